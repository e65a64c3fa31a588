"""What a run adds up between two lines of metrics.

Shapes: K sums of the objective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Totals:
    """Sums since the last line of metrics; those of tensors stay on the device."""

    sums_K2: Tensor
    scheduled_K2: Tensor
    """The same with each step's shares of the lens as factors."""
    tokens: int = 0
    """Response tokens of all processes."""
    input_tokens: int = 0
    """Prompt and response tokens of all processes, without padding."""
    steps: int = 0
    data_s: float = 0.0
    """Seconds of waiting for batches."""
    start: float = field(default_factory=time.perf_counter)
    """On the clock of `time.perf_counter`; later by each pause."""

    @classmethod
    def zero(cls, num_sums: int, device: torch.device) -> Totals:
        """Returns nothing yet; its clock starts now."""
        sums_K2 = torch.zeros(num_sums, 2, device=device)
        return cls(sums_K2, sums_K2.clone())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens in it out of the time: throughput counts training only."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - begun

    def speeds(self, end: float) -> dict[str, float]:
        """Names the time of a step, throughput and waiting until ``end`` on the same clock."""
        seconds = end - self.start
        return {
            "perf/step_s": seconds / self.steps,
            "perf/response_tokens_per_s": self.tokens / seconds,
            "perf/tokens_per_s": self.input_tokens / seconds,
            "perf/data_wait_pct": 100 * self.data_s / seconds,
        }

    def saved(self) -> dict[str, Tensor]:
        """Returns it as a state holds it, with the seconds so far for the clock's start."""
        seconds = [time.perf_counter() - self.start, self.data_s]
        return {
            "sums_K2": self.sums_K2.cpu(),
            "scheduled_K2": self.scheduled_K2.cpu(),
            "counts": torch.tensor([self.tokens, self.input_tokens, self.steps]),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }

    def fits(self, saved: dict[str, Tensor]) -> bool:
        """Whether what was saved has the same sums and counters: an older program had fewer."""
        shapes = {name: tensor.shape for name, tensor in self.saved().items()}
        return shapes == {name: tensor.shape for name, tensor in saved.items()}

    def add(self, saved: dict[str, Tensor]) -> None:
        """Goes on from what one process saved."""
        self.sums_K2 += saved["sums_K2"].to(self.sums_K2.device)
        self.scheduled_K2 += saved["scheduled_K2"].to(self.sums_K2.device)
        self.tokens, self.input_tokens, self.steps = (int(count) for count in saved["counts"])
        seconds, self.data_s = saved["seconds"].tolist()
        self.start = time.perf_counter() - seconds
