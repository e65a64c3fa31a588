"""What there is to score: the sets, the cells, and what of them is finished.

A *cell* is one set with one sampling seed. Everything here happens before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distilllens.config import EvaluateConfig
from distilllens.data.benchmarks import load_benchmark
from distilllens.data.records import Record
from distilllens.data.tokenize import encode_prompts
from distilllens.errors import DataError
from distilllens.evaluation.cells.partial import read_partial, remove_partial
from distilllens.evaluation.cells.prompts import fit_prompts
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint, identity
from distilllens.evaluation.cells.results import is_finished, remove_leftovers
from distilllens.evaluation.generation import check_context_window
from distilllens.models import load_model_config


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """The records of one set that are scored."""

    name: str
    records: list[Record]
    """With prompts within the limit."""
    num_dropped: int
    """Records left out because their prompts are longer than that."""
    longest_prompt: int
    """Tokens of the longest prompt that is scored."""
    cut: frozenset[int] = frozenset()
    """Places in ``records`` of prompts whose middle was cut to the limit."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One set with one sampling seed."""

    data: EvaluationSet
    seed: int
    folder: Path
    identity: dict[str, Any]
    is_finished: bool

    @property
    def label(self) -> str:
        """How it is named on the screen."""
        return f"{self.data.name} seed {self.seed}"


def drop_long_prompts(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], max_prompt_length: int
) -> tuple[list[Record], int]:
    """Returns the records whose prompts are within the limit, and the tokens of the longest."""
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [r.prompt for r in records])]
    pairs = [
        (record, length)
        for record, length in zip(records, lengths, strict=True)
        if length <= max_prompt_length
    ]
    return [record for record, _ in pairs], max((length for _, length in pairs), default=0)


def no_usable_prompt(name: str, num_records: int, limit: int) -> DataError:
    """Returns what a user should read where every prompt of a set was dropped."""
    return DataError(
        f"{name}: none of {num_records} prompts is within max_prompt_length={limit} tokens",
        fix="raise --max_prompt_length",
    )


def load_set(
    name: str, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig
) -> EvaluationSet:
    """Loads a set and cuts or drops what has too long a prompt.

    Raises:
        ConfigError, DataError: See `load_benchmark` and `fit_prompts`; every prompt was dropped.
    """
    records = load_benchmark(
        name, data_dir=config.data_dir, limit=config.limit, bad_lines=config.bad_lines
    )
    fitted = fit_prompts(
        tokenizer,
        records,
        limit=config.max_prompt_length,
        long_prompts=config.eval.long_prompts,
    )
    if not fitted.records:
        raise no_usable_prompt(name, len(records), config.max_prompt_length)
    return EvaluationSet(
        name=name,
        records=fitted.records,
        num_dropped=fitted.num_dropped,
        longest_prompt=fitted.longest,
        cut=fitted.cut,
    )


def check_windows(config: EvaluateConfig, sets: Sequence[EvaluationSet]) -> None:
    """Refuses too long a set before weights load and before the first of the sets has run."""
    model_config = load_model_config(
        config.checkpoint, trust_remote_code=config.trust_remote_code, revision=config.revision
    )
    longest = max(data.longest_prompt for data in sets)
    check_context_window(model_config, longest, config.eval.max_new_tokens)


def plan_cells(config: EvaluateConfig, sets: Sequence[EvaluationSet]) -> list[Cell]:
    """Returns all cells, sets first, and which of them are finished.

    Raises:
        ConfigError: A finished cell belongs to another evaluation.
    """
    checkpoint = checkpoint_fingerprint(config.checkpoint, config.revision)
    cells = []
    for data in sets:
        wanted = identity(config, checkpoint=checkpoint, records=data.records)
        if data.cut or data.num_dropped:  # else it changes nothing, and older results stay good
            wanted["eval.long_prompts"] = config.eval.long_prompts
        for seed in config.eval.seeds:
            folder = Path(config.output_dir) / f"seed{seed}" / data.name
            finished = not config.overwrite and is_finished(folder, wanted)
            cells.append(
                Cell(data=data, seed=seed, folder=folder, identity=wanted, is_finished=finished)
            )
    return cells


def find_missing(cells: Sequence[Cell], *, overwrite: bool) -> list[list[int] | None]:
    """Returns each cell's rows without an answer, None of a finished cell; one process calls it.

    What nobody needs any more is removed: files that a kill left half written, and the partial
    files of finished cells; with ``overwrite`` those of all, and their results, so that a stopped
    command goes on without it.

    Raises:
        ConfigError: Partial answers belong to another evaluation.
    """
    missing: list[list[int] | None] = []
    for cell in cells:
        remove_leftovers(cell.folder)
        if cell.is_finished or overwrite:
            remove_partial(cell.folder)
        if overwrite:
            (cell.folder / "results.json").unlink(missing_ok=True)
        there = read_partial(cell.folder, identity=cell.identity, seed=cell.seed).answers
        rows = [row for row in range(len(cell.data.records)) if row not in there]
        missing.append(None if cell.is_finished else rows)
    return missing
