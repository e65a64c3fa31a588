"""evaluate.main on a tiny model and tiny sets: files, skipping, errors, several processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluate
from distilllens.config import EvalConfig
from distilllens.data.benchmarks import load_benchmark
from distilllens.evaluation import command
from distilllens.evaluation.cells.results import build_table, mean_and_sd
from distilllens.evaluation.generation import Answer
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.evaluation.scoring.pool import score
from distilllens.models import load_model, load_tokenizer

SETTINGS = ["--eval.max_new_tokens", "8", "--max_prompt_length", "200", "--eval.batch_size", "2"]


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working folder with a model in run/best and the sets colours and words."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2(n_positions=256).save_pretrained("run/best")
    tiny_tokenizer.save_pretrained("run/best")
    write_set("colours", [("Name a colour.", "", ["red", "Blue."]), ("Name two.", "", "red, blue")])
    words = [(f"Repeat {word}.", "once", word) for word in ("pear", "fig", "apple")]
    write_set("words", [*words, ("long " * 200, "", "too long a prompt")])
    return tmp_path


def write_set(name: str, rows: list[tuple[str, str, Any]]) -> None:
    folder = Path("data", name)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"instruction": instruction, "input": text, "output": output})
        for instruction, text, output in rows
    ]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*arguments: str, sets: str = "[colours, words]", seeds: str = "[10, 20]") -> int:
    options = ["--checkpoint", "run/best", "--output_dir", "out", *SETTINGS]
    return evaluate.main([*options, "--sets", sets, "--eval.seeds", seeds, *arguments])


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("out", path).read_text(encoding="utf-8"))
    return content


def read_samples(path: str) -> list[dict[str, Any]]:
    lines = Path("out", path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.usefixtures("place")
def test_results_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert "mean ± sd" in printed
    assert "mean of sets" in printed
    folders = sorted(str(path.parent) for path in Path("out").rglob("results.json"))
    assert folders == [f"out/seed{s}/{name}" for s in (10, 20) for name in ("colours", "words")]
    assert not list(Path("out").rglob(".*"))  # no temporary file is left

    result, samples = read("seed20/words/results.json"), read_samples("seed20/words/samples.jsonl")
    assert result["counts"]["records"] == 4
    assert result["counts"]["dropped_long_prompts"] == 0
    assert result["counts"]["cut_long_prompts"] == 1
    assert [sample["cut"] for sample in samples] == [False, False, False, True]
    assert result["counts"]["scored"] == len(samples) == result["metrics"]["num"] == 4
    assert (result["set"], result["seed"], result["name"]) == ("words", 20, "run")
    assert result["config"]["eval"]["max_new_tokens"] == 8
    assert {"torch", "transformers", "rouge-score"} <= set(result["versions"])
    assert "git_commit" in result
    mean = sum(sample["rougeL"] for sample in samples) / 4
    assert result["metrics"]["rougeL"] == pytest.approx(100 * mean)
    assert result["timing"]["seconds"] > 0
    assert result["counts"]["truncated"] == sum(sample["truncated"] for sample in samples)
    assert samples[0]["prompt"].endswith("Repeat pear.\n\n### Input:\nonce\n\n### Response:\n")
    assert samples[0]["references"] == ["pear"]
    assert read_samples("seed10/colours/samples.jsonl")[0]["references"] == ["red", "Blue."]
    assert read_samples("seed10/words/samples.jsonl") != samples  # another seed, other samples


@pytest.mark.usefixtures("place")
def test_finished_cells_are_skipped_and_only_missing_ones_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(seeds="[10]") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json*")}
    capsys.readouterr()
    assert run("--eval.batch_size", "1") == 0  # the batch size does not matter to the answers
    printed = capsys.readouterr().out
    assert "4 cells, 2 finished already, skipped" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read("seed20/words/results.json")["seed"] == 20

    whole = read_samples("seed20/words/samples.jsonl")
    assert run("--overwrite") == 0
    assert read_samples("seed20/words/samples.jsonl") == whole  # reproducible
    after = {path: path.stat().st_mtime_ns for path in before}
    assert all(after[path] > before[path] for path in before)


@pytest.mark.usefixtures("place")
def test_results_of_another_evaluation_are_not_reused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(sets="[colours]") == 0
    capsys.readouterr()
    assert run("--eval.temperature", "0.5", sets="[colours]") == 2
    error = capsys.readouterr().err
    assert "belongs to another evaluation" in error
    assert "eval.temperature: 1.0 there, 0.5 now" in error
    assert "--overwrite" in error

    write_set("colours", [("Name a colour.", "", "green")])
    assert run(sets="[colours]") == 2
    assert "records: " in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_retrained_weights_are_noticed_and_a_copied_folder_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(sets="[colours]", seeds="[10]") == 0
    shutil.copytree("run/best", "copy/best")
    assert run("--checkpoint", "copy/best", sets="[colours]", seeds="[10]") == 0
    file = "copy/best/model.safetensors"
    weights = load_file(file)
    weights["transformer.h.1.mlp.c_fc.weight"] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert run("--checkpoint", "copy/best", sets="[colours]", seeds="[10]") == 2
    assert "weights and tokenizer: " in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_half_a_results_file_is_an_error_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("out/seed10/colours")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metr')
    assert run(sets="[colours]", seeds="[10]") == 2
    assert "results.json cannot be read" in capsys.readouterr().err
    assert run("--overwrite", sets="[colours]", seeds="[10]") == 0


@pytest.mark.usefixtures("place")
def test_dry_run_tells_counts_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry_run") == 0
    printed = capsys.readouterr().out
    assert "4 cells" in printed
    row = next(line for line in printed.splitlines() if "words" in line)
    assert [part for part in row.split() if part.isdigit()][:3] == ["4", "0", "1"]
    assert not Path("out").exists()
    assert run("--dry_run", "--eval.long_prompts", "drop") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "words" in line)
    assert [part for part in row.split() if part.isdigit()][:3] == ["3", "1", "0"]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--checkpoint", "checkpoints/none"], 2, "checkpoints/none"),
        (["--sets", "[colors]"], 3, "colours, words"),
        (["--sets", "[../data]"], 2, "no plain name"),
        (["--sets", "[words, words]"], 2, "names a set twice"),
        (["--limit", "0"], 2, "limit=0"),
        (["--max_prompt_length", "3"], 2, "max_prompt_length=3 leaves no room"),
        (
            ["--max_prompt_length", "3", "--eval.long_prompts", "drop"],
            3,
            "none of 2 prompts is within max_prompt_length=3",
        ),
        (["--limit", "some"], 2, "limit"),
        (["--score_workers", "-1"], 2, "score_workers=-1 must be ≥ 0"),
        (["--eval.max_new_tokens", "250"], 2, "context window 256"),
        (["--eval.temprature", "1"], 2, "did you mean --eval.temperature"),
        (["--output_dir", "run/best/config.json/out"], 6, "cannot write"),
    ],
)
def test_errors_for_users(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(*arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error[DL-")
    assert len(error.strip().splitlines()) <= 4
    assert "Traceback" not in error


@pytest.mark.usefixtures("place")
def test_a_broken_record_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("data/words/valid.jsonl").open("a") as stream:
        stream.write('{"instruction": \n')
    assert run() == 3
    assert "data/words/valid.jsonl:5: invalid JSON" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("place")
def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--limit", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err

    def fail(_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(command, "evaluate_checkpoint", fail)
    assert run() == 1
    error = capsys.readouterr().err
    assert "error[DL-BUG]: KeyError: 'a bug'" in error
    assert "Traceback" not in error
    assert run("--debug", "false") == 1
    assert run("--limit", "0", "--debug", "false") == 2  # known before the options are parsed
    assert "Traceback" not in capsys.readouterr().err
    Path("debug.yaml").write_text("debug: true\n")
    assert run("--config", "debug.yaml") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("value", "advice"), [("true", "without --overwrite "), ("false", "")])
def test_only_an_overwriting_command_is_not_repeated(
    value: str, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_checkpoint", stop)
    assert run("--overwrite", value) == 130
    assert f"the same command {advice}goes on" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("yaml", "name"),
    [
        ("objective: {approach: distill_lens, divergence: rkl}", "distill_lens/rkl"),
        ("objective: {approach: sft, divergence: rkl}", "sft"),
        ("objective: {approach: seqkd, divergence: rkl}", "seqkd"),
        ("run: {name: mine}\nobjective: {approach: kd, divergence: fkl}", "mine"),
        ("something: else", "run"),
    ],
)
def test_the_training_run_names_the_method(yaml: str, name: str) -> None:
    Path("run/config.yaml").write_text(yaml)
    assert run("--limit", "1", sets="[colours]", seeds="[10]") == 0
    assert read("seed10/colours/results.json")["name"] == name
    assert run("--overwrite", "--name", "given", sets="[colours]", seeds="[10]") == 0
    assert read("seed10/colours/results.json")["name"] == "given"


def test_scores_take_the_best_reference(place: Path) -> None:
    records = load_benchmark("colours", data_dir=place / "data")
    answers = [
        Answer(text="blue!", num_tokens=2, truncated=False),
        Answer(text="red", num_tokens=1, truncated=True),
    ]
    expected = {
        "rougeL": pytest.approx(100 * (1 + 2 / 3) / 2),
        "exact_match": 50.0,
        "num": 2,
        "truncated": 1,
        "mean_tokens": 1.5,
        "empty": 0,
    }
    assert {name: score(answers, records)[name] for name in expected} == expected
    with pytest.raises(ValueError, match="no samples"):
        score([], [])


def test_mean_and_sd() -> None:
    assert mean_and_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))
    assert mean_and_sd([3.0]) == (3.0, None)


def test_table_row_of_means_is_seed_by_seed() -> None:
    scores = {("a", 1): 10.0, ("a", 2): 20.0, ("b", 1): 30.0, ("b", 2): 20.0}
    results = [
        {"set": name, "seed": seed, "metrics": {"rougeL": value}}
        for (name, seed), value in scores.items()
    ]
    table = build_table(results, title="x")
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "b", "mean of sets"]
    assert columns[1] == ["10.00", "30.00", "20.00"]
    assert columns[-1] == ["15.00 ± 7.07", "25.00 ± 7.07", "20.00 ± 0.00"]


def join_as_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes: the command line, then the evaluation inside training."""
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    assert run("--output_dir", "out2") == 0
    torch.distributed.init_process_group("gloo")
    metrics = dev_metrics(rank=rank, world_size=2)
    Path(f"metrics{rank}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


def dev_metrics(*, rank: int, world_size: int) -> dict[str, float]:
    return evaluate_dev_generations(
        load_model("run/best"),
        load_tokenizer("run/best"),
        load_benchmark("words", data_dir="data"),
        settings=EvalConfig(max_new_tokens=8, batch_size=2),
        seed=10,
        max_prompt_length=200,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(place: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(join_as_rank, args=(port, str(place)), nprocs=2)
    assert run() == 0
    files = sorted(path.relative_to("out") for path in Path("out").rglob("samples.jsonl"))
    assert len(files) == 4
    for file in files:
        assert Path("out2", file).read_text() == Path("out", file).read_text()
    alone = dev_metrics(rank=0, world_size=1)
    for rank in range(2):
        assert json.loads(Path(f"metrics{rank}.json").read_text()) == alone
