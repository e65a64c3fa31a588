"""What a run leaves behind, and comes back from: states, the models latest/ and best/, cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilllens.checkpoint import StateParts, TrainState, load_state, save_state
from distilllens.data.encode import tokenizer_fingerprint
from distilllens.errors import CheckpointError
from distilllens.publish.card_facts import CardFacts, facts_of_run
from distilllens.publish.export import copy_model, export_model
from distilllens.runs import RunFolder, newest_state, write_status
from distilllens.runtime import distributed
from distilllens.runtime.manifest import read_manifest
from distilllens.tracking import Tracker
from distilllens.training.layer_choice import pair_records
from distilllens.training.resume import check_same_facts
from distilllens.training.setup import Plan, StepCount


class Keeper:
    """Saves a run and brings it back; all processes call its methods together.

    Args:
        plan: Of the run.
        steps: Its length.
        engine: DeepSpeed's, around student and loss.
        student: The module inside it, with or without LoRA.
        folder: Of the run.
        tracker: Tells what is done.
        data_fingerprint: Of the tokenised records.
    """

    def __init__(
        self,
        plan: Plan,
        steps: StepCount,
        *,
        engine: Any,
        student: nn.Module,
        folder: RunFolder,
        tracker: Tracker,
        data_fingerprint: str,
    ) -> None:
        self.plan, self.config, self.steps = plan, plan.config, steps
        self.engine, self.student = engine, student
        self.folder, self.tracker = folder, tracker
        self.data_fingerprint = data_fingerprint
        self.tokenizer_sha256 = tokenizer_fingerprint(plan.tokenizer)
        self.resumed_from: Path | None = None
        self.begun_at = ""  # the state that run.resume named, once: later ones are this run's own
        self.card = self._collect_card()

    def save(self, state: TrainState, sums: dict[str, Tensor]) -> None:
        """Saves all that a later process needs to go on from here.

        Args:
            state: Counters of the run.
            sums: What this process has added up since the last line of metrics.

        Raises:
            StorageError: No space, or no right to write.
        """
        parts = StateParts(
            config=self.config,
            student=self.student,
            tokenizer=self.plan.tokenizer,
            facts=self._facts(state.step),
            sums=sums,
            source=self.resumed_from,
            card=self._card(state.step, {}),
        )
        save_state(self.engine, state, parts, self.folder.state)
        distributed.on_main(
            lambda: write_status(self.folder, state="running", code=None, step=state.step)
        )

    def export_latest(self, step: int, dev_metrics: dict[str, float]) -> None:
        """Writes the student as latest/, a Hugging Face folder."""
        export_model(
            *(self.engine, self.student, self.plan.tokenizer, self.folder.latest),
            sampling=self.config.eval,
            card=self._card(step, dev_metrics),
        )

    def copy_to_best(self, step: int) -> None:
        """Makes best/ what latest/ is."""
        copy_model(self.folder.latest, self.folder.best)
        self.tracker.say(f"best/ is now step {step}")

    def kept(self) -> str:
        """Says what of the run is safe on disk."""
        state, model = newest_state(self.folder), self.folder.latest
        places = [str(place) for place in (state, model) if place is not None and place.is_dir()]
        return ", ".join(places) or "nothing was saved yet"

    def load(self, path: Path, device: torch.device) -> tuple[TrainState, list[dict[str, Tensor]]]:
        """Puts back what `save` saved.

        Args:
            path: A verified state.
            device: Of this process.

        Returns:
            The counters; and the sums that fall to this process, none if they are of other pairs.

        Raises:
            CheckpointError: It is of other data or further than this run goes, or a part of it did
                not come back.
        """
        now, optim = self._facts(step=0), self.config.optim
        changes = check_same_facts(path, now, allow_changes=self.config.run.allow_changes)
        decays = [group["weight_decay"] for group in self.engine.optimizer.param_groups]
        state, sums = load_state(self.engine, path, device, seed=self.config.run.seed)
        # DeepSpeed brings back these options too, which run.allow_changes may have changed.
        for group, decay in zip(self.engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.engine.optimizer.clip_grad = optim.clip_grad
        if state.step > self.steps.total_steps:
            raise CheckpointError(
                f"{path} is at step {state.step}, this run has {self.steps.total_steps}",
                fix="raise --optim.epochs or --optim.max_steps",
            )
        saved, named = read_manifest(path), self.config.run.resume
        is_named = named not in ("auto", "must", "never")
        self.begun_at = str(Path(named).resolve()) if is_named else saved["begun_at"]
        self.resumed_from = path
        self.tracker.say(f"resuming from step {state.step}")
        if changes:
            self.tracker.say(f"saved → now, allowed by run.allow_changes:{changes}")
        return state, sums if saved["layer_pairs"] == now["layer_pairs"] else []

    def _facts(self, step: int) -> dict[str, Any]:
        """What a state is of, as its manifest tells it; the sample offset counts in the epoch."""
        epoch, steps = divmod(step, self.steps.steps_per_epoch)
        return {
            "epoch": epoch,
            "sample_offset": steps * self.steps.global_batch,
            "global_batch": self.steps.global_batch,
            "zero_stage": self.plan.zero_stage,
            "precision": str(self.plan.dtype),
            "begun_at": self.begun_at,
            "data_fingerprint": self.data_fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "layer_pairs": pair_records(self.plan),
        }

    def _collect_card(self) -> CardFacts | None:
        """Returns what the exports' cards tell; None on all processes but the first."""
        if not distributed.is_main():
            return None
        try:
            return facts_of_run(self.folder, self.config)
        except Exception as error:  # of a file that only the card needs: no reason to stop
            self.tracker.say(f"exports will have no model card: {error}")
            return None

    def _card(self, step: int, dev_metrics: dict[str, float]) -> CardFacts | None:
        """Returns the facts for the card of this step."""
        return self.card and replace(self.card, step=step, dev=dev_metrics)
