"""The computation behind a lens report: loads the models one after the other and reads them all.

At any time the teacher and one student are in memory, never the logits of more than some rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from distilllens.config import ModelConfig
from distilllens.data.collate import Batch
from distilllens.data.progress import track
from distilllens.errors import ConfigError
from distilllens.layers import LayerPair
from distilllens.lens import LogitLens
from distilllens.lens_matrix import LensMap, LensRows, collect_rows, compute_lens_map
from distilllens.models import (
    check_same_tokens,
    context_length,
    load_model_config,
    load_teacher,
    load_tokenizer,
    num_blocks,
    shared_vocab_size,
    vocab_rows,
)
from distilllens.report.lens.readings import LensReadings, read_layers
from distilllens.report.lens.samples import (
    HeldOut,
    TextSample,
    answer_greedily,
    own_prompts,
    read_held_out,
)
from distilllens.report.lens.statistics import PerLayer, compute_statistics
from distilllens.report.lens.token_map import SampleReadings
from distilllens.report.lens.token_text import TokenText

LABELS = {"teacher": "Teacher", "student": "Student", "before": "Student before"}
"""How readers know the models, by role."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to be read."""

    role: str
    """teacher, student or before."""
    path: str
    lora: str | None = None
    """Adapter folder, merged into the weights when they are loaded."""
    revision: str | None = None
    """Commit hash of a hub repository."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a lens report is made of."""

    sources: tuple[Source, ...]
    """Teacher, student, and maybe the student before training."""
    pairs: tuple[LayerPair, ...]
    """Layers that a run trained; their cells are framed."""
    data: Path
    prompts: int
    """Records of the figures: the first so many."""
    tokens: int
    """At most so many of their response tokens, evenly spread."""
    show: int
    """Records of the token maps: the first usable ones."""
    show_tokens: int
    """Response tokens of a token map: the first so many."""
    answers: str
    """Who wrote the answers of the token maps: reference, teacher or student."""
    own_prompts: tuple[str, ...]
    own_responses: tuple[str, ...]
    max_length: int
    max_prompt_length: int
    device: str
    dtype: torch.dtype
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One model's numbers."""

    role: str
    path: str
    num_layers: int
    vocab_rows: int
    statistics: dict[str, PerLayer]

    @property
    def label(self) -> str:
        """How readers know the model."""
        return LABELS[self.role]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that a lens report shows."""

    models: tuple[ModelFigures, ...]
    """Teacher, student, and maybe the student before training."""
    after: LensMap
    before: LensMap | None
    pairs: tuple[LayerPair, ...]
    samples: tuple[SampleReadings, ...]
    held_out: HeldOut
    vocabulary: int
    """Tokens over which every distribution is."""
    text_of: Callable[[int], str]
    settings: StudySettings


def build_study(settings: StudySettings, console: Console) -> Study:
    """Reads all models on the same tokens.

    Raises:
        UserError: A model, adapter or the data is missing or broken; models do not share their
            tokens; pairs or the depth of the student before do not fit; no usable record.
    """
    return _Reader(settings, console).build()


class _Reader:
    def __init__(self, settings: StudySettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.tokenizer = self._check_models()
        longest = [settings.max_length, *self.contexts]
        self.max_length = min(longest)
        self.held_out = read_held_out(
            settings.data,
            self.tokenizer,
            count=settings.prompts,
            max_length=self.max_length,
            max_prompt_length=min(settings.max_prompt_length, self.max_length - 1),
        )
        eos = self.tokenizer.eos_token_id
        self.batches = self.held_out.batches(eos)
        self.shown = self._choose_samples()
        self.sample_readings: list[list[LensReadings]] = [[] for _ in self.shown]

    def _check_models(self) -> PreTrainedTokenizerBase:
        """Finds everything wrong that configurations and tokenizers tell, before weights load."""
        settings = self.settings
        configs = [
            load_model_config(
                s.path,
                trust_remote_code=s.trust_remote_code,
                revision=s.revision,
                option=f"--{s.role}",
            )
            for s in settings.sources
        ]
        self.depths = [num_blocks(config) for config in configs]
        self.contexts = [n for config in configs if (n := context_length(config)) is not None]
        tokenizers = [
            load_tokenizer(
                s.path,
                trust_remote_code=s.trust_remote_code,
                revision=s.revision,
                option=f"--{s.role}",
            )
            for s in settings.sources
        ]
        rows = [vocab_rows(config) for config in configs]
        for tokenizer, size in zip(tokenizers[1:], rows[1:], strict=True):
            check_same_tokens(tokenizers[0], tokenizer)
            shared_vocab_size(rows[0], size, len(tokenizer))
        self.head_rows, self.vocabulary = rows, min(rows)
        if len(set(self.depths[1:])) > 1:
            raise ConfigError(
                f"{settings.sources[2].path} has {self.depths[2]} blocks, the student "
                f"{settings.sources[1].path} has {self.depths[1]}",
                why="--before is the same student before its training",
                fix="name the model that the training started from with --before",
            )
        for pair in settings.pairs:
            if pair.teacher > self.depths[0] or pair.student > self.depths[1]:
                raise ConfigError(
                    f"the run pairs teacher block {pair.teacher} with student block "
                    f"{pair.student}, but the models have {self.depths[0]} and {self.depths[1]}",
                    fix="leave --run out, or name the models of that run",
                )
        return tokenizers[0]

    def _choose_samples(self) -> list[TextSample]:
        """Returns the samples of the token maps; those that a model answers are still empty."""
        settings = self.settings
        chosen = list(self.held_out.samples[: settings.show])
        if settings.answers != "reference":
            empty: tuple[int, ...] = ()
            chosen = [
                dataclasses.replace(s, answered_by=settings.answers, response_ids=empty, cut=False)
                for s in chosen
            ]
        # A prompt of one's own has no reference.
        author = "teacher" if settings.answers == "reference" else settings.answers
        for sample in own_prompts(
            self.tokenizer,
            settings.own_prompts,
            settings.own_responses,
            max_prompt_length=min(settings.max_prompt_length, self.max_length - 1),
        ):
            named = sample.answered_by or author
            chosen.append(dataclasses.replace(sample, answered_by=named))
        return [self._cut(sample) for sample in chosen]

    def _cut(self, sample: TextSample) -> TextSample:
        """Shortens an answer to what a token map shows, and to what the models can read."""
        room = min(self.settings.show_tokens, self.max_length - len(sample.prompt_ids))
        if len(sample.response_ids) <= room:
            return sample
        return dataclasses.replace(sample, response_ids=sample.response_ids[:room], cut=True)

    def build(self) -> Study:
        sources = self.settings.sources
        teacher_source, *students = sources
        if any(s.answered_by == "student" and not s.response_ids for s in self.shown):
            self._answer(self._load(students[0]), "student")
        teacher = self._load(teacher_source)
        self._answer(teacher, "teacher")
        teacher_rows, readings = self._read(teacher, teacher_source)
        teacher_final_N = readings.top_LNK[-1, :, 0]
        every = [readings]
        maps = []
        for source in students:
            lens = self._load(source)
            rows, readings = self._read(lens, source)
            every.append(readings)
            maps.append(self._compare(teacher_rows, rows, source))
        models = [
            ModelFigures(
                role=source.role,
                path=source.path,
                num_layers=readings.num_layers,
                vocab_rows=rows,
                statistics=compute_statistics(readings, teacher_final_N=teacher_final_N),
            )
            for source, readings, rows in zip(sources, every, self.head_rows, strict=True)
        ]
        return Study(
            models=tuple(models),
            after=maps[0],
            before=maps[1] if len(maps) > 1 else None,
            pairs=self.settings.pairs,
            samples=tuple(
                SampleReadings(
                    sample=sample,
                    answer=self._text(sample),
                    readings=tuple(readings),
                )
                for sample, readings in zip(self.shown, self.sample_readings, strict=True)
            ),
            held_out=self.held_out,
            vocabulary=self.vocabulary,
            text_of=TokenText(self.tokenizer),
            settings=self.settings,
        )

    def _text(self, sample: TextSample) -> str:
        """Returns an answer's text, without special tokens."""
        ids = list(sample.response_ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _load(self, source: Source) -> LogitLens:
        """Loads a model in evaluation mode and proves that its lens is right."""
        settings = self.settings
        config = ModelConfig(
            student=source.path,
            teacher=source.path,
            teacher_lora=source.lora,
            attention=settings.attention,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
        model: nn.Module = load_teacher(config, dtype=settings.dtype)
        lens = LogitLens(model.to(settings.device))
        lens.self_check(self.batches[0].input_ids_BT[:1, :8].to(settings.device))
        return lens

    def _answer(self, lens: LogitLens, author: str) -> None:
        """Lets a model answer the prompts that wait for it."""
        eos = self.tokenizer.eos_token_id
        for number, sample in enumerate(self.shown):
            if sample.response_ids or sample.answered_by != author:
                continue
            limit = min(self.settings.show_tokens, self.max_length - len(sample.prompt_ids))
            ids = answer_greedily(lens, sample.prompt_ids, limit=limit, eos=eos)
            self.shown[number] = dataclasses.replace(
                sample, response_ids=tuple(ids), cut=ids[-1] != eos
            )

    def _read(self, lens: LogitLens, source: Source) -> tuple[LensRows, LensReadings]:
        """Reads one model's layers on the held-out records and on the shown samples."""
        rows = self._rows(lens, self.batches, self.settings.tokens)
        eos = self.tokenizer.eos_token_id
        shown = [self._rows(lens, [sample.batch(eos)], None) for sample in self.shown]
        title = f"{LABELS[source.role].lower()}: reading {len(rows.hidden_LND)} layers"
        work = [rows, *shown]
        total = sum(len(part.targets_N) * len(part.hidden_LND) for part in work)
        if not self.console.is_terminal:
            self.console.print(title, markup=False, highlight=False)
        with track(title, "layer readings", total=total, console=self.console) as advance:
            readings = [
                read_layers(part, vocabulary=self.vocabulary, advance=advance) for part in work
            ]
        for kept, read in zip(self.sample_readings, readings[1:], strict=True):
            kept.append(read)
        return rows, readings[0]

    def _rows(self, lens: LogitLens, batches: Sequence[Batch], limit: int | None) -> LensRows:
        available = sum(batch.num_tokens for batch in batches)
        return collect_rows(lens, batches, max_tokens=available if limit is None else limit)

    def _compare(self, teacher: LensRows, student: LensRows, source: Source) -> LensMap:
        title = f"{LABELS[source.role].lower()}: comparing with the teacher's layers"
        if not self.console.is_terminal:
            self.console.print(title, markup=False, highlight=False)
        total = len(teacher.targets_N)
        with track(title, "tokens", total=total, console=self.console) as advance:
            return compute_lens_map(teacher, student, advance=advance)
