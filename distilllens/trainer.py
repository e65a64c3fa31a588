"""The training loop: steps, their numbers, and when to evaluate, save and stop.

Setup lives in `training.setup`, the mathematics in `student`, the dev set in `dev_evaluation`,
files in `keeper`.

Shapes: B batch, T tokens, N response rows, K sums of the objective.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from distilllens.checkpoint import TrainState
from distilllens.data.tokenize import PreparedData
from distilllens.dev_evaluation import DevEvaluation
from distilllens.evaluation.cells.shares import own_share
from distilllens.keeper import Keeper
from distilllens.runs import RunFolder
from distilllens.runtime import distributed
from distilllens.runtime.faults import reach
from distilllens.runtime.signals import Request, Stopped, StopRequest
from distilllens.student import DistillationModule, Teacher
from distilllens.teacher.cache import CachedTeacher
from distilllens.tracking import Tracker
from distilllens.training.bad_step import bad_step_error
from distilllens.training.clipping import clip_gradients_
from distilllens.training.loader import StepBatches, StepLoader
from distilllens.training.loss_scale import is_at_smallest_scale, smallest_scale_error
from distilllens.training.numerics_guard import NumericsGuard, WatchedStep
from distilllens.training.schedule import learning_rate, lens_shares
from distilllens.training.setup import (
    Plan,
    StepCount,
    build_optimizer,
    divide_weights,
    prove_lens,
)
from distilllens.training.totals import Totals


class Trainer:
    """Trains a student with DeepSpeed.

    Args:
        plan: Configuration and what follows from it.
        module: Student and objective.
        teacher: One that runs, or its stored rows; None for ``sft``.
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
        teacher: Teacher | CachedTeacher | None,
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
        self.world_size = distributed.world_size()
        self.loader = StepLoader(
            plan,
            data.train,
            steps,
            cache=teacher if isinstance(teacher, CachedTeacher) else None,
            rank=distributed.rank(),
            world_size=self.world_size,
            pin=device.type == "cuda",
        )
        optimizer = build_optimizer(module, self.config)
        watched = [] if plan.dtype == torch.float16 else module.named_parameters()
        # In float16 a gradient that overflows is normal: DeepSpeed skips it and lowers its scale.
        self.guard = NumericsGuard(optimizer, watched, device, plan.optimizer_device)
        if plan.zero_stage == 3:
            divide_weights(module, plan, device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=plan.deepspeed
        )
        self.module = module
        if plan.zero_stage == 3:
            prove_lens(module.lens, plan, data, device)
            # The fused loss reads these weights without calling their modules.
            for parameter in module.lens.parts.head.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self.state = TrainState(tracker_id=tracker.run_id)
        self.totals = self._new_totals()
        self.norm_before_clipping = torch.zeros((), device=device)
        self.keeper = Keeper(
            plan,
            steps,
            engine=self.engine,
            student=module.student,
            folder=folder,
            tracker=tracker,
            data_fingerprint=data.fingerprint,
        )
        self.dev = DevEvaluation(
            plan,
            data.dev,
            engine=self.engine,
            student=module.student,
            tracker=tracker,
            device=device,
            stop=stop,
        )

    # --- The loop ---

    def fit(self) -> None:
        """Trains to the end, a signal or the time limit; evaluates and saves on the way."""
        self.tracker.start(self.state.step)
        if self.totals.steps == 0:
            self.totals = self._new_totals()  # its clock starts here
        if self.is_evaluation_due():  # of a run that was stopped in it
            self.finish_step()
        while self.state.step < self.steps.total_steps:
            for batches in self.epoch():
                self.train_step(batches)
                self.tracker.advance(self.state.step)
                if self.device.type == "cpu" or self.is_log_due():
                    self.refuse_non_finite()
                if self.is_log_due():
                    self.log_metrics()
                self.finish_step()
                if self.state.step >= self.steps.total_steps:
                    break

    def finish_step(self) -> None:
        """Does what is due after a step: evaluates, saves, and ends the run if it was asked to.

        Raises:
            Stopped: All processes agreed on it; the step is saved.
        """
        if self.is_evaluation_due():
            self.save()  # first: whatever happens to the evaluation, the step is not lost
            with suppress(Stopped):  # the run that goes on evaluates this step
                self._evaluate_saved()
        if request := self.stop.agreed():
            self.save()
            if request is Request.STOP:
                raise self.stop.error(self.state.step)
            self.tracker.say(self.stop.saved(self.state.step))

    def epoch(self) -> Iterator[StepBatches]:
        """Yields what is left of the epoch, and counts the time of waiting for it."""
        with closing(self.loader.epoch(*divmod(self.state.step, self.steps.steps_per_epoch))) as it:
            while True:
                start = time.perf_counter()
                batches = next(it, None)
                self.totals.data_s += time.perf_counter() - start
                if batches is None:
                    return
                yield batches

    def train_step(self, batches: StepBatches) -> None:
        """Does one optimizer step: the mean over the response tokens of the global batch.

        Nothing here waits for the device.
        """
        count = len(batches.micro_batches)
        # DeepSpeed averages over processes and micro-batches; this factor turns that mean of sums
        # into the sum over all of them, divided by all their tokens.
        scale = self.world_size * count / max(batches.num_tokens, 1)
        shares = self._lens_shares(self.state.step)
        step_sums_K2 = torch.zeros_like(self.totals.sums_K2)
        for number, micro_batch in enumerate(batches.micro_batches, start=1):
            batch, teacher_rows = micro_batch.to(self.device)
            positions_BT = batch.packed_positions_BT
            if isinstance(self.teacher, Teacher):
                teacher_rows = self.teacher.rows(batch.input_ids_BT, batch.rows_N, positions_BT)
            inputs = (batch.input_ids_BT, batch.rows_N, batch.targets_N, teacher_rows)
            loss, sums_K2 = self.engine(*inputs, scale * self.loss_scale, positions_BT, shares)
            loss = loss / self.loss_scale  # DeepSpeed's backward multiplies by it again
            if reach("step.loss", step=self.state.step + 1):
                loss, sums_K2 = loss * math.nan, sums_K2 * math.nan
            if reach("step.gradient", step=self.state.step + 1):
                loss.register_hook(lambda gradient: gradient * math.nan)
            self.engine.backward(loss)
            step_sums_K2 += sums_K2
            if number == count:
                self._watch(step_sums_K2, batches)
                self._clip()
                self._set_learning_rate()
                reach("step.before_update", step=self.state.step + 1)
            self._update()
        self.state.step += 1
        reach("step.after_update", step=self.state.step)
        self.totals.sums_K2 += step_sums_K2
        self.totals.scheduled_K2 += self.plan.objective.scheduled(step_sums_K2, shares)
        self.totals.tokens += batches.num_tokens
        self.totals.input_tokens += batches.num_input_tokens
        self.totals.steps += 1

    def _watch(self, sums_K2: Tensor, batches: StepBatches) -> None:
        self.guard.watch(
            WatchedStep(
                step=self.state.step + 1,
                sums_K2=sums_K2,
                num_tokens=batches.num_tokens,
                records=batches.records,
                batches=[micro_batch.batch for micro_batch in batches.micro_batches],
            )
        )

    def _clip(self) -> None:
        """Clips the gradient where there is no ZeRO; else DeepSpeed's own step does."""
        if self.plan.zero_stage == 0:
            limit = self.config.optim.clip_grad
            self.norm_before_clipping = clip_gradients_(self.module.parameters(), limit)

    def _update(self) -> None:
        """Has DeepSpeed update the weights, or in float16 skip the step and lower its scale.

        Raises:
            NumericsError: The scale cannot be lowered any more.
        """
        try:
            self.engine.step()
        except Exception as error:
            if not is_at_smallest_scale(error):
                raise
            self.refuse_non_finite()  # then that is the reason
            raise smallest_scale_error(self.state.step + 1, kept=self.keeper.kept()) from error

    @property
    def loss_scale(self) -> float:
        """Factor by which DeepSpeed keeps small float16 gradients from vanishing; else 1.

        The fused loss makes its gradients in the forward pass, so it needs the factor there.
        """
        return float(self.engine.optimizer.loss_scale) if self.plan.dtype == torch.float16 else 1.0

    def refuse_non_finite(self) -> None:
        """Stops if a loss or gradient of any process was not finite since the last look.

        Raises:
            NumericsError: With the step, the processes and their records, which each has written
                down. No update was made from that step on.
        """
        if (bad := self.guard.bad_step()) is None:
            return
        scheduled_K2 = self.plan.objective.scheduled(bad.sums_K2, self._lens_shares(bad.step - 1))
        raise bad_step_error(
            bad,
            losses=self._mean_losses(bad.sums_K2, scheduled_K2, bad.num_tokens),
            gradients=self.guard.bad_gradients(),
            folder=self.folder,
            records=self.data.train,
            tokenizer=self.plan.tokenizer,
            kept=self.keeper.kept(),
        )

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _lens_shares(self, step: int) -> list[float]:
        """Returns each lens pair's at optimizer step ``step``, from 0."""
        pairs, lens = self.plan.objective.lens_pairs, self.config.objective.lens
        return lens_shares(lens, len(pairs), step, self.steps.total_steps)

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return learning_rate(self.config.optim, self.state.step, self.steps.total_steps)

    # --- Numbers ---

    def _new_totals(self) -> Totals:
        return Totals.zero(self.plan.objective.num_sums, self.device)

    def _mean_losses(self, sums_K2: Tensor, scheduled_K2: Tensor, tokens: int) -> dict[str, float]:
        """Names the means over all processes."""
        both = torch.stack([sums_K2, scheduled_K2]).double()
        sums, scheduled = distributed.sum_over_ranks(both).tolist()
        return self.plan.objective.losses(sums, tokens, scheduled)

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
        named = self._mean_losses(totals.sums_K2, totals.scheduled_K2, totals.tokens)
        shares = self._lens_shares(self.state.step - 1)  # of the last step
        named |= self.plan.objective.lens_coefficients(shares)
        metrics = {f"train/{name}": value for name, value in named.items()}
        metrics["train/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        if (norm := self._gradient_norm()) is not None:
            metrics["train/grad_norm"] = float(norm)
        if self.plan.dtype == torch.float16:
            metrics["train/loss_scale"] = self.loss_scale
            metrics["train/skipped_steps"] = self.engine.skipped_steps
        metrics |= totals.speeds(end=self.totals.start)
        metrics["perf/memory_gb"] = self._peak_memory_gb()
        self.tracker.log(metrics, step=self.state.step, epoch=self.epochs_done)

    def _gradient_norm(self) -> Tensor | float | None:
        """Returns the last step's before clipping; None where the DeepSpeed file turns it off."""
        if self.plan.zero_stage == 0:
            return self.norm_before_clipping
        return self.engine.get_global_grad_norm()

    def _peak_memory_gb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    # --- Evaluation and saving ---

    def is_evaluation_due(self) -> bool:
        """Each ``eval.every`` steps (default: each epoch), and at the end; once."""
        step, every = self.state.step, self.config.eval.every or self.steps.steps_per_epoch
        is_its_turn = step % every == 0 or step == self.steps.total_steps
        return is_its_turn and self.state.evaluated_step < step

    def _evaluate_saved(self) -> None:
        try:
            with own_share():  # its prompts may be those of this process alone
                self.evaluate()
        except Stopped:
            raise
        except Exception:
            self.tracker.say(
                f"the evaluation failed, but step {self.state.step} is saved; to score it: "
                f"python -m distilllens export {self.folder.root} --to DIR, "
                "then python evaluate.py --checkpoint DIR"
            )
            raise

    def evaluate(self) -> None:
        """Measures the dev set and saves latest/, and best/ if it is the best so far.

        Without a dev set best/ is always the latest.
        """
        self.refuse_non_finite()
        begun, step = time.perf_counter(), self.state.step
        with self.totals.paused():
            reach("evaluate.start", step=step)
            metrics = self.dev.measure()
            reach("evaluate.after_dev", step=step)
            self.keeper.export_latest(step, metrics)
            reach("evaluate.after_latest", step=step)
            if self._is_best(metrics):
                self.keeper.copy_to_best(step)
            self.state.evaluated_step = step
            reach("evaluate.end", step=step)
            metrics["perf/eval_s"] = time.perf_counter() - begun
            self.tracker.log(metrics, step=step, epoch=self.epochs_done)

    def _is_best(self, dev_metrics: dict[str, float]) -> bool:
        """Remembers this step if it is the best so far."""
        if not dev_metrics:
            self.state.best_step = self.state.step
            return True
        metric = self.config.eval.metric
        return self.state.take_if_best(dev_metrics[f"eval/dev/{metric}"], larger=metric == "rougeL")

    def save(self) -> None:
        """Saves all that a later process needs to go on from here.

        Raises:
            NumericsError: Updates were refused since the last look: the step would not be true.
            StorageError: No space, or no right to write.
        """
        self.refuse_non_finite()
        with self.totals.paused():
            self.keeper.save(self.state, self.totals.saved())
        self.stop.alive()

    def resume(self, path: Path) -> None:
        """Goes on from a verified state.

        Raises:
            CheckpointError: It is of other data, or a part of it did not come back.
        """
        self.state, saved = self.keeper.load(path, self.device)
        for sums in saved:
            if self.totals.fits(sums):
                self.totals.add(sums)
        self.stop.alive()
