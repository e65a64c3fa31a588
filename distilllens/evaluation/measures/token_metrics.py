"""How well a model predicts reference answers token by token, and how close it is to a teacher.

Everything is measured under teacher forcing: each next token of the reference, its end-of-text
token among them, given the prompt and the reference up to there. Sums are added up in float64,
chunk by chunk.

Shapes: n rows of a chunk (response tokens), V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distilllens.data.encode import encode_prompts, encode_responses
from distilllens.data.records import Record
from distilllens.divergence import forward_kl
from distilllens.evaluation.measures.teacher_forcing import (
    Chunk,
    TokenScorer,
    TokenText,
    score_texts,
)

NUM_BINS = 15
"""Of the expected calibration error, as in Guo et al. 2017."""
LARGEST_EXPONENT = 700.0
"""Perplexity is at most e to this: JSON has no infinity."""
SUMS = ("nll", "top1", "entropy")
TEACHER_SUMS = ("teacher_entropy", "kl_teacher_student", "kl_student_teacher", "agreement")
PERCENT = ("top1", "agreement")


@dataclass(frozen=True, kw_only=True)
class References:
    """The prompts of a set with their first references."""

    texts: list[TokenText]
    num_empty: int
    """Records left out, as in training: their first reference is blank."""
    num_cut: int
    """References that were cut to the longest length."""


def encode_references(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, max_length: int
) -> References:
    """Encodes prompts and first references exactly as training does.

    Args:
        tokenizer: Of both models.
        records: Their prompts have less than ``max_length`` tokens.
        max_length: Longest prompt + response in tokens; longer responses are cut.
    """
    answered = [record for record in records if record.outputs[0].strip()]
    prompts = encode_prompts(tokenizer, [record.prompt for record in answered])
    responses = encode_responses(tokenizer, [record.outputs[0] for record in answered])
    texts = [
        TokenText(prompt_ids=prompt, response_ids=response[: max_length - len(prompt)])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return References(
        texts=texts,
        num_empty=len(records) - len(answered),
        num_cut=sum(
            len(text.response_ids) < len(response)
            for text, response in zip(texts, responses, strict=True)
        ),
    )


def compute_token_metrics(
    student: TokenScorer,
    texts: Sequence[TokenText],
    *,
    teacher: TokenScorer | None = None,
    batch_size: int,
    batch_tokens: int,
    chunk_rows: int | None = None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Measures a model, and its distance from a teacher, on texts.

    Args:
        student: The model.
        texts: Prompts and references; at least one response token among them.
        teacher: Compared with it; None: no teacher.
        batch_size: Texts at once, at most.
        batch_tokens: Tokens at once, at most.
        chunk_rows: Rows at once over the vocabulary; default: as memory allows.
        advance: Called after each batch with the number of its texts.

    Returns:
        ``metrics``: means over all response tokens. ``nll`` (nats), ``perplexity`` = exp(nll),
        ``top1`` (% of tokens that are the likeliest), ``entropy`` (nats), ``ece`` (expected
        calibration error of the likeliest token's probability, %); with a teacher also
        ``teacher_entropy``, ``entropy_gap`` (student − teacher), ``kl_teacher_student`` =
        KL(teacher‖student), ``kl_student_teacher`` (nats), ``agreement`` (% of tokens where both
        have the same likeliest token).
        ``num_tokens``, and ``reliability``: for each of 15 bins of that probability its bounds
        (lower, upper], tokens, mean probability and share of hits (None without tokens).

    Raises:
        ConfigError, NumericsError: As `score_texts`.
        ValueError: There is no response token.
    """
    scorers = [student] if teacher is None else [student, teacher]
    names = SUMS if teacher is None else SUMS + TEACHER_SUMS
    device = student.model.device
    # float64 on the device; of MPS, which has none, no run of this project is known.
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    bins_3M = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)
    for more_sums, more_bins_3M in score_texts(
        scorers,
        texts,
        measure=lambda chunk: (_sums(chunk), _bins(chunk)),
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        chunk_rows=chunk_rows,
        advance=advance,
    ):
        sums += more_sums
        bins_3M += more_bins_3M
    tokens_M, confidence_M, hits_M = bins_3M.tolist()
    num_tokens = int(sum(tokens_M))
    if num_tokens == 0:
        raise ValueError("no response token to measure")
    metrics = {
        name: (100 if name in PERCENT else 1) * total / num_tokens
        for name, total in zip(names, sums.tolist(), strict=True)
    }
    metrics["perplexity"] = math.exp(min(metrics["nll"], LARGEST_EXPONENT))
    gaps = [abs(h - c) for h, c in zip(hits_M, confidence_M, strict=True)]
    metrics["ece"] = 100 * math.fsum(gaps) / num_tokens
    if teacher is not None:
        metrics["entropy_gap"] = metrics["entropy"] - metrics["teacher_entropy"]
    return {
        "metrics": metrics,
        "num_tokens": num_tokens,
        "reliability": [
            {
                "lower": m / NUM_BINS,
                "upper": (m + 1) / NUM_BINS,
                "tokens": int(tokens),
                "confidence": confidence / tokens if tokens else None,
                "accuracy": hits / tokens if tokens else None,
            }
            for m, (tokens, confidence, hits) in enumerate(
                zip(tokens_M, confidence_M, hits_M, strict=True)
            )
        ],
    }


def _sums(chunk: Chunk) -> Tensor:
    """Returns the sums over a chunk's rows of `SUMS`, and of `TEACHER_SUMS` with a teacher."""
    log_q, *others = chunk.log_probs_nV
    top_n = log_q.argmax(-1)
    values = [
        -log_q.gather(-1, chunk.targets_n[:, None])[:, 0],
        top_n == chunk.targets_n,
        _entropy(log_q),
    ]
    for log_p in others:
        values += [
            _entropy(log_p),
            forward_kl(log_p, log_q),
            forward_kl(log_q, log_p),
            log_p.argmax(-1) == top_n,
        ]
    return torch.stack([value_n.sum(dtype=torch.float64) for value_n in values])


def _entropy(log_probs_nV: Tensor) -> Tensor:
    return -(log_probs_nV.exp() * log_probs_nV).sum(-1)


def _bins(chunk: Chunk) -> Tensor:
    """Returns [3, M]: tokens, their top probabilities and their hits, added up by bin.

    Bin m holds the probabilities in (m / M, (m + 1) / M], as in Guo et al. 2017.
    """
    top_n, index_n = chunk.log_probs_nV[0].max(-1)
    confidence_n = top_n.double().exp()
    bin_n = ((confidence_n * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
    hits_n = (index_n == chunk.targets_n).double()
    return torch.stack(
        [
            torch.bincount(bin_n, weights=weights_n, minlength=NUM_BINS)
            for weights_n in (torch.ones_like(hits_n), confidence_n, hits_n)
        ]
    )
