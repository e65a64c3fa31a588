"""Which saved state a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from distilllens.config import TrainConfig
from distilllens.errors import CheckpointError
from distilllens.runs import RunFolder, redact
from distilllens.runtime import distributed
from distilllens.runtime.faults import reach
from distilllens.runtime.manifest import (
    clean_leftovers,
    find_damage,
    newest_good_state,
    read_manifest,
    step_folders,
)

STATE_FILE = "state.json"
"""Of a saved state: counters and options as JSON."""
BESIDE_THE_COURSE = (
    *("run", "tracking", "generate", "dry_run", "debug"),
    *("model.teacher_cache", "model.teacher_placement"),
)
"""Options that a run may be continued without; but ``run.seed`` must stay."""

logger = logging.getLogger("distilllens")


def find_state(folder: RunFolder, resume: str) -> Path | None:
    """Returns the state to go on from as ``run.resume`` says, or None for a fresh start.

    The first process looks, verifies every byte, and tells what it passes over and clears away;
    the others learn its choice. The folder must be this run's own: what looks left behind by a
    process that died is removed.

    Raises:
        CheckpointError: ``must`` or a path, and there is no good state; or there are states, and
            none of them is good.
    """
    if resume == "never":
        return None
    return distributed.on_main(lambda: _find_state(folder, resume))


def _find_state(folder: RunFolder, resume: str) -> Path | None:
    reach("resume.start")
    for place in (folder.root, folder.state):
        for done in clean_leftovers(place):
            logger.warning("left by a process that died: %s", done)
    good, damaged = newest_good_state(folder.state)
    if resume not in ("auto", "must"):
        wanted = Path(resume)
        if damage := find_damage(wanted):
            raise CheckpointError(f"run.resume={resume} is no saved state", why=damage)
        if good is not None and read_manifest(good)["begun_at"] == str(wanted.resolve()):
            return good  # the run went back to PATH before; now it goes on
        return wanted
    if good is None and damaged:
        raise CheckpointError(
            f"every saved state of {folder.state} is damaged",
            why="; ".join(damaged.values()),
            fix="mend one, or start anew with another --run.output_dir",
            kept="nothing was changed",
        )
    if good is None and resume == "must":
        raise CheckpointError(f"run.resume=must, but {folder.state} holds no saved state")
    for path, damage in damaged.items():
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        os.rename(path, aside)  # this run will write that step again
        logger.warning("%s; it is now %s, going on from %s", damage, aside.name, good)
    reach("resume.verified")
    return good


def set_later_aside(folder: RunFolder, state: Path) -> None:
    """Makes room for the steps that a run does again from an earlier state on; by one process."""
    step = read_manifest(state)["step"]
    for path in step_folders(folder.state):
        later = int(path.name.removeprefix("step-")) >= step
        if later and path.resolve() != state.resolve():
            aside = _free_name(path.with_name(f"before-{path.name}"))
            os.rename(path, aside)
            logger.warning("%s is now %s: going back to %s", path, aside.name, state)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


# --- The same run -------------------------------------------------------------------------------


def saved_tracker_id(state: Path) -> str:
    """Returns the id at the tracker of the run that saved a state."""
    return str(json.loads((state / STATE_FILE).read_text(encoding="utf-8"))["tracker_id"])


def check_same_config(state: Path, config: TrainConfig) -> str:
    """Refuses to go on with options that change the course of the run.

    With another number of processes micro-batch and accumulation may differ, as long as their
    product over all processes, the global batch, stays.

    Returns:
        What differs although it should not, if ``run.allow_changes`` allows that; else ``""``.

    Raises:
        CheckpointError: Lists each option that differs; or names the way for this number of
            processes.
    """
    saved = json.loads((state / STATE_FILE).read_text(encoding="utf-8"))["config"]
    # Options that are newer than the state had their defaults, as far as it is concerned.
    before, now = course_of(TrainConfig()) | _course(saved), course_of(config)
    facts = read_manifest(state)
    if facts["world_size"] != distributed.world_size():
        _check_world_size(state, facts, config)
        for name in ("optim.micro_batch_size", "optim.accumulation"):
            now[name] = before[name]
    return _refuse_differences(state, before, now, allowed=config.run.allow_changes)


def check_same_facts(state: Path, facts: dict[str, Any], *, allow_changes: bool) -> str:
    """Refuses data, tokenizer or ZeRO stage that are not those of the state.

    Args:
        state: A verified state.
        facts: Of this run, as `checkpoint.StateParts` has them.
        allow_changes: Other data, another tokenizer and another global batch are the user's wish.

    Returns:
        What differs although it should not, if that is allowed; else ``""``.

    Raises:
        CheckpointError: Lists what differs.
    """
    saved = read_manifest(state)
    fixed = ("zero_stage", "precision")
    _refuse_differences(
        state,
        *({name: f[name] for name in fixed} for f in (saved, facts)),
        fix="the DeepSpeed file of before; or export the model and train on from it in a new run",
    )
    names = ("data_fingerprint", "tokenizer_sha256", "global_batch")
    before, now = ({n: f[n] for n in names} for f in (saved, facts))
    return _refuse_differences(state, before, now, allowed=allow_changes)


def _refuse_differences(
    state: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    *,
    allowed: bool = False,
    fix: str = "give the same ones or a new --run.output_dir; --run.allow_changes true goes on too",
) -> str:
    names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    width = max(map(len, names), default=0)
    table = "".join(f"\n    {n:{width}}  {before.get(n)} → {now.get(n)}" for n in names)
    if not table or allowed:
        return table
    raise CheckpointError(
        f"{state} was saved with other options, data or models",
        why=f"saved → now:{table}",
        fix=fix,
        kept="the saved state is untouched",
    )


def _check_world_size(state: Path, facts: dict[str, Any], config: TrainConfig) -> None:
    """Refuses a number of processes that the state cannot be continued with."""
    saved, now = facts["world_size"], distributed.world_size()
    what = f"{state} was saved by {saved} processes, this run has {now}"
    kept = "the saved state is untouched"
    if facts["zero_stage"] > 0:
        raise CheckpointError(
            what,
            why=f"ZeRO stage {facts['zero_stage']} keeps one part of the optimizer per process",
            fix=f"start {saved} processes; or train on from the weights alone: python -m "
            f"distilllens export {state} --to DIR, then --model.student DIR in a new run",
            kept=kept,
        )
    wanted, micro = facts["global_batch"], config.optim.micro_batch_size
    if micro * config.optim.accumulation * now == wanted:
        return
    share, rest = divmod(wanted, now)
    fitting = math.gcd(share, micro)
    raise CheckpointError(
        what,
        why=f"its global batch is {wanted} records, this run's "
        f"{micro * config.optim.accumulation * now}: records would be seen twice or never",
        fix=f"--optim.micro_batch_size {fitting} --optim.accumulation {share // fitting}"
        if not rest
        else f"start a number of processes that divides {wanted}",
        kept=kept,
    )


def course_of(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that shape a run, flat, as a saved state holds them."""
    return _course(json.loads(redact(json.dumps(dataclasses.asdict(config)))))


def _course(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens the options that shape a run; how it is watched and where a cache lies do not."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if prefix + name in BESIDE_THE_COURSE:
            continue
        if isinstance(value, dict):
            flat |= _course(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat | ({"run.seed": config["run"]["seed"]} if prefix == "" else {})
