"""Measures beside the scores of answers: similarity, token metrics, exposure bias.

Each has its own file and its own identity, and is skipped where it is finished:

    OUTPUT_DIR/seedN/SET/samples.jsonl, results.json    similarity, of finished cells
    OUTPUT_DIR/token_metrics/SET.json                   token metrics: no sampling, so once per set
    OUTPUT_DIR/seedN/SET/exposure_bias.json             both models' answers of that seed

In the end their numbers join the ``metrics`` of each results.json, where tables read them. The
cells' own identities guard the folder, so a measure of another teacher is simply made anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilllens.config import EvaluateConfig, ModelConfig
from distilllens.data.progress import track
from distilllens.errors import DataError
from distilllens.evaluation.cells.plan import Cell
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint
from distilllens.evaluation.cells.results import read_result, read_samples, write_cell, write_result
from distilllens.evaluation.cells.shares import on_all_ranks, own_share
from distilllens.evaluation.generation import check_context_window
from distilllens.evaluation.measures.exposure_bias import describe_excess, measure_exposure_bias
from distilllens.evaluation.measures.teacher_forcing import TokenScorer, num_known_tokens
from distilllens.evaluation.measures.token_metrics import (
    References,
    compute_token_metrics,
    encode_references,
)
from distilllens.evaluation.similarity import (
    SentenceModel,
    check_sentence_model,
    count_texts,
    sentence_model_fingerprint,
)
from distilllens.families import base_model
from distilllens.model_files import check_adapter
from distilllens.models import (
    check_same_tokens,
    context_length,
    load_model,
    load_model_config,
    load_teacher,
    load_tokenizer,
    shared_vocab_size,
    vocab_rows,
)
from distilllens.runs import git_commit, versions
from distilllens.runtime.signals import poll, stoppable

TOKEN_FOLDER, EXPOSURE_FILE = "token_metrics", "exposure_bias.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file of a measure."""

    label: str
    cell: Cell
    """The cell, or one of those of the set."""
    file: Path
    identity: dict[str, Any]
    is_finished: bool
    references: References | None = None
    """Of the token metrics."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is asked for, and what of it is finished; nothing asked for: no jobs."""

    cells: list[Cell]
    similarity: list[Job]
    token_metrics: list[Job]
    exposure_bias: list[Job]


# --- The plan, before weights are loaded --------------------------------------------------------


def plan_measures(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    console: Console,
) -> Measures:
    """Finds what there is to measure, checks that it can be, and tells it.

    Raises:
        ConfigError: A package, a model or an adapter that is not there; teacher and student of
            different vocabularies; a context window that is too small.
        DataError: A set without any reference.
    """
    teacher: dict[str, Any] = {}
    if config.teacher is not None:
        _check_teacher(config, tokenizer, cells)
        lora = config.teacher_lora
        teacher = {
            "teacher": checkpoint_fingerprint(config.teacher, config.teacher_revision),
            "teacher_lora": None if lora is None else checkpoint_fingerprint(lora),
        }
    measures = Measures(
        cells=list(cells),
        similarity=_similarity_jobs(config, cells),
        token_metrics=_token_jobs(config, tokenizer, cells, teacher),
        exposure_bias=_exposure_jobs(config, cells, teacher),
    )
    for name, jobs in (
        ("similarity", measures.similarity),
        ("token metrics", measures.token_metrics),
        ("exposure bias", measures.exposure_bias),
    ):
        if jobs:
            finished = sum(job.is_finished for job in jobs)
            console.print(f"{name}: {len(jobs)} to measure, {finished} finished already")
    return measures


def _check_teacher(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, cells: Sequence[Cell]
) -> None:
    assert config.teacher is not None
    trust, revision = config.trust_remote_code, config.teacher_revision
    theirs = load_tokenizer(
        config.teacher, trust_remote_code=trust, revision=revision, option="--teacher"
    )
    check_same_tokens(theirs, tokenizer)
    teacher = load_model_config(config.teacher, trust_remote_code=trust, revision=revision)
    student = _student_config(config)
    shared_vocab_size(vocab_rows(teacher), vocab_rows(student), num_known_tokens(tokenizer))
    longest = max(cell.data.longest_prompt for cell in cells)
    check_context_window(teacher, longest, config.eval.max_new_tokens)
    if config.teacher_lora is not None:
        check_adapter(config.teacher_lora, "--teacher_lora")


def _student_config(config: EvaluateConfig) -> Any:
    return load_model_config(
        config.checkpoint, trust_remote_code=config.trust_remote_code, revision=config.revision
    )


def _similarity_jobs(config: EvaluateConfig, cells: Sequence[Cell]) -> list[Job]:
    if config.similarity is None:
        return []
    check_sentence_model(config.similarity, config.similarity_revision)
    model = sentence_model_fingerprint(config.similarity, config.similarity_revision)
    jobs = []
    for cell in cells:
        stored = read_result(cell.folder / "results.json") if cell.is_finished else {}
        jobs.append(
            Job(
                label=f"similarity, {cell.data.name} seed {cell.seed}",
                cell=cell,
                file=cell.folder / "results.json",
                identity={"model": model},
                is_finished=stored.get("similarity", {}).get("model") == model,
            )
        )
    return jobs


def _token_jobs(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    teacher: dict[str, Any],
) -> list[Job]:
    if not config.token_metrics:
        return []
    max_length = config.max_prompt_length + config.eval.max_new_tokens
    windows = [context_length(_student_config(config))]
    if config.teacher is not None:
        trust, revision = config.trust_remote_code, config.teacher_revision
        windows.append(
            context_length(
                load_model_config(config.teacher, trust_remote_code=trust, revision=revision)
            )
        )
    max_length = min([max_length, *(window for window in windows if window is not None)])
    jobs = []
    for name, cell in {cell.data.name: cell for cell in cells}.items():
        references = encode_references(tokenizer, cell.data.records, max_length=max_length)
        if not references.texts:
            raise DataError(
                f"{name}: no record has a reference to measure the tokens of",
                fix="leave --token_metrics out for this set",
            )
        file = Path(config.output_dir) / TOKEN_FOLDER / f"{name}.json"
        identity = {**cell.identity, "max_length": max_length, **teacher}
        jobs.append(
            Job(
                label=f"token metrics, {name}",
                cell=cell,
                file=file,
                identity=identity,
                is_finished=not config.overwrite and _stands(file, identity),
                references=references,
            )
        )
    return jobs


def _exposure_jobs(
    config: EvaluateConfig, cells: Sequence[Cell], teacher: dict[str, Any]
) -> list[Job]:
    if not config.exposure_bias:
        return []
    jobs = []
    for cell in cells:
        file = cell.folder / EXPOSURE_FILE
        identity = {**cell.identity, **teacher}
        jobs.append(
            Job(
                label=f"exposure bias, {cell.data.name} seed {cell.seed}",
                cell=cell,
                file=file,
                identity=identity,
                is_finished=not config.overwrite and _stands(file, identity),
            )
        )
    return jobs


def _stands(file: Path, identity: dict[str, Any]) -> bool:
    """Tells whether a measure is finished with this identity; a broken file is made anew."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["identity"] == identity)
    except (OSError, ValueError, TypeError, KeyError):
        return False


# --- The work -----------------------------------------------------------------------------------


def run_measures(
    measures: Measures,
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Measures what is not finished and adds all of it to the cells' results.json.

    Every rank must call it, when all cells are finished: each takes a share of the jobs.

    Raises:
        ConfigError, NumericsError, StorageError: As the measures and `write_cell`.
        Stopped: A signal ended it after a batch; finished files are kept.
    """

    def share(jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if not job.is_finished][rank::world_size]

    with stoppable(), own_share():
        if similarity := share(measures.similarity):
            _run_similarity(config, similarity, console, device)
        token, exposure = share(measures.token_metrics), share(measures.exposure_bias)
        if token or exposure:
            student, teacher = _load_scorers(config, tokenizer, console, device, dtype)
            for job in token:
                _run_token_metrics(config, job, student, teacher, console)
            for job in exposure:
                assert teacher is not None
                _run_exposure_bias(config, job, tokenizer, student, teacher, console)
    on_all_ranks(lambda: None)
    if rank == 0:
        _join(measures)


@contextmanager
def _progress(
    job: Job, unit: str, *, total: int, console: Console
) -> Iterator[Callable[[int], None]]:
    """Shows how far a job is, and ends it after a batch if a signal came."""
    with track(job.label, unit, total=total, console=console) as advance:

        def advance_or_stop(count: int) -> None:
            advance(count)
            poll(f"measuring {job.label}; finished measures are kept")

        yield advance_or_stop


def _run_similarity(
    config: EvaluateConfig, jobs: Sequence[Job], console: Console, device: torch.device
) -> None:
    assert config.similarity is not None
    model = SentenceModel(config.similarity, revision=config.similarity_revision, device=device)
    for job in jobs:
        samples, result = read_samples(job.cell.folder), read_result(job.file)
        with _progress(job, "texts", total=count_texts(samples), console=console) as advance:
            scores = model.similarities(samples, advance)
        samples = [
            {**sample, "similarity": score} for sample, score in zip(samples, scores, strict=True)
        ]
        mean = 100 * sum(scores) / len(scores)
        result["metrics"]["similarity"] = mean
        result["similarity"] = {"path": config.similarity, **job.identity}
        write_cell(job.cell.folder, result, samples)
        console.print(f"{job.label}: {mean:.2f}", soft_wrap=True)


def _load_scorers(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[TokenScorer, TokenScorer | None]:
    num_tokens = num_known_tokens(tokenizer)

    def build(model: PreTrainedModel) -> TokenScorer:
        module: torch.nn.Module = model
        module.to(device)
        return TokenScorer(model, num_tokens=num_tokens)

    student = build(
        load_model(
            config.checkpoint,
            dtype=dtype,
            attention=config.attention,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
        )
    )
    if config.teacher is None:
        return student, None
    console.print(f"loading the teacher {config.teacher} …", soft_wrap=True)
    settings = ModelConfig(
        teacher=config.teacher,
        teacher_lora=config.teacher_lora,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        revision=config.teacher_revision,
    )
    return student, build(base_model(load_teacher(settings, dtype=dtype)))


def _run_token_metrics(
    config: EvaluateConfig,
    job: Job,
    student: TokenScorer,
    teacher: TokenScorer | None,
    console: Console,
) -> None:
    references = job.references
    assert references is not None
    with _progress(job, "records", total=len(references.texts), console=console) as advance:
        measured = compute_token_metrics(
            student,
            references.texts,
            teacher=teacher,
            batch_size=config.eval.batch_size,
            batch_tokens=config.eval.batch_tokens,
            advance=advance,
        )
    counts = {
        "records": len(references.texts),
        "blank_references": references.num_empty,
        "cut_references": references.num_cut,
    }
    write_result(job.file, {**measured, "counts": counts, **_origin(config, job)})
    metrics = measured["metrics"]
    console.print(
        f"{job.label}: {metrics['nll']:.4f} nats per token, ECE {metrics['ece']:.2f} % "
        f"(n = {measured['num_tokens']:,} tokens)",
        soft_wrap=True,
    )


def _run_exposure_bias(
    config: EvaluateConfig,
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    student: TokenScorer,
    teacher: TokenScorer,
    console: Console,
) -> None:
    prompts = [record.prompt for record in job.cell.data.records]
    with _progress(job, "passes", total=4 * len(prompts), console=console) as advance:
        measured = measure_exposure_bias(
            student,
            teacher,
            tokenizer,
            prompts,
            settings=config.eval,
            seed=job.cell.seed,
            max_prompt_length=config.max_prompt_length,
            advance=advance,
        )
    origin = {"seed": job.cell.seed, **_origin(config, job)}
    write_result(job.file, {**measured, "num": len(prompts), **origin})
    console.print(f"{job.label}: {describe_excess(measured, len(prompts))}", soft_wrap=True)


def _origin(config: EvaluateConfig, job: Job) -> dict[str, Any]:
    """Returns where a measure comes from, for its file."""
    return {
        "set": job.cell.data.name,
        "checkpoint": config.checkpoint,
        "teacher": config.teacher,
        "teacher_lora": config.teacher_lora,
        "teacher_revision": config.teacher_revision,
        "identity": job.identity,
        "versions": versions(),
        "git_commit": git_commit(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _join(measures: Measures) -> None:
    """Adds the numbers of the measures' files to the metrics of the cells' results.json."""
    by_set = {job.cell.data.name: job for job in measures.token_metrics}
    by_cell = {job.cell.folder: job for job in measures.exposure_bias}
    for cell in measures.cells:
        asked = {
            TOKEN_FOLDER: by_set.get(cell.data.name),
            "exposure_bias": by_cell.get(cell.folder),
        }
        jobs = {measure: job for measure, job in asked.items() if job is not None}
        if not jobs:
            continue
        file = cell.folder / "results.json"
        result = read_result(file)
        metrics, joined = dict(result["metrics"]), dict(result.get("measures", {}))
        teachers = {job.identity.get("teacher") for job in jobs.values()} - {None}
        for measure, of in list(joined.items()):
            # Made anew; or of another teacher, whose numbers must not stand beside this one's.
            if measure in jobs or (teachers and of["teacher"] not in (None, *teachers)):
                for name in joined.pop(measure)["metrics"]:
                    metrics.pop(name, None)
        for measure, job in jobs.items():
            # What cannot be said (see exposure_bias's reason) is left out: tables read numbers.
            found = read_result(job.file)["metrics"]
            new = {name: value for name, value in found.items() if value is not None}
            metrics |= new
            joined[measure] = {"teacher": job.identity.get("teacher"), "metrics": sorted(new)}
        if (metrics, joined) != (result["metrics"], result.get("measures")):
            write_result(file, {**result, "metrics": metrics, "measures": joined})
