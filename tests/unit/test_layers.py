"""Layer pairs: the published lists by rule, and every list that must be refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distilllens.errors import ConfigError
from distilllens.layers import LayerPair, build_layer_pairs, layer_table


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


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lens\.rule='last' is unknown; known: proportional"):
        build_layer_pairs(12, 6, rule="last")  # type: ignore[arg-type]


def test_table_shows_pairs_and_depths() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(layer_table([LayerPair(8, 2), LayerPair(40, 11)], 48, 12))
    rows = [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]
    assert "1 8 of 48 17% 2 of 12 17%" in rows
    assert "2 40 of 48 83% 11 of 12 92%" in rows
