"""Steps are made ahead, in order, by one thread that ends with its consumer."""

from __future__ import annotations

import threading
import time

import pytest

from distilllens.training.loader import prefetch


def test_results_come_in_order_from_one_thread() -> None:
    names = set()

    def work(item: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.01 if item % 2 else 0)
        return item * item

    assert list(prefetch(work, range(7), ahead=2)) == [n * n for n in range(7)]
    assert len(names) == 1 and threading.current_thread().name not in names


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_made_than_asked_for(ahead: int) -> None:
    made: list[int] = []
    results = prefetch(made.append, range(10), ahead=ahead)
    next(results)
    time.sleep(0.1)
    assert made == list(range(ahead + 1))
    results.close()


def test_work_goes_on_while_the_consumer_is_busy() -> None:
    made: list[int] = []
    results = prefetch(made.append, range(10), ahead=2)
    next(results)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(made) == 3
    results.close()


def test_an_error_is_raised_where_its_result_would_come() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    results = prefetch(work, range(5), ahead=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(results)


def test_the_thread_ends_when_the_consumer_stops() -> None:
    before = threading.active_count()
    results = prefetch(lambda item: item, range(100), ahead=2)
    next(results)
    assert threading.active_count() == before + 1
    results.close()
    assert threading.active_count() == before
