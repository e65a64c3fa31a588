"""The metrics of results.json: what readers call them, which way is better, what they average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALWAYS = ("rougeL", "exact_match")
"""The metrics that every results.json has and every report shows, both as mean × 100."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown and compared."""

    title: str
    """Its name for readers, with the unit."""
    better: Literal["larger", "smaller"] | None
    """None: neither; no best is marked, and no difference is called better."""
    per_prompt: str
    """Key of the lines of samples.jsonl whose mean it is, where it is a mean over prompts."""


METRICS = {
    "rougeL": Metric(title="Rouge-L", better="larger", per_prompt="rougeL"),
    "exact_match": Metric(title="Exact match (%)", better="larger", per_prompt="exact_match"),
    "similarity": Metric(title="Sentence similarity", better="larger", per_prompt="similarity"),
    **{
        f"distinct_{n}": Metric(
            title=f"Distinct-{n} (%)", better="larger", per_prompt=f"distinct_{n}"
        )
        for n in (1, 2, 3, 4)
    },
    "rep_4": Metric(title="Repeated 4-grams (%)", better="smaller", per_prompt="rep_4"),
    "mean_tokens": Metric(title="Tokens per answer", better=None, per_prompt="num_tokens"),
    "mean_words": Metric(title="Words per answer", better=None, per_prompt="num_words"),
    "truncated": Metric(title="Truncated answers", better="smaller", per_prompt="truncated"),
    "empty": Metric(title="Empty answers", better="smaller", per_prompt="empty"),
    "truncated_percent": Metric(
        title="Truncated answers (%)", better="smaller", per_prompt="truncated"
    ),
    "empty_percent": Metric(title="Empty answers (%)", better="smaller", per_prompt="empty"),
    "loss": Metric(title="Loss (nats per token)", better="smaller", per_prompt="loss"),
}


def metric_of(name: str) -> Metric:
    """Returns what is known of a metric; of an unknown one its name, and no better or worse."""
    return METRICS.get(name, Metric(title=name, better=None, per_prompt=name))
