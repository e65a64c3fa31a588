"""Which teacher block is compared with which student block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from distilllens.errors import ConfigError


@dataclass(frozen=True, order=True)
class LayerPair:
    """A teacher block and a student block; i is the output of block i, counted from 1."""

    teacher: int
    student: int


def build_layer_pairs(
    num_teacher: int,
    num_student: int,
    *,
    teacher: Sequence[int] | None = None,
    student: Sequence[int] | None = None,
    rule: Literal["proportional"] = "proportional",
    count: int = 5,
) -> list[LayerPair]:
    """Pairs layers as listed, or by rule.

    Args:
        num_teacher: Number of the teacher's blocks.
        num_student: Number of the student's blocks.
        teacher: Teacher blocks, strictly increasing, in [1, num_teacher]. Layer i is the output of
            block i, which is ``hidden_states[i]``.
        student: As many student blocks, strictly increasing, in [1, num_student].
        rule: ``proportional``: at equal shares of the depth, the last block left out (the final
            divergence compares it already).
        count: Number of pairs of the rule; at most one fewer than the student's blocks.

    Raises:
        ConfigError: Lists of unequal length, out of range, doubled or not increasing; an unknown
            rule; more pairs than the models have layers.
    """
    if (teacher is None) != (student is None):
        raise ConfigError("lens.teacher_layers and lens.student_layers must be given together")
    if teacher is None or student is None:
        if rule != "proportional":
            raise ConfigError(f"lens.rule={rule!r} is unknown; known: proportional")
        most = min(num_teacher, num_student) - 1
        if not 1 <= count <= most:
            raise ConfigError(
                f"lens.count={count} must be in [1, {most}] for {num_teacher} teacher "
                f"and {num_student} student blocks"
            )
        teacher = _equal_shares(num_teacher, count)
        student = _equal_shares(num_student, count)
    if len(teacher) != len(student):
        raise ConfigError(
            f"lens.teacher_layers has {len(teacher)} entries {list(teacher)}, "
            f"lens.student_layers has {len(student)} {list(student)}",
            why="layers are compared pair by pair",
        )
    if not teacher:
        raise ConfigError("lens.teacher_layers and lens.student_layers are empty")
    _check_layers("lens.teacher_layers", teacher, num_teacher)
    _check_layers("lens.student_layers", student, num_student)
    return [LayerPair(t, s) for t, s in zip(teacher, student, strict=True)]


def _equal_shares(num_layers: int, count: int) -> list[int]:
    """Returns round(num_layers · k / (count + 1)) for k = 1 … count, halves rounded up."""
    return [(2 * num_layers * k + count + 1) // (2 * (count + 1)) for k in range(1, count + 1)]


def _check_layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise ConfigError(
                f"{name}: layer {layer} is out of range [1, {num_layers}]",
                why="layer i is the output of block i, counted from 1",
            )
    for before, after in itertools.pairwise(layers):
        if after <= before:
            raise ConfigError(f"{name}: {after} after {before}; layers must increase strictly")


def layer_table(pairs: Sequence[LayerPair], num_teacher: int, num_student: int) -> Table:
    """Returns the pairs with their relative depths, for the screen."""
    table = Table(title="lens: layer pairs")
    for column in ("pair", "teacher block", "depth", "student block", "depth"):
        table.add_column(column, justify="right")
    for number, pair in enumerate(pairs, start=1):
        table.add_row(
            str(number),
            f"{pair.teacher} of {num_teacher}",
            f"{pair.teacher / num_teacher:.0%}",
            f"{pair.student} of {num_student}",
            f"{pair.student / num_student:.0%}",
        )
    return table
