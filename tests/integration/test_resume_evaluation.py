"""An evaluation that ends in the middle of a cell, is killed, or is shared: the results stay."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluate
from distilllens.config import EvalConfig
from distilllens.data.benchmarks import load_benchmark
from distilllens.evaluation import protocol
from distilllens.evaluation.generation import Answer
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.evaluation.scoring import pool as scoring
from distilllens.models import load_model, load_tokenizer
from distilllens.runtime.lock import locked

PROJECT = Path(__file__).resolve().parents[2]
PROMPTS = 33
COUNTED = ("metrics", "set", "seed", "identity", "counts", "device", "dtype")
"""Of results.json: what may not depend on how often the evaluation was started."""


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Path]:
    """A working folder with a model, a set of 33 prompts, two of them too long, and its results."""
    root = tmp_path_factory.mktemp("place")
    tiny_gpt2(n_positions=256).save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    (root / "data/words").mkdir(parents=True)
    rng = random.Random(5)
    lines = []
    for number in range(PROMPTS):
        words = " ".join(rng.choices(["pear", "fig", "apple"], k=rng.randrange(1, 9)))
        record = {"instruction": f"Repeat {number}.", "input": words, "output": [words, "a b"]}
        if number in (4, 20):
            record["input"] = "long " * 200
        lines.append(json.dumps(record))
    (root / "data/words/valid.jsonl").write_text("\n".join(lines))
    before = Path.cwd()
    os.chdir(root)
    assert run("straight") == 0
    yield root
    os.chdir(before)


def flags(out: str, *more: str) -> list[str]:
    sets = ["--sets", "[words]", "--eval.seeds", "[10]", "--max_prompt_length", "200"]
    sizes = ["--eval.max_new_tokens", "8", "--eval.batch_size", "7"]
    return ["--checkpoint", "model", "--output_dir", out, *sets, *sizes, *more]


def run(out: str, *more: str) -> int:
    return evaluate.main(flags(out, *more))


def cell(out: str) -> Path:
    return Path(out, "seed10", "words")


def partial(out: str) -> list[Path]:
    return sorted(cell(out).glob("answers.partial.*.jsonl"))


def check_same(out: str, reference: str = "straight") -> None:
    """The files are those of an evaluation that was never stopped, and no others are there."""
    assert {path.name for path in cell(out).iterdir()} == {"results.json", "samples.jsonl"}
    assert (cell(out) / "samples.jsonl").read_bytes() == (
        cell(reference) / "samples.jsonl"
    ).read_bytes()
    found, wanted = (
        json.loads((cell(name) / "results.json").read_text()) for name in (out, reference)
    )
    assert {key: found[key] for key in COUNTED} == {key: wanted[key] for key in COUNTED}


def answer_then_stop(out: str, count: int, *more: str) -> None:
    """Ends the process's work in the middle of the cell, after ``count`` answers."""
    real, seen = protocol.PartialWriter.append, 0

    def append(self: Any, row: int, answer: Answer) -> None:
        nonlocal seen
        real(self, row, answer)
        seen += 1
        if seen == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol.PartialWriter, "append", append)
        assert run(out, *more) == 130


@pytest.mark.usefixtures("place")
def test_cut_prompts_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [json.loads(line) for line in (cell("straight") / "samples.jsonl").open()]
    assert [sample["index"] for sample in samples if sample["cut"]] == [4, 20]
    assert samples[4]["prompt"].endswith("long \n\n### Response:\n")
    assert " … " in samples[4]["prompt"] and "…" not in samples[5]["prompt"]
    assert run("straight", "--eval.long_prompts", "drop") == 2
    error = capsys.readouterr().err
    assert "eval.long_prompts: 'cut' there, 'drop' now" in error


@pytest.mark.usefixtures("place")
def test_a_stopped_cell_goes_on_after_its_last_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_then_stop("stopped", 9)
    answer_then_stop("stopped", 5, "--eval.batch_size", "3")
    assert not (cell("stopped") / "results.json").exists()
    lines = [json.loads(line) for line in partial("stopped")[0].open()]
    assert len({line["row"] for line in lines if "row" in line}) == 14
    assert "identity" in lines[0]
    capsys.readouterr()
    answered: list[int] = []
    real = protocol.generate_answers

    def watch(*args: Any, **options: Any) -> list[Answer]:
        answered.extend(options["indices"])
        return real(*args, **options)

    monkeypatch.setattr(protocol, "generate_answers", watch)
    monkeypatch.setattr(scoring, "MIN_PAIRS", 0)  # scored in another process, too
    assert run("stopped") == 0
    assert "14 answers of unfinished cells are there already" in capsys.readouterr().out
    assert len(answered) == PROMPTS - 14
    check_same("stopped")


@pytest.mark.usefixtures("place")
def test_torn_and_broken_lines_are_answered_again() -> None:
    answer_then_stop("whole", PROMPTS)  # killed between the last answer and the results
    (file,) = partial("whole")
    content = file.read_bytes()
    rng = random.Random(11)
    cuts = [0, 5, len(content) - 1, *(rng.randrange(len(content)) for _ in range(2))]
    for number, size in enumerate(cuts):
        folder = cell(f"torn{number}")
        folder.mkdir(parents=True)
        (folder / file.name).write_bytes(content[:size])
        assert run(f"torn{number}") == 0
        check_same(f"torn{number}")
    lines = content.splitlines(keepends=True)
    lines[3], lines[7] = b"\0" * 40 + b"\n", b'{"row": 6, "seconds": 1}\n'
    shares = [lines[:1] + lines[1 + rank :: 3] for rank in range(3)]  # of three ranks
    folder = cell("broken")
    folder.mkdir(parents=True)
    for rank, share in enumerate(shares):
        (folder / f"answers.partial.{rank}.jsonl").write_bytes(b"".join(share))
    assert run("broken") == 0
    check_same("broken")


@pytest.mark.usefixtures("place")
def test_answers_of_other_settings_are_refused_and_overwritten_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer_then_stop("other", 9, "--eval.temperature", "0.5")
    before = partial("other")[0].read_bytes()
    capsys.readouterr()
    assert run("other") == 2
    error = capsys.readouterr().err
    assert "answers.partial.0.jsonl belongs to another evaluation" in error
    assert "eval.temperature: 0.5 there, 1.0 now" in error
    assert partial("other")[0].read_bytes() == before
    assert run("other", "--overwrite") == 0
    check_same("other")


@pytest.mark.usefixtures("place")
def test_leftovers_of_a_kill_after_the_results_go() -> None:
    assert run("left") == 0
    (cell("left") / "answers.partial.0.jsonl").write_text("{}\n")
    (cell("left") / ".results.json-99").write_text("{")
    assert run("left") == 0
    check_same("left")


@pytest.mark.usefixtures("place")
def test_two_evaluations_of_one_folder_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    Path("busy").mkdir()
    with locked(Path("busy/evaluate.lock")):
        assert run("busy") == 2
    assert f"busy is in use by pid {os.getpid()}" in capsys.readouterr().err
    assert not cell("busy").exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("long_prompts", ["cut", "drop"])
def test_training_measures_what_the_evaluation_measures(long_prompts: Any) -> None:
    out = f"final-{long_prompts}"
    assert run(out, "--eval.long_prompts", long_prompts) == 0
    settings = EvalConfig(max_new_tokens=8, batch_size=4, long_prompts=long_prompts)
    metrics = evaluate_dev_generations(
        load_model("model"),
        load_tokenizer("model"),
        load_benchmark("words", data_dir="data"),
        settings=settings,
        seed=10,
        max_prompt_length=200,
    )
    assert metrics == json.loads((cell(out) / "results.json").read_text())["metrics"]
    assert metrics["num"] == (PROMPTS if long_prompts == "cut" else PROMPTS - 2)


# --- Processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twice_and_resumed(place: Path) -> None:
    rng = random.Random(time.time_ns())
    counts = sorted(rng.sample(range(1, PROMPTS // 2), 2))  # far enough from the end to be hit
    for count in counts:
        command = [sys.executable, "-m", "distilllens", "evaluate", *flags("killed")]
        process = subprocess.Popen(
            [*command, "--eval.batch_size", "1"],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.DEVNULL,
        )
        while sum(path.read_bytes().count(b'"row"') for path in partial("killed")) < count:
            assert process.poll() is None, f"it ended before it was killed, {counts}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (cell("killed") / "results.json").exists(), counts
    assert run("killed") == 0
    check_same("killed")


BATCHES = (1, 7, 32)


def join_as_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for batch in BATCHES:
        out = f"ranks{world_size}-{batch}"
        if rank == 0 and batch == 7:  # what another number of ranks left
            cell(out).mkdir(parents=True)
            os.link("five.jsonl", cell(out) / "answers.partial.8.jsonl")
        torch.distributed.barrier()
        assert run(out, "--eval.batch_size", str(batch)) == 0
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_and_batches_change_nothing(place: Path, world_size: int) -> None:
    if not Path("five.jsonl").exists():
        answer_then_stop("five", 5)
        partial("five")[0].rename("five.jsonl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        join_as_rank, args=(world_size, port, str(place)), nprocs=world_size
    )
    for batch in BATCHES:
        check_same(f"ranks{world_size}-{batch}")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("batch", [1, 32])
def test_batches_change_nothing(batch: int) -> None:
    assert run(f"batch{batch}", "--eval.batch_size", str(batch)) == 0
    check_same(f"batch{batch}")
