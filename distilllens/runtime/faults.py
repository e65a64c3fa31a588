"""Faults on purpose: one seam, inert unless a variable asks for a fault.

``DISTILLLENS_FAULT="save.after_state@20#1=KILL,step.loss@30=NAN"`` kills rank 1 when it passes the
point ``save.after_state`` in step 20, and gives every rank a NaN as the loss of step 30. Without
``@step`` or ``#rank`` any step or rank is meant.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from functools import cache

from distilllens.errors import ConfigError

VARIABLE = "DISTILLLENS_FAULT"

POINTS = {
    "step.loss": "a micro-batch's loss is computed; the place for NAN",
    "step.gradient": "a micro-batch's loss is finite, its gradients are not yet computed; for NAN",
    "step.before_update": "before the optimizer's update",
    "step.after_update": "after the optimizer's update",
    "evaluate.start": "before the dev set is measured",
    "evaluate.after_dev": "the dev set is measured, no model is written",
    "evaluate.after_latest": "latest/ is written, best/ is not",
    "evaluate.end": "latest/ and best/ are written, the metrics are not",
    "replace.before": "a model folder is written beside its place",
    "replace.between": "the old model folder is out of the way, the new one not yet in place",
    "replace.after": "the new model folder is in place, the old one not yet deleted",
    "save.start": "before anything of a state is written",
    "save.deepspeed_file": "one of DeepSpeed's files is written, but not forced to the disk",
    "save.after_deepspeed": "DeepSpeed's files are written",
    "save.after_random": "this process's random state is written",
    "save.after_student": "the student's weights are written",
    "save.after_state": "the counters and options are written",
    "save.before_manifest": "all is written but the manifest",
    "save.after_manifest": "the manifest is written, the folder not yet renamed",
    "save.after_rename": "the folder has its name, its parent is not yet forced to the disk",
    "save.after_commit": "the state is committed, older ones are still there",
    "delete.before": "before an old state's manifest is deleted",
    "delete.after_manifest": "an old state's manifest is deleted, its folder has its name still",
    "delete.after_rename": "an old state is out of the way, its files are still there",
    "delete.after": "an old state is deleted",
    "save.end": "a save is done",
    "resume.start": "before saved states are looked for",
    "resume.verified": "a state is chosen and verified",
    "resume.loaded": "a state is loaded",
    "export.verified": "the export command has verified a state",
    "export.copied": "the export command has copied the model, not yet renamed",
}
"""Every point that a fault can be set at, and where it lies."""

ACTIONS = ("KILL", "RAISE", "ENOSPC", "EIO", "SLEEP:n", "NAN", "EXIT0")


class InjectedFault(Exception):
    """What RAISE raises: an error that nothing expects."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One entry of the variable."""

    point: str
    step: int | None
    rank: int | None
    action: str
    seconds: float = 0.0

    def is_meant(self, point: str, step: int | None) -> bool:
        """Whether this process is to fail here."""
        return (
            self.point == point
            and self.step in (None, step)
            and self.rank in (None, int(os.environ.get("RANK", "0")))
        )

    def happen(self) -> bool:
        """Does what was asked for; returns whether values are to become NaN."""
        match self.action:
            case "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            case "EXIT0":
                os._exit(0)
            case "SLEEP":
                time.sleep(self.seconds)
            case "RAISE":
                raise InjectedFault(f"injected at {self.point}")
            case "ENOSPC" | "EIO":
                number = getattr(errno, self.action)
                raise OSError(number, os.strerror(number))
        return self.action == "NAN"


def reach(point: str, *, step: int | None = None) -> bool:
    """Passes a point; a fault that is set there happens.

    Args:
        point: A name of `POINTS`.
        step: The optimizer step that is being done or saved.

    Returns:
        Whether values here are to become NaN.

    Raises:
        ConfigError: The variable is not of the form described above.
        InjectedFault: RAISE.
        OSError: ENOSPC, EIO.
    """
    if VARIABLE not in os.environ:
        return False
    assert point in POINTS, point
    happened = [
        fault.happen()
        for fault in parse_faults(os.environ[VARIABLE])
        if fault.is_meant(point, step)
    ]
    return any(happened)


def check_faults() -> None:
    """Refuses a variable that is not of the form, before anything begins.

    Raises:
        ConfigError: See `parse_faults`.
    """
    parse_faults(os.environ.get(VARIABLE, ""))


@cache
def parse_faults(text: str) -> list[Fault]:
    """Reads the variable's value.

    Raises:
        ConfigError: An entry is not of the form, or its point or action is unknown.
    """
    return [_parse_fault(entry.strip()) for entry in text.split(",") if entry.strip()]


def _parse_fault(entry: str) -> Fault:
    form = r"(?P<point>[a-z_.]+)(@(?P<step>\d+))?(#(?P<rank>\d+))?=(?P<action>\w+)(:(?P<n>[\d.]+))?"
    match = re.fullmatch(form, entry)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {entry!r} is not <point>[@step][#rank]=ACTION")
    if match["point"] not in POINTS:
        raise ConfigError(
            f"{VARIABLE}: no point {match['point']!r}", fix=f"one of {', '.join(POINTS)}"
        )
    action = match["action"]
    known = {name.partition(":")[0] for name in ACTIONS}
    if action not in known or (action == "SLEEP") != (match["n"] is not None):
        raise ConfigError(
            f"{VARIABLE}: {entry!r} names no action", fix=f"one of {', '.join(ACTIONS)}"
        )
    return Fault(
        point=match["point"],
        step=None if match["step"] is None else int(match["step"]),
        rank=None if match["rank"] is None else int(match["rank"]),
        action=action,
        seconds=float(match["n"] or 0.0),
    )
