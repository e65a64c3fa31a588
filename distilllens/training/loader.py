"""What a step needs, made ahead of time by one thread: padded batches and cached teacher rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from distilllens.config import TrainConfig
from distilllens.data.collate import Batch, collate_columns
from distilllens.data.order import epoch_batches
from distilllens.data.tokenize import record_lengths, response_rows
from distilllens.objective import Rows
from distilllens.teacher.cache import CachedTeacher
from distilllens.training.setup import Plan, StepCount

STEPS_AHEAD = 2
"""Steps kept ready. More would only hold memory: the thread is idle nearly all the time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatch(NamedTuple):
    """Token ids, and the teacher's rows [N, E] if they come from a cache."""

    batch: Batch
    teacher: Rows | None = None

    def pin_memory(self) -> MicroBatch:
        """Returns it in memory that a GPU reads by itself."""
        return MicroBatch(self.batch.pin_memory(), _map_rows(Tensor.pin_memory, self.teacher))

    def to(self, device: torch.device) -> MicroBatch:
        """Returns it on ``device``; asynchronous from pinned memory."""
        teacher = _map_rows(lambda rows: rows.to(device, non_blocking=True), self.teacher)
        return MicroBatch(self.batch.to(device), teacher)


def _map_rows(function: Callable[[Tensor], Tensor], rows: Rows | None) -> Rows | None:
    if rows is None:
        return None
    return Rows(final=function(rows.final), layers=[function(layer) for layer in rows.layers])


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """One optimizer step of this process."""

    micro_batches: list[MicroBatch]
    records: list[int]
    """Their places in the training table."""
    num_tokens: int
    """Response tokens of the global batch: of all processes and micro-batches."""
    num_input_tokens: int
    """Its prompt and response tokens; padding is not counted."""


class StepLoader:
    """Yields an epoch's steps in the order that seed and epoch decide.

    Every process knows the whole order and all lengths, so none has to ask the others how many
    response tokens a global batch has.

    Args:
        plan: Of the run.
        table: The training records.
        steps: Length of the run.
        cache: The teacher's rows; None: there is no teacher, or it runs in each step.
        rank: Of this process.
        world_size: Number of processes.
        pin: Put batches into pinned memory (for a GPU).
    """

    def __init__(
        self,
        plan: Plan,
        table: Dataset,
        steps: StepCount,
        *,
        cache: CachedTeacher | None,
        rank: int,
        world_size: int,
        pin: bool,
    ) -> None:
        self.plan, self.config, self.table, self.steps = plan, plan.config, table, steps
        self.cache, self.rank, self.world_size, self.pin = cache, rank, world_size, pin
        self.lengths, self.num_rows = record_lengths(table), response_rows(table)

    def epoch(self, epoch: int, offset: int = 0) -> Generator[StepBatches]:
        """Yields the steps of one epoch (from 0), but for the first ``offset`` ones."""
        batches = epoch_batches(
            self.lengths,
            batch_size=self.steps.global_batch,
            seed=self.config.run.seed,
            epoch=epoch,
            group_by_length=self.config.data.group_by_length,
        )
        return prefetch(self._load, batches[offset:], ahead=STEPS_AHEAD)

    def _load(self, global_batch: np.ndarray) -> StepBatches:
        # A stride over the processes: a batch sorted by length gives each the same load.
        own = global_batch[self.rank :: self.world_size].tolist()
        size = self.config.optim.micro_batch_size
        micro_batches = [
            self._load_micro_batch(own[first : first + size]) for first in range(0, len(own), size)
        ]
        return StepBatches(
            micro_batches=micro_batches,
            records=own,
            num_tokens=int(self.num_rows[global_batch].sum()),
            num_input_tokens=int(self.lengths[global_batch].sum()),
        )

    def _load_micro_batch(self, records: Sequence[int]) -> MicroBatch:
        batch = collate_columns(
            self.table[records],
            pad_id=self.plan.tokenizer.eos_token_id,
            row_tokens=packed_row_tokens(self.config),
        )
        micro_batch = MicroBatch(batch, None if self.cache is None else self.cache.rows(records))
        return micro_batch.pin_memory() if self.pin else micro_batch


def packed_row_tokens(config: TrainConfig) -> int | None:
    """Returns the tokens of a packed row; None: records are not packed."""
    return config.data.max_length if config.data.packing else None


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Generator[Result]:
    """Yields ``function(item)`` in order, computed by one thread up to ``ahead`` items early.

    Errors of the function are raised where its result would have come.
    """
    pending: deque[Future[Result]] = deque()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
    try:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the consumer stops early
        thread.shutdown(cancel_futures=True)
