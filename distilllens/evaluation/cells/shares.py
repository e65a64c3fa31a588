"""Who answers what: the rows that are missing, dealt out to the ranks of a torchrun.

All rows of all unfinished cells, one behind the other, are cut into one stretch for each rank. So
the ranks have the same number of rows, to one, and with W ranks there are at most W − 1 cuts: a
rank answers and writes nearly all of its cells alone, in full batches, and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from distilllens.errors import DistributedError, UserError
from distilllens.runtime import distributed
from distilllens.runtime.signals import Stopped, poll

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Rows of one cell that one rank answers."""

    cell: int
    """The cell's place in the plan."""
    rows: list[int]
    """Rows of its set; none, where all are answered and only the results are missing."""
    is_whole: bool
    """Nobody else answers rows of the cell: its results can be written when these are done."""


@contextmanager
def own_share() -> Iterator[None]:
    """Marks an error in it as one of this rank alone, whose rows nobody else has: it tells it."""
    try:
        yield
    except UserError as error:
        if distributed.world_size() > 1 and not isinstance(error, Stopped):
            error.everywhere = False
        raise


def on_all_ranks(work: Callable[[], Result]) -> list[Result]:
    """Does ``work`` on every rank, waits for all of them, and returns the results by rank.

    Raises:
        Stopped: A signal came; another rank may have left by it already.
        DistributedError: Another rank has left.
    """
    try:
        return distributed.together(work)
    except DistributedError:
        poll("waiting for the other processes; what is finished is kept")
        raise


def deal(missing: Sequence[Sequence[int] | None], world_size: int) -> list[list[Share]]:
    """Returns each rank's shares.

    Args:
        missing: For each cell the rows without an answer; None: it is finished.
        world_size: Number of ranks.
    """
    total = sum(len(rows) for rows in missing if rows is not None)
    bounds = [total * rank // world_size for rank in range(world_size + 1)]
    hands: list[list[Share]] = [[] for _ in range(world_size)]
    begin = 0
    for cell, rows in enumerate(missing):
        if rows is None:
            continue
        for hand, first, stop in zip(hands, bounds, bounds[1:], strict=False):
            own = list(rows[max(0, first - begin) : max(0, stop - begin)])
            if own:
                hand.append(Share(cell=cell, rows=own, is_whole=len(own) == len(rows)))
        if not rows:
            hands[0].append(Share(cell=cell, rows=[], is_whole=True))
        begin += len(rows)
    return hands
