"""Rows dealt to ranks: each once, evenly, and few cells in more than one hand."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from distilllens.evaluation.cells.shares import Share, deal

CELLS = st.lists(st.none() | st.lists(st.integers(0, 99), unique=True, max_size=30), max_size=12)


@given(missing=CELLS, world_size=st.integers(1, 9))
def test_every_missing_row_is_dealt_once_and_evenly(
    missing: list[list[int] | None], world_size: int
) -> None:
    hands = deal(missing, world_size)
    assert len(hands) == world_size
    dealt = [(share.cell, row) for hand in hands for share in hand for row in share.rows]
    assert sorted(dealt) == sorted(
        (cell, row) for cell, rows in enumerate(missing) for row in rows or ()
    )
    loads = [sum(len(share.rows) for share in hand) for hand in hands]
    assert max(loads) - min(loads) <= 1
    shares = list(itertools.chain(*hands))
    held = [share.cell for share in shares]
    assert set(held) == {cell for cell, rows in enumerate(missing) if rows is not None}
    assert len(held) - len(set(held)) <= world_size - 1
    for share in shares:
        assert share.is_whole == (held.count(share.cell) == 1)


def test_one_large_cell_is_shared_and_small_ones_stay_whole() -> None:
    large, small = list(range(90)), list(range(10))
    hands = deal([small, None, large, []], 2)
    assert hands[0] == [
        Share(cell=0, rows=small, is_whole=True),
        Share(cell=2, rows=large[:40], is_whole=False),
        Share(cell=3, rows=[], is_whole=True),
    ]
    assert hands[1] == [Share(cell=2, rows=large[40:], is_whole=False)]
    assert deal([None], 3) == [[], [], []]
