"""Next-token distributions of models along given texts, a few hundred rows at a time.

A row is a position whose next token belongs to a response, as in training: encoding, collation,
the model's body, its head in float32. The head is cut to the tokens that the tokenizer knows,
the tokens that generation can choose (see `sampling.TokenChooser`), so heads that are padded
differently are compared over the same tokens.

Shapes: N rows of a batch, n of a chunk, D width, V tokens of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.data.collate import collate
from distilllens.divergence import log_probs
from distilllens.errors import NumericsError
from distilllens.evaluation.out_of_memory import with_less
from distilllens.kernels.chunks import cut_vocabulary, wide
from distilllens.kernels.products import project
from distilllens.lens import LogitLens
from distilllens.student import lens_rows

Measured = TypeVar("Measured")

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory for one chunk's float32 tensors over the vocabulary."""
WORKING_COPIES = 8
"""Such tensors alive at once: logits, log-probabilities and products of two models."""
MAX_CHUNK_ROWS = 1024
CHECKED_TOKENS = 16
"""Tokens of the first text that the self-check of a model's parts runs over."""


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A prompt and a response to it, as tokens."""

    prompt_ids: list[int]
    response_ids: list[int]
    """With the end-of-text token, if the response ends."""

    @property
    def columns(self) -> dict[str, list[int]]:
        """The text as `collate` takes it."""
        return {"prompt_ids": self.prompt_ids, "response_ids": self.response_ids}

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What the models say at some rows."""

    log_probs_nV: tuple[Float[Tensor, "n V"], ...]
    """Of each model in turn, natural logarithms, at least float32."""
    targets_n: Int64[Tensor, " n"]
    """The tokens that stand there."""
    texts_n: Int64[Tensor, " n"]
    """Places of the rows' texts, in the order they were given."""
    positions_n: Int64[Tensor, " n"]
    """Places in their responses, from 0."""


class TokenScorer:
    """Gives the distributions of one causal language model.

    Args:
        model: In evaluation mode, on its device.
        num_tokens: Tokens that the tokenizer knows: its largest id + 1.

    Raises:
        ConfigError: The model's parts cannot be found.
    """

    def __init__(self, model: PreTrainedModel, *, num_tokens: int) -> None:
        self.model = model
        self.num_tokens = num_tokens
        self._lens = LogitLens(model)
        head = self._lens.unembedding()
        self._head = cut_vocabulary(head, num_tokens, wide(head.head_VD.dtype))

    def check(self, text: TokenText) -> None:
        """Proves the parts on the beginning of a text; see `LogitLens.self_check`."""
        ids = [*text.prompt_ids, *text.response_ids][:CHECKED_TOKENS]
        self._lens.self_check(torch.tensor([ids], device=self.model.device))

    def rows(self, input_ids_BT: Tensor, rows_N: Tensor) -> Float[Tensor, "N D"]:
        """Returns what enters the head at the rows of a batch; see `lens_rows`."""
        device = self.model.device
        return lens_rows(self._lens, [], input_ids_BT.to(device), rows_N.to(device)).final

    def log_probs(self, hidden_nD: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Returns the next token's log-probabilities, at least float32."""
        logits_nV = project(hidden_nD, self._head.head_VD, self._head.bias_V)
        if self._head.transform is not None:
            logits_nV = self._head.transform(logits_nV)
        return log_probs(logits_nV)


def num_known_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest token id + 1."""
    return int(max(tokenizer.get_vocab().values())) + 1


@torch.inference_mode()
def score_texts(
    scorers: Sequence[TokenScorer],
    texts: Sequence[TokenText],
    *,
    measure: Callable[[Chunk], Measured],
    batch_size: int,
    batch_tokens: int,
    chunk_rows: int | None = None,
    advance: Callable[[int], None],
) -> Iterator[Measured]:
    """Runs models over texts and measures what they say at every response token.

    Args:
        scorers: Of models on one device, over the same tokens.
        texts: None empty.
        measure: Called with each chunk; again with a part of it where memory does not hold it, so
            it must change nothing.
        batch_size: Texts that run through a model at once, at most; texts of similar length go
            together.
        batch_tokens: Tokens of them at most, padding included; a longer text runs alone. Too little
            memory halves it.
        chunk_rows: Rows of a chunk; default: as many as `CHUNK_BYTES` holds. Too little memory
            halves it.
        advance: Called after each batch with the number of its texts.

    Yields:
        What ``measure`` returns, chunk by chunk.

    Raises:
        ConfigError: What was found of a model is not the model (its self-check fails), or there is
            no room for one text or one row.
        NumericsError: Logits that are not finite.
    """
    chunk_rows = chunk_rows or _chunk_rows(scorers[0])
    # Longest first: rows of a batch need little padding, and too little memory shows at once.
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    for scorer in scorers:
        if texts:
            scorer.check(texts[order[0]])
    while order:
        longest = len(texts[order[0]])
        wanted = min(len(order), batch_size, max(1, batch_tokens // longest))
        body = partial(_run_bodies, scorers, texts, order)
        batch, count = with_less(body, wanted, one=f"one text of {longest} tokens")
        if count < wanted:
            batch_tokens = count * longest
        first = 0
        while first < len(batch.targets_N):
            wanted = min(chunk_rows, len(batch.targets_N) - first)
            head = partial(_measure_rows, scorers, batch, measure, first)
            measured, rows = with_less(head, wanted, one="one row over the vocabulary")
            if rows < wanted:
                chunk_rows = rows
            first += rows
            yield measured
        advance(count)
        order = order[count:]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The rows of texts that ran through the models' bodies; see `Chunk`."""

    hidden: list[Float[Tensor, "N D"]]
    """Of each model."""
    targets_N: Int64[Tensor, " N"]
    texts_N: Int64[Tensor, " N"]
    positions_N: Int64[Tensor, " N"]


def _run_bodies(
    scorers: Sequence[TokenScorer], texts: Sequence[TokenText], order: Sequence[int], count: int
) -> _Batch:
    """Runs the first ``count`` texts of ``order`` through all models, without their heads."""
    places = order[:count]
    batch = collate([texts[place].columns for place in places], pad_id=0)
    texts_N, positions_N = _row_places([texts[place] for place in places], places)
    device = scorers[0].model.device
    return _Batch(
        hidden=[scorer.rows(batch.input_ids_BT, batch.rows_N) for scorer in scorers],
        targets_N=batch.targets_N.to(device),
        texts_N=texts_N.to(device),
        positions_N=positions_N.to(device),
    )


def _measure_rows(
    scorers: Sequence[TokenScorer],
    batch: _Batch,
    measure: Callable[[Chunk], Measured],
    first: int,
    count: int,
) -> Measured:
    """Runs ``count`` rows of a batch through the heads, and measures them."""
    rows = slice(first, first + count)
    chunk = Chunk(
        log_probs_nV=tuple(
            scorer.log_probs(hidden_ND[rows])
            for scorer, hidden_ND in zip(scorers, batch.hidden, strict=True)
        ),
        targets_n=batch.targets_N[rows],
        texts_n=batch.texts_N[rows],
        positions_n=batch.positions_N[rows],
    )
    if not all(side.isfinite().all() for side in chunk.log_probs_nV):
        raise NumericsError(
            "a model's logits are not finite on a test set",
            why="weights that diverged, or an overflow in the model's dtype",
            fix="--dtype float32 tells the two apart",
        )
    return measure(chunk)


def _row_places(texts: Sequence[TokenText], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the text's place and the place in its response of each row of `collate`."""
    # A text's first token has no predecessor that could predict it.
    firsts = [0 if text.prompt_ids else 1 for text in texts]
    spans = [
        torch.arange(first, len(text.response_ids))
        for first, text in zip(firsts, texts, strict=True)
    ]
    owners = torch.repeat_interleave(
        torch.tensor(places), torch.tensor([len(span) for span in spans])
    )
    return owners, torch.cat(spans)


def _chunk_rows(scorer: TokenScorer) -> int:
    """Returns how many rows of float32 numbers over the vocabulary fit."""
    budget = CHUNK_BYTES["cuda" if scorer.model.device.type == "cuda" else "cpu"]
    return max(1, min(MAX_CHUNK_ROWS, budget // (4 * scorer.num_tokens * WORKING_COPIES)))
