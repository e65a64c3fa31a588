"""The processors of one step: draws follow softmax, the n-gram rule is the library's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from distilllens.config import EvalConfig
from distilllens.evaluation.sampling import (
    ExampleSampler,
    KnownTokensOnly,
    NonFiniteWatch,
    NoRepeatNgrams,
    build_processors,
    example_seed,
)

CPU = torch.device("cpu")
EMPTY: Any = torch.zeros(1, 0, dtype=torch.long)
DEFAULT = EvalConfig(no_repeat_ngram_size=0)


def chi_square_p_value(counts: Tensor, probs: Tensor) -> float:
    """Returns the chance of such a deviation if ``counts`` are draws from ``probs`` (> 0)."""
    expected = probs.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(probs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def draw(logits_V: Tensor, num_rows: int, num_steps: int, settings: EvalConfig = DEFAULT) -> Tensor:
    """Returns tokens [num_rows, num_steps], each row with its own seed."""
    processors, _ = build_processors(
        settings,
        prompt_ids=[[0]] * num_rows,
        seeds=[example_seed(10, row) for row in range(num_rows)],
        num_tokens=len(logits_V),
        device=CPU,
    )
    steps = []
    for _ in range(num_steps):
        scores_BV: Any = logits_V.repeat(num_rows, 1)
        for processor in processors:
            scores_BV = processor(EMPTY, scores_BV)
        steps.append(scores_BV.argmax(dim=-1))
    return torch.stack(steps, dim=1)


def test_draws_follow_softmax_over_rows_and_steps() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -2.0, -3.0])
    tokens = draw(logits_V, num_rows=3000, num_steps=20)
    counts = torch.bincount(tokens.flatten(), minlength=8)
    assert chi_square_p_value(counts, logits_V.softmax(-1)) > 1e-3
    # The same test refuses a distribution that is off by a twentieth of a temperature.
    assert chi_square_p_value(counts, (logits_V / 1.05).softmax(-1)) < 1e-3


def test_consecutive_draws_of_a_row_are_independent() -> None:
    logits_V = torch.tensor([1.0, 0.3, 0.0, -0.7])
    tokens = draw(logits_V, num_rows=2000, num_steps=10)
    pairs = (tokens[:, :-1] * 4 + tokens[:, 1:])[:, ::2].flatten()
    probs = logits_V.softmax(-1)
    counts = torch.bincount(pairs, minlength=16)
    assert chi_square_p_value(counts, torch.outer(probs, probs).flatten()) > 1e-3


def test_temperature_top_k_and_top_p_shape_the_draws() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    hot = torch.bincount(
        draw(logits_V, 3000, 5, replace(DEFAULT, temperature=2.0)).flatten(), minlength=5
    )
    assert chi_square_p_value(hot, (logits_V / 2).softmax(-1)) > 1e-3
    top_k = torch.bincount(
        draw(logits_V, 3000, 5, replace(DEFAULT, top_k=3)).flatten(), minlength=5
    )
    assert top_k[3:].sum() == 0
    assert chi_square_p_value(top_k[:3], logits_V[:3].softmax(-1)) > 1e-3
    # softmax = .56 .21 .13 .08 .03: the smallest set with 70 % is the first two tokens.
    top_p = torch.bincount(
        draw(logits_V, 3000, 5, replace(DEFAULT, top_p=0.7)).flatten(), minlength=5
    )
    assert top_p[2:].sum() == 0
    assert chi_square_p_value(top_p[:2], logits_V[:2].softmax(-1)) > 1e-3


def test_a_flat_large_vocabulary_is_fully_reached_and_forbidden_tokens_never() -> None:
    logits_V = torch.zeros(1000)
    logits_V[::2] = -torch.inf
    tokens = draw(logits_V, num_rows=100, num_steps=100).flatten()
    assert (tokens % 2 == 1).all()
    counts = torch.bincount(tokens, minlength=1000)[1::2]
    assert chi_square_p_value(counts, torch.full((500,), 1 / 500)) > 1e-3


def test_a_row_draws_the_same_in_any_batch() -> None:
    scores_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = ExampleSampler([1, 2, 3, 4, 5, 6], CPU)(EMPTY, scores_BV)
    alone = ExampleSampler([4], CPU)(EMPTY, scores_BV[3:4])
    assert torch.equal(together[3:4], alone)
    assert not torch.equal(together[0], together[1])


def test_example_seeds_are_distinct_for_neighbours() -> None:
    seeds = {example_seed(seed, index) for seed in (10, 20, 30, 40, 50) for index in range(2000)}
    assert len(seeds) == 10_000


@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), max_size=12),
)
@settings(max_examples=200)
def test_ngram_rule_equals_the_library(size: int, prompt: list[int], answer: list[int]) -> None:
    ours, theirs = NoRepeatNgrams(size, [prompt]), NoRepeatNGramLogitsProcessor(size)
    scores: Any = torch.zeros(1, 4)
    for end in range(len(answer) + 1):
        ids: Any = torch.tensor([prompt + answer[:end]])
        assert torch.equal(ours(ids, scores), theirs(ids, scores.clone()))


def test_ngram_rule_ignores_the_padding() -> None:
    # Row 0 is padded with three 7s; were they text, "7 7 → 7" would be forbidden after "7 7".
    processor = NoRepeatNgrams(3, [[7, 7], [1, 2, 3, 1, 2]])
    scores = processor(torch.tensor([[7, 7, 7, 7, 7], [1, 2, 3, 1, 2]]), torch.zeros(2, 9))
    assert scores[0].isfinite().all()
    assert scores[1].isinf().nonzero().flatten().tolist() == [3]


def test_ngram_size_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="n-gram size 0"):
        NoRepeatNgrams(0, [[1]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_watch_sees_what_is_not_finite(bad: float) -> None:
    watch = NonFiniteWatch(CPU)
    scores = torch.zeros(2, 3)
    scores[0, 0] = -torch.inf  # one forbidden token is fine
    watch(EMPTY, scores)
    assert not watch.has_seen()
    scores[1, 2] = bad
    watch(EMPTY, scores)
    watch(EMPTY, torch.zeros(2, 3))
    assert watch.has_seen()


def test_watch_sees_a_row_without_any_token() -> None:
    watch = NonFiniteWatch(CPU)
    watch(EMPTY, torch.full((1, 3), -torch.inf))
    assert watch.has_seen()


def test_rows_of_the_head_without_a_token_are_never_drawn() -> None:
    scores = KnownTokensOnly(3)(EMPTY, torch.zeros(2, 5))
    assert scores.isinf().tolist() == [[False, False, False, True, True]] * 2
