"""A teacher's answers as training records: the folder that ``generate`` makes, checked and merged.

Such a folder holds ``raw.jsonl``, records as everywhere, and ``generation.json``, which says what
they are of. With both, a training can be sure that none of them is of a dev record.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilllens.data.records import Record, file_sha256
from distilllens.errors import DataError

RECORDS = "raw.jsonl"
"""In a generated folder: the answers, in the order of the prompts."""
RECEIPT = "generation.json"
"""There too: what made them, from which records, with which options; written last."""
MAKE_IT = "python -m distilllens generate with this run's options makes it"


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Returns what generation.json says; None if there is none.

    Raises:
        DataError: It is not readable, or of something else.
    """
    path = folder / RECEIPT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.keys() >= {"key", "limit", "keep_truncated", "records_sha256", "counts"}:
            raise ValueError("parts of it are missing")
        if not isinstance(content["key"], dict) or not isinstance(content["counts"], dict):
            raise ValueError("parts of it are no objects")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read", why=str(error), fix=f"remove {folder}; then {MAKE_IT}"
        ) from None
    return dict(content)


def check_generated(folder: Path, *, raw_sha256: str, dev_size: int) -> dict[str, Any]:
    """Returns what a generated folder is of, if it serves a training.

    Args:
        folder: ``data.generated``.
        raw_sha256: Of the training's own raw.jsonl.
        dev_size: Records at that file's head that are the dev set.

    Raises:
        DataError: It is not there, not finished, changed since it was made, or made from other
            records, so that dev records could be among its prompts.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        state = "is not finished" if folder.exists() else "is not there"
        raise DataError(f"data.generated={folder} {state}", fix=MAKE_IT)
    wanted = {"data": raw_sha256, "dev_size": dev_size}
    different = [
        f"{name} {receipt['key'].get(name)!s:.12}, this run has {value!s:.12}"
        for name, value in wanted.items()
        if receipt["key"].get(name) != value
    ]
    if different:
        raise DataError(
            f"data.generated={folder} was made with {'; '.join(different)}",
            why="records that are held out here may have been answered there",
            fix=f"give another --data.generated; {MAKE_IT}",
        )
    if file_sha256(folder / RECORDS) != receipt["records_sha256"]:
        raise DataError(
            f"{folder / RECORDS} is not as it was made",
            fix="generate it again with the same options; a changed file can be a --data.path",
        )
    return receipt


def merge_answers(
    gold: Sequence[Record], answers: Sequence[Record], *, keep_gold: bool
) -> list[Record]:
    """Returns the answers in the order of the training records, after these if they are kept.

    So the first N of the result are of the first prompts, whatever N.

    Args:
        gold: The training records.
        answers: Generated ones, in the order of their prompts: none, one or several of each.
        keep_gold: Train on both.

    Raises:
        DataError: An answer is to none of these records, or out of their order.
    """
    merged: list[Record] = []
    waiting = deque(answers)
    for record in gold:
        if keep_gold:
            merged.append(record)
        while waiting and waiting[0].prompt == record.prompt:
            merged.append(waiting.popleft())
    if waiting:
        raise DataError(
            f"{len(waiting)} generated answers are to no training record, first to "
            f"{waiting[0].instruction!r:.80}",
            fix=f"give another --data.generated; {MAKE_IT}",
        )
    return merged
