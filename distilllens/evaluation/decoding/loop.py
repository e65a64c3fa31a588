"""The loop that decodes: rows of a batch end one by one, and waiting prompts take their places.

The longest prompts come first, so rows of a batch need little padding, and too little memory shows
at once. A batch has as many rows as ``batch_size`` and ``batch_tokens`` allow. What is waiting
joins when an eighth of the rows is free (with 8 rows: as soon as one is), for a prefill delays all
others by a step. Where the model's cache cannot take new rows, the batch shrinks to its end first.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from distilllens.config import SamplingConfig
from distilllens.errors import NumericsError
from distilllens.evaluation.decoding.row_cache import can_hold
from distilllens.evaluation.decoding.sampling import RowRules, TokenChooser
from distilllens.evaluation.decoding.stores import LibraryStore, RowStore, Store, stack_left
from distilllens.evaluation.out_of_memory import first_line, free_memory, no_room

logger = logging.getLogger("distilllens")

JOIN_SHARE = 8
"""New rows join when 1 / 8 of the places are free."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to answer."""

    place: int
    """Where the caller has it."""
    prompt_ids: list[int]
    seed: int
    """Of its samples."""


class Row:
    """A request being answered."""

    def __init__(self, request: Request, settings: SamplingConfig) -> None:
        self.request = request
        self.rules = RowRules(settings, request.prompt_ids, request.seed)
        self.new_ids: list[int] = []


class Decoder:
    """Decodes requests with one model.

    Args:
        model: In evaluation mode, on its device.
        settings: Sampling, n-gram rule, length, batch size.
        num_tokens: The tokenizer's largest token id + 1.
        eos_id: Ends an answer.
        on_end: Called with a request's place and its new tokens (the last may be ``eos_id``) as
            soon as it has ended.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        settings: SamplingConfig,
        num_tokens: int,
        eos_id: int,
        on_end: Callable[[int, list[int]], None],
    ) -> None:
        self._model, self._settings, self._eos_id, self._on_end = model, settings, eos_id, on_end
        self._chooser = TokenChooser(settings, num_tokens=num_tokens, device=model.device)
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._longest = 0
        self._num_rows = 0

    def run(self, requests: Iterable[Request]) -> None:
        """Answers all requests.

        Raises:
            ConfigError: Not even one row fits into the device's memory.
            NumericsError: The model's logits are not finite.
        """
        self._waiting = longest_first(requests)
        if not self._waiting:
            return
        self._longest = len(self._waiting[0].prompt_ids) + self._settings.max_new_tokens
        self._limit_rows(self._settings.batch_tokens)
        while self._waiting:
            try:
                self._run_batches()
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            else:
                return
            # Outside of the handler, as the error holds on to the tensors of its frames.
            self._start_smaller(reason)

    def _limit_rows(self, tokens: int) -> None:
        fitting = max(1, tokens // self._longest)
        self._num_rows = min(fitting, self._settings.batch_size, len(self._waiting))

    def _start_smaller(self, reason: str) -> None:
        """Puts the rows in work back and halves the batch; answers do not depend on that."""
        in_work = [row.request for row in self._rows]  # in no order: ended rows left holes
        self._waiting = longest_first([*in_work, *self._waiting])
        self._rows = []
        free_memory()
        if self._num_rows <= 1:  # the cache has room for so many, however few are left
            raise no_room(f"one row of {self._longest} tokens", reason)
        tokens = self._num_rows * self._longest // 2
        logger.warning(
            "out of memory with %d rows of up to %d tokens: going on with %d tokens in a batch "
            "(batch_size or batch_tokens say so from the start; answers stay the same)",
            *(self._num_rows, self._longest, tokens),
        )
        self._limit_rows(tokens)

    def _run_batches(self) -> None:
        """Works until nothing waits and no row is left."""
        store = self._build_store()
        while self._waiting or self._rows:
            if store is None:
                self._generate_batch()
                continue
            if new := self._admit(can_join=store.can_join):
                logits_BV = store.prefill([row.request.prompt_ids for row in new])
            else:
                new = self._rows
                logits_BV = store.step([row.new_ids[-1] for row in new])
            tokens_B = self._chooser.choose(logits_BV, [row.rules for row in new])
            store.keep(self._advance(new, tokens_B.tolist()))

    def _build_store(self) -> Store | None:
        """Returns the best store for the model; None if rows cannot leave its cache one by one."""
        model = self._model
        if can_hold(model):
            return RowStore(
                model, num_rows=self._num_rows, longest=self._longest, pad_id=self._eos_id
            )
        if can_select(model):
            return LibraryStore(model, pad_id=self._eos_id)
        logger.warning(
            "%s keeps its past in a form of its own: batches run to their longest answer",
            type(model).__name__,
        )
        return None

    def _admit(self, *, can_join: bool) -> list[Row]:
        """Takes waiting requests in, if it is time to; returns their rows."""
        free = self._num_rows - len(self._rows)
        is_time = not self._rows or (can_join and free >= max(1, self._num_rows // JOIN_SHARE))
        if not is_time:
            return []
        new = [
            Row(self._waiting.popleft(), self._settings)
            for _ in range(min(free, len(self._waiting)))
        ]
        self._rows += new
        return new

    def _advance(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[int]:
        """Adds a token to each of these rows and hands over those that end.

        Returns:
            The places of the rows that are left, in the new order: holes are filled from the end.
        """
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            row.new_ids.append(token)
            row.rules.append(token)
            if token == self._eos_id or len(row.new_ids) == self._settings.max_new_tokens:
                ended.append(row)
        if not ended:
            return list(range(len(self._rows)))
        self._check_finite()
        left = [place for place, row in enumerate(self._rows) if row not in ended]
        order = [place for place in range(len(left)) if place in left]
        moved = [place for place in left if place >= len(left)]
        for hole in sorted(set(range(len(left))) - set(order)):
            order.insert(hole, moved.pop())
        self._rows = [self._rows[place] for place in order]
        for row in ended:
            self._on_end(row.request.place, row.new_ids)
        return order

    def _check_finite(self) -> None:
        if self._chooser.has_seen_non_finite():
            raise NumericsError(
                "the model's logits are not finite while it generates",
                why="weights that diverged, or an overflow in the model's dtype",
                fix="--dtype float32 (generate: --model.teacher_dtype float32) tells the two apart",
            )

    def _generate_batch(self) -> None:
        """Answers a batch by transformers' own loop, all rows to the longest answer's end."""
        self._admit(can_join=False)
        prompts = [row.request.prompt_ids for row in self._rows]
        input_ids_BT, mask_BT = stack_left(prompts, self._eos_id, self._model.device)
        choice = ChoiceProcessor(self._chooser, [row.rules for row in self._rows])
        output_BT = self._model.generate(  # type: ignore[operator]
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            logits_processor=LogitsProcessorList([choice]),
            generation_config=GenerationConfig(
                max_new_tokens=self._settings.max_new_tokens,
                do_sample=False,  # the processor leaves one token to each row
                num_beams=1,
                use_cache=True,
                eos_token_id=self._eos_id,
                pad_token_id=self._eos_id,
            ),
        )
        self._check_finite()
        for row, ids in zip(
            self._rows, output_BT[:, input_ids_BT.shape[1] :].tolist(), strict=True
        ):
            end = ids.index(self._eos_id) + 1 if self._eos_id in ids else len(ids)
            self._on_end(row.request.place, ids[:end])
        self._rows = []


def longest_first(requests: Iterable[Request]) -> deque[Request]:
    """Returns requests in the order in which rows must come: none is longer than one before."""
    return deque(sorted(requests, key=lambda request: -len(request.prompt_ids)))


class ChoiceProcessor(LogitsProcessor):
    """Lets transformers' ``generate`` choose as a `TokenChooser` does.

    Args:
        chooser: Chooses.
        rows: Of the batch, in its order.
    """

    def __init__(self, chooser: TokenChooser, rows: Sequence[RowRules]) -> None:
        self._chooser, self._rows = chooser, rows
        self._is_first_step = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._is_first_step:
            for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
                row.append(token)
        self._is_first_step = False
        tokens_B = self._chooser.choose(scores, self._rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


def can_select(model: PreTrainedModel) -> bool:
    """Tells whether the model takes a cache of transformers, from which rows can be left out."""
    takes_cache: bool = model._supports_default_dynamic_cache()  # type: ignore[operator]
    parameters = inspect.signature(model.forward).parameters
    return takes_cache and "past_key_values" in parameters and not model.is_remote_code()
