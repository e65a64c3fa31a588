"""``python -m distilllens judge A [--against B] --base_url URL --model NAME …``

Scores the answers of an evaluation, or compares them with another's. OUTPUT_DIR, by default
A/judge/MODEL, holds cache.jsonl (every reply) and, in score/ or against-B/, verdicts.jsonl,
results.json and table.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distilllens.config import JudgeConfig
from distilllens.data.progress import track
from distilllens.errors import EXIT_TIME_LIMIT, ConfigError, StorageError
from distilllens.evaluation.cells.results import check_writable
from distilllens.evaluation.judge.answers import Item, load_items
from distilllens.evaluation.judge.cache import ReplyCache
from distilllens.evaluation.judge.client import Endpoint
from distilllens.evaluation.judge.loop import Ledger, ask_all, token_cost
from distilllens.evaluation.judge.questions import (
    PROMPT_VERSION,
    Conversation,
    pair_question,
    score_question,
    valid_text,
)
from distilllens.evaluation.judge.summary import (
    Judged,
    markdown_table,
    rich_table,
    summarise,
    table_rows,
)
from distilllens.runs import git_commit, redact, replace_text, versions, write_json
from distilllens.runtime.lock import locked
from distilllens.runtime.signals import Stopped, stoppable


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Asks what is not known yet, and writes verdicts, figures and tables.

    Args:
        config: Answers, endpoint, limits. With ``dry_run`` nothing is sent or written.

    Returns:
        The content of results.json; nothing in a dry run.

    Raises:
        ConfigError: No evaluation there, other prompts in the two, no key, openai not installed; an
            endpoint that refuses requests or is dead; some questions got no reply.
        DataError: A samples.jsonl is not what evaluate.py writes.
        StorageError: The folder cannot be written.
        Stopped: A signal or the budget ended it; the same command goes on.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:  # a file or pipe need not squeeze the table into 80 columns
        console.width = 200
    items, hashes = load_items(config)
    folder = Path(config.output_dir or default_folder(config))
    if config.dry_run:
        _plan(items, config, folder, console)
        console.print("dry run: nothing was sent or written")
        return {}
    endpoint = Endpoint(config)
    ledger = Ledger(config=config)
    check_writable(folder)
    with locked(folder / "judge.lock"), stoppable():
        cache, judged, conversations = _plan(items, config, folder, console)
        if missing := [c for c in conversations if not c.is_over]:
            with track(
                "judging", "questions", total=len(missing), console=console, note=ledger.describe
            ) as advance:
                ask_all(missing, endpoint, cache, ledger, advance)
        results = _results(config, judged, conversations, endpoint, ledger, hashes)
        target = folder / task_name(config)
        _write(target, results, judged, _title(config))
    header, rows = table_rows(results["summary"], pairs=config.against is not None)
    console.print(rich_table(_title(config), header, rows), soft_wrap=False)
    console.print(f"{endpoint.num_sent:,} requests, {ledger.describe()}; {target}")
    _tell_incomplete(ledger)
    return results


def _plan(
    items: Sequence[Item], config: JudgeConfig, folder: Path, console: Console
) -> tuple[ReplyCache, list[Judged], list[Conversation]]:
    """Makes the questions, and leads them on as far as the cache knows the replies."""
    cache = ReplyCache(folder / "cache.jsonl", config)
    judged, conversations = ask_about(items, config, cache)
    for conversation in conversations:
        cache.replay(conversation)
    settled = sum(conversation.is_over for conversation in conversations)
    console.print(
        f"{len(items):,} {'pairs' if config.against else 'answers'}: {len(conversations):,} "
        f"questions, {settled:,} settled already by {cache.file}"
        + (f", {cache.num_torn} torn lines ignored" if cache.num_torn else "")
    )
    return cache, judged, conversations


def default_folder(config: JudgeConfig) -> Path:
    """Returns A/judge/MODEL."""
    return Path(str(config.answers)) / "judge" / _slug(str(config.model))


def task_name(config: JudgeConfig) -> str:
    """Returns ``score``, or ``against-B-`` and a hash of where B lies: two may share a name."""
    if config.against is None:
        return "score"
    other = Path(config.against).resolve()
    return f"against-{_slug(other.name)}-{hashlib.sha256(os.fsencode(other)).hexdigest()[:6]}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+|^\.+", "-", name)[:100]


def ask_about(
    items: Sequence[Item], config: JudgeConfig, cache: ReplyCache
) -> tuple[list[Judged], list[Conversation]]:
    """Returns the items with their questions, and every question once.

    Equal questions, such as one prompt's reference with several seeds, are asked only once.
    """
    unique: dict[str, Conversation] = {}
    judged = []
    for item in items:
        if item.other is not None:
            pairs = [(item.answer, item.other), (item.other, item.answer)]
            asked = [pair_question(item.prompt, *pair, asks=config.asks) for pair in pairs]
        else:
            texts = [item.answer, *([item.reference] if config.grade_references else [])]
            asked = [score_question(item.prompt, text, asks=config.asks) for text in texts]
        known = tuple(unique.setdefault(cache.key(c.messages), c) for c in asked)
        judged.append(Judged(item=item, conversations=known))
    return judged, list(unique.values())


def _tell_incomplete(ledger: Ledger) -> None:
    """Ends a command that has not settled everything.

    Raises:
        Stopped: The budget is spent.
        ConfigError: Some questions got no reply.
    """
    if ledger.spent:
        raise Stopped(
            f"stopped by {ledger.spent}",
            code=EXIT_TIME_LIMIT,
            fix="the same command goes on, with as much again",
        )
    if ledger.failures:
        raise ConfigError(
            f"{len(ledger.failures)} questions got no reply",
            why=ledger.failures[-1],
            fix="the same command asks only them again",
            kept="all other replies, and figures without these questions",
        )


# --- Files --------------------------------------------------------------------------------------


def _results(
    config: JudgeConfig,
    judged: Sequence[Judged],
    conversations: Sequence[Conversation],
    endpoint: Endpoint,
    ledger: Ledger,
    hashes: dict[str, str],
) -> dict[str, Any]:
    """Returns the content of results.json."""
    replies = [reply for conversation in conversations for reply in conversation.replies]
    input_tokens = sum(reply.input_tokens or 0 for reply in replies)
    output_tokens = sum(reply.output_tokens or 0 for reply in replies)
    has_price = config.input_price is not None
    return {
        "mode": "score" if config.against is None else "pairs",
        "complete": all(conversation.is_over for conversation in conversations),
        "judge": config.model,
        "replied_as": dict(Counter(valid_text(reply.model) for reply in replies)),
        "summary": summarise(judged, pairs=config.against is not None),
        "questions": len(conversations),
        "replies": {
            "count": len(replies),
            "unreadable": sum(len(c.replies) - (c.verdict is not None) for c in conversations),
            "tokens_not_told": sum(reply.output_tokens is None for reply in replies),
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cost": token_cost(config, input_tokens, output_tokens) if has_price else None,
        },
        "this_command": {
            "requests": endpoint.num_sent,
            "replies": ledger.num_replies,
            "lost_tries": ledger.num_lost,
            "input_tokens": ledger.input_tokens,
            "output_tokens": ledger.output_tokens,
            "cost": ledger.cost if has_price else None,
            "no_reply": ledger.failures,
            "stopped_by": ledger.spent or None,
        },
        "samples_sha256": hashes,
        "prompt_version": PROMPT_VERSION,
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "git_commit": git_commit(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _write(folder: Path, results: dict[str, Any], judged: Sequence[Judged], title: str) -> None:
    """Writes verdicts.jsonl, table.md and, last, results.json.

    Raises:
        StorageError: They cannot be written.
    """
    pairs = results["mode"] == "pairs"
    header, rows = table_rows(results["summary"], pairs=pairs)
    lines = [json.dumps(_verdict_line(one)) for one in judged]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "verdicts.jsonl", "".join(f"{line}\n" for line in lines))
        replace_text(folder / "table.md", markdown_table(title, header, rows))
        write_json(folder / "results.json", results)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}",
            why=error.strerror or str(error),
            fix="free the disk, or choose another --output_dir",
            kept="every reply is in cache.jsonl: the same command writes it again for nothing",
        ) from None


def _verdict_line(one: Judged) -> dict[str, Any]:
    return {
        "set": one.item.set,
        "seed": one.item.seed,
        "index": one.item.index,
        "outcome": one.outcome,
        "verdicts": one.verdicts,
        "problems": [c.problem if c.verdict is None else "" for c in one.conversations],
        "replies": [[reply.text for reply in c.replies] for c in one.conversations],
    }


def _title(config: JudgeConfig) -> str:
    against = "" if config.against is None else f" against {config.against}"
    return redact(f"{config.model} on {config.answers}{against}")
