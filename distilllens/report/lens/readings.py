"""What the lens of every block says at some response tokens: entropy, likeliest tokens, gold token.

Shapes: N rows (response tokens), n rows of one chunk, D width, V shared vocabulary, L layers,
K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilllens.divergence import log_probs
from distilllens.lens import LogitLens
from distilllens.lens_matrix import LensRows

TOP = 5
"""Likeliest tokens that are kept of each cell."""
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory for the [n, V] tensors of one chunk."""
WORKING_COPIES = 5
"""[n, V] tensors alive at once: logits, log-probabilities, probabilities, products, comparison."""


@dataclass(frozen=True, kw_only=True)
class LensReadings:
    """The readings of one model: a value per layer (first block first) and row."""

    entropy_LN: NDArray[np.float64]
    """−Σ p ln p in nats, in [0, ln V]."""
    nll_LN: NDArray[np.float64]
    """−ln p(gold token) in nats."""
    rank_LN: NDArray[np.int64]
    """Rank of the gold token: 1 + the number of tokens with a strictly larger logit."""
    top_LNK: NDArray[np.int64]
    """The ids of the likeliest tokens, the likeliest first."""
    prob_LNK: NDArray[np.float64]
    """Their probabilities."""
    gold_N: NDArray[np.int64]
    """The gold tokens: those of the response that the rows predict."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.entropy_LN)

    @property
    def num_tokens(self) -> int:
        """Number of rows."""
        return len(self.gold_N)


@torch.inference_mode()
def read_layers(
    rows: LensRows,
    *,
    vocabulary: int,
    chunk_rows: int | None = None,
    advance: Callable[[int], None],
) -> LensReadings:
    """Reads every layer at every row, chunk by chunk; logits of all layers never exist at once.

    Args:
        rows: Of one model, from `distilllens.lens_matrix.collect_rows`.
        vocabulary: Tokens that all models share; the rest of a padded head is cut off before the
            softmax, so that every model's distribution is over the same tokens.
        chunk_rows: Rows per chunk; default: as many as `CHUNK_BYTES` holds.
        advance: Called with the number of rows of each chunk of each layer when it is done.
    """
    num_rows = len(rows.targets_N)
    if chunk_rows is None:
        budget = CHUNK_BYTES["cuda" if rows.targets_N.is_cuda else "cpu"]
        chunk_rows = max(1, min(256, budget // (4 * vocabulary * WORKING_COPIES)))
    layers = []
    for hidden_ND in rows.hidden_LND:
        chunks = []
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            read = _read(rows.lens, hidden_ND[chunk], rows.targets_N[chunk], vocabulary)
            chunks.append(read)
            advance(chunk.stop - chunk.start)
        layers.append([np.concatenate(parts) for parts in zip(*chunks, strict=True)])
    entropy, nll, rank, top, prob = (np.stack(values) for values in zip(*layers, strict=True))
    return LensReadings(
        entropy_LN=entropy,
        nll_LN=nll,
        rank_LN=rank,
        top_LNK=top,
        prob_LNK=prob,
        gold_N=rows.targets_N.cpu().numpy(),
    )


def _read(
    lens: LogitLens, hidden_nD: Tensor, targets_n: Tensor, vocabulary: int
) -> tuple[NDArray[np.generic], ...]:
    """Returns entropy, NLL, rank, top ids and their probabilities of one layer's chunk."""
    logits_nV = lens.logits(hidden_nD)[:, :vocabulary]
    log_probs_nV = log_probs(logits_nV)
    gold_n1 = targets_n[:, None]
    # Of the logits: the floor of the log-probabilities would make far tokens equal.
    rank_n = (logits_nV > logits_nV.gather(1, gold_n1)).sum(-1) + 1
    nll_n = -log_probs_nV.gather(1, gold_n1)[:, 0]
    top_log_probs_nK, top_nK = log_probs_nV.topk(min(TOP, vocabulary), dim=-1)
    entropy_n = -(log_probs_nV.exp() * log_probs_nV).sum(-1)
    floats = (entropy_n, nll_n, top_log_probs_nK.exp())
    entropy, nll, prob = (values.double().cpu().numpy() for values in floats)
    return entropy, nll, rank_n.cpu().numpy(), top_nK.cpu().numpy(), prob
