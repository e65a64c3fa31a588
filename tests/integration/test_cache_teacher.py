"""The command: what it writes, keeps and refuses, and that training gets the teacher's own rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PROJECT, Workspace
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from distilllens.__main__ import main as command
from distilllens.commands import cache_teacher
from distilllens.config import load_config
from distilllens.data.collate import collate
from distilllens.data.tokenize import PreparedData
from distilllens.errors import ConfigError
from distilllens.objective import Rows
from distilllens.runtime import distributed
from distilllens.teacher import cache as teacher_cache
from distilllens.teacher.cache import CachedTeacher, open_teacher_cache, read_manifest
from distilllens.training.setup import Plan, build_module, load_data, plan_run, run_teacher

SMALL_SHARDS = 40_000
"""Bytes; some ten shards of the toy records in float32."""
CPU = torch.device("cpu")


class Opened(NamedTuple):
    """What a training would have at its start."""

    plan: Plan
    data: PreparedData
    cache: CachedTeacher


def run_command(flags: list[str]) -> int:
    return command(["cache-teacher", *flags])


def cache_flags(place: Workspace, *more: str) -> list[str]:
    folder = ("--model.teacher_cache", f"{place.root}/cache", "--model.teacher_cache_bits", "32")
    return place.flags(*folder, *more)


def open_cache(flags: list[str]) -> Opened:
    config = load_config(flags)
    plan = plan_run(config)
    data = load_data(plan)
    assert plan.teacher_config is not None
    cache = open_teacher_cache(
        config,
        teacher_config=plan.teacher_config,
        teacher_dtype=plan.teacher_dtype,
        teacher_layers=[pair.teacher for pair in plan.objective.pairs],
        data=data,
    )
    return Opened(plan, data, cache)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and time of change of each file."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", SMALL_SHARDS)


# --- What training gets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "bits", "tolerance"),
    [("fp32", "32", 1e-6), ("bf16", "16", 1e-2), ("bf16", "32", 1e-2), ("fp32", "16", 2e-3)],
)
def test_the_loss_of_cached_rows_is_that_of_the_teacher(
    precision: str, bits: str, tolerance: float, workspace: Workspace, small_shards: None
) -> None:
    deepspeed = ("--deepspeed", workspace.deepspeed(1, precision))
    flags = cache_flags(workspace, *deepspeed, "--model.teacher_cache_bits", bits)
    assert run_command(flags) == 0
    plan, data, cache = open_cache(flags)
    teacher = run_teacher(plan, data, CPU)
    module = build_module(plan, data, CPU, teacher.unembedding())
    members = [17, 3, 44, 20, 8]
    batch = collate([data.train[member] for member in members], pad_id=0)

    def losses(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad()
        loss, sums = module(batch.input_ids_BT, batch.rows_N, batch.targets_N, rows)
        loss.backward()
        grads = [p.grad.float().flatten() for p in module.parameters() if p.grad is not None]
        return sums.double(), torch.cat(grads)

    expected, expected_grad = losses(teacher.rows(batch.input_ids_BT, batch.rows_N))
    module.teacher_unembedding = cache.unembedding()
    actual, grad = losses(cache.rows(members))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)
    assert (grad - expected_grad).norm() <= 5 * tolerance * expected_grad.norm()
    online = teacher.rows(batch.input_ids_BT, batch.rows_N)
    wrong = Rows(online.final.roll(1, 0), [rows.roll(1, 0) for rows in online.layers])
    assert not torch.allclose(losses(wrong)[0], expected, rtol=tolerance, atol=1e-5)


def test_8_bits_are_told_with_their_error(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = cache_flags(workspace, "--model.teacher_cache_bits", "8")
    assert run_command(flags) == 0
    told = " ".join(capsys.readouterr().out.split())
    manifest = read_manifest(workspace.root / "cache")
    assert manifest is not None
    for name in ("final", "L02", "L04"):
        error = manifest["relative_error"][name]
        assert 0.005 < error < 0.05
        assert f"{name} {error:.2%}" in told
    rows = manifest["rows"]
    assert f"{rows:,} response tokens × 150 bytes" in told  # 3 layers × (48 + 2 of the scale)
    assert "in 1 shards, 0 there already" in told and "response tokens/s" in told
    stored = (workspace.root / "cache/rows-00000.safetensors").stat().st_size
    assert 0 <= stored - 150 * rows < 2000


def test_a_merged_adapter_is_in_the_rows(workspace: Workspace) -> None:
    teacher: Any = GPT2LMHeadModel.from_pretrained(workspace.root / "teacher")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    adapted: Any = get_peft_model(teacher, lora)
    adapted.save_pretrained(workspace.root / "adapter")
    flags = cache_flags(workspace, "--model.teacher_lora", f"{workspace.root}/adapter")
    assert run_command(flags) == 0
    _, data, cache = open_cache(flags)
    sample = data.train[7]
    ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
    start = len(sample["prompt_ids"]) - 1
    with torch.no_grad():
        expected = adapted(ids).logits[0, start:-1]
    actual = cache.rows([7]).final @ cache.unembedding().head_VD.T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_padded_teacher_vocabulary_is_stored_whole(
    workspace: Workspace, tiny_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    tiny_gpt2(vocab=320, n_layer=6, n_embd=48, n_head=2, seed=1).save_pretrained(
        workspace.root / "teacher"
    )
    assert run_command(cache_flags(workspace)) == 0
    opened = open_cache(cache_flags(workspace))
    assert opened.plan.vocab_size == 300
    assert opened.cache.unembedding().head_VD.shape == (320, 48)


def test_responses_cut_at_the_length_have_their_rows(workspace: Workspace) -> None:
    lengths = ("--data.max_length", "100", "--data.max_prompt_length", "95")
    assert run_command(cache_flags(workspace, *lengths)) == 0
    _, data, cache = open_cache(cache_flags(workspace, *lengths))
    assert data.stats["train"]["cut_responses"] > 0
    counts = [len(cache.rows([record]).final) for record in range(len(data.train))]
    assert counts == [len(record["response_ids"]) for record in data.train]


def test_a_cache_of_more_serves_fewer(
    workspace: Workspace, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer records, fewer layers, another student's layers, seeds, batches and objective."""
    assert run_command(cache_flags(workspace)) == 0
    before = files(workspace.root / "cache")
    more = (
        *("--data.train_size", "11", "--run.seed", "3", "--optim.micro_batch_size", "2"),
        *("--objective.approach", "kd", "--objective.divergence", "fkl"),
        *("--objective.temperature", "2", "--data.group_by_length", "false"),
    )
    assert run_command(cache_flags(workspace, *more)) == 0
    assert "all is there already" in " ".join(capsys.readouterr().out.split())
    assert files(workspace.root / "cache") == before
    full, fewer = open_cache(cache_flags(workspace)), open_cache(cache_flags(workspace, *more))
    assert len(fewer.data.train) == 11
    assert torch.equal(full.cache.rows([10, 2]).final, fewer.cache.rows([10, 2]).final)
    assert fewer.cache.rows([10, 2]).layers == []


# --- Going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("leftovers", [False, True])
def test_only_what_is_missing_is_made_again(
    workspace: Workspace, small_shards: None, leftovers: bool
) -> None:
    folder = workspace.root / "cache"
    assert run_command(cache_flags(workspace)) == 0
    before, bytes_before = files(folder), contents(folder)
    assert len(before) > 6
    (folder / "rows-00001.safetensors").unlink()
    if leftovers:  # as a killed run leaves them
        (folder / ".rows-00001.safetensors.tmp").write_bytes(b"half a shard")
        (folder / "manifest.json").unlink()
        with pytest.raises(ConfigError, match="is not finished"):
            open_cache(cache_flags(workspace))
    assert run_command(cache_flags(workspace)) == 0
    after = files(folder)
    assert contents(folder) == bytes_before and after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"rows-00001.safetensors", "head.safetensors", "manifest.json"}


def test_a_stopped_run_says_what_is_kept_and_goes_on(
    workspace: Workspace,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, flags = workspace.root / "cache", cache_flags(workspace)
    write = cache_teacher.write_shard

    def write_and_stop(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        if (folder / "rows-00001.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(cache_teacher, "write_shard", write_and_stop)
        assert run_command(flags) == 143
    told = capsys.readouterr().err
    assert "SIGTERM: the finished shards are kept" in told
    assert "go on with: python -m distilllens cache-teacher --model.student" in told
    kept = files(folder)
    assert kept.keys() == {"rows-00000.safetensors", "rows-00001.safetensors"}
    assert run_command(flags) == 0
    assert "2 there already" in " ".join(capsys.readouterr().out.split())
    assert files(folder).items() >= kept.items()
    stopped = contents(folder)
    shutil.rmtree(folder)
    assert run_command(flags) == 0
    assert contents(folder) == stopped


def test_more_records_are_added(
    workspace: Workspace, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are, no manifest promises what the shards no longer hold."""
    folder = workspace.root / "cache"
    assert run_command(cache_flags(workspace, "--data.train_size", "20")) == 0
    before = files(folder)
    with pytest.raises(ConfigError, match="holds 20 records, this run has 48"):
        open_cache(cache_flags(workspace))
    write, promises = cache_teacher.write_shard, []

    def write_and_look(*arguments: Any, **more: Any) -> None:
        promises.append((folder / "manifest.json").exists())
        write(*arguments, **more)

    monkeypatch.setattr(cache_teacher, "write_shard", write_and_look)
    assert run_command(cache_flags(workspace)) == 0
    assert promises and not any(promises)
    after, made = files(folder), contents(folder)
    assert after["rows-00000.safetensors"] == before["rows-00000.safetensors"]
    shutil.rmtree(folder)
    assert run_command(cache_flags(workspace)) == 0
    assert contents(folder) == made


def test_two_processes_write_the_same_bytes(workspace: Workspace, small_shards: None) -> None:
    worker = workspace.root / "worker.py"
    worker.write_text(
        "import os, sys\nfrom distilllens.commands import cache_teacher\n"
        f"cache_teacher.SHARD_BYTES = {SMALL_SHARDS}\n"
        "write = cache_teacher.write_shard\n"
        "def tell_and_write(folder, shard, *arguments, **more):\n"
        "    print(f'\\nprocess {os.environ[\"RANK\"]} wrote {shard.number}\\n', flush=True)\n"
        "    write(folder, shard, *arguments, **more)\n"
        "cache_teacher.write_shard = tell_and_write\n"
        "from distilllens.__main__ import main\nsys.exit(main(['cache-teacher', *sys.argv[1:]]))\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(
        [sys.executable, *command, *cache_flags(workspace)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done, ") == 1  # one of them speaks
    wrote = [line.split() for line in done.stdout.splitlines() if " wrote " in line]
    assert sorted((int(number), int(rank)) for _, rank, _, number in wrote) == [
        (number, number % 2) for number in range(len(wrote))
    ]
    folder = workspace.root / "cache"
    made, manifest = contents(folder), read_manifest(folder)
    assert len(made) == len(wrote) + 1
    shutil.rmtree(folder)
    assert run_command(cache_flags(workspace)) == 0
    assert contents(folder) == made and read_manifest(folder) == manifest


# --- What is refused ----------------------------------------------------------------------------


def other_teacher(place: Workspace) -> None:
    path = place.root / "teacher/model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.bias"][3] += 0.5
    save_file(weights, path, {"format": "pt"})


def an_adapter(place: Workspace) -> None:
    teacher: Any = AutoModelForCausalLM.from_pretrained(place.root / "teacher")
    adapted: Any = get_peft_model(teacher, LoraConfig(r=2, target_modules=["c_attn"]))
    adapted.save_pretrained(place.root / "adapter")


def padded_teacher(place: Workspace) -> None:
    teacher: Any = AutoModelForCausalLM.from_pretrained(place.root / "teacher")
    teacher.resize_token_embeddings(304)
    teacher.save_pretrained(place.root / "teacher")


def other_record(place: Workspace) -> None:
    path = place.root / "data/toy/raw.jsonl"
    path.write_text(path.read_text().replace("cat", "cow"))


def older_format(place: Workspace) -> None:
    path = place.root / "cache/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["key"]["format_version"] = 0
    path.write_text(json.dumps(manifest))


LENS = "--objective.lens"


@pytest.mark.parametrize(
    ("parts", "change", "flags"),
    [
        ({"teacher"}, other_teacher, ()),
        ({"teacher_lora"}, an_adapter, ("--model.teacher_lora", "ROOT/adapter")),
        ({"teacher_dtype"}, None, ("--model.teacher_dtype", "bfloat16")),
        ({"teacher_quantization"}, None, ("--model.teacher_quantization", "8bit")),
        (
            {"teacher_layers"},
            None,
            (f"{LENS}.teacher_layers", "[2, 5]", f"{LENS}.student_layers", "[1, 2]"),
        ),
        ({"lens_norm"}, None, (f"{LENS}.norm", "none")),
        ({"teacher", "vocab_size"}, padded_teacher, ()),
        ({"data"}, other_record, ()),
        ({"data"}, None, ("--data.max_length", "128", "--data.max_prompt_length", "100")),
        ({"bits"}, None, ("--model.teacher_cache_bits", "16")),
        ({"format_version"}, older_format, ()),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(
    parts: set[str],
    change: Callable[[Workspace], None] | None,
    flags: tuple[str, ...],
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both by a training and by the command, which keeps all of it."""
    assert run_command(cache_flags(workspace)) == 0
    if change is not None:
        change(workspace)
    before = files(workspace.root / "cache")
    arguments = cache_flags(
        workspace, *(flag.replace("ROOT", str(workspace.root)) for flag in flags)
    )
    with pytest.raises(ConfigError, match="was made with") as caught:
        open_cache(arguments)
    named = {part.split()[0] for part in caught.value.what.partition("made with ")[2].split("; ")}
    assert named == parts
    assert run_command(arguments) == 2
    assert caught.value.what in capsys.readouterr().err
    assert files(workspace.root / "cache") == before


def test_processes_of_their_own_records_cannot_share_a_teacher(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher in parts is gathered by all together, and each would wait for the others."""
    flags = cache_flags(workspace, "--model.teacher_placement", "sharded")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        assert run_command(flags) == 2
    assert "needs model.teacher_placement=device, not sharded" in capsys.readouterr().err
    assert run_command(flags) == 0


def test_shards_of_something_else_are_refused_before_there_is_a_manifest(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cache_flags(workspace)) == 0
    (workspace.root / "cache/manifest.json").unlink()
    other_teacher(workspace)
    assert run_command(cache_flags(workspace)) == 2
    assert "was made with teacher " in capsys.readouterr().err


def test_weights_that_did_not_change_are_not_read_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(cache_flags(workspace)) == 0
    weights = workspace.root / "teacher/model.safetensors"
    read: list[str] = []
    digest = teacher_cache.file_sha256

    def digest_and_count(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(teacher_cache, "file_sha256", digest_and_count)
    open_cache(cache_flags(workspace))
    assert read == []
    weights.touch()
    open_cache(cache_flags(workspace))  # read again, and the same
    assert read == ["model.safetensors"]


def test_a_full_disk_is_refused_before_the_work(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 0

    def usage(_: object) -> Any:
        return shutil._ntuple_diskusage(10**12, 0, needed)

    monkeypatch.setattr(cache_teacher.shutil, "disk_usage", usage)
    assert run_command(cache_flags(workspace)) == 6
    told = capsys.readouterr().err
    assert "error[DL-STORAGE]" in told and "0 bytes are free" in told
    assert not (workspace.root / "cache").exists()
    data = load_data(plan_run(load_config(cache_flags(workspace))))
    rows = sum(len(response) for response in data.train["response_ids"])
    needed = (rows * 3 * 48 * 4 + 300 * 48 * 4) * 105 // 100 - 1
    assert run_command(cache_flags(workspace)) == 6
    needed += 2
    assert run_command(cache_flags(workspace)) == 0


def test_a_disk_that_fills_up_keeps_what_is_finished(
    workspace: Workspace,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save_until_full(tensors: Any, path: Path, metadata: Any) -> None:
        if "00002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(cache_teacher, "save_file", save_until_full)
    assert run_command(cache_flags(workspace)) == 6
    told = capsys.readouterr().err
    assert "rows-00002.safetensors" in told and "No space left" in told and "kept: " in told
    kept = files(workspace.root / "cache")
    assert kept.keys() == {"rows-00000.safetensors", "rows-00001.safetensors"}
    monkeypatch.undo()
    monkeypatch.setattr(cache_teacher, "SHARD_BYTES", SMALL_SHARDS)
    assert run_command(cache_flags(workspace)) == 0
    assert files(workspace.root / "cache").items() >= kept.items()


def test_rows_that_are_not_finite_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of = cache_teacher.Teacher.rows

    def overflow(self: Any, *arguments: Any) -> Rows:
        rows = rows_of(self, *arguments)
        rows.layers[0][0, 0] = float("inf")
        return rows

    monkeypatch.setattr(cache_teacher.Teacher, "rows", overflow)
    assert run_command(cache_flags(workspace)) == 5
    assert "hidden rows are not all finite" in capsys.readouterr().err
    assert files(workspace.root / "cache") == {}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model.teacher_cache", "null"), "needs --model.teacher_cache"),
        (("--objective.approach", "sft"), "nothing to cache"),
        (("--objective.kd_ratio", "0"), "nothing to cache"),
        (("--model.teacher_cache", "ROOT/tokens"), "holds other things than a teacher cache"),
        (("--model.teacher_cache", "ROOT/student/config.json"), "it is a file"),
        (("--model.teacher", "ROOT/gone"), "ROOT/gone not found"),
    ],
)
def test_wrong_options(
    flags: tuple[str, ...],
    told: str,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = str(workspace.root)
    arguments = cache_flags(workspace, *(flag.replace("ROOT", root) for flag in flags))
    assert run_command(arguments) == 2
    assert told.replace("ROOT", root) in capsys.readouterr().err
    assert not (workspace.root / "cache").exists()


def test_a_manifest_of_something_else_is_refused(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace.root / "cache").mkdir()
    for content in ("{", "[]", '{"source": 1}'):
        (workspace.root / "cache/manifest.json").write_text(content)
        assert run_command(cache_flags(workspace)) == 2
        assert "is not of a teacher cache" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named_with_the_command(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="cache is not there") as caught:
        open_cache(cache_flags(workspace))
    assert "python -m distilllens cache-teacher" in caught.value.fix


def test_a_dry_run_writes_nothing(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*cache_flags(workspace), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "dry run: nothing was written" in told and "0 there already" in told
    assert not (workspace.root / "cache").exists()
