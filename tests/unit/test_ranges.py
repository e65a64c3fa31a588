"""Ranges of options: what they refuse, and that every number has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from annotated_types import Ge, Interval

from distilllens.cli.prepare import PrepareConfig
from distilllens.cli.skills import SkillsConfig
from distilllens.config import EvaluateConfig, JudgeConfig, TrainConfig, load_config
from distilllens.errors import ConfigError
from distilllens.ranges import Count, InnerShare, Positive, Share, field_ranges, range_problem

WITHOUT = {
    "model.student_lora.alpha": "a scale of any sign",
    "model.teacher_cache_bits": "one of three",
    "objective.lens.weights": "looked at as a whole, with the pairs",
    "objective.lens.teacher_layers": "looked at with both models",
    "objective.lens.student_layers": "looked at with both models",
}
"""Options of a training with numbers and without a range, and why."""


@pytest.mark.parametrize(
    ("hint", "value", "told"),
    [
        (Count, 1, ""),
        (Count, 0, "must be ≥ 1"),
        (Count | None, None, ""),
        (Count | None, 0, "must be ≥ 1"),
        (list[Count], 0, "must be ≥ 1"),
        (Positive, 1e-300, ""),
        (Positive, 0.0, "must be > 0"),
        (Share, 0.0, ""),
        (Share, 1.0, ""),
        (Share, 1.0000001, "must be ≥ 0 and ≤ 1"),
        (InnerShare, 0.0, "must be > 0 and < 1"),
        (InnerShare, 1.0, "must be > 0 and < 1"),
        (Annotated[float, Interval(gt=0, le=1)], 1.0, ""),
        (Annotated[float, Interval(gt=0, le=1)], 0.0, "must be > 0 and ≤ 1"),
        (Annotated[int, Ge(2)], 1, "must be ≥ 2"),
        (Annotated[float, "a note"], -5.0, ""),
        (float, -5.0, ""),
        (Count, "all", ""),
        (Positive, float("nan"), "must be > 0"),
    ],
)
def test_numbers_out_of_range_are_told(hint: Any, value: Any, told: str) -> None:
    assert range_problem(hint, value) == told


def parts_of(hint: Any) -> Iterator[Any]:
    """Yields a type and all that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from parts_of(part)


def number_options(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of all options that may be a number."""
    for name, hint in get_type_hints(config_class).items():
        parts = set(parts_of(hint))
        for part in parts:
            if is_dataclass(part):
                assert isinstance(part, type)
                yield from number_options(part, f"{prefix}{name}.")
        if parts & {int, float} or any(type(part) is int for part in parts):
            yield f"{prefix}{name}"


@pytest.mark.parametrize(
    "config_class", [TrainConfig, EvaluateConfig, JudgeConfig, PrepareConfig, SkillsConfig]
)
def test_every_number_has_a_range(config_class: type) -> None:
    numbers = set(number_options(config_class))
    assert numbers
    assert numbers - set(field_ranges(config_class)) - set(WITHOUT) == set()
    if config_class is TrainConfig:
        assert set(WITHOUT) <= numbers
        assert not set(WITHOUT) & set(field_ranges(config_class))


@pytest.mark.parametrize(
    "config_class", [TrainConfig, EvaluateConfig, JudgeConfig, PrepareConfig, SkillsConfig]
)
def test_defaults_are_within_their_ranges(config_class: type) -> None:
    def check(config: Any) -> None:
        hints = get_type_hints(type(config), include_extras=True)
        for field in fields(config):
            value = getattr(config, field.name)
            if is_dataclass(value):
                check(value)
            for item in value if isinstance(value, list) else [value]:
                assert range_problem(hints[field.name], item) == "", field.name

    check(config_class())


def test_help_tells_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate. Range: > 0. (type: float, default: 0.0002)" in shown
    assert "Range: ≥ 0 and ≤ 1." in shown


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--optim.lr=-1", "--run.keep=1", "--eval.seeds=[1,-2]"])
    assert caught.value.what.startswith("3 problems: ")
    for text in ("optim.lr=-1.0 must be > 0", "run.keep=1 must be ≥ 2", "seeds=[1, -2] must be"):
        assert text in caught.value.what


def test_an_adapters_numbers_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"model\.student_lora\.r=0 must be ≥ 1"):
        load_config(["--model.student_lora", "{r: 0}", "--objective.approach", "sft"])
