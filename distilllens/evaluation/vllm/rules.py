"""The rules of our sampling that vLLM lacks, as a logits processor that its workers load by name.

Only vLLM imports this file: it needs vLLM's own base class. The interface is that of vLLM's V1
model runner; what comes back is checked by `backend`, whatever runner a version takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distilllens.evaluation.decoding.sampling import NoRepeatNgrams

_interface: Any = importlib.import_module("vllm.v1.sample.logits_processor")


class RowRulesProcessor(_interface.AdapterLogitsProcessor):
    """Forbids rows of the head that stand for no token, and repeated n-grams.

    Reads ``num_tokens`` and ``no_repeat_ngram_size`` of a request's ``extra_args``.
    """

    def is_argmax_invariant(self) -> bool:
        """Tells vLLM that the likeliest token may change."""
        return False

    def new_req_logits_processor(
        self, params: Any
    ) -> Callable[[Sequence[int], Sequence[int], Tensor], Tensor]:
        """Returns the rules of one request, for its prompt, its new tokens and their logits."""
        return request_rules(**params.extra_args)


def request_rules(
    *, num_tokens: int, no_repeat_ngram_size: int
) -> Callable[[Sequence[int], Sequence[int], Tensor], Tensor]:
    """Returns the rules of one request; they follow its tokens as they come."""
    ngrams: NoRepeatNgrams | None = None
    count = 0

    def apply(prompt_ids: Sequence[int], output_ids: Sequence[int], logits_V: Tensor) -> Tensor:
        nonlocal ngrams, count
        logits_V[num_tokens:] = -torch.inf
        if no_repeat_ngram_size > 0:
            if ngrams is None:
                ngrams = NoRepeatNgrams(no_repeat_ngram_size, prompt_ids)
            for token in output_ids[count:]:
                ngrams.append(token)
            count = len(output_ids)
            if banned := list(ngrams.banned()):
                logits_V[torch.tensor(banned, device=logits_V.device)] = -torch.inf
        return logits_V

    return apply
