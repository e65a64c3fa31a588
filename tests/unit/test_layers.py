"""Layer pairs: the published lists by rule, and every list that must be refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from distilllens.config import LayerRule
from distilllens.errors import ConfigError
from distilllens.layers import (
    LayerPair,
    build_layer_pairs,
    layer_table,
    pair_by_similarity,
    similarity_table,
)


def lists(pairs: list[LayerPair]) -> tuple[list[int], list[int]]:
    return [pair.teacher for pair in pairs], [pair.student for pair in pairs]


@pytest.mark.parametrize(
    ("teacher_blocks", "student_blocks", "count", "teacher", "student"),
    [
        (48, 12, 5, [8, 16, 24, 32, 40], [2, 4, 6, 8, 10]),  # GPT-2 1.5B and base
        (48, 24, 5, [8, 16, 24, 32, 40], [4, 8, 12, 16, 20]),  # GPT-2 1.5B and medium
        (36, 28, 4, [7, 14, 22, 29], [6, 11, 17, 22]),  # Qwen2.5 3B and 1.5B
        (2, 2, 1, [1], [1]),
        (4, 3, 2, [1, 3], [1, 2]),  # 4/3 = 1.33 and 2.67
        (5, 3, 1, [3], [2]),  # 2.5 and 1.5: halves go up
        (9, 4, 3, [2, 5, 7], [1, 2, 3]),  # 2.25, 4.5, 6.75
    ],
)
def test_rule(
    teacher_blocks: int, student_blocks: int, count: int, teacher: list[int], student: list[int]
) -> None:
    pairs = build_layer_pairs(teacher_blocks, student_blocks, count=count)
    assert lists(pairs) == (teacher, student)


@given(data=st.data(), num_teacher=st.integers(2, 200), num_student=st.integers(2, 200))
def test_rule_always_gives_usable_layers(
    data: st.DataObject, num_teacher: int, num_student: int
) -> None:
    count = data.draw(st.integers(1, min(num_teacher, num_student) - 1))
    teacher, student = lists(build_layer_pairs(num_teacher, num_student, count=count))
    for layers, blocks in ((teacher, num_teacher), (student, num_student)):
        assert len(layers) == count
        assert layers == sorted(set(layers))
        assert layers[0] >= 1 and layers[-1] < blocks  # the last is the final divergence's
        for k, layer in enumerate(layers, start=1):
            assert abs(layer / blocks - k / (count + 1)) <= 0.5 / blocks + 1e-9


def test_explicit_lists_are_taken_as_they_are() -> None:
    pairs = build_layer_pairs(32, 22, teacher=[1, 10, 32], student=[2, 3, 22], count=99)
    assert pairs == [LayerPair(1, 2), LayerPair(10, 3), LayerPair(32, 22)]


@pytest.mark.parametrize(
    ("teacher", "student", "told"),
    [
        ([2, 4, 6], [1, 2], r"teacher_layers has 3 entries \[2, 4, 6\].*student_layers has 2 \[1"),
        ([2, 13], [1, 2], r"lens\.teacher_layers: layer 13 is out of range \[1, 12\]"),
        ([2, 4], [1, 7], r"lens\.student_layers: layer 7 is out of range \[1, 6\]"),
        ([0, 4], [1, 2], r"lens\.teacher_layers: layer 0 is out of range \[1, 12\]"),
        ([2, 4], [-1, 2], r"lens\.student_layers: layer -1 is out of range \[1, 6\]"),
        ([2, 2], [1, 2], r"lens\.teacher_layers: 2 after 2; layers must increase strictly"),
        ([2, 4], [3, 1], r"lens\.student_layers: 1 after 3; layers must increase strictly"),
        ([], [], "are empty"),
        ([2], None, "must be given together"),
        (None, [2], "must be given together"),
        ([], None, "must be given together"),
    ],
)
def test_refused_lists(teacher: list[int] | None, student: list[int] | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        build_layer_pairs(12, 6, teacher=teacher, student=student)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("count", [0, -1, 6, 12])
def test_refused_counts(count: int) -> None:
    told = rf"lens\.count={count} must be in \[1, 5\] for 12 teacher and 6 student blocks"
    with pytest.raises(ConfigError, match=told):
        build_layer_pairs(12, 6, count=count)
    with pytest.raises(ConfigError, match=told.replace("12 t", "6 t").replace("6 s", "12 s")):
        build_layer_pairs(6, 12, count=count)


@pytest.mark.parametrize("lists", [None, [2, 3]])
def test_unknown_rule_is_refused(lists: list[int] | None) -> None:
    with pytest.raises(ConfigError, match=r"lens\.rule='last' is unknown; known: proportional"):
        build_layer_pairs(12, 6, rule="last", teacher=lists, student=lists)  # type: ignore[arg-type]


# --- The other rules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher_blocks", "student_blocks", "every", "teacher", "student"),
    [
        (48, 12, 2, [8, 16, 24, 32, 40], [2, 4, 6, 8, 10]),  # the published pairs too
        (48, 12, 5, [20, 40], [5, 10]),
        (48, 12, 11, [44], [11]),
        (30, 10, 3, [9, 18, 27], [3, 6, 9]),
        (32, 22, 6, [9, 17, 26], [6, 12, 18]),  # 8.73, 17.45, 26.18
        (10, 4, 1, [3, 5, 8], [1, 2, 3]),  # 2.5 and 7.5 go up
    ],
)
def test_every_n(
    teacher_blocks: int, student_blocks: int, every: int, teacher: list[int], student: list[int]
) -> None:
    pairs = build_layer_pairs(teacher_blocks, student_blocks, rule="every_n", every=every, count=99)
    assert lists(pairs) == (teacher, student)


@pytest.mark.parametrize(
    ("teacher_blocks", "student_blocks", "every", "told"),
    [
        (12, 6, None, "needs objective.lens.every ≥ 1, got None"),
        (12, 6, 0, "needs objective.lens.every ≥ 1, got 0"),
        (12, 6, 6, r"lens.every=6 must be in \[1, 5\] for 6 student blocks"),
        (3, 12, 2, r"student blocks \[2, 4, 6, 8, 10\] with \[1, 1, 2, 2, 3\] of 3"),  # doubled
        (2, 12, 10, r"\[10\] with \[2\] of 2"),  # the last: 10 / 6 = 1.67
        (2, 12, 2, r"\[0, "),  # 4 / 12 = 0.33
    ],
)
def test_refused_every(
    teacher_blocks: int, student_blocks: int, every: int | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        build_layer_pairs(teacher_blocks, student_blocks, rule="every_n", every=every)


@pytest.mark.parametrize(
    ("teacher_blocks", "student_blocks", "count", "teacher", "student"),
    [
        (48, 12, 3, [45, 46, 47], [9, 10, 11]),
        (6, 12, 5, [1, 2, 3, 4, 5], [7, 8, 9, 10, 11]),
        (2, 2, 1, [1], [1]),
    ],
)
def test_last_k(
    teacher_blocks: int, student_blocks: int, count: int, teacher: list[int], student: list[int]
) -> None:
    pairs = build_layer_pairs(teacher_blocks, student_blocks, rule="last_k", count=count)
    assert lists(pairs) == (teacher, student)
    with pytest.raises(ConfigError, match=r"lens\.count=\d+ must be in"):
        build_layer_pairs(teacher_blocks, student_blocks, rule="last_k", count=student_blocks)


def test_explicit_needs_lists_and_takes_them() -> None:
    pairs = build_layer_pairs(12, 6, rule="explicit", teacher=[5, 12], student=[1, 6])
    assert pairs == [LayerPair(5, 1), LayerPair(12, 6)]
    with pytest.raises(ConfigError, match=r"explicit needs objective\.lens\.teacher_layers"):
        build_layer_pairs(12, 6, rule="explicit")


@pytest.mark.parametrize("rule", ["every_n", "last_k", "lens_similarity"])
def test_lists_and_another_rule_contradict_each_other(rule: LayerRule) -> None:
    with pytest.raises(ConfigError, match=f"lens.rule={rule}, but objective.lens") as caught:
        build_layer_pairs(12, 6, rule=rule, teacher=[5], student=[1], every=2)
    assert "--objective.lens.rule explicit" in caught.value.fix


def test_similarity_is_no_matter_of_depths() -> None:
    with pytest.raises(ConfigError, match="lens_similarity is measured on the models"):
        build_layer_pairs(12, 6, rule="lens_similarity")


# --- The choice by similarity -------------------------------------------------------------------


def brute_force(divergence_KT: np.ndarray) -> tuple[float, list[int]]:
    """Tries all increasing choices, the lexically smallest first."""
    count, num_teacher = divergence_KT.shape
    best: tuple[float, list[int]] = (np.inf, [])
    for choice in combinations(range(num_teacher), count):
        total = sum(divergence_KT[k, t] for k, t in enumerate(choice))
        if total < best[0]:
            best = (float(total), [t + 1 for t in choice])
    return best


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float]) -> np.ndarray:
    num_teacher = draw(st.integers(1, 8))
    count = draw(st.integers(1, min(4, num_teacher)))
    size = count * num_teacher
    cells = draw(st.lists(values, min_size=size, max_size=size))
    return np.array(cells, dtype=np.float64).reshape(count, num_teacher)


@given(divergence_KT=matrices(st.integers(0, 3).map(float)))  # exact sums, and many ties
def test_choice_and_ties_as_by_brute_force(divergence_KT: np.ndarray) -> None:
    students = [2 * k + 3 for k in range(len(divergence_KT))]
    teacher, student = lists(pair_by_similarity(divergence_KT, students))
    assert student == students
    assert teacher == brute_force(divergence_KT)[1]


@given(divergence_KT=matrices(st.floats(0, 50)))
def test_choice_is_as_good_as_by_brute_force(divergence_KT: np.ndarray) -> None:
    teacher, _ = lists(pair_by_similarity(divergence_KT, range(1, len(divergence_KT) + 1)))
    assert teacher == sorted(set(teacher))
    total = sum(divergence_KT[k, t - 1] for k, t in enumerate(teacher))
    assert total == pytest.approx(brute_force(divergence_KT)[0], rel=1e-12)


def test_choice_by_hand() -> None:
    divergences = np.array([[0.9, 0.1, 0.5, 0.9], [0.9, 0.0, 0.9, 0.3], [0.9, 0.9, 0.9, 0.2]])
    # Each row's own best would be blocks 2, 2 and 4. In order: 2, 3, 4 = 0.1 + 0.9 + 0.2 = 1.2,
    # against 1, 2, 4 = 0.9 + 0.0 + 0.2 = 1.1.
    assert lists(pair_by_similarity(divergences, [2, 5, 9])) == ([1, 2, 4], [2, 5, 9])


@pytest.mark.parametrize(
    ("divergences", "blocks"),
    [
        ([[0.1, 0.2]], [1, 2]),
        ([[0.1], [0.2]], [1, 2]),
        ([[0.1, float("nan")]], [1]),
        ([[0.1, float("inf")]], [1]),
    ],
)
def test_impossible_choices(divergences: list[list[float]], blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="diverg"):
        pair_by_similarity(np.array(divergences), blocks)


# --- On the screen ------------------------------------------------------------------------------


def shown(table: Table) -> list[str]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]


def test_table_shows_pairs_and_depths() -> None:
    rows = shown(layer_table([LayerPair(8, 2), LayerPair(40, 11)], 48, 12))
    assert "1 8 of 48 17% 2 of 12 17%" in rows
    assert "2 40 of 48 83% 11 of 12 92%" in rows


def test_table_stars_what_was_chosen() -> None:
    pairs = [LayerPair(teacher=1, student=2), LayerPair(teacher=3, student=4)]
    rows = shown(similarity_table(pairs, [[0.1, 0.25, 0.3], [0.4, 0.5, 0.0]]))
    assert "1 * 0.1000 0.4000" in rows
    assert "2 0.2500 0.5000" in rows
    assert "3 0.3000 * 0.0000" in rows
