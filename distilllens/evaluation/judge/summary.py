"""From verdicts to figures: win rates and scores with intervals, and how the judge itself did.

Answers to one prompt with several sampling seeds are no independent trials. Every interval counts a
prompt once: shares by Wilson's formula with n prompts, means by a bootstrap over prompts.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.table import Table

from distilllens.evaluation.judge.answers import Item
from distilllens.evaluation.judge.questions import Conversation, Verdict

Outcome = Literal["win", "tie", "loss", "unparsed", "unanswered"]
CONFIDENCE = 0.95
RESAMPLES, BOOTSTRAP_SEED = 2000, 0
ALL = "all"
"""Name of the row over all sets."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An item with the judge's word on it."""

    item: Item
    conversations: tuple[Conversation, ...]
    """Of a score: about the answer, then about the reference if that is graded. Of a pair: A's
    answer first, then B's answer first."""

    @property
    def verdicts(self) -> tuple[Verdict | None, ...]:
        """One for each conversation; None where there is none."""
        return tuple(conversation.verdict for conversation in self.conversations)

    @property
    def outcome(self) -> Outcome | Literal["scored"]:
        """A win of A needs the same verdict in both orders, and so does a loss.

        An answer's score needs none of its reference, which the ratio alone is of.
        """
        is_pair = self.item.other is not None
        needed = self.conversations if is_pair else self.conversations[:1]
        if any(not conversation.is_over for conversation in needed):
            return "unanswered"
        if any(conversation.verdict is None for conversation in needed):
            return "unparsed"
        if not is_pair:
            return "scored"
        if self.verdicts == ("first", "second"):
            return "win"
        return "loss" if self.verdicts == ("second", "first") else "tie"


def wilson_interval(share: float, n: int) -> list[float]:
    """Returns the 95 % interval of a share of ``n`` trials (Wilson 1927), which need be no count.

    Args:
        share: In [0, 1].
        n: Trials (≥ 1).
    """
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = share + z * z / (2 * n)
    width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return [max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)]


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float] | None = None
) -> list[float]:
    """Returns the 95 % percentile interval of a mean, or of a ratio of sums, over prompts.

    The seed is fixed: the same values give the same interval.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, np.float64)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [
        above[picked].sum() / below[picked].sum()
        for picked in (random.integers(len(above), size=len(above)) for _ in range(RESAMPLES))
    ]
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(drawn, [tail, 1 - tail])]


def summarise(judged: Sequence[Judged], *, pairs: bool) -> dict[str, dict[str, Any]]:
    """Returns the figures of each set, and of all together under ``all`` if there are several."""
    by_set: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        by_set[one.item.set].append(one)
    if len(by_set) > 1:
        by_set[ALL] = list(judged)
    compute = pair_figures if pairs else score_figures
    return {name: _counts(members) | compute(members) for name, members in by_set.items()}


def _counts(judged: Sequence[Judged]) -> dict[str, Any]:
    outcomes = Counter(one.outcome for one in judged)
    unread = {name: outcomes.pop(name, 0) for name in ("unparsed", "unanswered")}
    read = [one for one in judged if one.outcome not in unread]
    return {"n": len(read), "num_prompts": len(_by_prompt(read)), **unread}


def _by_prompt(judged: Iterable[Judged]) -> list[list[Judged]]:
    groups: dict[tuple[str, int], list[Judged]] = defaultdict(list)
    for one in judged:
        groups[one.item.set, one.item.index].append(one)
    return list(groups.values())


def pair_figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Returns wins, ties and losses of A, and how often the judge just took one position.

    Returns:
        ``win_rate``, ``tie_rate`` and ``loss_rate``, in [0, 1], with ``…_interval`` for the first
        and last; ``always_first`` and ``always_second``, the shares of pairs whose two verdicts
        named the same place. Counts only where there is no verdict.
    """
    groups = _by_prompt(one for one in judged if one.outcome in ("win", "tie", "loss"))
    read = [one for group in groups for one in group]
    counts = Counter(one.outcome for one in read)
    figures: dict[str, Any] = {
        "wins": counts["win"],
        "ties": counts["tie"],
        "losses": counts["loss"],
    }
    if not read:
        return figures
    for outcome, name in (("win", "win_rate"), ("tie", "tie_rate"), ("loss", "loss_rate")):
        # The mean over prompts: with missing verdicts, prompts still weigh the same.
        shares = [statistics.fmean(one.outcome == outcome for one in group) for group in groups]
        figures[name] = statistics.fmean(shares)
        if outcome != "tie":
            figures[f"{name}_interval"] = wilson_interval(figures[name], len(groups))
    for place in ("first", "second"):
        same = sum(one.verdicts == (place, place) for one in read)
        figures[f"always_{place}"] = same / len(read)
    return figures


def score_figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Returns the mean score, and the ratio to the references' where those are graded.

    The ratio is of sums, as MiniLLM's GPT-4 feedback (Gu et al. 2023, arXiv 2306.08543); there both
    are graded in one request, here each alone, so that no order can favour either. It is of the
    ``num_ratio_prompts`` whose answer and reference both have a score, and so is the references'.
    """
    scored = [one for one in judged if one.outcome == "scored"]
    if not scored:
        return {}
    answers = _mean_verdicts(scored, 0)
    figures: dict[str, Any] = {
        "score": statistics.fmean(answers),
        "score_interval": bootstrap_interval(answers),
    }
    if both := [one for one in scored if len(one.verdicts) == 2 and one.verdicts[1] is not None]:
        answers, references = _mean_verdicts(both, 0), _mean_verdicts(both, 1)
        figures["num_ratio_prompts"] = len(references)
        figures["reference_score"] = statistics.fmean(references)
        figures["ratio"] = sum(answers) / sum(references)
        figures["ratio_interval"] = bootstrap_interval(answers, references)
    return figures


def _mean_verdicts(scored: Sequence[Judged], place: int) -> list[float]:
    """Returns the mean of each prompt's scores."""
    return [
        statistics.fmean(score for one in group if isinstance(score := one.verdicts[place], int))
        for group in _by_prompt(scored)
    ]


# --- Tables -------------------------------------------------------------------------------------

PAIR_HEADER = (
    *("set", "n", "prompts", "win %", "tie %", "loss %"),
    *("always first %", "always second %", "unparsed", "unanswered"),
)
SCORE_HEADER = (
    *("set", "n", "prompts", "score", "reference", "ratio %"),
    *("unparsed", "unanswered"),
)
NOTE = "Intervals: 95 %, over prompts."


def table_rows(
    summary: Mapping[str, Mapping[str, Any]], *, pairs: bool
) -> tuple[Sequence[str], list[list[str]]]:
    """Returns the titles of the columns, and a row of texts for each set."""
    rows = []
    for name, figures in summary.items():
        if pairs:
            cells = [
                _with_interval(figures, "win_rate", 100),
                _with_interval(figures, "tie_rate", 100),
                _with_interval(figures, "loss_rate", 100),
                _with_interval(figures, "always_first", 100),
                _with_interval(figures, "always_second", 100),
            ]
        else:
            cells = [
                _with_interval(figures, "score", 1),
                _with_interval(figures, "reference_score", 1) + _fewer(figures),
                _with_interval(figures, "ratio", 100) + _fewer(figures),
            ]
        counts = [str(figures[key]) for key in ("n", "num_prompts", "unparsed", "unanswered")]
        rows.append([name, *counts[:2], *cells, *counts[2:]])
    return (PAIR_HEADER if pairs else SCORE_HEADER), rows


def _with_interval(figures: Mapping[str, Any], key: str, factor: float) -> str:
    if key not in figures:
        return "–"
    digits = 1 if factor == 100 else 2
    text = f"{factor * figures[key]:.{digits}f}"
    if interval := figures.get(f"{key}_interval"):
        low, high = (f"{factor * value:.{digits}f}" for value in interval)
        text += f" [{low}, {high}]"
    return text


def _fewer(figures: Mapping[str, Any]) -> str:
    """Returns of how many prompts the ratio is, if not of all."""
    count = figures.get("num_ratio_prompts", figures["num_prompts"])
    return "" if count == figures["num_prompts"] else f" (n = {count})"


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns the table for a screen."""
    table = Table(title=title, caption=NOTE)
    for name in header:
        table.add_column(name, justify="left" if name == "set" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as Markdown."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    text = "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
    return f"**{title}**\n\n{text}\n\n{NOTE}\n"
