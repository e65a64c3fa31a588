"""Layer pairs of rule ``lens_similarity``: measured once, when both models are loaded.

A saved state and layers.json hold them with what they were chosen by: a resumed run takes them from
its state, as its student is no longer the one they were measured on.

Shapes: K layer pairs, T teacher blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from torch import nn

from distilllens.data.collate import Batch, collate_columns
from distilllens.data.progress import track
from distilllens.data.tokenize import PreparedData, record_lengths
from distilllens.errors import NumericsError
from distilllens.layers import LayerPair, layer_table, pair_by_similarity, similarity_table
from distilllens.lens import LogitLens
from distilllens.lens_matrix import collect_rows, lens_divergences
from distilllens.models import num_blocks
from distilllens.objective import DistillationObjective
from distilllens.runtime import distributed
from distilllens.runtime.manifest import read_manifest
from distilllens.runtime.signals import Stopped, StopRequest
from distilllens.student import DistillationModule, Teacher
from distilllens.training.setup import Plan

MAX_ROWS = 2048
"""Response tokens that are compared at most, evenly spread over the sample: 0.5 GB of a teacher of
32 blocks that are 4096 wide, in bfloat16."""
DOING = "measuring layer pairs"


def pair_records(plan: Plan) -> list[dict[str, Any]]:
    """Returns the pairs as layers.json and a saved state hold them.

    Measured ones come with ``divergence``: of the student block and teacher block 1, 2, … in nats.
    """
    records: list[dict[str, Any]] = [dataclasses.asdict(pair) for pair in plan.pairs]
    if plan.divergence_KT is not None:
        for record, divergences in zip(records, plan.divergence_KT, strict=True):
            record["divergence"] = divergences
    return records


def pair_tables(plan: Plan) -> list[RenderableType]:
    """Returns the layer pairs as tables, or a line that says when they will be known."""
    if not plan.pairs or plan.teacher_config is None:
        return []
    if plan.pairs_are_open:
        blocks = ", ".join(str(pair.student) for pair in plan.pairs)
        sample = plan.config.objective.lens.sample
        return [
            f"lens: teacher blocks for student blocks {blocks} are measured on {sample} training "
            "records when the weights are loaded (objective.lens.rule=lens_similarity)"
        ]
    depths = num_blocks(plan.teacher_config), num_blocks(plan.student_config)
    tables: list[RenderableType] = [layer_table(plan.pairs, *depths)]
    if plan.divergence_KT is not None:
        tables.insert(0, similarity_table(plan.pairs, plan.divergence_KT))
    return tables


def restore_pairs(plan: Plan, state: Path) -> Plan:
    """Takes measured pairs from a verified state; leaves them open if it has none that fit.

    That happens only where ``run.allow_changes`` let the lens or the models change.
    """
    assert plan.teacher_config is not None
    records = read_manifest(state).get("layer_pairs", [])
    blocks = [record["student"] for record in records]
    widths = {len(record.get("divergence", [])) for record in records}
    if blocks != _student_blocks(plan) or widths != {num_blocks(plan.teacher_config)}:
        return plan
    pairs = [LayerPair(teacher=r["teacher"], student=r["student"]) for r in records]
    return _with_pairs(plan, pairs, [record["divergence"] for record in records])


def measure_pairs(
    plan: Plan,
    teacher: Teacher,
    module: DistillationModule,
    data: PreparedData,
    console: Console,
    stop: StopRequest,
) -> Plan:
    """Finds the teacher blocks most like the student blocks; all processes must call it.

    The first process measures, as the others would find the same; all get its numbers. Only blocks
    below the teacher's last are chosen, as by the other rules.

    Args:
        plan: With open pairs, whose student blocks stay.
        teacher: On its device; it is handed the blocks, in place.
        module: With the whole student, so before DeepSpeed; it is handed the objective, in place.
        data: Tokenised records; ``lens.sample`` of those to train on are drawn.
        console: Shows the progress.
        stop: Signals.

    Returns:
        The plan with measured pairs.

    Raises:
        NumericsError: A divergence is not finite.
        Stopped: A signal; on all processes.
    """

    def measure() -> NDArray[np.float64] | None:
        try:
            return _measure(plan, teacher.lens, module.lens, data, console, stop)
        except Stopped:
            return None  # all end together, below

    divergence_KT = distributed.on_main(measure)
    if divergence_KT is None:
        stop.check(DOING)
    assert divergence_KT is not None
    pairs = pair_by_similarity(divergence_KT[:, :-1], _student_blocks(plan))
    plan = _with_pairs(plan, pairs, divergence_KT.tolist())
    teacher.layers, module.objective = [pair.teacher for pair in pairs], plan.objective
    return plan


def _measure(
    plan: Plan,
    teacher: LogitLens,
    student: LogitLens,
    data: PreparedData,
    console: Console,
    stop: StopRequest,
) -> NDArray[np.float64]:
    batches = sample_batches(plan, data)
    stop.poll(DOING)
    with _evaluating(student.model):
        teacher_rows = collect_rows(teacher, batches, max_tokens=MAX_ROWS)
        stop.poll(DOING)
        student_rows = collect_rows(
            student, batches, max_tokens=MAX_ROWS, layers=_student_blocks(plan)
        )
        num_rows = len(student_rows.hidden_LND[0])
        with track(DOING, "tokens", total=num_rows, console=console) as show:

            def advance(rows: int) -> None:
                stop.poll(DOING)
                show(rows)

            divergence_KT = lens_divergences(
                plan.objective.lens_divergence,
                plan.objective.lens_options,
                teacher=teacher_rows,
                student=student_rows,
                advance=advance,
            )
    if not np.isfinite(divergence_KT).all():
        k, t = np.argwhere(~np.isfinite(divergence_KT))[0]
        raise NumericsError(
            f"objective.lens.rule=lens_similarity: the divergence of teacher block {t + 1} and "
            f"student block {_student_blocks(plan)[k]} is {divergence_KT[k, t]}",
            why="their logits overflow, or one has no mass where the other has some",
            fix="--objective.lens.divergence jsd, a float32 DeepSpeed file, or another "
            "--objective.lens.rule",
        )
    return divergence_KT


def sample_batches(plan: Plan, data: PreparedData) -> list[Batch]:
    """Draws ``lens.sample`` training records by the run's seed; batches of similar length."""
    config = plan.config
    generator = np.random.default_rng(config.run.seed)
    drawn = generator.permutation(len(data.train))[: config.objective.lens.sample]
    table = data.train.select(drawn)
    order = np.argsort(record_lengths(table), kind="stable")
    size = config.optim.micro_batch_size
    return [
        collate_columns(table[order[start : start + size]], pad_id=plan.tokenizer.eos_token_id)
        for start in range(0, len(order), size)
    ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _student_blocks(plan: Plan) -> list[int]:
    return [pair.student for pair in plan.pairs]


def _with_pairs(plan: Plan, pairs: list[LayerPair], divergence_KT: list[list[float]]) -> Plan:
    objective = DistillationObjective(plan.config.objective, pairs)
    return dataclasses.replace(plan, pairs=pairs, objective=objective, divergence_KT=divergence_KT)
