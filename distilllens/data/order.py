"""The order of training: every epoch a new seeded permutation, cut into global batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distilllens.errors import DataError

WINDOW_BATCHES = 50
"""Batches in a window of length grouping: on Dolly with batches of 8, records of 145 tokens in the
mean are padded to 150 instead of 311, and still meet new neighbours in each epoch."""


def epoch_batches(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool,
) -> list[np.ndarray]:
    """Returns the batches of one epoch as arrays of record indices (int64, ``batch_size`` each).

    The records that do not fill a last batch are left out: other ones in each epoch, and the
    same ones with and without grouping.

    Args:
        lengths: Length of each record in tokens.
        batch_size: Records in a global batch: all ranks, all micro-batches.
        seed: Seed of the run, ≥ 0.
        epoch: Number of the epoch from 0; the order depends on (seed, epoch) only, so that a
            resumed run finds it again.
        group_by_length: Sort by length inside windows of 50 batches, then shuffle the batches.

    Raises:
        DataError: Fewer records than a batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be ≥ 1")
    if len(lengths) < batch_size:
        raise DataError(
            f"{len(lengths)} training records do not fill one global batch of {batch_size}",
            fix="lower optim.micro_batch_size or optim.accumulation, or add records",
        )
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    order = order[: len(order) // batch_size * batch_size]
    if group_by_length:
        order = _sort_windows(order, np.asarray(lengths), WINDOW_BATCHES * batch_size)
    batches = np.split(order, len(order) // batch_size)
    if group_by_length:
        # Sorted windows would feed short batches first: a course of lengths in every window.
        batches = [batches[i] for i in generator.permutation(len(batches))]
    return batches


def _sort_windows(order: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    starts = range(0, len(order), window)
    windows = [order[start : start + window] for start in starts]
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
