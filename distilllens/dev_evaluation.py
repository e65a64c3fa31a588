"""How good the student is by now: its loss and its answers on the dev records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from distilllens.data.collate import collate_columns
from distilllens.data.records import Record, read_records
from distilllens.evaluation.cells.plan import no_usable_prompt
from distilllens.evaluation.cells.prompts import fit_prompts
from distilllens.evaluation.protocol import evaluate_dev_generations
from distilllens.families import base_model
from distilllens.runtime import distributed
from distilllens.runtime.signals import StopRequest
from distilllens.tracking import Tracker
from distilllens.training.setup import Plan


class DevEvaluation:
    """Measures the student in training on the dev set; all processes do it together.

    Args:
        plan: Of the run.
        table: The dev records, tokenised; may be empty.
        engine: DeepSpeed's, around student and loss.
        student: The module inside it, with or without LoRA.
        tracker: Tells what is under way.
        device: Of this process.
        stop: Is asked between batches.

    Raises:
        DataError: Answers are wanted, and no dev prompt can be used.
    """

    def __init__(
        self,
        plan: Plan,
        table: Dataset,
        *,
        engine: Any,
        student: nn.Module,
        tracker: Tracker,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.plan, self.config, self.table = plan, plan.config, table
        self.engine, self.student = engine, student
        self.tracker, self.device, self.stop = tracker, device, stop
        self.world_size, self.rank = distributed.world_size(), distributed.rank()
        self.answers = self.config.eval.metric == "rougeL"
        self.records = self._read_records() if self.answers and len(table) > 0 else []

    def measure(self) -> dict[str, float]:
        """Returns the token-weighted loss and, if it chooses best/, Rouge-L of answers.

        Empty without a dev set.

        Raises:
            Stopped: Between two batches.
        """
        if len(self.table) == 0:
            return {}
        self.tracker.say(f"evaluating {len(self.table)} dev records")
        self.engine.eval()
        loss = self._loss()
        metrics = {"eval/dev/loss": loss, "eval/dev/ppl": math.exp(min(loss, 700.0))}
        if self.answers:
            metrics |= self._generations()
        self.engine.train()
        return metrics

    @torch.no_grad()
    def _loss(self) -> float:
        size, count = self.config.eval.batch_size, len(self.table)
        starts = range(0, count, size)
        loss_sum, tokens = 0.0, 0.0
        for turn in range(math.ceil(len(starts) / self.world_size)):
            self.stop.check("evaluating")
            number = turn * self.world_size + self.rank
            start = starts[number % len(starts)]  # all processes run equally often (ZeRO-3)
            columns = self.table[start : start + size]
            batch = collate_columns(columns, pad_id=self.plan.tokenizer.eos_token_id)
            batch = batch.to(self.device)
            _, sums_K2 = self.engine(batch.input_ids_BT, batch.rows_N, batch.targets_N)
            if number < len(starts):
                loss_sum += sums_K2[0, 0].item()
                tokens += batch.num_tokens
        loss_sum, tokens = distributed.sum_numbers([loss_sum, tokens], self.device)
        return loss_sum / max(tokens, 1.0)

    def _read_records(self) -> list[Record]:
        """Returns the records to answer, now: what cannot be cut should stop no running job."""
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

    def _generations(self) -> dict[str, float]:
        metrics = evaluate_dev_generations(
            base_model(self.student),
            self.plan.tokenizer,
            self.records,
            settings=self.config.eval,
            seed=self.config.eval.seeds[0],
            max_prompt_length=self.config.data.max_prompt_length,
            rank=self.rank,
            world_size=self.world_size,
            stop=self.stop,
        )
        return {f"eval/dev/{name}": value for name, value in metrics.items()}
