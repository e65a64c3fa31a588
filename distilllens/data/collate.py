"""From tokenised records to padded or packed tensors, and the index of the rows that carry loss.

Shapes: B rows of tokens (one record each, or several packed), T tokens of the longest, N response
tokens that have a predecessor.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of positions without loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, padded on the right to its longest row.

    All tensors are int64. ``labels_BT[b, t]`` is the token AT position t (unshifted, as in
    transformers) or -100. The logits that predict it stand at position t - 1, so ``rows_N`` holds
    b * T + t - 1 for each response token, record after record, and ``targets_N`` the tokens:
    ``cross_entropy(logits_BTV.flatten(0, 1)[rows_N], targets_N)`` is the whole token loss.
    ``position_ids_BT`` counts from 0 in each record; on padding it is 0.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor
    rows_N: Tensor
    targets_N: Tensor
    num_tokens: int
    packed: bool

    @property
    def packed_positions_BT(self) -> Tensor | None:
        """Position ids if the model must be given them: only records that share rows need it."""
        return self.position_ids_BT if self.packed else None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with all tensors on ``device``; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Returns the batch in memory that a GPU reads by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors: dict[str, Any] = {
            name: function(v) for name, v in values.items() if isinstance(v, Tensor)
        }
        return dataclasses.replace(self, **tensors)


def collate(
    samples: Sequence[Mapping[str, Sequence[int]]], *, pad_id: int, row_tokens: int | None = None
) -> Batch:
    """Lays records into rows, pads these to the longest, and finds the response positions.

    Args:
        samples: Records with ``prompt_ids`` and ``response_ids``; at least one, none empty.
        pad_id: Any id of the vocabulary; it is never attended to and never a label. A response
            may hold the same id (EOS as pad token) and keeps its label.
        row_tokens: Pack several records into a row of about so many tokens (at least that many,
            if there are, and less than twice as many); None: one record a row.

    Returns:
        The batch; without any response token it has N = 0. ``rows_N`` goes record by record in
        the order of ``samples``, packed or not.

    Raises:
        ValueError: No samples, or one without any token.
    """
    lengths = [len(s["prompt_ids"]) + len(s["response_ids"]) for s in samples]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"collate needs samples with at least one token, got lengths {lengths}")
    places, size, width = lay_out(lengths, row_tokens)
    input_ids_BT = torch.full((size, width), pad_id, dtype=torch.int64)
    labels_BT = torch.full((size, width), IGNORE, dtype=torch.int64)
    attention_mask_BT, position_ids_BT = torch.zeros(2, size, width, dtype=torch.int64)
    rows = []
    for (row, start), length, sample in zip(places, lengths, samples, strict=True):
        prompt_end, end = start + len(sample["prompt_ids"]), start + length
        input_ids_BT[row, start:prompt_end] = torch.as_tensor(sample["prompt_ids"])
        response = torch.as_tensor(sample["response_ids"])
        input_ids_BT[row, prompt_end:end] = labels_BT[row, prompt_end:end] = response
        attention_mask_BT[row, start:end] = 1
        position_ids_BT[row, start:end] = torch.arange(length)
        # A record's first token has no predecessor that could predict it.
        first = max(prompt_end, start + 1)
        rows.append(torch.arange(row * width + first - 1, row * width + end - 1))
    rows_N = torch.cat(rows)
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        labels_BT=labels_BT,
        rows_N=rows_N,
        targets_N=labels_BT.flatten()[rows_N + 1],
        num_tokens=len(rows_N),
        packed=row_tokens is not None,
    )


def collate_columns(
    columns: Mapping[str, Sequence[Any]], *, pad_id: int, row_tokens: int | None = None
) -> Batch:
    """Collates records that come as columns, as slices of a table do; see `collate`."""
    pairs = zip(columns["prompt_ids"], columns["response_ids"], strict=True)
    samples = [{"prompt_ids": p, "response_ids": r} for p, r in pairs]
    return collate(samples, pad_id=pad_id, row_tokens=row_tokens)


def lay_out(
    lengths: Sequence[int], row_tokens: int | None
) -> tuple[list[tuple[int, int]], int, int]:
    """Returns (row, start) of each record, the number of rows, and their tokens; as `collate`."""
    places = [(i, 0) for i in range(len(lengths))]
    if row_tokens is not None:
        places = _pack(lengths, max(1, sum(lengths) // row_tokens))
    width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
    return places, 1 + max(row for row, _ in places), width


def _pack(lengths: Sequence[int], num_rows: int) -> list[tuple[int, int]]:
    """Returns (row, start) of each record: the longest first, each into the emptiest row.

    That leaves rows of almost equal length (Graham 1969: the longest is at most 4/3 of the best
    possible), so little is padded.
    """
    fill = [(0, row) for row in range(min(num_rows, len(lengths)))]
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        start, row = heapq.heappop(fill)
        places[i] = (row, start)
        heapq.heappush(fill, (start + lengths[i], row))
    return places
