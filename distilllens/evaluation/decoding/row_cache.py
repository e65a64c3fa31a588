"""A cache of keys and values whose rows come and go, in memory that is allocated once.

Shapes: ``R`` rows, ``H`` heads, ``C`` columns, ``D`` width of a head.

All rows end in the same column: a step writes one column for all of them, and a new row's prompt
goes into the columns just before it, so that rows of any length are one batch padded on the left.
The columns in use are a window that moves to the right; columns that only ended rows needed fall
out of it, and at the end of the memory the window moves back to its beginning. transformers'
``DynamicCache`` copies all keys and values of all layers at every step instead (with 8 rows of 300
tokens a quarter of a small model's step).

To the model this looks like a batch padded on the left in an ordinary cache. Layers with a sliding
window are kept in full too: transformers' mask, made for a cache of that length, then leaves out
what is behind the window, and the padding with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

SLACK = 4
"""A quarter of the longest row's columns besides, so the window seldom moves back."""


class Window:
    """What the model is shown in one forward: these rows, with this past.

    Args:
        num_rows: R of the memory.
        num_columns: C of the memory.
    """

    def __init__(self, *, num_rows: int, num_columns: int) -> None:
        self.num_rows, self.num_columns = num_rows, num_columns
        self.show(slice(0, 0), start=0, end=0)

    def show(self, rows: slice, *, start: int, end: int) -> None:
        """Sets the rows and the columns of their past; new keys go behind it."""
        self.rows, self.start, self.end = rows, start, end


class RowLayer(CacheLayerMixin):
    """One layer's keys and values, ``[R, H, C, D]`` each."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the memory; zeros, as what is masked out must still be finite."""
        shown = self._window
        self.keys, self.values = (
            states.new_zeros(shown.num_rows, states.shape[1], shown.num_columns, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new keys and values; returns those of the past and the new ones, as views."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        shown, stop = self._window, self._window.end + key_states.shape[-2]
        self.keys[shown.rows, :, shown.end : stop] = key_states
        self.values[shown.rows, :, shown.end : stop] = value_states
        return (
            self.keys[shown.rows, :, shown.start : stop],
            self.values[shown.rows, :, shown.start : stop],
        )

    def move_row(self, source: int, target: int, columns: slice) -> None:
        """Copies a row to another's place."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[target, :, columns] = self.keys[source, :, columns]
        self.values[target, :, columns] = self.values[source, :, columns]

    def move_columns(self, num_rows: int, source: slice, target: slice) -> None:
        """Copies columns of the first rows to others, which may overlap them."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:num_rows, :, target] = self.keys[:num_rows, :, source].clone()
        self.values[:num_rows, :, target] = self.values[:num_rows, :, source].clone()

    def get_seq_length(self) -> int:
        """Returns the columns of the past."""
        return self._window.end - self._window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of columns that the mask must have, and its first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns −1: there is no limit that the model should see."""
        return -1


class RowCache(Cache):
    """A `RowLayer` for each layer, and the window that they share.

    Args:
        num_layers: Of the model.
        num_rows: Rows at once.
        longest: Tokens of the longest row, prompt and answer.
    """

    def __init__(self, *, num_layers: int, num_rows: int, longest: int) -> None:
        self.window = Window(num_rows=num_rows, num_columns=longest + longest // SLACK + 1)
        self.rows = [RowLayer(self.window) for _ in range(num_layers)]
        super().__init__(layers=list(self.rows))

    def move_row(self, source: int, target: int, columns: slice) -> None:
        """Copies a row to another's place, in all layers."""
        for layer in self.rows:
            layer.move_row(source, target, columns)

    def move_columns(self, num_rows: int, source: slice, target: slice) -> None:
        """Copies columns of the first rows, in all layers."""
        for layer in self.rows:
            layer.move_columns(num_rows, source, target)


def can_hold(model: PreTrainedModel) -> bool:
    """Tells whether a `RowCache` serves for the model.

    All its layers must be attention, full or with a sliding window, and its code and preparation
    of inputs transformers' own: Phi-3, for one, throws its cache away at a certain length.
    """
    own = type(model).prepare_inputs_for_generation  # type: ignore[attr-defined]
    if own is not GenerationMixin.prepare_inputs_for_generation or model.is_remote_code():
        return False
    config = model.config.get_text_config(decoder=True)
    kinds = set(get_layer_types_and_kwargs(config)[0])
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {"full_attention", "sliding_attention"} and layers <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
