"""The training loop. Setup lives in `setup`, the mathematics in `student`, files in `checkpoint`.

Shapes: B batch, T tokens, N response rows, K sums of the objective.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from distilllens.checkpoint import (
    StateParts,
    TrainState,
    copy_model,
    export_model,
    load_state,
    save_state,
)
from distilllens.data.collate import collate_columns
from distilllens.data.encode import tokenizer_fingerprint
from distilllens.data.records import Record, read_records
from distilllens.data.tokenize import PreparedData
from distilllens.errors import CheckpointError
from distilllens.evaluation.cells.plan import no_usable_prompt
from distilllens.evaluation.cells.prompts import fit_prompts
from distilllens.evaluation.cells.shares import own_share
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.families import base_model
from distilllens.publish.card_facts import CardFacts, facts_of_run
from distilllens.runs import RunFolder, newest_state, write_status
from distilllens.runtime import distributed
from distilllens.runtime.faults import reach
from distilllens.runtime.manifest import read_manifest
from distilllens.runtime.signals import Request, Stopped, StopRequest
from distilllens.student import DistillationModule, Teacher
from distilllens.teacher.cache import CachedTeacher
from distilllens.tracking import Tracker
from distilllens.training.bad_step import bad_step_error
from distilllens.training.clipping import clip_gradients_
from distilllens.training.layer_choice import pair_records
from distilllens.training.loader import StepBatches, StepLoader
from distilllens.training.loss_scale import is_at_smallest_scale, smallest_scale_error
from distilllens.training.numerics_guard import NumericsGuard, WatchedStep
from distilllens.training.resume import check_same_facts
from distilllens.training.schedule import learning_rate, lens_shares
from distilllens.training.setup import Plan, StepCount, build_optimizer
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
        self.world_size, self.rank = distributed.world_size(), distributed.rank()
        self.loader = StepLoader(
            plan,
            data.train,
            steps,
            cache=teacher if isinstance(teacher, CachedTeacher) else None,
            rank=self.rank,
            world_size=self.world_size,
            pin=device.type == "cuda",
        )
        optimizer = build_optimizer(module, self.config)
        watched = [] if plan.dtype == torch.float16 else module.named_parameters()
        # In float16 a gradient that overflows is normal: DeepSpeed skips it and lowers its scale.
        self.guard = NumericsGuard(optimizer, watched, device, plan.optimizer_device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=plan.deepspeed
        )
        self.module = module
        if plan.zero_stage == 3:  # the fused loss reads these weights without calling their modules
            for parameter in module.lens.parts.head.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self.state = TrainState(tracker_id=tracker.run_id)
        self.resumed_from: Path | None = None
        self.begun_at = ""  # the state that run.resume named, once: later ones are this run's own
        self.tokenizer_sha256 = tokenizer_fingerprint(plan.tokenizer)
        self.totals = self._new_totals()
        self.norm_before_clipping = torch.zeros((), device=device)
        self.card = self._collect_card()
        answers = self.config.eval.metric == "rougeL" and len(data.dev) > 0
        self.dev_records = self._read_dev_records() if answers else []

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
            raise smallest_scale_error(self.state.step + 1, kept=self._kept()) from error

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
            kept=self._kept(),
        )

    def _kept(self) -> str:
        state, model = newest_state(self.folder), self.folder.latest
        places = [str(place) for place in (state, model) if place is not None and place.is_dir()]
        return ", ".join(places) or "nothing was saved yet"

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

    def _mean_losses(
        self, sums_K2: Tensor, scheduled_K2: Tensor, num_tokens: int
    ) -> dict[str, float]:
        """Names the means over all processes."""
        both = torch.stack([sums_K2, scheduled_K2]).double()
        sums, scheduled = distributed.sum_over_ranks(both).tolist()
        return self.plan.objective.losses(sums, num_tokens, scheduled)

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
        objective = self.plan.objective
        named = self._mean_losses(totals.sums_K2, totals.scheduled_K2, totals.tokens)
        named |= objective.lens_coefficients(self._lens_shares(self.state.step - 1))
        metrics = {f"train/{name}": value for name, value in named.items()}
        metrics["train/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        if (norm := self._gradient_norm()) is not None:
            metrics["train/grad_norm"] = float(norm)
        if self.plan.dtype == torch.float16:
            metrics["train/loss_scale"] = self.loss_scale
            metrics["train/skipped_steps"] = self.engine.skipped_steps
        metrics["perf/step_s"] = seconds / totals.steps
        metrics["perf/response_tokens_per_s"] = totals.tokens / seconds
        metrics["perf/tokens_per_s"] = totals.input_tokens / seconds
        metrics["perf/data_wait_pct"] = 100 * totals.data_s / seconds
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
        every = self.config.eval.every or self.steps.steps_per_epoch
        step = self.state.step
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
        start, step = time.perf_counter(), self.state.step
        self.refuse_non_finite()
        reach("evaluate.start", step=step)
        metrics = self.dev_metrics()
        reach("evaluate.after_dev", step=step)
        export_model(
            *(self.engine, self.module.student, self.plan.tokenizer, self.folder.latest),
            sampling=self.config.eval,
            card=self._card(metrics),
        )
        reach("evaluate.after_latest", step=step)
        name, larger = f"eval/dev/{self.config.eval.metric}", self.config.eval.metric == "rougeL"
        if not metrics or self.state.take_if_best(metrics[name], larger=larger):
            copy_model(self.folder.latest, self.folder.best)
            self.tracker.say(f"best/ is now step {step}")
        if not metrics:
            self.state.best_step = step
        self.state.evaluated_step = step
        reach("evaluate.end", step=step)
        metrics["perf/eval_s"] = time.perf_counter() - start
        self.tracker.log(metrics, step=step, epoch=self.epochs_done)
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
            self.stop.check("evaluating")
            number = turn * self.world_size + self.rank
            start = starts[number % len(starts)]  # all processes run equally often (ZeRO-3)
            columns = self.data.dev[start : start + size]
            batch = collate_columns(columns, pad_id=self.plan.tokenizer.eos_token_id)
            batch = batch.to(self.device)
            _, sums_K2 = self.engine(batch.input_ids_BT, batch.rows_N, batch.targets_N)
            if number < len(starts):
                loss_sum += sums_K2[0, 0].item()
                tokens += batch.num_tokens
        loss_sum, tokens = distributed.sum_numbers([loss_sum, tokens], self.device)
        return loss_sum / max(tokens, 1.0)

    def _read_dev_records(self) -> list[Record]:
        """Returns the dev records to answer, now: what cannot be cut should stop no running job."""
        data, settings = self.config.data, self.config.eval
        file = read_records(Path(data.path) / "raw.jsonl", bad_lines=data.bad_lines)
        fitted = fit_prompts(
            self.plan.tokenizer,
            file.records[: settings.dev_size],
            limit=data.max_prompt_length,
            long_prompts=settings.long_prompts,
        )
        if fitted.num_long:
            self.tracker.say(
                f"dev prompts over {data.max_prompt_length} tokens: {len(fitted.cut)} cut in the "
                f"middle, {fitted.num_dropped} dropped, before they are answered"
            )
        if not fitted.records:
            num_records = len(file.records[: settings.dev_size])
            raise no_usable_prompt("the dev set", num_records, data.max_prompt_length)
        return fitted.records

    def _dev_generations(self) -> dict[str, float]:
        metrics = evaluate_dev_generations(
            base_model(self.module.student),
            self.plan.tokenizer,
            self.dev_records,
            settings=self.config.eval,
            seed=self.config.eval.seeds[0],
            max_prompt_length=self.config.data.max_prompt_length,
            rank=self.rank,
            world_size=self.world_size,
            stop=self.stop,
        )
        return {f"eval/dev/{name}": value for name, value in metrics.items()}

    def save(self) -> None:
        """Saves all that a later process needs to go on from here.

        Raises:
            NumericsError: Updates were refused since the last look: the step would not be true.
            StorageError: No space, or no right to write.
        """
        self.refuse_non_finite()
        start = time.perf_counter()
        parts = StateParts(
            config=self.config,
            student=self.module.student,
            tokenizer=self.plan.tokenizer,
            facts=self.facts,
            sums=self.totals.saved(),
            source=self.resumed_from,
            card=self._card({}),
        )
        save_state(self.engine, self.state, parts, self.folder.state)
        distributed.on_main(
            lambda: write_status(self.folder, state="running", code=None, step=self.state.step)
        )
        self.totals.start += time.perf_counter() - start  # throughput counts training only
        self.stop.alive()

    def _collect_card(self) -> CardFacts | None:
        """Returns what the exports' cards tell; None on all processes but the first."""
        if not distributed.is_main():
            return None
        try:
            return facts_of_run(self.folder, self.config)
        except Exception as error:  # of a file that only the card needs: no reason to stop
            self.tracker.say(f"exports will have no model card: {error}")
            return None

    def _card(self, dev_metrics: dict[str, float]) -> CardFacts | None:
        """Returns the facts for the card of this step."""
        return self.card and replace(self.card, step=self.state.step, dev=dev_metrics)

    @property
    def facts(self) -> dict[str, Any]:
        """What a state is of, as its manifest tells it; the sample offset counts in the epoch."""
        epoch, steps = divmod(self.state.step, self.steps.steps_per_epoch)
        return {
            "epoch": epoch,
            "sample_offset": steps * self.steps.global_batch,
            "global_batch": self.steps.global_batch,
            "zero_stage": self.plan.zero_stage,
            "precision": str(self.plan.dtype),
            "begun_at": self.begun_at,
            "data_fingerprint": self.data.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "layer_pairs": pair_records(self.plan),
        }

    def resume(self, state: Path) -> None:
        """Goes on from a verified state.

        Raises:
            CheckpointError: It is of other data, or a part of it did not come back.
        """
        allow_changes = self.config.run.allow_changes
        changes = check_same_facts(state, self.facts, allow_changes=allow_changes)
        groups = self.engine.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        self.state, saved = load_state(self.engine, state, self.device, seed=self.config.run.seed)
        # DeepSpeed brings back these options too, which run.allow_changes may have changed.
        for group, decay in zip(self.engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.engine.optimizer.clip_grad = self.config.optim.clip_grad
        if self.state.step > self.steps.total_steps:
            raise CheckpointError(
                f"{state} is at step {self.state.step}, this run has {self.steps.total_steps}",
                fix="raise --optim.epochs or --optim.max_steps",
            )
        manifest = read_manifest(state)
        named = self.config.run.resume
        is_named = named not in ("auto", "must", "never")
        self.begun_at = str(Path(named).resolve()) if is_named else manifest["begun_at"]
        self.resumed_from = state
        self.tracker.say(f"resuming from step {self.state.step}")
        if changes:
            self.tracker.say(f"saved → now, allowed by run.allow_changes:{changes}")
        same_pairs = manifest["layer_pairs"] == self.facts["layer_pairs"]
        for sums in saved:
            if same_pairs and self.totals.fits(sums):
                self.totals.add(sums)
        self.stop.alive()
