"""Distinct-n, repetition and lengths: by hand, and against sets of tuples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.evaluation.scoring.text_metrics import compute_text_metrics


def measure(*answers: str, truncated: Sequence[bool] = ()) -> dict[str, float]:
    marks = [*truncated, *[False] * len(answers)]
    pairs = zip(answers, marks, strict=False)
    return compute_text_metrics([{"answer": text, "truncated": mark} for text, mark in pairs])


def test_by_hand() -> None:
    metrics = measure("a b c d a b c d", "A b, c", truncated=(True,))
    # Tokens: a b c d a b c d | a b , c. Bigrams: ab bc cd da ab bc cd | ab "b," ",c".
    assert metrics["distinct_1"] == pytest.approx(100 * 5 / 12)
    assert metrics["distinct_2"] == pytest.approx(100 * 6 / 10)
    assert metrics["distinct_3"] == pytest.approx(100 * 6 / 8)  # abc bcd cda dab, "ab," "b,c"
    assert metrics["distinct_4"] == pytest.approx(100 * 5 / 6)  # abcd twice of five; "ab,c"
    assert metrics["rep_4"] == pytest.approx(100 * (1 / 5 + 0) / 2)
    assert metrics["mean_words"] == (8 + 3) / 2
    assert metrics["truncated_percent"] == 50.0
    assert metrics["empty"] == metrics["empty_percent"] == 0


def test_a_loop_repeats_almost_all() -> None:
    # 100 words have 97 4-grams, of which two are different.
    assert measure("no yes " * 50)["rep_4"] == pytest.approx(100 * (1 - 2 / 97))
    assert measure("no " * 3)["rep_4"] == 0.0  # too short for a 4-gram


def test_empty_and_short_answers() -> None:
    metrics = measure("", " \n", "word")
    assert (metrics["empty"], metrics["empty_percent"]) == (2, pytest.approx(200 / 3))
    assert metrics["distinct_1"] == 100.0
    assert metrics["distinct_2"] == metrics["distinct_4"] == metrics["rep_4"] == 0.0
    assert measure("")["distinct_1"] == 0.0


def test_every_script_has_tokens() -> None:
    assert measure("学校 школа École", "école")["distinct_1"] == 75.0
    assert measure("It isn't.")["distinct_4"] == 100.0  # it isn ' t . has two 4-grams


WORDS = ("red", "blue", "green", ".", "cat")
ANSWERS = st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=1, max_size=6)


@given(ANSWERS)
@settings(max_examples=200, deadline=None)
def test_equals_sets_of_tuples(answers: list[list[str]]) -> None:
    metrics = measure(*(" ".join(words) for words in answers))
    for n in (1, 2, 3, 4):
        grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
        expected = 100 * len(set(grams)) / len(grams) if grams else 0.0
        assert metrics[f"distinct_{n}"] == pytest.approx(expected)
    repeats = Fraction(0)
    for words in answers:
        own = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeats += Fraction(len(own) - len(set(own)), max(1, len(own)))
    assert metrics["rep_4"] == pytest.approx(float(100 * repeats / len(answers)))


def test_order_and_company_change_nothing() -> None:
    generator = random.Random(0)
    answers = [" ".join(generator.choices(WORDS, k=generator.randrange(40))) for _ in range(50)]
    metrics = measure(*answers)
    generator.shuffle(answers)
    assert measure(*answers) == metrics  # ranks gather shares in another order, bit for bit
