"""In what a student's training was not the paper's: its own record against configs/paper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distilllens.config import CE_ONLY, TrainConfig, load_config
from distilllens.parsing import scalars
from distilllens.public import PROJECT
from distilllens.runs import FACTS_FILE

CONFIGS = PROJECT / "configs"
NUM_RECORDS = 11_435
"""The paper's training records: Dolly as MiniLLM prepared it has 12,435, the first 1000 for dev."""
GPUS = 4
PRECISION = "bfloat16"
COMPARED = ("objective.", "optim.", "data.max_length", "data.max_prompt_length", "data.keep_gold")
"""What the keys begin with of options that decide what is trained."""
OTHERWISE = {
    *(f"optim.{name}" for name in ("epochs", "max_steps", "micro_batch_size", "accumulation")),
    *(f"objective.lens.{name}" for name in ("teacher_layers", "student_layers", "rule", "count")),
    *("objective.lens.every", "objective.lens.sample"),
}
"""Of these: options that are compared by what comes of them, steps, batch and layer pairs."""


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """How the paper trained a row of Table 1."""

    pair: str
    """Of teacher and student, as the files in configs/ call it."""
    approach: str
    kind: str
    """Of divergence; ce without one."""
    teacher_blocks: int


@cache
def paper_config(run: PaperRun) -> TrainConfig:
    """Returns the paper's settings.

    Raises:
        ConfigError: configs/ is not there.
    """
    names = (f"models/{run.pair}", f"objectives/{run.approach}", f"paper/{run.pair}-{run.approach}")
    argv = [part for name in ("base", *names) for part in ("--config", f"{CONFIGS / name}.yaml")]
    if run.approach == "seqkd":
        argv += ["--data.generated", "answers"]
    if run.approach not in CE_ONLY:
        argv += ["--objective.divergence", run.kind]
    return load_config(argv)


def training_differences(checkpoint: Path, run: PaperRun) -> list[str]:
    """Returns what is known to differ from the paper's training, a phrase for each thing.

    Args:
        checkpoint: Folder of the student, whose `FACTS_FILE` tells how it was trained.
        run: The paper's.
    """
    if not (CONFIGS / "paper").is_dir():
        return ["training not compared: configs/paper is not here"]
    try:
        facts = json.loads((checkpoint / FACTS_FILE).read_text(encoding="utf-8"))
        return list(_differences(facts, paper_config(run), run))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"training not known: no {FACTS_FILE} beside the weights that tells it"]


def _differences(facts: Mapping[str, Any], paper: TrainConfig, run: PaperRun) -> Iterator[str]:
    options, data = facts["options"], facts["data"]
    optim = options["optim"]
    if (data["num_train"], Path(data["file"]).parent.name) != (NUM_RECORDS, "dolly"):
        count = "unknown" if data["num_train"] is None else f"{data['num_train']:,}"
        yield f"training records: {count} of {data['file']} for {NUM_RECORDS:,} of dolly"
    if options["data"]["generated"] is not None and run.approach != "seqkd":
        yield f"trained on a teacher's answers, {options['data']['generated']}"
    if run.approach != "sft":
        blocks = (facts["teacher"] or {}).get("num_blocks")
        if blocks != run.teacher_blocks:
            yield f"teacher of {blocks or 'unknown'} blocks for {run.teacher_blocks}"
    if optim["max_steps"] is not None:
        yield f"{optim['max_steps']:,} optimizer steps for {paper.optim.epochs} epochs"
    elif optim["epochs"] != paper.optim.epochs:
        yield f"{optim['epochs']} epochs for {paper.optim.epochs}"
    batch = optim["micro_batch_size"] * optim["accumulation"] * facts["world_size"]
    wanted = paper.optim.micro_batch_size * paper.optim.accumulation * GPUS
    if batch != wanted:
        yield f"global batch {batch} for {wanted}"
    if facts["precision"] != PRECISION:
        yield f"precision {facts['precision'] or 'unknown'} for {PRECISION}"
    if options["model"]["student_lora"] is not None:
        yield "an adapter was trained, not all weights"
    if run.approach == "distill_lens":
        yield from _pair_differences(facts, paper)
    theirs, ours = dict(scalars(asdict(paper))), dict(scalars(options))
    for key, value in theirs.items():
        if _decides(key, run.approach) and ours.get(key, value) != value:
            yield f"{key}: {json.dumps(ours[key])} for {json.dumps(value)}"


def _pair_differences(facts: Mapping[str, Any], paper: TrainConfig) -> Iterator[str]:
    lens = paper.objective.lens
    assert lens.teacher_layers is not None and lens.student_layers is not None
    wanted = list(zip(lens.teacher_layers, lens.student_layers, strict=True))
    pairs = [(teacher, student) for teacher, student in facts["pairs"]]
    if pairs != wanted:
        ours, theirs = (" ".join(f"{t}–{s}" for t, s in found) for found in (pairs, wanted))
        yield f"layer pairs {ours or 'none'} for {theirs}"


def _decides(key: str, approach: str) -> bool:
    """Whether an option changes what is trained, and is not told otherwise."""
    if not key.startswith(COMPARED) or key in OTHERWISE:
        return False
    if approach in CE_ONLY:
        return not key.startswith("objective.") or key == "objective.approach"
    return not key.startswith("objective.lens.") or approach == "distill_lens"
