"""Configurations side by side: the keys in which runs differ, and those that all share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distilllens.parsing import scalars
from distilllens.report.runs.groups import RunGroup
from distilllens.report.runs.record import RunRecord
from distilllens.report.tables import MISSING

PLACES = ("run.output_dir", "run.name")
"""Keys that tell runs apart by design: their labels say it already."""


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The options of several runs, flattened to dotted keys, in the order of config.py."""

    differing: Sequence[tuple[str, Sequence[str]]]
    """Key, and the value of each group; the different values of one group stand in one text."""
    common: Sequence[tuple[str, str]]
    """Key and value of what is the same everywhere."""


def compare_configurations(groups: Sequence[RunGroup]) -> Differences:
    """Returns what differs between the groups, or between the runs of any of them."""
    flat = [[_flatten_run(run) for run in group.runs] for group in groups]
    keys = list(dict.fromkeys(key for runs in flat for run in runs for key in run))
    differing, common = [], []
    for key in keys:
        values = [list(dict.fromkeys(run.get(key, MISSING) for run in runs)) for runs in flat]
        if len({value for found in values for value in found}) > 1:
            differing.append((key, [", ".join(found) for found in values]))
        elif values:
            common.append((key, values[0][0]))
    return Differences(differing=differing, common=common)


def _flatten_run(run: RunRecord) -> dict[str, str]:
    """Returns the options as text, then what else decides a result: data, commit, libraries."""
    options = dict(scalars(dataclasses.asdict(run.config)))
    told = {key: _text(value) for key, value in options.items() if key not in PLACES}
    versions = run.environment.get("versions")
    told["data fingerprint"] = str(run.data.get("fingerprint") or MISSING)[:12]
    told["commit"] = str(run.environment.get("git_commit") or MISSING)
    for name, version in versions.items() if isinstance(versions, Mapping) else ():
        told[f"version of {name}"] = str(version)
    return told


def _text(value: object) -> str:
    """Returns a value as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return str(value)
