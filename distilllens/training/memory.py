"""How much memory and disk a run will need, before it starts: from shapes alone.

`distilllens.training.dry_step` counts what the models need; this file adds what PyTorch's AdamW and
DeepSpeed keep, moment by moment of a step, and takes the moment that needs most. The tests and
``python -m benchmarks.memory`` hold it against measured runs.

P are the student's parameters, Q those that are trained, W the processes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from distilllens.data.collate import lay_out
from distilllens.families import find_parts
from distilllens.teacher.sharding import divided_parameters
from distilllens.training.dry_step import (
    HEAP_BLOCK,
    BatchShape,
    StepBytes,
    build_shape,
    build_student_shape,
    count_student,
    count_teacher,
)
from distilllens.training.loader import packed_row_tokens
from distilllens.training.setup import Plan

GIGA = 1e9
ADAM_BYTES = 8
"""Two float32 moments per trained parameter."""
MASTER_BYTES = 4
RUNTIME_CPU = 0.77e9
"""Python, PyTorch, transformers and DeepSpeed in a process without a GPU: the highest resident
memory of a training of two tiny models, measured."""
RUNTIME_GPU = 1.0e9
"""CUDA's context, cuBLAS's workspaces and what the caching allocator cannot use; an assumption."""
RUNTIME_HOST = 3.0e9
"""Main memory of a process beside a GPU, CUDA's libraries in it; an assumption."""
HEAP_GROWTH = 1.4
"""On Linux, glibc's malloc keeps what is freed in blocks below 32 MB, in pieces: its heap grows to
so many times its content. Measured; MALLOC_MMAP_THRESHOLD_ in the environment switches it off."""
MALLOC_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
BUCKET_ELEMENTS = 500_000_000
SUB_GROUP_ELEMENTS = LIVE_ELEMENTS = 1_000_000_000
PREFETCH_ELEMENTS = 50_000_000
"""DeepSpeed's defaults of reduce_bucket_size; sub_group_size and stage3_max_live_parameters;
stage3_prefetch_bucket_size."""
QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Per weight of a block; 4 bits come with a float32 scale for every 64."""
KEPT_FREE = "freed, kept by malloc"

Parts = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RunCounts:
    """What the shapes of models and batch decide, whatever the ZeRO stage."""

    parameters: int
    trained: int
    trained_small: int
    """Elements of trained tensors that glibc's malloc puts into its heap as float32."""
    largest: int
    """Elements of the largest parameter."""
    step: StepBytes
    teacher_weights: float = 0
    """Bytes that are whole on each device; 0, as the next four, without a teacher."""
    teacher_body: float = 0
    """Bytes of what ``model.teacher_placement`` may divide; of a quantised teacher's blocks."""
    teacher_largest: float = 0
    """Bytes of the largest parameter in it."""
    teacher_forward: int = 0
    teacher_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GB (1e9 bytes) per process by purpose, at the moment of a step that needs most."""

    moment: str
    device: Parts
    """On the GPU; without one, in main memory."""
    host: Parts = field(default_factory=dict)
    """In main memory beside a GPU; empty without one."""

    @property
    def total(self) -> float:
        """Of the device."""
        return sum(self.device.values())


def longest_batch(plan: Plan, lengths: Sequence[int] = (), rows: Sequence[int] = ()) -> BatchShape:
    """Returns the micro-batch that needs most memory.

    Args:
        plan: Of the run.
        lengths: Tokens of each training record; none: as long as the configuration allows.
        rows: Response tokens of each.
    """
    size, longest = plan.config.optim.micro_batch_size, plan.config.data.max_length
    if not lengths:
        return BatchShape(records=size, length=longest, rows=size * longest)
    _, records, length = lay_out(sorted(lengths)[-size:], packed_row_tokens(plan.config))
    return BatchShape(records=records, length=length, rows=sum(sorted(rows)[-size:]))


def count_run(plan: Plan, batch: BatchShape, device: torch.device) -> RunCounts:
    """Counts parameters and a micro-batch's bytes on the meta device.

    Args:
        plan: Of the run.
        batch: The micro-batch.
        device: Where the run will be.
    """
    student = build_student_shape(plan)
    projectors = _projectors(plan)
    trained = [p.numel() for p in student.parameters() if p.requires_grad] + projectors
    weights = [p.numel() for p in student.parameters()] + projectors
    counts = RunCounts(
        parameters=sum(weights),
        trained=sum(trained),
        trained_small=sum(n for n in trained if n * MASTER_BYTES < HEAP_BLOCK),
        largest=max(weights),
        step=count_student(plan, student, batch, device),
    )
    if plan.teacher_config is None:
        return counts
    text, size = plan.teacher_config.get_text_config(), plan.teacher_dtype.itemsize
    rows = (1 + len(plan.pairs)) * batch.rows * text.hidden_size * size
    if plan.config.model.teacher_cache is not None:
        head = text.vocab_size * text.hidden_size * size
        return dataclasses.replace(counts, teacher_weights=head, teacher_rows=rows)
    teacher = build_shape(plan.teacher_config, torch.float32, "auto")
    bits = plan.config.model.teacher_quantization
    blocks = find_parts(teacher).blocks.parameters()
    body = [p.numel() for p in (divided_parameters(teacher) if bits == "none" else blocks)]
    return dataclasses.replace(
        counts,
        teacher_weights=(sum(p.numel() for p in teacher.parameters()) - sum(body)) * size,
        teacher_body=sum(body) * QUANTISED_BYTES.get(bits, size),
        teacher_largest=max(body) * size,
        teacher_forward=count_teacher(plan, batch, device),
        teacher_rows=rows,
    )


def _projectors(plan: Plan) -> list[int]:
    """Returns the sizes of the matrices that compare hidden states: one for each pair."""
    if plan.teacher_config is None:
        return []
    student, teacher = plan.student_config.get_text_config(), plan.teacher_config.get_text_config()
    return [student.hidden_size * teacher.hidden_size for _ in plan.objective.hidden_pairs]


def run_device() -> torch.device:
    """Returns where a run on this machine would be."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def estimate_memory(
    plan: Plan,
    world_size: int,
    *,
    batch: BatchShape | None = None,
    device: torch.device | None = None,
    counts: RunCounts | None = None,
) -> MemoryEstimate:
    """Estimates the highest level of memory of one process.

    Args:
        plan: Of the run.
        world_size: Number of processes.
        batch: The largest micro-batch; default: the longest that the configuration allows.
        device: Where the run will be; default: a GPU if this machine has one.
        counts: Of `count_run` for the same plan, batch and device, to save its time.
    """
    device = device or run_device()
    counts = counts or count_run(plan, batch or longest_batch(plan), device)
    zero = _Zero(plan, counts, world_size, on_gpu=device.type == "cuda")
    always, moments = zero.static(), zero.moments()
    name = max(moments, key=lambda moment: sum((always | moments[moment]).values()))
    needed = always | moments[name]
    host = zero.host()
    if not zero.on_gpu:  # what is offloaded stays in the same memory
        needed = {k: needed.get(k, 0) + host.get(k, 0) for k in needed | host}
        host = {}
    return MemoryEstimate(moment=name, device=_shown(needed), host=_shown(host))


def _shown(parts: Parts) -> Parts:
    return {name: value / GIGA for name, value in parts.items() if value > 0}


class _Zero:
    """What AdamW and DeepSpeed keep for a run, in bytes; read from DeepSpeed 0.19's source.

    Args:
        plan: Of the run.
        counts: Of its models and batch.
        world_size: Number of processes.
        on_gpu: On a CPU a buffer takes memory only as far as it is written to.
    """

    def __init__(self, plan: Plan, counts: RunCounts, world_size: int, *, on_gpu: bool) -> None:
        self.plan, self.counts, self.on_gpu = plan, counts, on_gpu
        self.options: dict[str, Any] = plan.deepspeed.get("zero_optimization", {})
        self.stage, self.size = plan.zero_stage, plan.dtype.itemsize
        self.share = world_size if self.stage > 0 else 1
        self.own = counts.trained / self.share
        self.is_alone, self.world_size = world_size == 1, world_size
        self.accumulates = plan.config.optim.accumulation > 1
        self.optimizer_away = self._offloaded("offload_optimizer")
        self.weights_away = self._offloaded("offload_param") and self.stage == 3

    def _offloaded(self, name: str) -> bool:
        section = self.options.get(name) or {}
        return self.stage > 0 and section.get("device", "none") != "none"

    def static(self) -> Parts:
        """Weights and optimizer: what is there all the time."""
        weights = self.counts.parameters * self.size / (self.share if self.stage == 3 else 1)
        teacher = "weights" if self.plan.config.model.teacher_cache is None else "head"
        return {
            "runtime": RUNTIME_GPU if self.on_gpu else RUNTIME_CPU,
            "student weights": 0 if self.weights_away else weights,
            "optimizer": 0 if self.optimizer_away else self._optimizer(),
            f"teacher {teacher}": self.counts.teacher_weights + self._teacher_body("device"),
        }

    def _teacher_body(self, place: Literal["device", "cpu"]) -> float:
        """Bytes of the teacher's body that this process keeps on its device, or beside it."""
        placement = self.plan.config.model.teacher_placement
        if (placement == "cpu") != (place == "cpu"):
            return 0
        divided = 1 if placement == "device" else self.world_size
        return self.counts.teacher_body / divided

    def _optimizer(self) -> float:
        masters = MASTER_BYTES if self.stage > 0 else 0  # also where the weights are float32
        return self.own * (ADAM_BYTES + masters)

    def moments(self) -> dict[str, Parts]:
        """Returns the moments of a step that can need most, and what each adds."""
        counts, step = self.counts, self.counts.step
        held, rows = self._always_held(), {"teacher rows": counts.teacher_rows}
        holes, freed = self._malloc()
        return {
            "loading": self._loading(),
            "teacher's forward pass": held | self._teacher_forward(),
            "loss": held | {"activations": step.kept, "loss": step.loss} | rows | holes,
            "backward pass": self._backward() | rows | holes,
            "gradients' end": self._gradients_end() | freed,
            "update": self._update() | freed,
        }

    def _loading(self) -> Parts:
        """Stage 3 divides one weight after the other, before there is an optimizer.

        It begins with all of them where they are mapped files, which go together (a CPU), and where
        the first process measures the layer pairs with them.
        """
        if self.stage < 3:
            return {}
        counts = self.counts
        parts = {"optimizer": 0.0, "weights to divide": counts.largest * self.size}
        if self.plan.pairs_are_open:
            parts["student weights"] = counts.parameters * self.size
        elif not self.on_gpu:
            parts["weights to divide"] = counts.parameters * self.size
        return parts

    def _teacher_forward(self) -> Parts:
        """What a teacher in parts gathers: a weight in use, and those of the next ones."""
        placement = self.plan.config.model.teacher_placement
        gathers = placement == "cpu" or (placement == "sharded" and not self.is_alone)
        ahead = PREFETCH_ELEMENTS * self.plan.teacher_dtype.itemsize
        return {
            "teacher activations": self.counts.teacher_forward,
            "gathered teacher": self.counts.teacher_largest + ahead if gathers else 0,
        }

    def _malloc(self) -> tuple[Parts, Parts]:
        """What malloc's heap has beyond its content: while activations are in it, and after."""
        if self.on_gpu or sys.platform != "linux" or MALLOC_VARIABLE in os.environ:
            return {}, {}
        heap = self.counts.step.heap
        # Without ZeRO the moments are in it too, one by one.
        moments = ADAM_BYTES * self.counts.trained_small if self.stage == 0 else 0
        holes = (HEAP_GROWTH - 1) * (heap + moments)
        return {KEPT_FREE: holes}, {KEPT_FREE: heap + holes}

    def _elements(self) -> int:
        return int(self.options.get("reduce_bucket_size", BUCKET_ELEMENTS))

    def _bucket(self) -> float:
        """Bytes of DeepSpeed's buffers for gradients on their way."""
        if self.stage == 0:
            return 0
        elements = self._elements()
        if not self.on_gpu:
            elements = min(elements, self.counts.trained)
        buffers = 2 if self.stage < 3 and self.options.get("overlap_comm") else 1
        return buffers * elements * self.size

    def _always_held(self) -> Parts:
        """What stage 3 holds in each moment, and gradients between micro-batches."""
        if self.stage < 3:
            full = self.counts.trained if self.stage < 2 else self.own
            away = self.stage == 2 and self.optimizer_away
            return {"gradients": full * self.size if self.accumulates and not away else 0}
        live = int(self.options.get("stage3_max_live_parameters", LIVE_ELEMENTS))
        gathered = 0 if self.is_alone and not self.weights_away else self.counts.parameters
        return {
            "gradients": 0 if self.optimizer_away else self.own * self.size,
            "gathered weights": min(live, gathered) * self.size,
            "buckets": self._bucket(),
        }

    def _backward(self) -> Parts:
        step, held = self.counts.step, self._always_held()
        if self.stage == 3:
            return held | {"activations": step.backward_alone}
        full = self.counts.trained * self.size
        stays = self.stage < 2 or not self.on_gpu  # gradients wait for the end, or in the bucket
        if stays and not self.accumulates:
            gradients: float = min(full, step.backward)
            parts = {"activations": step.backward - gradients, "gradients": gradients}
        else:
            # A process's own gradients are copied out when the bucket is full, or at the end.
            copies = self.accumulates or self.counts.trained > self._elements()
            own = self.own * self.size if copies and not self.optimizer_away else 0
            gradients = full if stays else own
            parts = {"activations": step.backward_alone, "gradients": gradients}
        return parts | {"buckets": self._bucket() if self.on_gpu else 0}

    def _gradients_end(self) -> Parts:
        """Stages 1 and 2 copy a process's own gradients out of the bucket."""
        if self.stage not in (1, 2):
            return {}
        full = self.counts.trained * self.size if self.stage == 1 else 0
        own = 0 if self.optimizer_away else self.own * self.size
        return {"gradients": own, "buckets": max(self._bucket(), full)}

    def _update(self) -> Parts:
        """AdamW wants one flat float32 gradient; it is made before the parts are freed."""
        held = self._always_held()
        own = self.own * self.size
        if self.stage == 0:
            return {"gradients": own}
        group = self.own
        if self.stage == 3:
            group = min(group, int(self.options.get("sub_group_size", SUB_GROUP_ELEMENTS)))
        flat = group * (self.size + (MASTER_BYTES if self.size < MASTER_BYTES else 0))
        if self.optimizer_away:
            return held
        return held | {"gradients": own, "update": flat}

    def host(self) -> Parts:
        """Main memory beside the GPU; without one only what is offloaded."""
        parts: Parts = {}
        if self.optimizer_away:
            # Float32 gradients, and a copy of the weights (1, 2) or gradients (3) in their dtype.
            parts["optimizer"] = self._optimizer()
            parts["gradients"] = self.own * (MASTER_BYTES + self.size)
        if self.weights_away:
            parts["student weights"] = self.counts.parameters * self.size / self.share
        if beside := self._teacher_body("cpu"):
            parts["teacher weights"] = beside
        if not self.on_gpu:
            return parts
        # Whole, while shares of it are made; the teacher comes first.
        teacher = self.counts.teacher_weights + self.counts.teacher_body
        student = self.counts.parameters * self.size + parts.get("student weights", 0)
        loading = max(student, teacher) + beside
        parts["weights while they are loaded"] = max(0, loading - sum(parts.values()))
        return {"runtime": RUNTIME_HOST} | parts


def estimate_state_bytes(plan: Plan) -> tuple[int, int]:
    """Returns the bytes on disk of a saved training state, and of an exported model.

    A state holds the model twice, as DeepSpeed's weights and as a Hugging Face folder, and the
    optimizer's moments and float32 weights.
    """
    student = build_student_shape(plan)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    model = count_parameters(plan.student_config) * plan.dtype.itemsize
    masters = MASTER_BYTES if plan.zero_stage > 0 or plan.dtype != torch.float32 else 0
    return 2 * model + trained * (ADAM_BYTES + masters), model


def count_parameters(config: PretrainedConfig) -> int:
    """Returns the number of parameters of a model, without allocating it."""
    return sum(p.numel() for p in build_shape(config, torch.float32, "auto").parameters())


def at_stage(plan: Plan, stage: int) -> Plan:
    """Returns the plan with another ZeRO stage and all else as it was."""
    zero = plan.deepspeed.get("zero_optimization", {}) | {"stage": stage}
    return dataclasses.replace(plan, deepspeed=plan.deepspeed | {"zero_optimization": zero})
