"""What a sweep makes of the folders it finds: their files are written here, nothing is started."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilllens.config import EvaluateConfig, dump_config
from distilllens.errors import ConfigError
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint, identity
from distilllens.sweep.cells import Cell, build_cells, evaluate_config
from distilllens.sweep.results import MethodResult, choose_runs, read_results
from distilllens.sweep.scores import check_scores, is_scored
from distilllens.sweep.spec import Sweep, read_sweep
from distilllens.sweep.stored import check_stored
from distilllens.sweep.table import SweepTable

BATCH = {"optim.micro_batch_size": 4, "optim.accumulation": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/dolly").mkdir(parents=True)
    (tmp_path / "data/dolly/raw.jsonl").write_text("records\n")
    return tmp_path


def sweep_of(**content: Any) -> Sweep:
    """Returns a sweep of two methods on a global batch of 8; ``set`` is merged in."""
    flags = {"objective.approach": "sft", "optim.max_steps": 4, **BATCH, **content.pop("set", {})}
    small = {
        "methods": {"a": {}, "b": {"set": {"objective.kd_ratio": 0.5}}},
        "seeds": [10],
        "set": flags,
    }
    Path("toy.yaml").write_text(yaml.safe_dump(small | content, sort_keys=False))
    return read_sweep(Path("toy.yaml"))


def train(
    cell: Cell,
    *,
    processes: int = 1,
    state: str = "finished",
    metric: float | None = 1.0,
    step: int = 4,
) -> None:
    """Writes what a training leaves, on the records that are there now."""
    root = cell.folder.root
    (root / "best").mkdir(parents=True)
    (root / "best/config.json").write_text(cell.label)
    digest = hashlib.sha256(Path("data/dolly/raw.jsonl").read_bytes()).hexdigest()
    (root / "config.yaml").write_text(dump_config(cell.config))
    content = {
        "environment.json": {"machine": {"world_size": processes}},
        "data.json": {"fingerprint": digest[::-1], "source": {"raw_sha256": digest}},
        "status.json": {"state": state, "best_metric": metric, "best_step": step},
        "metrics.jsonl": {"step": step, "train/loss": 1.0},
    }
    for name, record in content.items():
        (root / name).write_text(json.dumps(record) + "\n")
    if state != "finished":
        (root / f"state/step-{step}").mkdir(parents=True)
        (root / f"state/step-{step}/manifest.json").write_text("{}")


def table_of(sweep: Sweep) -> SweepTable:
    return SweepTable(sweep, read_results(sweep, choose_runs(sweep)))


def budget_notes(sweep: Sweep) -> list[str]:
    return [
        note for note in table_of(sweep).notes() if "equal budget" in note or "are equal" in note
    ]


# --- The budget ---------------------------------------------------------------------------------


def test_another_number_of_processes_is_another_global_batch() -> None:
    sweep = sweep_of()
    train(build_cells(sweep)[0])
    two = dataclasses.replace(sweep, processes=2)
    with pytest.raises(ConfigError, match=r"1 of 2 cells .*a/seed10: global batch 8 → 16") as told:
        check_stored(two, build_cells(two))
    assert "optim.accumulation for the same global batch" in str(told.value.fix)
    # The same number of records in a step is the same budget, however they are shared out.
    for micro, accumulation, processes in ((4, 1, 2), (2, 2, 2), (8, 1, 1), (2, 1, 4)):
        own = {"optim.micro_batch_size": micro, "optim.accumulation": accumulation}
        same = sweep_of(set=own, processes=processes)
        check_stored(same, build_cells(same))
    train(build_cells(sweep_of(set={"optim.accumulation": 1}))[1], processes=2)
    assert budget_notes(sweep) == [
        "4 optimizer steps on data/dolly. All options of data, optim and eval are equal."
    ]


def test_the_table_tells_of_another_global_batch_of_any_seed() -> None:
    sweep = sweep_of(seeds=[10, 20])
    for cell, processes in zip(build_cells(sweep), (1, 1, 1, 2), strict=True):
        train(cell, processes=processes)
    table = table_of(sweep)
    assert budget_notes(sweep) == ["† not an equal budget: global batch 8, but b 8 or 16."]
    assert [table.is_unequal(method) for method in "ab"] == [False, True]
    assert json.loads(table.json())["unequal"] == {"global batch": {"a": 8, "b": [8, 16]}}


def test_a_stopped_training_keeps_its_share_where_it_keeps_its_processes() -> None:
    train(build_cells(sweep_of())[1], state="stopped")
    other = sweep_of(set={"optim.micro_batch_size": 8, "optim.accumulation": 1})
    with pytest.raises(ConfigError, match=r"b/seed10: optim\.micro_batch_size 4 → 8, optim\.acc"):
        check_stored(other, build_cells(other))
    more = sweep_of(set={"optim.accumulation": 1}, processes=2)
    check_stored(more, build_cells(more))


def test_records_that_were_made_anew_are_other_records() -> None:
    sweep = sweep_of()
    cells = build_cells(sweep)
    train(cells[0])
    Path("data/dolly/raw.jsonl").write_text("others\n")
    with pytest.raises(ConfigError, match=r"a/seed10: content of the records: data/dolly/raw\.js"):
        check_stored(sweep, cells)
    check_stored(sweep, cells[:1])  # with nothing left to train, nobody reads them any more
    train(cells[1])
    with pytest.raises(ConfigError, match=r"2 of 2 cells .*content of the records \w{8}, not the"):
        check_stored(sweep, cells)
    assert table_of(sweep).is_unequal("b")
    (note,) = budget_notes(sweep)
    assert note.startswith("† not an equal budget: content of the records")


def test_generated_answers_that_were_made_anew_are_told() -> None:
    methods = {"a": {}, "b": {"set": {"data.generated": "answers"}}}
    sweep = sweep_of(methods=methods, seeds=[10, 20], allow_unequal=["data.generated"])
    first, answered, *_ = cells = build_cells(sweep)
    train(first)
    train(answered)
    file = answered.folder.data
    content = json.loads(file.read_text())
    content["fingerprint"] = "with answers"
    content["source"]["generated_sha256"] = hashlib.sha256(b"answers\n").hexdigest()
    file.write_text(json.dumps(content))
    Path("answers").mkdir()
    Path("answers/raw.jsonl").write_text("answers\n")
    check_stored(sweep, cells)  # other options have other records
    Path("answers/raw.jsonl").write_text("others\n")
    with pytest.raises(ConfigError, match=r"1 of 4 cells .*b/seed10: .*answers/raw\.jsonl changed"):
        check_stored(sweep, cells)


def test_before_the_baseline_is_there_equal_methods_are_not_marked() -> None:
    methods = {name: {"set": own} for name, own in (
        ("a", {}), ("b", {"optim.lr": 0.5}), ("c", {"optim.lr": 0.5}))}  # fmt: skip
    sweep = sweep_of(methods=methods, baseline="c", allow_unequal=["optim.lr"])
    for cell in build_cells(sweep)[:2]:
        train(cell)
    table = table_of(sweep)
    assert not any(table.is_unequal(method) for method in methods)
    assert budget_notes(sweep) == ["not an equal budget: optim.lr a 0.0002, b 0.5."]
    train(build_cells(sweep)[2])
    assert [table_of(sweep).is_unequal(method) for method in methods] == [True, False, False]
    assert budget_notes(sweep) == ["† not an equal budget: optim.lr 0.5, but a 0.0002."]


def test_a_grid_of_one_needs_no_dev_set() -> None:
    sweep = sweep_of(lr=[1e-3])
    for cell in build_cells(sweep):
        train(cell, metric=None)
    assert {name: len(choice.runs) for name, choice in choose_runs(sweep).items()} == {
        "a": 1, "b": 1
    }  # fmt: skip


# --- The scores ---------------------------------------------------------------------------------


def scored(**flags: Any) -> tuple[Sweep, list[Cell]]:
    """Returns a sweep of a finished training of each method, with an evaluation."""
    sweep = with_evaluation(**flags)
    cells = build_cells(sweep)
    for cell in cells:
        train(cell)
    return sweep, cells


def with_evaluation(**flags: Any) -> Sweep:
    return sweep_of(evaluate={"set": {"sets": ["toy"], "eval.seeds": [1, 2], "limit": 9} | flags})


def config_of(sweep: Sweep, cell: Cell) -> EvaluateConfig:
    return evaluate_config(sweep, cell.method, cell.lr, cell.seed)


def score(config: EvaluateConfig, rouge: float, *, size: int = 240, records: str = "one") -> None:
    """Writes what evaluate.py leaves of a set with ``size`` records."""
    weights = checkpoint_fingerprint(config.checkpoint)
    known = identity(config, checkpoint=weights, records=[]) | {"records": records}
    num = min(size, config.limit) if isinstance(config.limit, int) else size
    for seed in config.eval.seeds:
        result = {
            "metrics": {"rougeL": rouge, "exact_match": 0.0, "num": num},
            "set": "toy",
            "seed": seed,
            "name": config.name,
            "identity": known,
            "counts": {"records": num},
            "config": dataclasses.asdict(config),
        }
        file = Path(config.output_dir) / f"seed{seed}/toy/results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))


def results_of(sweep: Sweep) -> list[MethodResult]:
    return read_results(sweep, choose_runs(sweep))


def test_scores_of_another_evaluation_do_not_stand_beside_this_ones() -> None:
    few, cells = scored(limit=2)
    score(config_of(few, cells[0]), 9.0)
    more = with_evaluation(limit=20, **{"eval.temperature": 0.5, "eval.batch_size": 3})
    score(config_of(more, cells[1]), 25.0)
    a, b = results_of(more)
    assert a.scores == {} and b.scores == {"toy": {10: 25.0}}
    (note,) = a.notes
    assert "a seed 10: scored with other settings (eval.temperature: 1.0 there, 0.5 now; " in note
    assert "limit: 2 there, 20 now" in note and "--overwrite_scores" in note
    with pytest.raises(ConfigError, match=r"1 of 2 cells .*eval/a/seed10: eval\.temp") as told:
        check_scores(more, cells)
    assert "--overwrite_scores" in str(told.value.fix)
    assert [is_scored(config_of(more, cell)) for cell in cells] == [False, True]
    score(config_of(more, cells[0]), 25.0)
    check_scores(more, cells)
    assert table_of(more).differences["b"].mean == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "flags",
    [
        {"eval.batch_size": 3, "score_workers": 0, "data_dir": "./data"},
        {"eval.seeds": [2]},
        {"eval.long_prompts": "drop"},  # no prompt was too long
        {"eval.every": 5, "bad_lines": "skip"},
    ],
)
def test_what_changes_no_answer_leaves_scores_as_they_are(flags: dict[str, Any]) -> None:
    before, cells = scored()
    for cell in cells:
        score(config_of(before, cell), 7.0)
    after = with_evaluation(**flags)
    check_scores(after, cells)
    assert all(is_scored(config_of(after, cell)) for cell in cells)
    assert [result.scores for result in results_of(after)] == [{"toy": {10: 7.0}}] * 2


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        (9, 20, False),
        (20, 9, False),
        (9, "all", False),
        (500, "all", True),  # the set has 240
        ("all", 240, True),
        ("all", 239, False),
        (None, "all", True),
    ],
)
def test_a_limit_counts_where_it_gives_other_records(
    before: int | str | None, now: int | str | None, is_same: bool
) -> None:
    sweep, cells = scored(limit=before)
    score(config_of(sweep, cells[0]), 7.0)
    assert is_scored(config_of(with_evaluation(limit=now), cells[0])) == is_same


def test_missing_seeds_are_told_and_no_reason_to_refuse() -> None:
    sweep, cells = scored()
    score(config_of(sweep, cells[0]), 7.0)
    more = with_evaluation(**{"eval.seeds": [1, 2, 3]})
    check_scores(more, cells)
    assert results_of(more)[0].notes == ("a seed 10: scored in part only (2 of 3)",)
    assert not is_scored(config_of(more, cells[0]))


def test_other_weights_are_told_before_anything_starts() -> None:
    sweep, cells = scored()
    score(config_of(sweep, cells[0]), 7.0)
    (cells[0].folder.best / "config.json").write_text("others")
    with pytest.raises(ConfigError, match="other weights than results/sweeps/toy/a/seed10/best"):
        check_scores(sweep, cells)
    # A training that is under way may yet come to the same weights.
    (cells[0].folder.status).write_text('{"state": "stopped"}')
    check_scores(sweep, cells)


def test_scores_on_other_records_than_the_baselines_do_not_count() -> None:
    sweep, cells = scored()
    score(config_of(sweep, cells[0]), 7.0)
    score(config_of(sweep, cells[1]), 8.0, records="two")
    a, b = results_of(sweep)
    assert a.scores == {"toy": {10: 7.0}} and b.scores == {}
    assert b.notes[0].startswith("b seed 10: scored on other records of toy than the others; remov")
    assert results_of(dataclasses.replace(sweep, baseline="b"))[1].scores == {"toy": {10: 8.0}}


def test_a_measure_that_is_asked_for_later_is_still_to_do() -> None:
    sweep, cells = scored()
    plain = config_of(sweep, cells[0])
    score(plain, 7.0)
    asked = dataclasses.replace(plain, token_metrics=True)
    assert is_scored(plain) and not is_scored(asked)
    for seed in (1, 2):
        file = Path(plain.output_dir) / f"seed{seed}/toy/results.json"
        joined = {"measures": {"token_metrics": {"teacher": None, "metrics": ["nll"]}}}
        file.write_text(json.dumps(json.loads(file.read_text()) | joined))
    assert not is_scored(asked)  # its own file is not there
    measure = Path(plain.output_dir) / "token_metrics/toy.json"
    measure.parent.mkdir()
    for text, is_done in (("{", False), ('{"identity": {}}', True),
        ('{"identity": {"teacher": "another"}}', False)):  # fmt: skip
        measure.write_text(text)
        assert is_scored(asked) == is_done
    assert not is_scored(dataclasses.replace(plain, similarity="a/model"))
