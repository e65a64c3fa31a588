"""Lens maps of runs: which models to load, on which text, before and after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from distilllens.config import ModelConfig
from distilllens.data.collate import Batch, collate
from distilllens.data.progress import track
from distilllens.data.records import read_records
from distilllens.data.tokenize import encode_prompts, encode_responses
from distilllens.errors import ConfigError, DataError, UserError
from distilllens.lens import LogitLens
from distilllens.lens_matrix import LensMap, LensRows, collect_rows, compute_lens_map
from distilllens.models import (
    check_same_tokens,
    load_model,
    load_teacher,
    load_tokenizer,
    shared_vocab_size,
)
from distilllens.report.runs.record import RunRecord

BATCH_SIZE = 8
"""Prompts per forward pass."""


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """What a lens map is computed from."""

    data: Path | None
    """Held-out records; None: valid.jsonl in the run's data folder."""
    prompts: int
    """Use the first so many records."""
    tokens: int
    """Use at most so many of their response tokens, evenly spread."""
    teacher: str | None
    """Teacher of runs that were trained without one."""
    device: str
    required: bool
    """Whether a map that cannot be drawn is an error instead of a note."""


@dataclass(frozen=True, kw_only=True)
class RunMaps:
    """The maps of one run."""

    run: RunRecord
    teacher: str
    own_teacher: bool
    """False: the run was trained without a teacher and is only compared with this one."""
    before: LensMap
    after: LensMap
    data: Path
    num_prompts: int

    @property
    def origin(self) -> tuple[str, str]:
        """Teacher and initial student: runs that share them begin with the same map."""
        return self.teacher, self.run.config.model.student


def build_run_maps(
    runs: Sequence[RunRecord], options: MapOptions, console: Console
) -> tuple[list[RunMaps], list[str]]:
    """Computes the maps of every run that can have them.

    Models that several runs share (the teacher, the initial student) are compared once.

    Returns:
        The maps, and a sentence for each run that has none.

    Raises:
        UserError: With ``options.required``: a teacher, student, best/ or data file is missing,
            or they do not fit together.
    """
    workshop = _Workshop(options, console)
    teachers = {run.config.model.teacher for run in runs} - {None}
    lent = options.teacher or (teachers.pop() if len(teachers) == 1 else None)
    maps, notes = [], []
    for run in runs:
        teacher = run.config.model.teacher or lent
        if teacher is not None and Path(teacher).resolve() == run.folder / "best":
            notes.append(f"{run.label}: no lens map: it is the teacher itself")
            continue
        try:
            maps.append(workshop.build(run, teacher))
        except UserError as error:
            if options.required:
                raise
            notes.append(f"{run.label}: no lens map: {error.what}")
    return maps, notes


class _Workshop:
    """Keeps what runs share: one teacher with its rows, and the maps of initial students."""

    def __init__(self, options: MapOptions, console: Console) -> None:
        self.options, self.console = options, console
        self.teacher_key: tuple[object, ...] | None = None
        self.teacher_rows: LensRows | None = None
        self.batches: list[Batch] = []
        self.num_prompts = 0
        self.before: dict[tuple[object, ...], LensMap] = {}

    def build(self, run: RunRecord, teacher: str | None) -> RunMaps:
        model = run.config.model
        if teacher is None:
            raise ConfigError(
                "the run has no teacher to compare with", fix="name one with --teacher PATH"
            )
        if model.teacher is None:
            model = dataclasses.replace(model, teacher=teacher, teacher_lora=None)
        best = run.folder / "best"
        if not best.is_dir():
            raise ConfigError(f"{best} not found", why="the map after training needs it")
        data = self.options.data or Path(run.config.data.path) / "valid.jsonl"
        if not data.is_file():
            raise DataError(
                f"{data}: no such file",
                why="lens maps are drawn on held-out records",
                fix="give a JSONL file with --data, or leave the maps out with --no_lens",
            )
        self._prepare_teacher(run, model, data)
        key = (self.teacher_key, model.student, model.revision)
        if key not in self.before:
            self.before[key] = self._compare(model, model.student, f"{run.label}, before")
        # The exported student is plain safetensors of a known family: no revision, no own code.
        exported = dataclasses.replace(model, revision=None, trust_remote_code=False)
        after = self._compare(exported, str(best), f"{run.label}, after")
        return RunMaps(
            run=run,
            teacher=teacher,
            own_teacher=run.config.objective.approach != "sft",
            before=self.before[key],
            after=after,
            data=data,
            num_prompts=self.num_prompts,
        )

    def _prepare_teacher(self, run: RunRecord, model: ModelConfig, data: Path) -> None:
        """Loads the teacher and the text, unless the run before used the same."""
        lengths = (run.config.data.max_length, run.config.data.max_prompt_length)
        key = (model.teacher, model.teacher_lora, model.revision, data.resolve(), *lengths)
        if key == self.teacher_key:
            return
        self.teacher_key, self.teacher_rows = None, None
        assert model.teacher is not None
        tokenizer = self._tokenizer(model, model.teacher)
        check_same_tokens(tokenizer, self._tokenizer(model, model.student))
        self.batches, self.num_prompts = _held_out_batches(
            data, tokenizer, self.options.prompts, max_length=lengths[0], max_prompt=lengths[1]
        )
        lens = self._lens(load_teacher(model, dtype=torch.float32))
        self.teacher_rows = collect_rows(lens, self.batches, max_tokens=self.options.tokens)
        self.teacher_key = key

    def _tokenizer(self, model: ModelConfig, path: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(
            path, trust_remote_code=model.trust_remote_code, revision=model.revision
        )

    def _lens(self, model: nn.Module) -> LogitLens:
        """Moves a model to the device and proves that its lens is right."""
        model.to(self.options.device)
        lens = LogitLens(model)
        lens.self_check(self.batches[0].input_ids_BT[:1, :8].to(self.options.device))
        return lens

    def _compare(self, model: ModelConfig, student_path: str, title: str) -> LensMap:
        assert self.teacher_rows is not None
        student = load_model(
            student_path,
            dtype=torch.float32,
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
        )
        lens = self._lens(student)
        num_tokens = len(self._tokenizer(model, student_path))
        shared_vocab_size(
            self.teacher_rows.lens.parts.vocab_size, lens.parts.vocab_size, num_tokens
        )
        rows = collect_rows(lens, self.batches, max_tokens=self.options.tokens)
        if not self.console.is_terminal:
            self.console.print(f"lens map: {title}", markup=False)
        num_rows = len(rows.hidden_LND[0])
        with track(f"lens map: {title}", "tokens", total=num_rows, console=self.console) as advance:
            return compute_lens_map(self.teacher_rows, rows, advance=advance)


def _held_out_batches(
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    max_length: int,
    max_prompt: int,
) -> tuple[list[Batch], int]:
    """Returns the first records as batches of prompt + first reference, and how many they are."""
    records = [
        record
        for record in read_records(data, references="many").records[:count]
        if record.outputs[0].strip()
    ]
    prompts = encode_prompts(tokenizer, [record.prompt for record in records])
    responses = encode_responses(tokenizer, [record.outputs[0] for record in records])
    samples = [
        {"prompt_ids": prompt, "response_ids": response[: max_length - len(prompt)]}
        for prompt, response in zip(prompts, responses, strict=True)
        if len(prompt) <= max_prompt
    ]
    if not samples:
        raise DataError(
            f"{data}: none of the first {count} records has an answer and a prompt that fits",
            fix="give another file with --data, or more records with --prompts",
        )
    batches = [
        collate(samples[start : start + BATCH_SIZE], pad_id=tokenizer.eos_token_id)
        for start in range(0, len(samples), BATCH_SIZE)
    ]
    return batches, len(samples)
