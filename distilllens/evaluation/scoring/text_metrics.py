"""Diversity, repetition and length of a set's answers, from the texts alone.

A token of these metrics is a word or a punctuation mark of the lower-cased text, in any script;
"It isn't." has five: it, isn, ', t and the full stop. No n-gram crosses from one answer into the
next. Shapes: A answers, W tokens of all answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKEN = re.compile(r"\w+|[^\w\s]")
SIZES = (1, 2, 3, 4)
"""n of distinct-n; the last is that of the repetition, too."""


def compute_text_metrics(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns what the answers of a set are like, whatever their references say.

    Args:
        samples: Lines of samples.jsonl, at least one; ``answer``, ``truncated`` are read.

    Returns:
        ``distinct_1`` … ``distinct_4``: different n-grams of all answers, in percent of all their
        n-grams (Li et al. 2016; they divide by all tokens for every n, later work and MiniLLM by
        all n-grams). 0 if there are none. The larger the set, the lower: compare equal sets only.
        ``rep_4``: mean over answers of 1 − different 4-grams / 4-grams, in percent (seq-rep-4 of
        Welleck et al. 2020); 0 for an answer of fewer than four tokens.
        ``mean_words``: words as white space divides them.
        ``empty``: number of answers without any but white space.
        ``truncated_percent``, ``empty_percent``: shares of all answers.
    """
    count = len(samples)
    texts = [sample["answer"] for sample in samples]
    distinct, repetition = _ngram_metrics(texts)
    empty = sum(not text.strip() for text in texts)
    return {
        **{f"distinct_{n}": 100 * share for n, share in zip(SIZES, distinct, strict=True)},
        f"rep_{SIZES[-1]}": 100 * repetition,
        "mean_words": sum(len(text.split()) for text in texts) / count,
        "empty": empty,
        "truncated_percent": 100 * sum(sample["truncated"] for sample in samples) / count,
        "empty_percent": 100 * empty / count,
    }


def _ngram_metrics(texts: Sequence[str]) -> tuple[list[float], float]:
    """Returns distinct-n for each of `SIZES`, and the repetition, as shares.

    n-grams are numbered exactly, by sorting: sets of tuples took 1 GB for 10,000 long answers.
    """
    numbers: dict[str, int] = {}
    tokens = [
        [numbers.setdefault(token, len(numbers)) for token in TOKEN.findall(text.lower())]
        for text in texts
    ]
    ids_W = np.fromiter((t for answer in tokens for t in answer), dtype=np.int64)
    answer_W = np.repeat(np.arange(len(texts)), [len(answer) for answer in tokens])
    distinct = []
    grams = ids_W  # number of the n-gram that begins at each position
    for n in SIZES:
        if n > 1:
            pairs = grams[:-1] * len(numbers) + ids_W[n - 1 :]
            grams = np.unique(pairs, return_inverse=True)[1]
        owner = answer_W[: len(grams)]
        inside = owner == answer_W[n - 1 :]
        distinct.append(_share(len(np.unique(grams[inside])), int(inside.sum())))
    return distinct, _mean_repetition(grams[inside], owner[inside], len(texts))


def _mean_repetition(grams: NDArray[np.int64], owner: NDArray[np.int64], count: int) -> float:
    """Returns the mean over answers of the share of n-grams that repeat one of the answer."""
    totals_A = np.bincount(owner, minlength=count)
    size = int(grams.max(initial=0)) + 1
    different_A = np.bincount(np.unique(owner * size + grams) // size, minlength=count)
    some = totals_A > 0
    # fsum is exact: the order of the answers changes nothing.
    return math.fsum((totals_A - different_A)[some] / totals_A[some]) / count


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
