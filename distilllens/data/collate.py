"""From tokenised records to padded tensors, and the index of the rows that carry loss.

Shapes: B records, T tokens of the longest, N response tokens that have a predecessor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of positions without loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, padded on the right to its longest record.

    All tensors are int64. ``labels_BT[b, t]`` is the token AT position t (unshifted, as in
    transformers) or -100. The logits that predict it stand at position t - 1, so ``rows_N`` holds
    b * T + t - 1 for each response token, in increasing order, and ``targets_N`` the tokens:
    ``cross_entropy(logits_BTV.flatten(0, 1)[rows_N], targets_N)`` is the whole token loss.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    position_ids_BT: Tensor
    labels_BT: Tensor
    rows_N: Tensor
    targets_N: Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with all tensors on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name != "num_tokens"
        }
        return dataclasses.replace(self, **moved)


def collate(samples: Sequence[Mapping[str, Sequence[int]]], *, pad_id: int) -> Batch:
    """Pads records to the longest of them and finds their response rows.

    Args:
        samples: Records with ``prompt_ids`` and ``response_ids``; at least one, none empty.
        pad_id: Any id of the vocabulary; it is never attended to and never a label. A response
            may hold the same id (EOS as pad token) and keeps its label.

    Returns:
        The batch. Positions count from 0 at the first token and stay at the last one's on
        padding; a batch without any response token has N = 0.

    Raises:
        ValueError: No samples, or one without any token.
    """
    lengths = [len(s["prompt_ids"]) + len(s["response_ids"]) for s in samples]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"collate needs samples with at least one token, got lengths {lengths}")
    size, longest = len(samples), max(lengths)
    input_ids_BT = torch.full((size, longest), pad_id, dtype=torch.int64)
    labels_BT = torch.full((size, longest), IGNORE, dtype=torch.int64)
    for row, sample in enumerate(samples):
        prompt = torch.as_tensor(sample["prompt_ids"], dtype=torch.int64)
        response = torch.as_tensor(sample["response_ids"], dtype=torch.int64)
        end = len(prompt) + len(response)
        input_ids_BT[row, : len(prompt)] = prompt
        input_ids_BT[row, len(prompt) : end] = response
        labels_BT[row, len(prompt) : end] = response
    lengths_B1 = torch.tensor(lengths).unsqueeze(1)
    positions_1T = torch.arange(longest).unsqueeze(0)
    # The token at position 0 has no predecessor that could predict it.
    next_labels_BT = torch.full_like(labels_BT, IGNORE)
    next_labels_BT[:, :-1] = labels_BT[:, 1:]
    next_labels = next_labels_BT.flatten()
    rows_N = (next_labels != IGNORE).nonzero().squeeze(1)
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=(positions_1T < lengths_B1).long(),
        position_ids_BT=torch.minimum(positions_1T, lengths_B1 - 1),
        labels_BT=labels_BT,
        rows_N=rows_N,
        targets_N=next_labels[rows_N],
        num_tokens=int(rows_N.numel()),
    )
