"""The trainings of a sweep: their folders, command lines and configurations, checked as a whole."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from distilllens.config import EvaluateConfig, TrainConfig, load_config, load_evaluate_config
from distilllens.errors import ConfigError
from distilllens.parsing import did_you_mean, raise_problems
from distilllens.runs import RunFolder
from distilllens.sweep.spec import Layers, Sweep
from distilllens.training.resume import course_of

ROOT = Path(__file__).resolve().parents[2]
"""Where train.py and evaluate.py are."""
BUDGET = ("data.", "optim.", "eval.", "model.student", "model.dtype", "deepspeed")
"""What the options begin with that decide what a training may use, and where it starts."""
RECORDS = ("data.path", "data.generated", "data.keep_gold", "data.train_size", "eval.dev_size")
"""Options that decide how many records there are to train on."""
STEPS = "optim.max_steps"
"""Differs too where the records do and their passes decide the number of steps."""
Who = TypeVar("Who", bound=Hashable)
"""A method, or one of its trainings."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: a method, a learning rate of the grid, a seed."""

    method: str
    lr: float | None
    """Of the grid; None without one."""
    seed: int
    folder: RunFolder
    evaluation: Path
    """Where the scores of its best/ go."""
    arguments: tuple[str, ...]
    """Of train.py."""
    config: TrainConfig
    """What they resolve to."""

    @property
    def label(self) -> str:
        """What the screen calls it."""
        return f"{self.method}{'' if self.lr is None else f' lr {self.lr:g}'} seed {self.seed}"


def cell_path(method: str, lr: float | None, seed: int) -> Path:
    """Returns the path of a cell below the sweep's folder or its eval/: METHOD[/lrX]/seedN."""
    return Path(method) / ("" if lr is None else f"lr{lr!r}") / f"seed{seed}"


def evaluation_path(sweep: Sweep, method: str, lr: float | None, seed: int) -> Path:
    """Returns the folder of a cell's scores."""
    return sweep.output_dir / "eval" / cell_path(method, lr, seed)


def build_cells(sweep: Sweep, extra: Sequence[str] = ()) -> list[Cell]:
    """Returns all trainings in the order in which they run: seed by seed, so that a sweep that is
    stopped early has compared all methods on the first seeds.

    Args:
        sweep: Their common and own layers.
        extra: Flags for every training, after all others.

    Raises:
        ConfigError: A configuration is not valid; the mistakes of all methods at once.
    """
    problems: dict[str, list[str]] = {}
    loaded: dict[tuple[str, float | None], tuple[Layers, TrainConfig]] = {}
    for method, own in sweep.methods.items():
        for lr in sweep.lr or (None,):
            layers = sweep.training.then(own)
            if lr is not None:
                layers = layers.then(Layers(flags={"optim.lr": lr}))
            try:
                config = load_config([*layers.arguments(), *extra])
            except ConfigError as error:
                methods = problems.setdefault(error.what, [])
                methods += [method] if method not in methods else []
            else:
                loaded[method, lr] = layers, config
    raise_problems([f"{', '.join(methods)}: {what}" for what, methods in problems.items()])
    return [
        _build_cell(sweep, method, lr, seed, layers, config, extra)
        for seed in sweep.seeds
        for (method, lr), (layers, config) in loaded.items()
    ]


def _build_cell(
    sweep: Sweep,
    method: str,
    lr: float | None,
    seed: int,
    layers: Layers,
    config: TrainConfig,
    extra: Sequence[str],
) -> Cell:
    folder = sweep.output_dir / cell_path(method, lr, seed)
    own = {"run.seed": seed, "run.name": method, "run.output_dir": str(folder)}
    run = dataclasses.replace(config.run, seed=seed, name=method, output_dir=str(folder))
    return Cell(
        method=method,
        lr=lr,
        seed=seed,
        folder=RunFolder(folder),
        evaluation=evaluation_path(sweep, method, lr, seed),
        arguments=(*layers.then(Layers(flags=own)).arguments(), *extra),
        config=dataclasses.replace(config, run=run),
    )


def train_command(sweep: Sweep, cell: Cell) -> list[str]:
    """Returns the command that trains a cell."""
    return [*_start(sweep, "train.py"), *cell.arguments]


def evaluate_command(sweep: Sweep, cell: Cell, *, overwrite: bool = False) -> list[str]:
    """Returns the command that scores a cell's best model; the sweep must have an evaluation.

    Args:
        sweep: With the evaluation's layers.
        cell: Whose model is scored.
        overwrite: From the first answer on, whatever is scored already.
    """
    layers = _evaluation(sweep, cell.method, cell.lr, cell.seed)
    if overwrite:
        layers = layers.then(Layers(flags={"overwrite": True}))
    return [*_start(sweep, "evaluate.py"), *layers.arguments()]


def evaluate_config(sweep: Sweep, method: str, lr: float | None, seed: int) -> EvaluateConfig:
    """Returns what the command that scores a cell resolves to.

    Raises:
        ConfigError: A configuration that is not valid.
    """
    return load_evaluate_config(_evaluation(sweep, method, lr, seed).arguments())


def _evaluation(sweep: Sweep, method: str, lr: float | None, seed: int) -> Layers:
    assert sweep.evaluation is not None
    path = cell_path(method, lr, seed)
    best = RunFolder(sweep.output_dir / path).best
    own = {"checkpoint": str(best), "output_dir": str(evaluation_path(sweep, method, lr, seed))}
    return sweep.evaluation.then(Layers(flags={**own, "name": method}))


def _start(sweep: Sweep, script: str) -> list[str]:
    path = ROOT / script
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file", fix="run the sweep from a checkout of the project"
        )
    start = [sys.executable]
    if sweep.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc_per_node", str(sweep.processes), "--shutdown_timeout", "600"]
    return [*start, script if Path.cwd() == ROOT else str(path)]


# --- The budget ---------------------------------------------------------------------------------


def unequal_options(configs: Mapping[Who, TrainConfig]) -> dict[str, dict[Who, Any]]:
    """Returns the options of the budget in which configurations differ: option → whose → value.

    Args:
        configs: By method, or by training.
    """
    flat = {who: course_of(config) for who, config in configs.items()}
    keys = dict.fromkeys(key for options in flat.values() for key in options)
    values = {
        key: {who: options.get(key) for who, options in flat.items()}
        for key in keys
        if key.startswith(BUDGET)
    }
    differing = {
        key: by_who
        for key, by_who in values.items()
        if len({repr(value) for value in by_who.values()}) > 1
    }
    if any(key in differing for key in RECORDS) and STEPS not in differing:
        passes: dict[Who, Any] = {
            who: f"{config.optim.epochs} epochs of its own records"
            for who, config in configs.items()
            if config.optim.max_steps is None
        }
        differing |= {STEPS: passes} if passes else {}
    return differing


def refused_options(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Returns the differences that the sweep file does not allow.

    Raises:
        ConfigError: It allows an option that is none of the budget.
    """
    # The grid and the seeds are the same for all methods: one cell of each tells all.
    first = {cell.method: cell.config for cell in reversed(cells)}
    options = {key for config in first.values() for key in course_of(config)}
    known = {key for key in options if key.startswith(BUDGET)}
    raise_problems(
        [
            f"{sweep.file}: allow_unequal: {key} is no option of the budget"
            f"{did_you_mean(key, known)}"
            for key in sweep.allow_unequal
            if key not in known
        ]
    )
    differing = unequal_options({method: first[method] for method in sweep.methods})
    return {key: value for key, value in differing.items() if key not in sweep.allow_unequal}


def differences_table(differing: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of options, their values, and who has which."""
    table = Table(title="Not the same budget", title_justify="left")
    for title in ("option", "value", "methods"):
        table.add_column(title, overflow="fold")
    for key, by_method in differing.items():
        for value in dict.fromkeys(map(repr, by_method.values())):
            owners = [method for method, own in by_method.items() if repr(own) == value]
            table.add_row(key, value, ", ".join(owners))
    return table


def unequal_budget(differing: Mapping[str, object]) -> ConfigError:
    """Returns the refusal of a comparison that would not be like for like."""
    keys = ", ".join(differing)
    return ConfigError(
        f"the methods do not train on an equal budget: {keys}",
        fix=f"give them the same values, or say so in the sweep file: allow_unequal: [{keys}]",
        kept="nothing was started",
    )
