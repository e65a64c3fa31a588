"""The answers that are judged: read from evaluation folders, and paired prompt by prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.config import JudgeConfig
from distilllens.errors import ConfigError, DataError

SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of samples.jsonl."""

    index: int
    prompt: str
    answer: str
    reference: str
    """The first of the record's."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a set and a sampling seed, with the answers that are judged."""

    set: str
    seed: int
    index: int
    prompt: str
    answer: str
    reference: str
    other: str | None = None
    """The answer of the evaluation that it is compared with."""


CellName = tuple[str, int]
"""Set and sampling seed."""


def load_items(config: JudgeConfig) -> tuple[list[Item], dict[str, str]]:
    """Reads the answers of one evaluation, or pairs those of two.

    Returns:
        Items by set, seed and index; and the SHA-256 of each samples.jsonl, by its path.

    Raises:
        ConfigError: No finished evaluation there, no such set or seed, other prompts in the two.
        DataError: A samples.jsonl is not what evaluate.py writes.
    """
    assert config.answers is not None
    cells = find_cells(Path(config.answers))
    chosen = _choose(config, cells)
    others: Mapping[CellName, Path] = {}
    if config.against is not None:
        others = find_cells(Path(config.against))
        _check_same_cells(config, chosen, others)
    items, hashes = [], {}
    for name, folder in chosen.items():
        samples, hashes[str(folder)] = read_samples(folder, config.limit)
        other_samples = None
        if name in others and config.against is not None:
            other_samples, hashes[str(others[name])] = read_samples(others[name], config.limit)
            _check_same_prompts(folder, samples, others[name], other_samples)
        for position, sample in enumerate(samples):
            item = Item(
                set=name[0],
                seed=name[1],
                index=sample.index,
                prompt=sample.prompt,
                answer=sample.answer,
                reference=sample.reference,
                other=other_samples[position].answer if other_samples else None,
            )
            items.append(item)
    return items, hashes


def find_cells(folder: Path) -> dict[CellName, Path]:
    """Returns the finished cells of an evaluation, sorted by set and seed.

    Raises:
        ConfigError: There are none.
    """
    cells = {}
    for file in folder.glob("seed*/*/results.json"):
        if match := SEED_FOLDER.fullmatch(file.parent.parent.name):
            cells[file.parent.name, int(match[1])] = file.parent
    if not cells:
        raise ConfigError(
            f"{folder} holds no finished evaluation",
            why="there is no seedN/SET/results.json",
            fix="give the folder that was evaluate.py's --output_dir",
        )
    return dict(sorted(cells.items()))


def _choose(config: JudgeConfig, cells: Mapping[CellName, Path]) -> dict[CellName, Path]:
    sets = config.sets or list(dict.fromkeys(name for name, _ in cells))
    seeds = config.seeds or list(dict.fromkeys(seed for _, seed in cells))
    wanted = [(name, seed) for name in sets for seed in seeds]
    if lacking := [cell for cell in wanted if cell not in cells]:
        raise _lacking(Path(str(config.answers)), lacking)
    return {cell: cells[cell] for cell in wanted}


def _lacking(folder: Path, cells: list[CellName]) -> ConfigError:
    name, seed = cells[0]
    return ConfigError(
        f"{folder} has no finished seed{seed}/{name}"
        + (f", nor {len(cells) - 1} others" if len(cells) > 1 else ""),
        fix="finish that evaluation, or choose with --sets and --seeds what both have",
    )


def _check_same_cells(
    config: JudgeConfig, chosen: Mapping[CellName, Path], others: Mapping[CellName, Path]
) -> None:
    """Refuses to compare what only one of two evaluations has, unless it was left out by name."""
    if lacking := [cell for cell in chosen if cell not in others]:
        raise _lacking(Path(str(config.against)), lacking)
    further = [cell for cell in others if cell not in chosen]
    if further and config.sets is None and config.seeds is None:
        raise _lacking(Path(str(config.answers)), further)


def _check_same_prompts(
    folder: Path, samples: list[Sample], other_folder: Path, others: list[Sample]
) -> None:
    places = [(sample.index, sample.prompt) for sample in samples]
    other_places = [(sample.index, sample.prompt) for sample in others]
    if places == other_places:
        return
    if len(places) != len(other_places):
        why = (
            f"{len(places)} prompts against {len(other_places)}; --limit takes the first N of both"
        )
    else:
        first = next(i for i, place in enumerate(places) if place != other_places[i])
        why = f"the first that differs is line {first + 1} of samples.jsonl"
    raise ConfigError(f"{folder} and {other_folder} have different prompts", why=why)


def read_samples(folder: Path, limit: int | None) -> tuple[list[Sample], str]:
    """Returns the first samples of a cell, and the SHA-256 of its samples.jsonl.

    Raises:
        DataError: The file is not there or not what evaluate.py writes.
    """
    file = folder / "samples.jsonl"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read", why=error.strerror or str(error)) from None
    samples = list(_samples(file, content))
    if not samples:
        raise DataError(f"{file} holds no samples", fix="evaluate again with --overwrite")
    return samples[:limit], hashlib.sha256(content).hexdigest()


def _samples(file: Path, content: bytes) -> Iterator[Sample]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        match record:
            case {
                "index": int(index),
                "prompt": str(prompt),
                "answer": str(answer),
                "references": [str(reference), *_],
            }:
                yield Sample(index=index, prompt=prompt, answer=answer, reference=reference)
            case _:
                raise DataError(
                    f"{file}:{number}: no sample with index, prompt, answer and references",
                    fix="evaluate again with --overwrite",
                )
