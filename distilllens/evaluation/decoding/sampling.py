"""What happens to the logits of one step before a token is chosen, and the choice.

Shapes: ``B`` rows of a batch, ``V`` tokens of the vocabulary, ``M`` blocks of ``S`` tokens.

Every rule here treats a row as if it were alone: its neighbours in the batch change nothing, so
rows may come and go between steps. A row's state is a `RowRules`; `TokenChooser` holds what all
rows share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distilllens.config import SamplingConfig

STEPS_AHEAD = 16
"""Steps for which a row's random numbers are drawn at once; another number gives other samples."""
TOP_P_FIRST = 256
"""Likeliest tokens that top-p looks at first; it looks at more where they do not suffice."""


class NoRepeatNgrams:
    """Tells every token that would repeat an n-gram of one row, its prompt included.

    The same rule as transformers' ``no_repeat_ngram_size``, which collects all n-grams again at
    each step and counts the padding as text; this one adds one n-gram a step and starts from the
    prompt without padding.

    Args:
        size: n (≥ 1).
        prompt_ids: The prompt's tokens, without padding.
    """

    def __init__(self, size: int, prompt_ids: Sequence[int]) -> None:
        if size < 1:
            raise ValueError(f"n-gram size {size} must be ≥ 1")
        self._size = size
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in prompt_ids:
            self.append(token)

    def _prefix(self) -> tuple[int, ...]:
        """Returns the last n − 1 tokens (fewer while the text is shorter)."""
        return tuple(self._text[max(0, len(self._text) - self._size + 1) :])

    def append(self, token: int) -> None:
        """Adds a token to the text."""
        prefix = self._prefix()
        if len(prefix) == self._size - 1:
            self._followers.setdefault(prefix, []).append(token)
        self._text.append(token)

    def banned(self) -> Sequence[int]:
        """Returns the tokens that must not come next; one may stand there twice."""
        return self._followers.get(self._prefix(), ())


class RowNoise:
    """The random numbers of one row: independent Exp(1), on the CPU, by a generator of its own.

    Args:
        seed: Fixes them all.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._ahead: list[Tensor] = []

    def draw(self, width: int) -> Tensor:
        """Returns the next step's numbers, ``[width]``; the width must stay the same."""
        if not self._ahead:
            noise = torch.empty(STEPS_AHEAD, width).exponential_(generator=self._generator)
            noise.clamp_min_(torch.finfo(noise.dtype).tiny)
            self._ahead = list(noise.unbind())[::-1]
        return self._ahead.pop()


class RowRules:
    """What one row carries from step to step: its n-grams and its random numbers.

    Args:
        settings: n-gram rule, and whether to sample.
        prompt_ids: The prompt's tokens, without padding.
        seed: Of the row's samples.
    """

    def __init__(self, settings: SamplingConfig, prompt_ids: Sequence[int], seed: int) -> None:
        size = settings.no_repeat_ngram_size
        self._ngrams = NoRepeatNgrams(size, prompt_ids) if size > 0 else None
        self.noise = RowNoise(seed)

    def append(self, token: int) -> None:
        """Takes note of the token that was chosen."""
        if self._ngrams is not None:
            self._ngrams.append(token)

    def banned(self) -> Sequence[int]:
        """Returns the tokens that must not come next."""
        return () if self._ngrams is None else self._ngrams.banned()


class TokenChooser:
    """Chooses one token for each row: the likeliest, or a sample.

    Order of the rules, as in transformers: rows of the head that stand for no token are left out
    (heads are padded, Qwen2.5-7B's to 152,064 for 151,665 tokens, and distillation against a
    smaller vocabulary never trains those rows down), n-grams, temperature, top-k, top-p.

    Args:
        settings: Temperature, top-k, top-p, and whether to sample.
        num_tokens: The tokenizer's largest token id + 1.
        device: The logits'.
    """

    def __init__(self, settings: SamplingConfig, *, num_tokens: int, device: torch.device) -> None:
        self._settings = settings
        self._num_tokens = num_tokens
        self._not_finite = torch.zeros((), dtype=torch.bool, device=device)

    def choose(self, logits_BV: Tensor, rows: Sequence[RowRules]) -> Tensor:
        """Returns one token for each row, ``[B]`` (int64), without telling it to the rows.

        Args:
            logits_BV: float32; overwritten.
            rows: Of the batch, in its order.
        """
        scores_BV = logits_BV[:, : self._num_tokens]
        # The flag stays on the device: no step waits for it.
        self._not_finite |= ~scores_BV.amax(dim=-1).isfinite().all()
        banned = [(row, token) for row, rules in enumerate(rows) for token in rules.banned()]
        if banned:
            places = torch.tensor(banned, device=scores_BV.device)
            scores_BV[places[:, 0], places[:, 1]] = -torch.inf
        if not self._settings.do_sample:
            return scores_BV.argmax(dim=-1)
        if self._settings.temperature != 1.0:
            scores_BV = scores_BV / self._settings.temperature
        weights_BV = scores_BV.softmax(dim=-1)
        if self._settings.top_k > 0:
            weights_BV = keep_top_k(weights_BV, self._settings.top_k)
        if self._settings.top_p < 1.0:
            weights_BV = keep_top_p(weights_BV, self._settings.top_p)
        width = noise_width(weights_BV.shape[-1])
        noise = torch.stack([rules.noise.draw(width) for rules in rows])
        return race(weights_BV, noise.to(weights_BV.device))

    def has_seen_non_finite(self) -> bool:
        """Tells whether any row ever had no finite largest logit: NaN, +inf, or only −inf."""
        return bool(self._not_finite)


def keep_top_k(weights_BV: Tensor, k: int) -> Tensor:
    """Returns the weights with 0 for all below the k-th largest of a row; ties with it stay."""
    kth_B1 = weights_BV.topk(min(k, weights_BV.shape[-1]), dim=-1).values[:, -1:]
    return weights_BV.where(weights_BV >= kth_B1, 0)


def keep_top_p(weights_BV: Tensor, p: float) -> Tensor:
    """Returns the weights with 0 outside each row's smallest set that has the share ``p``.

    A full sort of 49,152 tokens takes 4 ms a row on a CPU, its first few tokens 0.1 ms.
    """
    wanted_B1 = p * weights_BV.sum(dim=-1, keepdim=True)
    count = min(TOP_P_FIRST, weights_BV.shape[-1])
    while True:
        largest_BK, tokens_BK = weights_BV.topk(count, dim=-1)
        sums_BK = largest_BK.cumsum(dim=-1)
        if count == weights_BV.shape[-1] or bool((sums_BK[:, -1:] >= wanted_B1).all()):
            break
        count = min(8 * count, weights_BV.shape[-1])
    # A token stays if those before it do not suffice.
    kept_BK = largest_BK.where(sums_BK - largest_BK < wanted_B1, 0)
    return torch.zeros_like(weights_BV).scatter_(-1, tokens_BK, kept_BK)


def block_size(vocabulary: int) -> int:
    """Returns ``S``, the tokens of a block, near √V so that both races are short."""
    return max(1, math.isqrt(vocabulary))


def noise_width(vocabulary: int) -> int:
    """Returns the random numbers that `race` needs for a row: M + S, about 2 √V."""
    size = block_size(vocabulary)
    return math.ceil(vocabulary / size) + size


def race(weights_BV: Tensor, noise_BN: Tensor) -> Tensor:
    """Returns a sample of each row's weights: a block by its sum, then a token of that block.

    With E_v independent Exp(1), argmax_v w_v / E_v has exactly the distribution w / Σ w: the
    exponential race, which ``torch.multinomial`` runs over all V tokens. In two stages it needs
    2 √V random numbers instead of V, which at 49,152 tokens cost 1.1 ms a row on a CPU, a fifth
    of a small model's step. Rounding of the weights moves a race's result as rarely as in one
    stage; a search in the cumulative distribution would move with every token before the sample.

    Args:
        weights_BV: ≥ 0, of any sum > 0; tokens of weight 0 are never chosen.
        noise_BN: Exp(1), > 0, ``[B, noise_width(V)]``.
    """
    vocabulary = weights_BV.shape[-1]
    size = block_size(vocabulary)
    num_whole = vocabulary // size
    whole_BMS = weights_BV[:, : num_whole * size].unflatten(-1, (num_whole, size))
    sums_BM = whole_BMS.sum(dim=-1)
    if num_whole * size < vocabulary:
        rest_B1 = weights_BV[:, num_whole * size :].sum(dim=-1, keepdim=True)
        sums_BM = torch.cat([sums_BM, rest_B1], dim=-1)
    num_blocks = sums_BM.shape[-1]
    block_B1 = (sums_BM / noise_BN[:, :num_blocks]).argmax(dim=-1, keepdim=True)
    tokens_BS = block_B1 * size + torch.arange(size, device=weights_BV.device)
    inner_BS = weights_BV.gather(-1, tokens_BS.clamp_max(vocabulary - 1))
    inner_BS = inner_BS.masked_fill(tokens_BS >= vocabulary, 0)
    winner_B1 = (inner_BS / noise_BN[:, num_blocks:]).argmax(dim=-1, keepdim=True)
    return tokens_BS.gather(-1, winner_B1)[:, 0]


def example_seed(seed: int, index: int) -> int:
    """Returns the seed of one example: well mixed, so near seeds and indices are unrelated."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])
