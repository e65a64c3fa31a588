"""The training loop. Setup lives in `setup`, the mathematics in `student`, files in `checkpoint`.

Shapes: B batch, T tokens, N response rows, K terms of the objective.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from distilllens import distributed
from distilllens.checkpoint import TrainState, copy_model, export_model, load_state, save_state
from distilllens.data.collate import Batch, collate
from distilllens.data.order import epoch_batches
from distilllens.data.records import read_records
from distilllens.data.tokenize import PreparedData, record_lengths
from distilllens.errors import NumericsError
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.families import base_model
from distilllens.runs import RunFolder, write_status
from distilllens.schedule import learning_rate
from distilllens.setup import Plan, StepCount, build_optimizer
from distilllens.signals import StopRequest
from distilllens.student import DistillationModule, Teacher
from distilllens.tracking import Tracker


@dataclass
class Totals:
    """What has been added up since the last line of metrics; stays on the device."""

    sums_K2: Tensor
    tokens: float = 0.0
    steps: int = 0
    data_s: float = 0.0
    start: float = 0.0


class Trainer:
    """Trains a student with DeepSpeed.

    Args:
        plan: Configuration and what follows from it.
        module: Student and objective.
        teacher: None for ``sft``.
        data: Tokenised records.
        steps: Length of the run.
        folder: Of the run.
        tracker: Takes the numbers.
        device: Of this process.
        stop: Signals and the time limit.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        module: DistillationModule,
        teacher: Teacher | None,
        data: PreparedData,
        steps: StepCount,
        folder: RunFolder,
        tracker: Tracker,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.plan, self.config, self.steps = plan, plan.config, steps
        self.teacher, self.data, self.folder, self.tracker = teacher, data, folder, tracker
        self.device, self.stop = device, stop
        self.world_size, self.rank = distributed.world_size(), distributed.rank()
        self.lengths = record_lengths(data.train)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, self.config),
            config=plan.deepspeed,
        )
        self.module = module
        if plan.zero_stage == 3:  # the fused loss reads these weights without calling their modules
            for parameter in module.lens.parts.head.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self.state = TrainState()
        self.totals = self._new_totals()

    # --- The loop ---

    def fit(self) -> None:
        """Trains to the end, a signal or the time limit; evaluates and saves on the way."""
        self.tracker.start(self.state.step)
        self.totals = self._new_totals()
        while self.state.step < self.steps.total_steps:
            for micro_batches in self.epoch():
                self.train_step(micro_batches)
                self.tracker.advance(self.state.step)
                if self.is_log_due():
                    self.log_metrics()
                if self.is_evaluation_due():
                    self.evaluate()
                    self.save()
                if self.stop.agreed(self.device):
                    self.save()
                    raise self.stop.error(self.state.step)
                if self.state.step >= self.steps.total_steps:
                    break

    def epoch(self) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each optimizer step left in the epoch."""
        epoch, offset = divmod(self.state.step, self.steps.steps_per_epoch)
        batches = epoch_batches(
            self.lengths,
            batch_size=self.steps.global_batch,
            seed=self.config.run.seed,
            epoch=epoch,
            group_by_length=self.config.data.group_by_length,
        )
        size = self.config.optim.micro_batch_size
        for batch in batches[offset:]:
            start = time.perf_counter()
            # A stride over the processes: a batch sorted by length gives each the same load.
            own = batch[self.rank :: self.world_size].tolist()
            micro_batches = [
                self._collate(self.data.train[own[first : first + size]])
                for first in range(0, len(own), size)
            ]
            self.totals.data_s += time.perf_counter() - start
            yield micro_batches

    def _collate(self, columns: dict[str, list[Any]]) -> Batch:
        pairs = zip(columns["prompt_ids"], columns["response_ids"], strict=True)
        pad_id = self.plan.tokenizer.eos_token_id
        return collate([{"prompt_ids": p, "response_ids": r} for p, r in pairs], pad_id=pad_id)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Does one optimizer step: the mean over the response tokens of the global batch."""
        own_tokens = float(sum(batch.num_tokens for batch in micro_batches))
        (tokens,) = distributed.sum_numbers([own_tokens], self.device)
        # DeepSpeed averages over processes and micro-batches; this factor turns that mean of sums
        # into the sum over all of them, divided by all their tokens.
        scale = self.world_size * len(micro_batches) / max(tokens, 1.0)
        for batch in micro_batches:
            batch = batch.to(self.device)
            teacher_rows = None
            if self.teacher is not None:
                teacher_rows = self.teacher.rows(batch.input_ids_BT, batch.rows_N)
            loss, sums_K2 = self.engine(
                batch.input_ids_BT, batch.rows_N, batch.targets_N, teacher_rows, scale
            )
            self.engine.backward(loss)
            self.totals.sums_K2 += sums_K2
            if self.engine.is_gradient_accumulation_boundary():
                self._refuse_non_finite()
                self._set_learning_rate()
            self.engine.step()
        self.state.step += 1
        self.totals.tokens += own_tokens
        self.totals.steps += 1

    def _refuse_non_finite(self) -> None:
        """Stops before the update if any loss component of any process is NaN or infinite."""
        bad = (~torch.isfinite(self.totals.sums_K2)).any().float()
        if distributed.sum_over_ranks(bad).item() == 0:
            return
        sums = distributed.sum_over_ranks(self.totals.sums_K2).tolist()
        losses = self.plan.objective.losses(sums, self.totals.tokens)
        parts = ", ".join(f"{name}={value:.4g}" for name, value in losses.items())
        kept = self.folder.latest
        raise NumericsError(
            f"non-finite loss at step {self.state.step + 1} ({parts})",
            why="a loss or its logits overflowed; the update was not made",
            fix="lower --optim.lr, add --optim.warmup, or use a float32 DeepSpeed file",
            kept=str(kept) if kept.is_dir() else "no model was saved yet",
        )

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return learning_rate(self.config.optim, self.state.step, self.steps.total_steps)

    # --- Numbers ---

    def _new_totals(self) -> Totals:
        terms = 1 + len(self.plan.objective.pairs)
        return Totals(torch.zeros(terms, 2, device=self.device), start=time.perf_counter())

    @property
    def epochs_done(self) -> float:
        """Passes over the records so far."""
        return self.state.step / self.steps.steps_per_epoch

    def is_log_due(self) -> bool:
        """Each ``tracking.log_every`` steps, and at the end."""
        step = self.state.step
        return step % self.config.tracking.log_every == 0 or step == self.steps.total_steps

    def log_metrics(self) -> None:
        """Writes the means since the last line, over all processes."""
        totals, self.totals = self.totals, self._new_totals()
        seconds = self.totals.start - totals.start
        sums = distributed.sum_over_ranks(totals.sums_K2.double()).tolist()
        (tokens,) = distributed.sum_numbers([totals.tokens], self.device)
        losses = self.plan.objective.losses(sums, tokens)
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics["train/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        if (norm := self.engine.get_global_grad_norm()) is not None:
            metrics["train/grad_norm"] = float(norm)
        metrics["perf/step_s"] = seconds / totals.steps
        metrics["perf/response_tokens_per_s"] = tokens / seconds
        metrics["perf/data_wait_pct"] = 100 * totals.data_s / seconds
        metrics["perf/memory_gb"] = self._peak_memory_gb()
        self.tracker.log(metrics, step=self.state.step, epoch=self.epochs_done)

    def _peak_memory_gb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    # --- Evaluation and saving ---

    def is_evaluation_due(self) -> bool:
        """Each ``eval.every`` steps (default: each epoch), and at the end."""
        every = self.config.eval.every or self.steps.steps_per_epoch
        step = self.state.step
        return step % every == 0 or step == self.steps.total_steps

    def evaluate(self) -> None:
        """Measures the dev set and saves latest/, and best/ if it is the best so far.

        Without a dev set best/ is always the latest.
        """
        start = time.perf_counter()
        metrics = self.dev_metrics()
        export_model(self.engine, self.module.student, self.plan.tokenizer, self.folder.latest)
        name, larger = f"eval/dev/{self.config.eval.metric}", self.config.eval.metric == "rougeL"
        if not metrics or self.state.take_if_best(metrics[name], larger=larger):
            copy_model(self.folder.latest, self.folder.best)
            self.tracker.say(f"best/ is now step {self.state.step}")
        metrics["perf/eval_s"] = time.perf_counter() - start
        self.tracker.log(metrics, step=self.state.step, epoch=self.epochs_done)
        self.totals.start += time.perf_counter() - start  # throughput counts training only

    def dev_metrics(self) -> dict[str, float]:
        """Returns the token-weighted dev loss and, if it chooses best/, Rouge-L of answers."""
        if len(self.data.dev) == 0:
            return {}
        self.tracker.say(f"evaluating {len(self.data.dev)} dev records")
        self.engine.eval()
        loss = self._dev_loss()
        metrics = {"eval/dev/loss": loss, "eval/dev/ppl": math.exp(min(loss, 700.0))}
        if self.config.eval.metric == "rougeL":
            metrics |= self._dev_generations()
        self.engine.train()
        return metrics

    @torch.no_grad()
    def _dev_loss(self) -> float:
        size, count = self.config.eval.batch_size, len(self.data.dev)
        starts = range(0, count, size)
        loss_sum, tokens = 0.0, 0.0
        for turn in range(math.ceil(len(starts) / self.world_size)):
            number = turn * self.world_size + self.rank
            start = starts[number % len(starts)]  # all processes run equally often (ZeRO-3)
            batch = self._collate(self.data.dev[start : start + size]).to(self.device)
            _, sums_K2 = self.engine(batch.input_ids_BT, batch.rows_N, batch.targets_N)
            if number < len(starts):
                loss_sum += sums_K2[0, 0].item()
                tokens += batch.num_tokens
        loss_sum, tokens = distributed.sum_numbers([loss_sum, tokens], self.device)
        return loss_sum / max(tokens, 1.0)

    def _dev_generations(self) -> dict[str, float]:
        raw = Path(self.config.data.path) / "raw.jsonl"
        records = read_records(raw, bad_lines=self.config.data.bad_lines).records
        metrics = evaluate_dev_generations(
            base_model(self.module.student),
            self.plan.tokenizer,
            records[: self.config.eval.dev_size],
            settings=self.config.eval,
            seed=self.config.eval.seeds[0],
            max_prompt_length=self.config.data.max_prompt_length,
            rank=self.rank,
            world_size=self.world_size,
        )
        return {f"eval/dev/{name}": value for name, value in metrics.items()}

    def save(self) -> None:
        """Saves all that a later process needs to go on from here."""
        save_state(self.engine, self.state, self.config, self.folder.state)
        if distributed.is_main():
            write_status(self.folder, state="running", code=None, step=self.state.step)

    def resume(self, state: Path) -> None:
        """Goes on from a saved state."""
        self.state = load_state(self.engine, state, self.device)
        self.tracker.say(f"resuming from step {self.state.step}")
