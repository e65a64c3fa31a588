"""Which teacher block is compared with which student block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from distilllens.config import LayerRule
from distilllens.errors import ConfigError

LISTS = "objective.lens.teacher_layers and student_layers"


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
    rule: LayerRule = "proportional",
    count: int = 5,
    every: int | None = None,
) -> list[LayerPair]:
    """Pairs layers as listed, or by rule.

    Args:
        num_teacher: Number of the teacher's blocks.
        num_student: Number of the student's blocks.
        teacher: Teacher blocks, strictly increasing, in [1, num_teacher]. Layer i is the output of
            block i, which is ``hidden_states[i]``. With ``proportional``, the default, as with
            ``explicit`` the lists are taken; the other rules refuse them.
        student: As many student blocks, strictly increasing, in [1, num_student].
        rule: All but lists leave the last block out, as the final divergence compares it already.
            ``proportional``: at equal shares of the depth. ``every_n``: student blocks n, 2n, …
            and the teacher blocks at the same depth, halves rounded up. ``last_k``: the last
            blocks of each model, paired from the top. ``explicit``: as listed.
            ``lens_similarity`` is measured on the models: `pair_by_similarity`.
        count: Number of pairs of ``proportional`` and ``last_k``; at most one fewer than the
            blocks of the smaller model.
        every: n of ``every_n``.

    Raises:
        ConfigError: Lists of unequal length, out of range, doubled or not increasing, or missing,
            or in conflict with the rule; an unknown rule; more pairs than the models have layers.
    """
    if rule not in get_args(LayerRule):
        raise ConfigError(
            f"objective.lens.rule={rule!r} is unknown; known: {', '.join(get_args(LayerRule))}"
        )
    if (teacher is None) != (student is None):
        raise ConfigError(f"{LISTS} must be given together")
    if teacher is None or student is None:
        teacher, student = _layers_by_rule(rule, num_teacher, num_student, count, every)
    elif rule not in ("proportional", "explicit"):
        raise ConfigError(
            f"objective.lens.rule={rule}, but {LISTS} are given",
            why="the lists leave the rule nothing to choose",
            fix="--objective.lens.rule explicit, or without the lists: "
            "--objective.lens.teacher_layers null --objective.lens.student_layers null",
        )
    if len(teacher) != len(student):
        raise ConfigError(
            f"objective.lens.teacher_layers has {len(teacher)} entries {list(teacher)}, "
            f"objective.lens.student_layers has {len(student)} {list(student)}",
            why="layers are compared pair by pair",
        )
    if not teacher:
        raise ConfigError(f"{LISTS} are empty")
    _check_layers("objective.lens.teacher_layers", teacher, num_teacher)
    _check_layers("objective.lens.student_layers", student, num_student)
    return [LayerPair(t, s) for t, s in zip(teacher, student, strict=True)]


def _layers_by_rule(
    rule: LayerRule, num_teacher: int, num_student: int, count: int, every: int | None
) -> tuple[list[int], list[int]]:
    """Returns teacher and student blocks of a rule that needs no more than the depths."""
    if rule == "explicit":
        raise ConfigError(f"objective.lens.rule=explicit needs {LISTS}")
    if rule == "lens_similarity":
        raise ConfigError(
            "objective.lens.rule=lens_similarity is measured on the models, when they are loaded"
        )
    if rule == "every_n":
        if every is None or every < 1:
            raise ConfigError(
                f"objective.lens.rule=every_n needs objective.lens.every ≥ 1, got {every}"
            )
        return _every_nth(num_teacher, num_student, every)
    most = min(num_teacher, num_student) - 1
    if not 1 <= count <= most:
        raise ConfigError(
            f"objective.lens.count={count} must be in [1, {most}] for {num_teacher} teacher "
            f"and {num_student} student blocks"
        )
    if rule == "last_k":
        teacher, student = (list(range(n - count, n)) for n in (num_teacher, num_student))
        return teacher, student
    return _equal_shares(num_teacher, count), _equal_shares(num_student, count)


def _equal_shares(num_layers: int, count: int) -> list[int]:
    """Returns round(num_layers · k / (count + 1)) for k = 1 … count, halves rounded up."""
    return [(2 * num_layers * k + count + 1) // (2 * (count + 1)) for k in range(1, count + 1)]


def _every_nth(num_teacher: int, num_student: int, every: int) -> tuple[list[int], list[int]]:
    """Returns teacher blocks round(num_teacher · s / num_student) and student blocks s."""
    student = list(range(every, num_student, every))
    teacher = [(2 * num_teacher * s + num_student) // (2 * num_student) for s in student]
    if not student:
        raise ConfigError(
            f"objective.lens.every={every} must be in [1, {num_student - 1}] for {num_student} "
            "student blocks"
        )
    if len(set(teacher)) < len(teacher) or teacher[0] < 1 or teacher[-1] >= num_teacher:
        raise ConfigError(
            f"objective.lens.every={every} pairs the student blocks {student} with {teacher} of "
            f"{num_teacher} teacher blocks",
            why="each needs a teacher block of its own, below the last",
            fix="another --objective.lens.every, or --objective.lens.rule proportional",
        )
    return teacher, student


def pair_by_similarity(
    divergence_KT: NDArray[np.float64], student_blocks: Sequence[int]
) -> list[LayerPair]:
    """Chooses the strictly increasing teacher blocks with the smallest mean divergence.

    Dynamic programming from the last student block down: the best of teacher blocks t, t + 1, … for
    student blocks k, k + 1, … is the better of taking t for k, and of doing without t.

    Args:
        divergence_KT: [k, t − 1]: of student block ``student_blocks[k]`` and teacher block t.
        student_blocks: K blocks, increasing.

    Returns:
        K pairs; of equally good choices the one with the smallest first teacher block, then the
        smallest second, and so on.

    Raises:
        ValueError: Not one row per student block, fewer teacher blocks than those, or a number
            that is not finite.
    """
    count, num_teacher = divergence_KT.shape
    if count != len(student_blocks) or count > num_teacher:
        raise ValueError(f"{divergence_KT.shape} divergences for {len(student_blocks)} blocks")
    if not np.isfinite(divergence_KT).all():
        raise ValueError("divergences must be finite")
    best = np.full((count + 1, num_teacher + 1), np.inf)  # sums from row k and column t on
    best[count] = 0.0
    for k in reversed(range(count)):
        for t in reversed(range(num_teacher)):
            best[k, t] = min(divergence_KT[k, t] + best[k + 1, t + 1], best[k, t + 1])
    pairs, t = [], 0
    for k, student in enumerate(student_blocks):
        while divergence_KT[k, t] + best[k + 1, t + 1] > best[k, t]:
            t += 1
        t += 1
        pairs.append(LayerPair(teacher=t, student=student))
    return pairs


def _check_layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise ConfigError(
                f"{name}: layer {layer} is out of range [1, {num_layers}]",
                why="layer i is the output of block i, counted from 1",
                fix=f"--{name} with numbers from 1 to {num_layers}, or null for both lists",
            )
    for before, after in itertools.pairwise(layers):
        if after <= before:
            raise ConfigError(
                f"{name}: {after} after {before}; layers must increase strictly",
                fix=f"sort --{name}, each number once",
            )


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


def similarity_table(pairs: Sequence[LayerPair], divergence_KT: Sequence[Sequence[float]]) -> Table:
    """Returns the divergences from which pairs were chosen, for the screen; the chosen starred."""
    table = Table(title="lens: divergence before training (* chosen)")
    for column in ("teacher block", *(f"student {pair.student}" for pair in pairs)):
        table.add_column(column, justify="right")
    for teacher, divergences in enumerate(zip(*divergence_KT, strict=True), start=1):
        cells = [
            f"{'* ' if pair.teacher == teacher else ''}{value:.4f}"
            for pair, value in zip(pairs, divergences, strict=True)
        ]
        table.add_row(str(teacher), *cells)
    return table
