"""The range of an option: said once, in its field's type; checked when read, told by ``--help``.

``lr: Positive`` and ``top_p: Annotated[float, Interval(gt=0, le=1)]`` are such types.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
InnerShare = Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True)
class Limit:
    """One end of a range."""

    symbol: str
    holds: Callable[[Any, Any], bool]
    bound: Any


def range_problem(hint: Any, value: Any) -> str:
    """Says which range a number misses, as in ``must be > 0 and ≤ 1``; empty if it misses none.

    Args:
        hint: The option's type, with its `Annotated` parts.
        value: A number; anything else has no range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if all(limit.holds(value, limit.bound) for limit in _limits(hint)):
        return ""
    return f"must be {format_range(hint)}"


def format_range(hint: Any) -> str:
    """Returns a type's range, as in ``≥ 1``; empty if it has none."""
    return " and ".join(f"{limit.symbol} {limit.bound}" for limit in _limits(hint))


def field_ranges(config_class: type, prefix: str = "") -> dict[str, str]:
    """Returns the ranges of a configuration's options by dotted key, those of its parts too."""
    ranges: dict[str, str] = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part) and isinstance(part, type):
                ranges |= field_ranges(part, f"{prefix}{name}.")
        if told := format_range(hint):
            ranges[f"{prefix}{name}"] = told
    return ranges


def _limits(hint: Any) -> Iterator[Limit]:
    """Yields the limits in a type, wherever they stand: at a list's items, beside None."""
    for part in get_args(hint):
        yield from _limits(part)
    for part in hint.__metadata__ if get_origin(hint) is Annotated else ():
        for limit in part if isinstance(part, GroupedMetadata) else [part]:
            match limit:
                case Ge(ge=bound):
                    yield Limit("≥", operator.ge, bound)
                case Gt(gt=bound):
                    yield Limit(">", operator.gt, bound)
                case Le(le=bound):
                    yield Limit("≤", operator.le, bound)
                case Lt(lt=bound):
                    yield Limit("<", operator.lt, bound)
