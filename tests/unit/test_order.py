"""The order of training records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.data.order import epoch_batches
from distilllens.errors import DataError


def batches(count: int = 1000, **options: int | bool) -> list[np.ndarray]:
    lengths = np.random.default_rng(3).integers(5, 512, count)
    settings: dict = {"batch_size": 8, "seed": 10, "epoch": 0, "group_by_length": False}
    return epoch_batches(lengths, **{**settings, **options})


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=300),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    group=st.booleans(),
)
def test_each_epoch_is_a_permutation_less_the_rest(
    lengths: list[int], batch_size: int, seed: int, epoch: int, group: bool
) -> None:
    if len(lengths) < batch_size:
        with pytest.raises(DataError, match=f"{len(lengths)} training records"):
            epoch_batches(
                lengths, batch_size=batch_size, seed=seed, epoch=epoch, group_by_length=group
            )
        return
    result = epoch_batches(
        lengths, batch_size=batch_size, seed=seed, epoch=epoch, group_by_length=group
    )
    assert [len(b) for b in result] == [batch_size] * (len(lengths) // batch_size)
    flat = np.concatenate(result)
    assert len(set(flat.tolist())) == len(flat)
    assert set(flat.tolist()) <= set(range(len(lengths)))


@pytest.mark.parametrize("group", [False, True])
def test_same_seed_and_epoch_same_order_else_another(group: bool) -> None:
    def flat(**options: int) -> list[int]:
        return np.concatenate(batches(group_by_length=group, **options)).tolist()

    assert flat() == flat()
    assert flat() != flat(epoch=1)
    assert flat() != flat(seed=11)
    assert flat(seed=10, epoch=11) != flat(seed=11, epoch=10)
    assert flat() != sorted(flat())


def test_order_does_not_hang_on_global_random_state() -> None:
    first = batches()
    np.random.seed(1)
    np.random.rand(7)
    np.testing.assert_array_equal(first, batches())


def test_left_out_records_change_and_do_not_hang_on_grouping() -> None:
    def left_out(**options: int | bool) -> set[int]:
        return set(range(1003)) - set(np.concatenate(batches(1003, **options)).tolist())

    assert len(left_out()) == 3
    assert left_out() == left_out(group_by_length=True)
    assert left_out() != left_out(epoch=1)


def test_grouping_saves_padding_and_keeps_lengths_mixed_over_time() -> None:
    lengths = np.random.default_rng(3).integers(5, 512, 8000)

    def padded(result: list[np.ndarray]) -> float:
        return float(np.mean([lengths[b].max() for b in result]))

    plain, grouped = batches(8000), batches(8000, group_by_length=True)
    assert padded(plain) > 1.5 * lengths.mean()
    assert padded(grouped) < 1.05 * lengths.mean()
    # No course from short to long within a window, where sorting left one (correlation 1).
    means = np.array([lengths[b].mean() for b in grouped])
    for start in range(0, 1000, 50):
        window = means[start : start + 50]
        assert abs(np.corrcoef(np.arange(50), window)[0, 1]) < 0.6


def test_grouped_batches_are_sorted_within_windows_of_fifty() -> None:
    # 60 records of batch 1: one window of 50 and one of 10; within each all lengths distinct.
    result = epoch_batches(
        list(range(100)), batch_size=2, seed=0, epoch=0, group_by_length=True
    )  # one window
    assert {frozenset(b.tolist()) for b in result} == {
        frozenset((n, n + 1)) for n in range(0, 100, 2)
    }


def test_batch_size_below_one() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(batch_size=0)
