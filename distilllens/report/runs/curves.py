"""Which metrics of metrics.jsonl become curves, in which order, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distilllens.report.runs.groups import RunGroup

PER_LAYER = re.compile(r"train/(lens|lens_coeff|hidden)/(.+)/L(\d+)")
"""Term, its kind and student layer: drawn as a heatmap, not as curves."""
LAYER_TERMS = {
    "lens": "Lens divergence",
    "lens_coeff": "Weight of the lens",
    "hidden": "Hidden-state distance",
}
"""What is shown of those terms."""
COUNTS = ("eval/dev/num",)
"""Not worth a panel: how many dev records were answered, the same at each evaluation."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of metrics.jsonl and how it is drawn."""

    key: str
    title: str
    unit: str
    caption: str
    markers: bool = False
    """A dot at each value: for metrics with few of them."""
    may_be_log: bool = False
    """Whether the axis is logarithmic where the values span more than a factor of ten."""


NATS = "nats per response token"

CURVES = (
    Curve(
        key="train/loss",
        title="Training loss",
        unit=NATS,
        caption="The loss that is minimised. Approaches add up different terms, so levels compare "
        "only between runs of one objective.",
        may_be_log=True,
    ),
    Curve(
        key="eval/dev/loss",
        title="Dev loss",
        unit=NATS,
        caption="Cross entropy on the held-out dev records' answers: comparable between all runs.",
        markers=True,
    ),
    Curve(
        key="eval/dev/rougeL",
        title="Dev Rouge-L",
        unit="Rouge-L F1 × 100",
        caption="Of generated answers to the dev prompts.",
        markers=True,
    ),
    Curve(
        key="train/loss/ce",
        title="Cross entropy on the records' answers",
        unit=NATS,
        caption="The term of supervised fine-tuning.",
        may_be_log=True,
    ),
    Curve(
        key="train/loss/kd",
        title="Final-layer divergence",
        unit=NATS,
        caption="Between the final distributions of teacher and student, of the run's own kind.",
        may_be_log=True,
    ),
    Curve(
        key="train/loss/lens",
        title="Lens divergence",
        unit=NATS,
        caption="Mean over the paired layers.",
        may_be_log=True,
    ),
    Curve(
        key="train/loss/hidden",
        title="Hidden-state distance",
        unit="distance per response token",
        caption="Mean over the paired layers: mean squared difference, or 1 − cosine.",
        may_be_log=True,
    ),
    Curve(
        key="train/lens_coeff",
        title="Weight of the lens term",
        unit="λ",
        caption="As its schedule ran; the mean over the paired layers.",
    ),
    Curve(
        key="train/lr",
        title="Learning rate",
        unit="learning rate",
        caption="Warmup and schedule as they ran.",
    ),
    Curve(
        key="train/grad_norm",
        title="Gradient norm",
        unit="L2 norm before clipping",
        caption="Over all trained parameters.",
        may_be_log=True,
    ),
    Curve(
        key="train/loss_scale",
        title="Loss scale",
        unit="factor",
        caption="Of float16 training.",
        may_be_log=True,
    ),
    Curve(
        key="train/skipped_steps",
        title="Skipped steps",
        unit="steps since the start",
        caption="Updates that float16 left out to lower its loss scale.",
    ),
    Curve(
        key="perf/tokens_per_s",
        title="Throughput, all tokens",
        unit="tokens per second",
        caption="Prompt and response tokens without padding, over all processes.",
    ),
    Curve(
        key="perf/response_tokens_per_s",
        title="Throughput",
        unit="response tokens per second",
        caption="Tokens that the loss is taken on, over all processes.",
    ),
    Curve(
        key="perf/step_s",
        title="Time of a step",
        unit="seconds per optimizer step",
        caption="Evaluations and saves are not in it.",
        may_be_log=True,
    ),
    Curve(
        key="perf/memory_gb",
        title="Memory",
        unit="GB, the most so far",
        caption="Of the first process: of its GPU, or its resident memory without one.",
    ),
    Curve(
        key="perf/data_wait_pct",
        title="Waiting for data",
        unit="% of the time",
        caption="Near 0 where the loader keeps ahead of the model.",
    ),
    Curve(
        key="eval/dev/ppl",
        title="Dev perplexity",
        unit="exp of the dev loss",
        caption="The dev loss on another scale.",
        markers=True,
        may_be_log=True,
    ),
    Curve(
        key="eval/dev/exact_match",
        title="Dev exact match",
        unit="% of the prompts",
        caption="Answers that equal a reference after normalisation.",
        markers=True,
    ),
    Curve(
        key="eval/dev/mean_tokens",
        title="Dev answer length",
        unit="tokens per answer",
        caption="Mean over the generated answers.",
        markers=True,
    ),
    Curve(
        key="eval/dev/truncated",
        title="Dev answers cut",
        unit="answers",
        caption="That reached the limit of new tokens before their end.",
        markers=True,
    ),
    Curve(
        key="perf/eval_s",
        title="Time of a dev evaluation",
        unit="seconds",
        caption="Loss and generated answers.",
        markers=True,
    ),
)


def curves_of(groups: Sequence[RunGroup]) -> list[Curve]:
    """Returns a curve for every metric that was logged; those without a name here come last."""
    logged = {
        key
        for group in groups
        for kind in ("train/", "eval/", "perf/")
        for key in group.keys(kind)
        if key not in COUNTS
    }
    known = [curve for curve in CURVES if curve.key in logged]
    others = sorted(logged - {curve.key for curve in known})
    return known + [_unknown(key) for key in others if not PER_LAYER.fullmatch(key)]


def _unknown(key: str) -> Curve:
    return Curve(
        key=key,
        title=key,
        unit="as logged",
        caption="",
        markers=key.startswith("eval/"),
    )
