"""Sweep files, the equal-budget check and the paired statistics, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from rich.console import Console

from distilllens.config import clock
from distilllens.errors import ConfigError
from distilllens.report.tables import Marks, to_latex, to_markdown
from distilllens.sweep.cells import build_cells, cell_path, refused_options, train_command
from distilllens.sweep.jobs import Job, Runner, error_text, last_line, visible_gpus
from distilllens.sweep.paired import PairedDifference, paired_difference
from distilllens.sweep.spec import Sweep, read_sweep


def sweep_of(folder: Path, **content: Any) -> Sweep:
    file = folder / "mine.yaml"
    small = {"methods": {"a": {}, "b": {}}, "seeds": [1], "set": {"objective.approach": "sft"}}
    file.write_text(yaml.safe_dump(small | content, sort_keys=False))
    return read_sweep(file)


# --- Sweep files --------------------------------------------------------------------------------


def test_a_short_file_has_defaults(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    assert (sweep.name, sweep.output_dir) == ("mine", Path("results/sweeps/mine"))
    assert (sweep.baseline, sweep.processes, sweep.parallel) == ("a", 1, 1)
    assert (sweep.lr, sweep.evaluation, sweep.allow_unequal) == ((), None, ())


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        sweep_of(
            tmp_path,
            seed=[1],
            seeds=[1, 1],
            lr=[0.0],
            parallel=0,
            processes=True,
            baseline="c",
            configs="base.yaml",
            set={"run.seed": 3, "optim": {"lr": 1}},
            methods={"a": {"flags": {}}, "eval": {}, "b": None},
        )
    for part in (
        "12 problems",
        "unknown key seed (did you mean seeds?)",
        "seeds=[1, 1] names one twice",
        "lr must be a list of numbers > 0, got [0.0]",
        "parallel must be a whole number ≥ 1, got 0",
        "processes must be a whole number ≥ 1, got True",
        "baseline=c is no method",
        "configs must be a list of texts, got 'base.yaml'",
        "set: run.seed is given by the sweep itself",
        "set: optim must be a value or a list of values",
        "unknown key methods.a.flags",
        "methods.eval is no name",
        "methods.b must be a mapping of configs and set, got None",
    ):
        assert part in told.value.what


def test_the_reader_is_the_strict_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seeds: [1]\nseeds: [2]\nmethods: {a: {}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2:1: key 'seeds' occurs twice"):
        read_sweep(file)
    with pytest.raises(ConfigError, match="no such sweep file"):
        read_sweep(tmp_path / "other.yaml")


def test_own_layers_win_over_common_ones(tmp_path: Path) -> None:
    own = {"set": {"optim.lr": 0.5, "objective.lens.student_layers": None}}
    sweep = sweep_of(
        tmp_path,
        set={"optim.lr": 0.25, "optim.max_steps": 7, "objective.approach": "sft"},
        methods={"a": own, "b": {}},
    )
    a, b = build_cells(sweep, ["--optim.epochs", "3"])
    assert (a.config.optim.lr, b.config.optim.lr) == (0.5, 0.25)
    assert (a.config.optim.max_steps, a.config.optim.epochs) == (7, 3)
    assert (b.config.run.name, b.config.run.seed) == ("b", 1)
    assert train_command(sweep, a)[-2:] == ["--optim.epochs", "3"]


def test_cells_come_seed_by_seed_and_the_grid_has_own_folders(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, seeds=[1, 2], lr=[1e-5, 0.25])
    built = build_cells(sweep)
    assert [(cell.seed, cell.method, cell.config.optim.lr) for cell in built[:4]] == [
        (1, "a", 1e-5), (1, "a", 0.25), (1, "b", 1e-5), (1, "b", 0.25)
    ]  # fmt: skip
    assert len(built) == len({cell.folder.root for cell in built}) == 8
    assert cell_path("a", 1e-5, 2) == Path("a/lr1e-05/seed2")
    assert cell_path("a", None, 2) == Path("a/seed2")


def test_mistakes_of_all_methods_are_told_once_each(tmp_path: Path) -> None:
    methods = {name: {"set": {"optim.max_step": 3}} for name in "ab"}
    kd = {"set": {"objective.approach": "kd"}}
    sweep = sweep_of(tmp_path, methods={**methods, "kd": kd})
    with pytest.raises(ConfigError) as told:
        build_cells(sweep)
    assert (
        "a, b: unknown flag --optim.max_step (did you mean --optim.max_steps?)" in told.value.what
    )
    assert "kd: model.teacher is needed" in told.value.what


# --- The equal budget ---------------------------------------------------------------------------


def test_an_unequal_budget_is_found_and_can_be_allowed(tmp_path: Path) -> None:
    methods = {
        "a": {},
        "b": {"set": {"optim.lr": 0.5, "objective.divergence": "jsd", "model.teacher": "big"}},
        "c": {"set": {"data.train_size": 5, "model.student_lora.r": 4, "tracking.log_every": 3}},
    }
    sweep = sweep_of(tmp_path, methods=methods)
    refused = refused_options(sweep, build_cells(sweep))
    assert refused["optim.lr"] == {"a": 2e-4, "b": 0.5, "c": 2e-4}
    assert refused["data.train_size"] == {"a": None, "b": None, "c": 5}
    # Objective, teacher and logging are no budget; what is trained is.
    assert {key.partition(".")[0] for key in refused} == {"optim", "data", "model"}
    assert all(key.startswith("model.student_lora") for key in refused if key.startswith("model"))
    allowed = sweep_of(tmp_path, methods=methods, allow_unequal=list(refused))
    assert refused_options(allowed, build_cells(allowed)) == {}


def test_own_records_mean_another_number_of_steps(tmp_path: Path) -> None:
    """Epochs over other records are other steps; a number of steps is the same for all."""
    methods = {"a": {}, "b": {"set": {"data.generated": "answers"}}}
    own = {"methods": methods, "allow_unequal": ["data.generated"]}
    sweep = sweep_of(tmp_path, **own)
    told = "20 epochs of its own records"
    assert refused_options(sweep, build_cells(sweep)) == {"optim.max_steps": {"a": told, "b": told}}
    steps = {"objective.approach": "sft", "optim.max_steps": 5}
    assert refused_options(sweep_of(tmp_path, **own, set=steps), build_cells(
        sweep_of(tmp_path, **own, set=steps))) == {}  # fmt: skip
    said = sweep_of(tmp_path, methods=methods, allow_unequal=["data.generated", "optim.max_steps"])
    assert refused_options(said, build_cells(said)) == {}


def test_only_options_of_the_budget_can_be_allowed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, allow_unequal=["optim.rl", "tracking.log_every"])
    with pytest.raises(ConfigError) as told:
        refused_options(sweep, build_cells(sweep))
    assert "optim.rl is no option of the budget (did you mean optim.lr?)" in told.value.what
    assert "tracking.log_every is no option" in told.value.what


# --- Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # of printed tables: 0.975
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)],
)
def test_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    difference = PairedDifference(values=tuple(float(k * k) for k in range(degrees + 1)))
    assert difference.interval is not None and difference.standard_error is not None
    low, high = difference.interval
    assert (low + high) / 2 == pytest.approx(difference.mean)
    assert (high - low) / (2 * difference.standard_error) == pytest.approx(quantile, abs=6e-4)


def test_paired_difference_worked_out_by_hand() -> None:
    difference = paired_difference({1: 5.0, 2: 9.0, 3: 13.0, 9: 0.0}, {3: 7.0, 2: 5.0, 1: 3.0})
    assert difference is not None
    # 2, 4, 6: mean 4, (4 + 0 + 4) / 2 = 4, so sd 2; se 2 / √3; half width 4.3027 · 1.1547 = 4.968
    assert difference.values == (2.0, 4.0, 6.0)
    assert (difference.mean, difference.sd) == (4.0, 2.0)
    assert difference.standard_error == pytest.approx(1.1547, abs=1e-4)
    assert difference.interval == pytest.approx((-0.968, 8.968), abs=1e-3)
    assert difference.is_noise is True
    assert PairedDifference(values=(4.0, 4.1, 4.2)).is_noise is False
    assert paired_difference({1: 5.0}, {2: 5.0}) is None


def test_one_seed_tells_nothing_about_noise() -> None:
    difference = PairedDifference(values=(4.0,))
    assert (difference.mean, difference.sd, difference.interval) == (4.0, None, None)
    assert difference.is_noise is None


# --- Texts --------------------------------------------------------------------------------------


class Lines:
    text_columns: ClassVar[tuple[int, ...]] = (0,)

    def header(self) -> list[str]:
        return ["method", "100 %"]

    def lines(self) -> list[list[str]]:
        return [["a_b & c", "1.00 ± 0.10"], ["d|e", "–"]]


def test_tables_in_markdown_and_latex() -> None:
    assert to_markdown(Lines(), marks=Marks(best=frozenset({(0, 1)}))).splitlines() == [
        "| method | 100 % |",
        "| --- | ---: |",
        "| a_b & c | **1.00 ± 0.10** |",
        "| d\\|e | – |",
    ]
    assert to_latex(Lines(), marks=Marks(best=frozenset({(0, 1)}))).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & 100 \% \\",
        r"\midrule",
        r"a\_b \& c & \textbf{1.00 $\pm$ 0.10} \\",
        r"d|e & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


# --- Jobs ---------------------------------------------------------------------------------------


def test_jobs_beside_each_other_have_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,3,5,7,9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    runner = Runner(parallel=2, processes=2, fail_fast=False, console=Console(quiet=True))
    waits = "until test -e go; do sleep 0.02; done"  # the first, while all others run
    jobs = [
        Job(
            label=str(number),
            command=("sh", "-c", f"cd {tmp_path}; echo $CUDA_VISIBLE_DEVICES; {then}"),
            screen=tmp_path / f"{number}.out",
        )
        for number, then in enumerate((waits, "true", "true", "touch go"))
    ]
    runner.run(jobs)
    assert runner.failures == []
    used = [(tmp_path / f"{number}.out").read_text().strip() for number in range(4)]
    assert used == ["GPU-aa,3", "5,7", "5,7", "5,7"]


def test_a_machine_without_gpus_has_none_to_give_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    runner = Runner(parallel=1, processes=1, fail_fast=False, console=Console(quiet=True))
    command = ("sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-unset}")
    runner.run([Job(label="a", command=command, screen=tmp_path / "a.out")])
    assert (tmp_path / "a.out").read_text() == "unset\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]


def test_the_last_error_of_a_screen_is_told(tmp_path: Path) -> None:
    screen = tmp_path / "seed1.out"
    assert last_line(screen) == "starting …"
    screen.write_text(
        "step 1\n\nerror[DL-DATA]: no answer\n  fix: skip it\nW1122 torchrun says so\n"
    )
    assert last_line(screen) == "W1122 torchrun says so"
    assert error_text(screen) == "error[DL-DATA]: no answer\n  fix: skip it"
    screen.write_text("one\ntwo\nKilled\n")
    assert error_text(screen) == "one\ntwo\nKilled"


def test_times_are_told_to_the_nearest_second() -> None:
    told = [clock(seconds) for seconds in (0.4, 59.6, 3725.4, 90_000)]
    assert told == ["0:00:00", "0:01:00", "1:02:05", "25:00:00"]
