"""What happens to the logits of one step before a token is chosen.

Shapes: ``B`` rows of a batch, ``T`` tokens so far, ``V`` vocabulary.

Every processor here treats a row as if it were alone: the padding on its left and its neighbours
in the batch change nothing. `ExampleSampler` turns the scores so that the *largest* one is a
sample, so ``generate`` runs with ``do_sample=False`` and takes the argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distilllens.config import SamplingConfig


class NonFiniteWatch(LogitsProcessor):
    """Remembers whether any row had no finite largest logit: NaN, +inf, or only −inf.

    The flag stays on the device and is read once a batch, so no step waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._seen = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._seen |= ~scores.amax(dim=-1).isfinite().all()
        return scores

    def has_seen(self) -> bool:
        """Tells whether a non-finite row has passed."""
        return bool(self._seen)


class KnownTokensOnly(LogitsProcessor):
    """Forbids the rows of the LM head that stand for no token.

    Heads are padded (Qwen2.5-7B: 152,064 rows, 151,665 tokens), and distillation against a smaller
    vocabulary never trains those rows down.

    Args:
        num_tokens: The largest token id + 1.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._num_tokens :] = -torch.inf
        return scores


class NoRepeatNgrams(LogitsProcessor):
    """Forbids every token that would repeat an n-gram of the row, its prompt included.

    The same rule as transformers' ``no_repeat_ngram_size``, which collects all n-grams again at
    each step and counts the padding as text; this one adds one n-gram a step and starts from the
    prompts without padding.

    Args:
        size: n (≥ 1).
        prompt_ids: The prompts' tokens, one list for each row, without padding.
    """

    def __init__(self, size: int, prompt_ids: Sequence[Sequence[int]]) -> None:
        if size < 1:
            raise ValueError(f"n-gram size {size} must be ≥ 1")
        self._size = size
        self._texts: list[list[int]] = [[] for _ in prompt_ids]
        self._followers: list[dict[tuple[int, ...], list[int]]] = [{} for _ in prompt_ids]
        for row, ids in enumerate(prompt_ids):
            for token in ids:
                self._append(row, token)
        self._is_first_step = True

    def _prefix(self, row: int) -> tuple[int, ...]:
        """Returns the last n − 1 tokens of a row (fewer while it is shorter)."""
        text = self._texts[row]
        return tuple(text[max(0, len(text) - self._size + 1) :])

    def _append(self, row: int, token: int) -> None:
        prefix = self._prefix(row)
        if len(prefix) == self._size - 1:
            self._followers[row].setdefault(prefix, []).append(token)
        self._texts[row].append(token)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._is_first_step:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self._append(row, token)
        self._is_first_step = False
        banned = [
            (row, token)
            for row, followers in enumerate(self._followers)
            for token in followers.get(self._prefix(row), ())
        ]
        if not banned:
            return scores
        rows, tokens = torch.tensor(banned, device=scores.device).unbind(dim=1)
        return scores.index_put((rows, tokens), scores.new_tensor(-torch.inf))


class ExampleSampler(LogitsProcessor):
    """Makes the argmax a sample of softmax(scores), with one random generator for each row.

    With E_v independent Exp(1), argmax_v p_v / E_v has exactly the distribution p: the exponential
    race, which is Gumbel-max without logarithms, and what ``torch.multinomial`` does for one draw.
    A row's noise depends on its own seed only, so its sample is the same in any batch. CPU and
    CUDA generators differ: a sample is reproducible on one kind of device.

    Args:
        seeds: One seed for each row.
        device: The scores' device; the noise is drawn there.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs_BV = scores.softmax(dim=-1)
        noise_BV = torch.empty_like(probs_BV)
        for row, generator in enumerate(self._generators):
            noise_BV[row].exponential_(generator=generator)
        return probs_BV / noise_BV.clamp_min_(torch.finfo(noise_BV.dtype).tiny)


def example_seed(seed: int, index: int) -> int:
    """Returns the seed of one example: well mixed, so near seeds and indices are unrelated."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def build_processors(
    settings: SamplingConfig,
    *,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    num_tokens: int,
    device: torch.device,
) -> tuple[LogitsProcessorList, NonFiniteWatch]:
    """Builds the processors of one batch, in transformers' own order.

    Args:
        settings: n-gram rule, temperature, top-k, top-p.
        prompt_ids: The rows' prompts without padding.
        seeds: The rows' seeds, used if ``settings.do_sample``.
        num_tokens: The tokenizer's largest token id + 1.
        device: The logits' device.

    Returns:
        The list for ``generate(..., do_sample=False)``, and the watch in it.
    """
    watch = NonFiniteWatch(device)
    processors = LogitsProcessorList([watch, KnownTokensOnly(num_tokens)])
    if settings.no_repeat_ngram_size > 0:
        processors.append(NoRepeatNgrams(settings.no_repeat_ngram_size, prompt_ids))
    if settings.do_sample:
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(ExampleSampler(seeds, device))
    return processors, watch
