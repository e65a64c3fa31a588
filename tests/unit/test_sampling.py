"""The processors of one step: draws follow softmax, the n-gram rule is the library's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from distilllens.config import EvalConfig
from distilllens.evaluation.decoding.sampling import (
    NoRepeatNgrams,
    RowNoise,
    RowRules,
    TokenChooser,
    example_seed,
    keep_top_k,
    keep_top_p,
    noise_width,
    race,
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
    chooser = TokenChooser(settings, num_tokens=len(logits_V), device=CPU)
    rows = [RowRules(settings, [0], example_seed(10, row)) for row in range(num_rows)]
    steps = [chooser.choose(logits_V.repeat(num_rows, 1), rows) for _ in range(num_steps)]
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
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))

    def draws(places: list[int]) -> Tensor:
        chooser = TokenChooser(DEFAULT, num_tokens=50, device=CPU)
        rows = [RowRules(DEFAULT, [0], place) for place in places]
        return torch.stack([chooser.choose(logits_BV[places], rows) for _ in range(40)], dim=1)

    together = draws([0, 1, 2, 3, 4, 5])
    assert torch.equal(together[[3]], draws([3]))
    assert torch.equal(together[[5, 1]], draws([5, 1]))
    assert not torch.equal(draws([0, 0])[0], draws([0, 1])[1])


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8, 9, 10, 17, 1000, 50_257])
def test_both_stages_of_the_race_reach_every_token(vocabulary: int) -> None:
    """A token of all the weight wins whatever the noise; so does the last of an uneven block."""
    for token in {0, vocabulary // 2, vocabulary - 1}:
        weights = torch.zeros(1, vocabulary)
        weights[0, token] = 1e-30
        noise = torch.rand(1, noise_width(vocabulary)) + 1e-6
        assert race(weights, noise).tolist() == [token]


def test_the_race_needs_few_random_numbers() -> None:
    assert noise_width(49_152) < 450
    assert noise_width(151_665) < 800


def test_noise_is_exponential_and_goes_on_where_it_was() -> None:
    noise = RowNoise(7)
    values = torch.cat([noise.draw(500) for _ in range(100)])
    assert values.min() > 0
    bounds = -torch.log1p(-torch.arange(1, 10) / 10)  # deciles of Exp(1)
    counts = torch.bincount(torch.bucketize(values, bounds), minlength=10)
    assert chi_square_p_value(counts, torch.full((10,), 0.1)) > 1e-3
    again = RowNoise(7)
    assert torch.equal(torch.cat([again.draw(500) for _ in range(100)]), values)


@given(st.integers(0, 10**6), st.integers(1, 400), st.floats(0.05, 0.99))
@settings(max_examples=50)
def test_top_k_and_top_p_keep_what_transformers_keeps(seed: int, k: int, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits: Any = torch.randn(3, 400, generator=generator) * (1 + seed % 4)
    weights = logits.softmax(-1)
    expected_k = TopKLogitsWarper(k)(EMPTY, logits.clone()).isfinite()
    assert torch.equal(keep_top_k(weights, k) > 0, expected_k)
    kept = keep_top_p(weights, p)
    assert torch.equal(kept > 0, TopPLogitsWarper(p)(EMPTY, logits.clone()).isfinite())
    assert torch.equal(kept[kept > 0], weights[kept > 0])


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
    ours, theirs = NoRepeatNgrams(size, prompt), NoRepeatNGramLogitsProcessor(size)
    for end in range(len(answer) + 1):
        ids: Any = torch.tensor([prompt + answer[:end]])
        scores: Any = torch.zeros(1, 4)
        assert set(ours.banned()) == set(theirs(ids, scores)[0].isinf().nonzero()[:, 0].tolist())
        ours.append(answer[end] if end < len(answer) else 0)


def test_forbidden_ngrams_are_never_chosen() -> None:
    greedy = EvalConfig(do_sample=False, no_repeat_ngram_size=3)
    rows = [RowRules(greedy, prompt, 0) for prompt in ([7, 7], [1, 2, 3, 1, 2])]
    chooser = TokenChooser(greedy, num_tokens=9, device=CPU)
    logits = torch.zeros(2, 9)
    logits[:, 3] = 1.0
    assert chooser.choose(logits, rows).tolist() == [3, 0]  # the second row has said 1 2 3


def test_ngram_size_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="n-gram size 0"):
        NoRepeatNgrams(0, [1])


def chosen(logits: Tensor, num_tokens: int, config: EvalConfig) -> tuple[list[int], bool]:
    """Returns one choice for each row, and whether something was not finite."""
    chooser = TokenChooser(config, num_tokens=num_tokens, device=CPU)
    rows = [RowRules(config, [0], seed) for seed in range(len(logits))]
    tokens = chooser.choose(logits, rows).tolist()
    chooser.choose(torch.zeros(len(logits), num_tokens), rows)  # what has been seen stays seen
    return tokens, chooser.has_seen_non_finite()


GREEDY = replace(DEFAULT, do_sample=False)


@pytest.mark.parametrize("config", [DEFAULT, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float, config: EvalConfig) -> None:
    logits = torch.zeros(2, 3)
    logits[0, 0] = -torch.inf  # one forbidden token is fine
    assert not chosen(logits.clone(), 3, config)[1]
    logits[1, 2] = bad
    assert chosen(logits, 3, config)[1]


def test_a_row_without_any_token_is_seen() -> None:
    tokens, is_seen = chosen(torch.full((1, 3), -torch.inf), 3, DEFAULT)
    assert is_seen
    assert 0 <= tokens[0] < 3


@pytest.mark.parametrize("config", [DEFAULT, GREEDY], ids=["sampled", "greedy"])
def test_rows_of_the_head_without_a_token_are_never_drawn(config: EvalConfig) -> None:
    logits = torch.zeros(50, 5)
    logits[:, 3:] = 9.0
    assert max(chosen(logits, 3, config)[0]) < 3
