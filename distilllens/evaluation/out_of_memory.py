"""Too little memory on the device: the same work once more, with less of it at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from distilllens.errors import ConfigError

Result = TypeVar("Result")

logger = logging.getLogger("distilllens")


def with_less(work: Callable[[int], Result], count: int, *, one: str) -> tuple[Result, int]:
    """Does as much at once as memory allows: ``count``, half of it, and so on down to 1.

    Args:
        work: Called with the count; must change nothing where it fails.
        count: At most (≥ 1).
        one: What is counted, as in "one text of 300 tokens".

    Returns:
        The result, and the count that it is of.

    Raises:
        ConfigError: There is no room even for one.
    """
    while True:
        try:
            return work(count), count
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        # Outside of the handler, as the error holds on to the tensors of its frames.
        free_memory()
        if count == 1:
            raise no_room(one, reason)
        logger.warning("out of memory with %d × %s: going on with %d", count, one, count // 2)
        count //= 2


def free_memory() -> None:
    """Hands back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(one: str, reason: str) -> ConfigError:
    """Returns what a user should read where not even one fits."""
    return ConfigError(
        f"not even {one} fits into the device's memory",
        why=reason,
        fix="a smaller dtype, shorter texts (max_new_tokens), or a device with more free memory",
    )


def first_line(error: torch.OutOfMemoryError) -> str:
    """Returns what was asked for; the lines behind it are advice on allocators."""
    return str(error).partition("\n")[0]
