"""Reads a sweep file: what is compared, with which seeds, and how it is run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilllens.errors import ConfigError
from distilllens.parsing import did_you_mean, raise_problems, read_mapping

METHOD_NAME = re.compile(r"(?!eval$|sweep\.)[A-Za-z0-9][A-Za-z0-9_.+-]{0,79}")
"""Method names are folders beside eval/ and sweep.*."""
TRAINING_KEYS = ("run.output_dir", "run.name", "run.seed", "run.resume", "dry_run", "debug")
EVALUATION_KEYS = ("checkpoint", "output_dir", "name", "dry_run", "debug", "overwrite")
"""Options that belong to the sweep itself."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Of what a command line is made: YAML files, then flags."""

    configs: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    """By dotted key; scalars and lists of them."""

    def then(self, later: Layers) -> Layers:
        """Returns these layers with others behind them, which win."""
        return Layers(configs=(*self.configs, *later.configs), flags={**self.flags, **later.flags})

    def arguments(self) -> list[str]:
        """Returns the arguments of train.py or evaluate.py."""
        files = [part for path in self.configs for part in ("--config", path)]
        return files + [f"--{key}={_flag_text(value)}" for key, value in self.flags.items()]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A comparison of methods on an equal budget."""

    file: Path
    name: str
    """Default: the file's name."""
    output_dir: Path
    """Default: results/sweeps/NAME."""
    training: Layers
    """Of every training; the methods' own layers come after them."""
    methods: Mapping[str, Layers]
    """By name, in the order of the table."""
    seeds: tuple[int, ...]
    """Training seeds, the same for all methods: they decide the data order."""
    lr: tuple[float, ...]
    """Learning rates to choose from, for each method by its dev metric; empty: the configs' own."""
    evaluation: Layers | None
    """Of evaluate.py; None: methods are compared by their dev metric."""
    processes: int
    """Of one training; torchrun starts them if there are several."""
    parallel: int
    """Trainings at the same time."""
    allow_unequal: tuple[str, ...]
    """Options of the budget in which methods may differ."""
    baseline: str
    """The method that the others are compared to; default: the first."""


def read_sweep(file: Path) -> Sweep:
    """Reads a sweep file.

    Raises:
        ConfigError: It is not there or not plain YAML; unknown keys and wrong values, all at once.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such sweep file", fix="one of configs/sweeps/, or your own")
    reader = _Reader(file)
    sweep = reader.sweep(read_mapping(file))
    raise_problems(reader.problems)
    return sweep


class _Reader:
    """Turns a mapping into a `Sweep` and collects what is wrong with it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[str] = []

    def sweep(self, content: Mapping[Any, Any]) -> Sweep:
        known = (
            *("name", "output_dir", "configs", "set", "methods", "seeds", "lr", "evaluate"),
            *("processes", "parallel", "allow_unequal", "baseline"),
        )
        self._refuse_unknown(content, known, "")
        name = self._text(content, "name", self.file.stem)
        lr = self._numbers(content.get("lr", []), "lr", (int, float), above=0)
        reserved = (*TRAINING_KEYS, *(("optim.lr",) if lr else ()))
        methods = self._methods(content.get("methods"), reserved)
        seeds = self._numbers(content.get("seeds"), "seeds", (int,), above=-1)
        if not seeds:
            self._tell("seeds must name at least one training seed")
        baseline = self._text(content, "baseline", next(iter(methods), ""))
        if baseline not in methods and methods:
            self._tell(f"baseline={baseline} is no method{did_you_mean(baseline, set(methods))}")
        evaluate = content.get("evaluate")
        return Sweep(
            file=self.file,
            name=name,
            output_dir=Path(self._text(content, "output_dir", f"results/sweeps/{name}")),
            training=self._layers(content, "", reserved),
            methods=methods,
            seeds=tuple(int(seed) for seed in seeds),
            lr=tuple(float(rate) for rate in lr),
            evaluation=self._part(evaluate, "evaluate", EVALUATION_KEYS) if evaluate else None,
            processes=self._count(content, "processes"),
            parallel=self._count(content, "parallel"),
            allow_unequal=self._texts(content.get("allow_unequal", []), "allow_unequal"),
            baseline=baseline,
        )

    def _methods(self, content: Any, reserved: Iterable[str]) -> dict[str, Layers]:
        if not isinstance(content, Mapping) or not content:
            self._tell(f"methods must be a mapping of method names, got {content!r:.60}")
            return {}
        for name in content:
            if not isinstance(name, str) or not METHOD_NAME.fullmatch(name):
                self._tell(
                    f"methods.{name!s:.80} is no name: letters, digits, _ . + and -, not eval"
                )
        return {
            str(name): self._part(part, f"methods.{name}", reserved)
            for name, part in content.items()
        }

    def _part(self, content: Any, key: str, reserved: Iterable[str]) -> Layers:
        if not isinstance(content, Mapping):
            self._tell(f"{key} must be a mapping of configs and set, got {content!r:.60}")
            return Layers()
        self._refuse_unknown(content, ("configs", "set"), f"{key}.")
        return self._layers(content, f"{key}.", reserved)

    def _layers(self, content: Mapping[Any, Any], prefix: str, reserved: Iterable[str]) -> Layers:
        flags = content.get("set", {})
        if not isinstance(flags, Mapping):
            self._tell(f"{prefix}set must be a mapping of dotted keys, got {flags!r:.60}")
            flags = {}
        for key, value in flags.items():
            if key in reserved:
                self._tell(f"{prefix}set: {key} is given by the sweep itself")
            if not all(
                _is_scalar(item) for item in (value if isinstance(value, list) else [value])
            ):
                self._tell(
                    f"{prefix}set: {key} must be a value or a list of values, got {value!r:.60}"
                )
        return Layers(
            configs=self._texts(content.get("configs", []), f"{prefix}configs"),
            flags={str(key): value for key, value in flags.items()},
        )

    def _refuse_unknown(
        self, content: Mapping[Any, Any], known: Iterable[str], prefix: str
    ) -> None:
        for key in content:
            if key not in known:
                self._tell(f"unknown key {prefix}{key}{did_you_mean(str(key), set(known))}")

    def _text(self, content: Mapping[Any, Any], key: str, default: str) -> str:
        value = content.get(key, default)
        if not isinstance(value, str) or (not value and key in content):
            self._tell(f"{key} must be a text, got {value!r:.60}")
            return default
        return value

    def _texts(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self._tell(f"{key} must be a list of texts, got {value!r:.60}")
            return ()
        return tuple(value)

    def _count(self, content: Mapping[Any, Any], key: str) -> int:
        value = content.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._tell(f"{key} must be a whole number ≥ 1, got {value!r:.60}")
            return 1
        return value

    def _numbers(
        self, value: Any, key: str, kinds: tuple[type, ...], *, above: float
    ) -> list[float]:
        items = value if isinstance(value, list) else [value]
        wrong = [
            item
            for item in items
            if not isinstance(item, kinds) or isinstance(item, bool) or not _is_above(item, above)
        ]
        if wrong or not isinstance(value, list):
            noun = "numbers > 0" if float in kinds else "whole numbers ≥ 0"
            self._tell(f"{key} must be a list of {noun}, got {value!r:.60}")
            return []
        if len(set(items)) < len(items):
            self._tell(f"{key}={value} names one twice")
        return items

    def _tell(self, problem: str) -> None:
        self.problems.append(f"{self.file}: {problem}")


def _is_above(value: Any, limit: float) -> bool:
    return math.isfinite(value) and value > limit


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _flag_text(value: Any) -> str:
    """Returns a value as YAML would have it on one line; a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_extra_flags(sweep: Sweep, flags: Iterable[str]) -> None:
    """Refuses flags for every training that the sweep gives itself, and layers.

    Raises:
        ConfigError: Names the offending flag.
    """
    for flag in flags:
        key = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and key in (*TRAINING_KEYS, *(("optim.lr",) if sweep.lr else ())):
            raise ConfigError(
                f"{flag} is given by the sweep itself",
                fix=f"change {sweep.file}; --output_dir DIR chooses another folder",
            )
        if flag.startswith("--config"):
            raise ConfigError(f"{flag}: layers stand in the sweep file", fix=f"see {sweep.file}")
