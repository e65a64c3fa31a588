"""Groups of seeds, differing options, progress and time left, words in common."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distilllens.config import TrainConfig
from distilllens.report.html import Drawings
from distilllens.report.plots import curve_panels
from distilllens.report.runs.differences import compare_configurations
from distilllens.report.runs.groups import RunGroup, group_runs
from distilllens.report.runs.metrics_file import MetricsLine
from distilllens.report.runs.progress import Progress, progress_of, seconds_per_step, total_steps
from distilllens.report.runs.record import RunRecord
from distilllens.report.scores.samples import marked_words
from distilllens.report.watch import Watched, watch_runs


def run_of(
    *,
    name: str = "run",
    seed: int = 10,
    lr: float = 1e-3,
    lines: Sequence[MetricsLine] = (),
    status: Mapping[str, Any] | None = None,
    **optim: Any,
) -> RunRecord:
    base = TrainConfig()
    config = dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, name=name, seed=seed, output_dir=f"{name}/seed{seed}"),
        optim=dataclasses.replace(base.optim, lr=lr, **optim),
    )
    return RunRecord(
        folder=Path(f"/runs/{name}/lr{lr}/seed{seed}"),
        label=f"{name} (seed{seed})",
        config=config,
        lines=tuple(lines),
        environment={"git_commit": "c0ffee", "versions": {"torch": "2.13.0"}},
        data={"fingerprint": "f00d"},
        status=status or {},
        pairs=(),
    )


def test_seeds_of_one_configuration_are_a_group_among_many_runs() -> None:
    runs = [run_of(name=name, seed=seed) for seed in (10, 20, 30) for name in ("kd", "lens")]
    assert [group.label for group in group_runs(runs)] == [run.label for run in runs]  # six: few
    groups = group_runs([*runs, run_of(name="sft", seed=10)])
    assert [group.label for group in groups] == ["kd (3 seeds)", "lens (3 seeds)", "sft"]
    assert [run.config.run.seed for run in groups[0].runs] == [10, 20, 30]


def test_runs_of_one_name_with_other_options_are_no_seeds_of_each_other() -> None:
    runs = [run_of(seed=seed, lr=lr) for lr in (1e-3, 2e-3) for seed in (1, 2, 3, 4)]
    groups = group_runs(runs)
    assert [len(group.runs) for group in groups] == [4, 4]
    assert len({group.label for group in groups}) == 2


def test_only_options_that_differ_are_in_the_table() -> None:
    one = run_of(name="a", lr=1e-3)
    other = dataclasses.replace(run_of(name="b", lr=2e-3), environment={"git_commit": "beef"})
    found = compare_configurations([RunGroup(label=r.label, runs=(r,)) for r in (one, other)])
    assert found.differing == [
        ("optim.lr", ["0.001", "0.002"]),
        ("commit", ["c0ffee", "beef"]),
        ("version of torch", ["2.13.0", "–"]),
    ]
    common = dict(found.common)
    assert common["optim.schedule"] == "cosine" and common["model.teacher"] == "null"
    assert common["data fingerprint"] == "f00d"
    assert not common.keys() & {"optim.lr", "run.output_dir"}


def test_values_within_a_group_stand_in_one_cell() -> None:
    runs = (run_of(seed=10), run_of(seed=20))
    found = compare_configurations([RunGroup(label="a", runs=runs)])
    assert found.differing == [("run.seed", ["10, 20"])]


def lines_of(*points: tuple[int, float], per_epoch: int = 100) -> list[MetricsLine]:
    return [
        {"step": step, "epoch": round(step / per_epoch, 6), "time": at, "train/loss": 1.0}
        for step, at in points
    ]


def test_time_left_by_hand() -> None:
    """Ten steps take 20 s and an evaluation 10 s, twice: 60 s for 20 steps; 270 steps are left."""
    lines: list[MetricsLine] = [
        *lines_of((10, 1000.0)),
        {"step": 10, "time": 1010.0, "eval/dev/loss": 2.0},
        *lines_of((20, 1030.0)),
        *lines_of((30, 1050.0)),
        {"step": 30, "time": 1060.0, "eval/dev/loss": 1.5},
    ]
    run = run_of(lines=lines, epochs=3, status={"state": "running"})
    assert total_steps(run) == 300
    assert seconds_per_step(run) == pytest.approx(3.0)
    row = progress_of(run)
    assert row.seconds_left == pytest.approx(270 * 3.0)
    assert (row.step, row.total, row.dev) == (30, 300, (30, 1.5))
    assert row.state_now(now=1061.0) == "running"
    assert row.state_now(now=1060.0 + 600) == "running, silent for 10 min"
    assert not row.has_ended


def test_a_pause_between_two_lives_is_no_time_of_a_step() -> None:
    lines = lines_of((10, 0.0), (20, 10.0), (30, 20.0), (40, 9000.0), (50, 9010.0))
    assert seconds_per_step(run_of(lines=lines)) == pytest.approx(1.0)


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_ended_has_no_time_left(state: str) -> None:
    lines = lines_of((10, 0.0), (20, 10.0))
    row = progress_of(run_of(lines=lines, max_steps=40, status={"state": state}))
    assert row.has_ended and row.total == 40 and row.seconds_left is None


@pytest.mark.parametrize("lines", [[], lines_of((10, 5.0)), [{"step": 3}]])
def test_progress_of_hardly_begun_runs(lines: list[MetricsLine]) -> None:
    row = progress_of(run_of(lines=lines, status={"state": "running"}))
    assert row.seconds_left is None and row.dev is None
    assert len(row.cells()) == 9


def test_a_loss_that_is_not_a_number_is_told() -> None:
    lines: list[MetricsLine] = [{"step": 1, "train/loss": float("nan")}]
    row: Progress = progress_of(run_of(lines=lines))
    assert row.cells()[3] == "nan"


def test_only_changed_figures_are_drawn_again() -> None:
    drawings = Drawings(png=False)

    def draw(lines: Sequence[MetricsLine]) -> int:
        before = drawings.num_drawn
        for _, panel in curve_panels([RunGroup(label="a", runs=(run_of(lines=lines),))]):
            assert drawings.render(panel).light.startswith("data:image/svg+xml;base64,")
        return drawings.num_drawn - before

    first: list[MetricsLine] = [{"step": 1, "train/loss": 1.0, "eval/dev/loss": 2.0}]
    assert draw(first) == 2
    assert draw(first) == 0
    assert draw([*first, {"step": 2, "train/loss": 0.5}]) == 1


def test_a_page_is_written_when_a_run_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file changes any more; a made-up clock goes on, and after 200 looks comes Ctrl-C."""
    now = [1000.0]
    states: list[str] = []
    (tmp_path / "config.yaml").write_text(
        f"run: {{output_dir: {tmp_path}}}\nmodel: {{student: s}}\ndata: {{path: d}}\n"
        "objective: {approach: sft, kd_ratio: 0.0}\n"
    )
    (tmp_path / "status.json").write_text('{"state": "running"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0, "time": 1000.0}\n')

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1200:
            raise KeyboardInterrupt

    def write(watched: Watched) -> None:
        if watched.live_seconds is not None:
            states.extend(progress_of(run).state_now() for run in watched.runs)

    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch_runs([tmp_path], seconds=1.0, write=write, console=Console(file=io.StringIO()))
    assert states == ["running", "running, silent for 2 min", "running, silent for 3 min"]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat", ["cat", "sat"]),
        ("Cat, the CAT", "the cat", ["the", "CAT"]),  # in the reference's order
        ("b a", "a b", None),  # either, but one only
        ("", "a", []),
        ("a  b\n", "", []),
        ("é <b>x</b>", "É x", ["é", "x"]),
    ],
)
def test_words_in_common_by_hand(text: str, reference: str, expected: list[str] | None) -> None:
    pieces = marked_words(text, reference)
    assert "".join(piece for piece, _ in pieces) == text
    marked = [piece for piece, is_shared in pieces if is_shared]
    assert marked == expected if expected is not None else len(marked) == 1
