"""What a model remembers of the rows of a batch between two steps.

Shapes: ``B`` rows of a batch, ``T`` tokens, ``V`` vocabulary.

`RowStore` is for models whose layers are all attention; rows may leave and join at any step.
`LibraryStore` keeps transformers' own cache of whatever kind (hybrid and recurrent layers): rows
may leave, but a new batch begins only when the last has ended. Both make the position ids count
real tokens only, which models with learned positions (GPT-2) need.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from distilllens.evaluation.decoding.row_cache import RowCache


class Store(Protocol):
    """The rows' past; its rows are counted in the order in which they came, or in `keep`'s."""

    can_join: bool
    """Whether `prefill` works while rows are there."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Adds rows; returns the logits after each prompt, ``[rows added, V]`` (float32)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to each row; returns the logits after it, ``[B, V]`` (float32)."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Keeps these rows only: row i is from now on what row ``order[i]`` was."""
        ...


class RowStore:
    """Rows in a `RowCache`.

    Args:
        model: One that `row_cache.can_hold` holds for.
        num_rows: Rows at once, at most.
        longest: Tokens of the longest row, prompt and answer.
        pad_id: Any token; padding is masked out.
    """

    can_join = True

    def __init__(self, model: PreTrainedModel, *, num_rows: int, longest: int, pad_id: int) -> None:
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._model, self._pad_id = model, pad_id
        self._cache = RowCache(num_layers=num_layers, num_rows=num_rows, longest=longest)
        self._lengths: list[int] = []
        """Tokens of each row in the cache."""
        self._end = 0
        """The column after them, of all rows."""
        self._options = _options(model)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Store`. No prompt may be longer than the longest row that is there."""
        length = max(len(ids) for ids in prompts)
        if not self._lengths:
            self._end = length
        assert length <= self._end
        input_ids_BT, mask_BT = stack_left(prompts, self._pad_id, self._model.device)
        count = len(self._lengths)
        rows = slice(count, count + len(prompts))
        past = self._end - length
        logits_BV = self._forward(input_ids_BT, mask_BT, rows=rows, start=past, end=past)
        self._lengths += [len(ids) for ids in prompts]
        return logits_BV

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Store`."""
        device, count = self._model.device, len(self._lengths)
        past = max(self._lengths)
        if self._end == self._cache.window.num_columns:
            source = slice(self._end - past, self._end)
            self._cache.move_columns(count, source, slice(0, past))
            self._end = past
        lengths_B1 = torch.tensor(self._lengths, device=device)[:, None]
        mask_BT = (torch.arange(past + 1, device=device) >= past - lengths_B1).long()
        input_ids_B1 = torch.tensor(tokens, device=device)[:, None]
        logits_BV = self._forward(
            input_ids_B1, mask_BT, rows=slice(0, count), start=self._end - past, end=self._end
        )
        self._lengths = [length + 1 for length in self._lengths]
        self._end += 1
        return logits_BV

    def keep(self, order: Sequence[int]) -> None:
        """See `Store`. A row moves at most once, to a place that no row needs any more."""
        lengths = self._lengths
        for target, source in enumerate(order):
            if source != target:
                columns = slice(self._end - lengths[source], self._end)
                self._cache.move_row(source, target, columns)
        self._lengths = [lengths[source] for source in order]

    def _forward(
        self, input_ids_BT: Tensor, mask_BT: Tensor, *, rows: slice, start: int, end: int
    ) -> Tensor:
        self._cache.window.show(rows, start=start, end=end)
        positions_BT = positions(mask_BT)[:, -input_ids_BT.shape[1] :]
        inputs: dict[str, Any] = {
            "input_ids": input_ids_BT,
            "attention_mask": mask_BT,
            "past_key_values": self._cache,
            **self._options,
        }
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            inputs["position_ids"] = positions_BT
        return last_logits(self._model(**inputs))


class LibraryStore:
    """Rows in the cache that transformers makes for the model, prepared as ``generate`` does.

    Args:
        model: One that takes ``past_key_values``.
        pad_id: Any token; padding is masked out.
    """

    can_join = False

    def __init__(self, model: PreTrainedModel, *, pad_id: int) -> None:
        self._model: Any = model
        self._pad_id = pad_id
        self._options = _options(model)
        self._cache: Cache | None = None
        self._input_ids_BT = self._mask_BT = torch.empty(0, 0, dtype=torch.long)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Store`."""
        device = self._model.device
        self._input_ids_BT, self._mask_BT = stack_left(prompts, self._pad_id, device)
        config = self._model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        return self._forward(next_sequence_length=None, is_first_iteration=True)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Store`."""
        new_B1 = torch.tensor(tokens, device=self._input_ids_BT.device)[:, None]
        self._input_ids_BT = torch.cat([self._input_ids_BT, new_B1], dim=1)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(new_B1)], dim=1)
        return self._forward(next_sequence_length=1, is_first_iteration=False)

    def keep(self, order: Sequence[int]) -> None:
        """See `Store`."""
        if len(order) == len(self._mask_BT):
            return
        rows = torch.tensor(order, dtype=torch.long, device=self._mask_BT.device)
        self._input_ids_BT, self._mask_BT = self._input_ids_BT[rows], self._mask_BT[rows]
        assert self._cache is not None
        # Unlike `batch_select_indices`, recurrent layers have this one too.
        self._cache.reorder_cache(rows)  # type: ignore[arg-type]

    def _forward(self, **stage: Any) -> Tensor:
        extra = {}
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            extra["position_ids"] = positions(self._mask_BT)
        inputs = self._model.prepare_inputs_for_generation(
            self._input_ids_BT,
            past_key_values=self._cache,
            attention_mask=self._mask_BT,
            **self._options,
            **extra,
            **stage,
        )
        outputs = self._model(**inputs)
        self._cache = outputs.past_key_values
        return last_logits(outputs)


def stack_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns ``input_ids_BT`` and ``attention_mask_BT`` (int64), padded on the left."""
    length = max(len(ids) for ids in prompts)
    padded = [[pad_id] * (length - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def positions(mask_BT: Tensor) -> Tensor:
    """Returns position ids that count real tokens only; padding gets 0, as in ``generate``."""
    return (mask_BT.cumsum(dim=-1) - 1).masked_fill(mask_BT == 0, 0)


def last_logits(outputs: Any) -> Tensor:
    """Returns the logits after the last token, ``[B, V]`` (float32)."""
    logits_BTV: Tensor = outputs.logits
    return logits_BTV[:, -1].float()


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what every forward is called with; not all models can leave logits out."""
    options: dict[str, Any] = {"use_cache": True, "return_dict": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return options
