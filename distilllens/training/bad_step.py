"""What is told and written down of a step with a loss or a gradient that was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distilllens.errors import NumericsError
from distilllens.runs import RunFolder, write_json
from distilllens.runtime import distributed
from distilllens.training.numerics_guard import WatchedStep


def bad_step_error(
    bad: WatchedStep,
    *,
    losses: Mapping[str, float],
    gradients: Sequence[str],
    folder: RunFolder,
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    kept: str,
) -> NumericsError:
    """Has each process with a bad number write down its batch; returns what ends them all.

    Args:
        bad: The step, as this process knows it; all must call this.
        losses: Named means over all processes.
        gradients: Parameters of this process whose gradients were not finite.
        folder: Of the run.
        records: The training table.
        tokenizer: To write the records' texts.
        kept: What of the run is safe.
    """
    own: dict[str, Any] | None = None
    if gradients or not bad.sums_K2.isfinite().all():
        own = {"rank": distributed.rank(), "records": list(bad.records), "gradients": gradients}

    def write() -> dict[str, Any] | None:
        if own is None:
            return None
        path = folder.bad_batch(bad.step, distributed.rank())
        _write(path, bad, own, records, tokenizer)
        return {**own, "file": str(path)}

    reports = distributed.together(write)
    told = [report for report in reports if report is not None]
    is_loss = not all(map(math.isfinite, losses.values()))
    parts = ", ".join(f"{name}={value:.4g}" for name, value in losses.items())
    where = "; ".join(f"rank {r['rank']}, records {_listed(r['records'])}" for r in told)
    names = [name for report in told for name in report["gradients"]]
    if is_loss:
        why = "a loss or its logits overflowed"
    else:
        why = f"the loss is finite, the gradients of {_listed(names)} are not"
    return NumericsError(
        f"non-finite {'loss' if is_loss else 'gradient'} at step {bad.step} ({parts}); {where}",
        why=f"{why}; the update was not made",
        fix="lower --optim.lr, add --optim.warmup, or use a float32 DeepSpeed file; the batch: "
        + ", ".join(report["file"] for report in told),
        kept=kept,
    )


def _write(
    path: Path,
    bad: WatchedStep,
    own: Mapping[str, Any],
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = records.select(bad.records)
    texts = [[tokenizer.decode(r["prompt_ids"]), tokenizer.decode(r["response_ids"])] for r in rows]
    details = {
        "sums": bad.sums_K2.tolist(),
        "texts": texts,
        "input_ids": [batch.input_ids_BT.tolist() for batch in bad.batches],
    }
    write_json(path, {"step": bad.step, **own, **details})


def _listed(items: Sequence[object], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
