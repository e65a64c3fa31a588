"""A model's card again, with the scores so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilllens.config import load_config
from distilllens.errors import ConfigError, StorageError
from distilllens.model_files import check_folder
from distilllens.publish.card import CARD, UNKNOWN, own_licence, write_card
from distilllens.publish.card_facts import (
    CardFacts,
    Said,
    dev_metrics_at,
    facts_of_run,
    read_facts,
    refuse_state,
    run_of_model,
)
from distilllens.publish.card_scores import CardScore, mirrored_evaluations, scores_of_model
from distilllens.runs import is_finished, read_status


def facts_of_model(folder: Path) -> CardFacts:
    """Returns the facts beside a model, or collects them from the run that it lies in.

    Raises:
        ConfigError: No model, or neither facts nor run are there.
        DataError: What is there is damaged.
    """
    check_folder(str(folder), "config.json", may_be_hub_name=False)
    if (facts := read_facts(folder)) is not None:
        return facts
    if (run := run_of_model(folder)) is None:
        raise ConfigError(
            f"nothing tells how {folder} was trained",
            why="it has no distilllens.json, and is no best/ or latest/ in a run's folder",
            fix="python -m distilllens export RUN --to DIR writes a model with its card",
        )
    facts = facts_of_run(run, load_config(["--config", str(run.config)]))
    status = read_status(run)
    name = "best_step" if folder.name == "best" else "step"
    return replace(facts, step=status.get(name) if is_finished(run) else None)


def refresh_card(
    folder: Path, evaluations: Sequence[Path] | None = None, said: Mapping[str, Any] | None = None
) -> list[CardScore]:
    """Writes a model's card again, with the evaluations that are there now.

    Args:
        folder: Of the model.
        evaluations: Folders of results; None: where evaluate.py puts those of its run.
        said: What the publisher says; fields of `Said` that are None stay as they were.

    Returns:
        The scores on the card.

    Raises:
        ConfigError, DataError: See `facts_of_model`, `scores_of_model`; a part of a saved state.
        StorageError: The card cannot be written.
    """
    refuse_state(folder)
    facts = facts_of_model(folder)
    given = {name: value for name, value in (said or {}).items() if value is not None}
    facts = replace(facts, said=Said(**{**vars(facts.said), **given}))
    run = run_of_model(folder)
    if facts.step is not None and run is not None and not facts.dev:
        facts = replace(facts, dev=dev_metrics_at(run, facts.step))
    if evaluations is None:
        evaluations = [] if run is None else mirrored_evaluations(run.root)
    scores = scores_of_model(folder, evaluations)
    try:
        write_card(folder, facts, scores)
    except OSError as error:
        raise StorageError(
            f"the card in {folder} cannot be written",
            why=error.strerror or str(error),
            kept="the model is untouched",
        ) from None
    return scores


def describe_card(folder: Path, scores: Sequence[CardScore]) -> str:
    """Returns what a user should know of a model's new card: its sets and its licence."""
    sets = ", ".join(sorted({score.test_set for score in scores}))
    licence, reason = own_licence(facts_of_model(folder))
    return (
        f"{folder / CARD}: {f'scores on {sets}' if sets else 'no scores'}\n"
        f"licence: {licence or UNKNOWN} ({reason})"
    )
