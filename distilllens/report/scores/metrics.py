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
    per_prompt: str = ""
    """Key of the lines of samples.jsonl whose mean it is; empty: it is no mean over prompts."""
    once_per_set: bool = False
    """Whether it is without sampling: the results of all sampling seeds have the same figure."""


def _token_metric(title: str, better: Literal["larger", "smaller"] | None) -> Metric:
    return Metric(title=title, better=better, once_per_set=True)


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
    "nll": _token_metric("Loss on the references (nats per token)", "smaller"),
    "perplexity": _token_metric("Perplexity of the references", "smaller"),
    "top1": _token_metric("Top-1 accuracy (% of tokens)", "larger"),
    "ece": _token_metric("Calibration error (%)", "smaller"),
    "entropy": _token_metric("Entropy (nats per token)", None),
    "teacher_entropy": _token_metric("Teacher's entropy (nats per token)", None),
    "entropy_gap": _token_metric("Entropy minus the teacher's (nats per token)", None),
    "kl_teacher_student": _token_metric("KL(teacher‖student) (nats per token)", "smaller"),
    "kl_student_teacher": _token_metric("KL(student‖teacher) (nats per token)", "smaller"),
    "agreement": _token_metric("Top-1 agreement with the teacher (% of tokens)", "larger"),
    "ex_acc_err": Metric(title="Excess accumulated error (%)", better="smaller"),
    "ex_acc_err_se": Metric(
        title="Excess accumulated error: standard error over prompts (%)", better="smaller"
    ),
    "ex_acc_err_per_token": Metric(
        title="Excess accumulated error per token (%)", better="smaller"
    ),
}


def metric_of(name: str) -> Metric:
    """Returns what is known of a metric; of an unknown one its name, and no better or worse."""
    return METRICS.get(name, Metric(title=name, better=None, per_prompt=name))
