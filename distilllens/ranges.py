"""What an option may be: said once, in its field's type; checked when read, told by ``--help``.

``lr: Positive`` and ``top_p: Annotated[float, Interval(gt=0, le=1)]`` are such types.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

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


def field_ranges(config_class: type) -> dict[str, str]:
    """Returns the ranges of a configuration's options by dotted key, those of its parts too."""
    hints = field_types(config_class)
    return {key: told for key, hint in hints.items() if (told := format_range(hint))}


def field_types(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Returns the types of a configuration's options by dotted key, those of its parts too."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        types[f"{prefix}{name}"] = hint
        for part in parts(hint):
            types |= field_types(part, f"{prefix}{name}.")
    return types


def parts(hint: Any) -> list[type]:
    """Returns the dataclasses in a type: itself, or what stands beside None."""
    return [
        part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)
    ]


PLAIN = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    NoneType: ("null", "null"),
}
"""Types in a user's words: one, and several."""


def describe_type(hint: Any, *, several: bool = False) -> str:
    """Says what a type takes, as in ``a list of whole numbers ≥ 0`` or ``one of mse, cosine``."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        told = format_range(hint)
        return f"{describe_type(inside[0], several=several)}{f' {told}' if told else ''}"
    if origin is Literal:
        return f"{'one of ' if len(inside) > 1 else ''}{', '.join(map(str, inside))}"
    if origin is list:
        return f"a list of {describe_type(inside[0], several=True)}"
    if inside:
        return " or ".join(describe_type(part) for part in inside)
    return PLAIN.get(hint, ("a mapping of keys", "mappings"))[several]


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
