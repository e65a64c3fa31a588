"""A training step without memory: run on PyTorch's meta device, where tensors have shapes only.

The models' own code runs, forward and backward, in any family; every tensor that comes and goes is
counted. So the estimate in `memory` needs no rule for what a block keeps for its
backward pass. What the meta device would do otherwise than the real one is put right: attention
that never forms its scores, and the fused loss, of which only the buffers are made.

Shapes: B batch, T tokens, N response rows, D student width, E teacher width, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from distilllens.kernels.chunks import COLUMNS, default_chunk_rows, wide
from distilllens.lens import LogitLens
from distilllens.models import add_lora
from distilllens.student import lens_rows
from distilllens.training.setup import Plan

META = torch.device("meta")
HEAP_BLOCK = 32 * 2**20
"""Bytes from which glibc's malloc always gives a block back to the system when it is freed."""
CPU_SCRATCH_BYTES = 6 * 9 * 2**18
"""Buffers of the fused loss for one block of rows (`chunks.CPU_BLOCK_BYTES` each)."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A micro-batch as far as memory goes."""

    records: int
    """Rows of tokens: each a record, or several if they are packed."""
    length: int
    """Tokens that all are padded to."""
    rows: int
    """Response tokens."""


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What one micro-batch needs beyond weights; bytes."""

    kept: int
    """By the student's blocks for the backward pass, at the loss."""
    loss: int
    """The highest level in the fused loss, above ``kept``."""
    backward: int
    """The highest level of the backward pass, gradients of parameters included."""
    backward_alone: int
    """The same, were each parameter's gradient taken away as soon as it is whole."""
    heap: int
    """The highest level of blocks that glibc's malloc takes from its heap, on a CPU."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.peak_alone = 0
        self.gradients = 0
        """Bytes of `now` that are gradients of parameters."""
        self.heap = self.heap_peak = 0
        """Of blocks below `HEAP_BLOCK`: now, and at most."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def leave_out(self, module: nn.Module) -> None:
        """Does not count a module's parameters and buffers, which are there before."""
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)

    def start_peaks(self) -> None:
        """Lets the highest levels begin where it stands."""
        self.peak = self.now
        self.peak_alone = self.now - self.gradients

    def take_gradient(self, parameter: Tensor) -> None:
        """Notes that a parameter's gradient is whole; a hook."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operation and counts what it returns; views share what is counted."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.now -= size
            self.heap -= size if size < HEAP_BLOCK else 0
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.heap += size if size < HEAP_BLOCK else 0
        self.heap_peak = max(self.heap_peak, self.heap)
        self.peak = max(self.peak, self.now)
        self.peak_alone = max(self.peak_alone, self.now - self.gradients)


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention kernel: it keeps its inputs, its output, one sum a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, tokens, _ = query.shape
        # Laid out as the kernels do, so that joining the heads copies nothing.
        output = query.new_empty(*batch, tokens, heads, value.shape[-1]).transpose(-3, -2)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=META)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _kernels_of(device: torch.device) -> Iterator[None]:
    """Makes the meta device take the kernels of another one, for attention and dropout."""
    attention, dropout = functional.scaled_dot_product_attention, functional.dropout
    on_gpu = device.type == "cuda"

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        # A CPU's kernel knows no dropout (GPT-2: 0.1) and no values of another width than the keys
        # (MiniCPM3): with them, the scores are formed.
        same = query.shape[-1] == value.shape[-1]
        if not on_gpu and (more.get("dropout_p") or not same):
            return attention(query, key, value, *args, **more)
        return _Attention.apply(query, key, value)

    def fused_dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, training)[0]  # keeps one byte an element

    functional.scaled_dot_product_attention = fused_attention
    if on_gpu:
        functional.dropout = fused_dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = attention, dropout


@dataclass(frozen=True, kw_only=True)
class _LossShape:
    """What the buffers of the fused loss depend on."""

    vocab_size: int
    device: torch.device
    teacher_head: Tensor | None


class _Loss(torch.autograd.Function):
    """The buffers of `distilllens.fused`, in its order, and nothing else of it."""

    @staticmethod
    def forward(ctx: Any, shape: _LossShape, head_VD: Tensor, *hidden_ND: Tensor) -> Tensor:
        need_head = ctx.needs_input_grad[1]
        ctx.head = torch.empty_like(head_VD, dtype=wide(head_VD.dtype)) if need_head else None
        ctx.head_dtype = head_VD.dtype
        ctx.hidden = [torch.empty_like(hidden) for hidden in hidden_ND]
        vocab, on_cpu = shape.vocab_size, shape.device.type == "cpu"
        rows = min(default_chunk_rows(vocab, shape.device), max(len(h) for h in hidden_ND))
        size = (rows, vocab if on_cpu else -(-vocab // COLUMNS) * COLUMNS)
        sides = [head_VD] if shape.teacher_head is None else [head_VD, shape.teacher_head]
        heads = [side.to(torch.float32) for side in sides] if on_cpu else []
        logits = [torch.empty(size, device=META) for _ in sides]
        if on_cpu:
            scratch = torch.empty(CPU_SCRATCH_BYTES, dtype=torch.uint8, device=META)
            del scratch
            if head_VD.dtype != torch.float32:
                narrow = torch.empty(size, dtype=head_VD.dtype, device=META)
                del narrow
        else:
            gradient = torch.empty(size, dtype=head_VD.dtype, device=META)
            del gradient
        del heads, logits
        return torch.empty((), device=META)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        head, ctx.head = ctx.head, None
        hidden, ctx.hidden = ctx.hidden, []
        return None, None if head is None else head.to(ctx.head_dtype), *hidden


def build_shape(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, *, trust_remote_code: bool = False
) -> Any:
    """Returns a model on the meta device, in evaluation mode."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attention != "auto":  # flash_attention_2 keeps what the kernels of sdpa keep
        options["attn_implementation"] = "eager" if attention == "eager" else "sdpa"
    config = copy.deepcopy(config)
    config.pad_token_id = None  # GPT-2 would look for it in the ids
    with META:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model.eval()


def build_student_shape(plan: Plan) -> nn.Module:
    """Returns the plan's student on the meta device as `models.load_student` makes it."""
    settings = plan.config.model
    model = build_shape(
        plan.student_config,
        plan.dtype,
        settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if settings.student_lora is not None:
        model = add_lora(model, settings.student_lora).to(plan.dtype)
    return model.train()


def count_student(
    plan: Plan, student: nn.Module, batch: BatchShape, device: torch.device
) -> StepBytes:
    """Counts a micro-batch of the student, from the token ids to the end of the backward pass.

    Args:
        plan: Of the run.
        student: Of `build_student_shape`; it is left with gradients.
        batch: The micro-batch.
        device: Whose kernels count.
    """
    teacher_head = None
    if plan.teacher_config is not None:
        text = plan.teacher_config.get_text_config()
        teacher_head = torch.empty(
            plan.vocab_size, text.hidden_size, dtype=plan.teacher_dtype, device=META
        )
    lens = LogitLens(student, plan.config.objective.lens.norm)
    ids_BT, rows_N = _batch(batch)
    live = LiveBytes()
    live.leave_out(student)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.take_gradient)
    with _kernels_of(device), live:
        layers = [pair.student for pair in plan.objective.pairs]
        rows = lens_rows(lens, layers, ids_BT, rows_N)
        kept = live.now
        live.start_peaks()
        shape = _LossShape(vocab_size=plan.vocab_size, device=device, teacher_head=teacher_head)
        hidden = [rows.final, *rows.layers]
        del rows
        loss = _Loss.apply(shape, lens.unembedding().head_VD, *hidden)
        del hidden
        loss_peak = live.peak
        live.start_peaks()
        loss.backward()
    return StepBytes(
        kept=kept,
        loss=loss_peak - kept,
        backward=live.peak,
        backward_alone=live.peak_alone,
        heap=live.heap_peak,
    )


def count_teacher(plan: Plan, batch: BatchShape, device: torch.device) -> int:
    """Counts the highest level of the teacher's forward pass; its rows are in it."""
    assert plan.teacher_config is not None
    settings = plan.config.model
    teacher = build_shape(
        plan.teacher_config,
        plan.teacher_dtype,
        settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    lens = LogitLens(teacher, plan.config.objective.lens.norm)
    ids_BT, rows_N = _batch(batch)
    live = LiveBytes()
    live.leave_out(teacher)
    with torch.no_grad(), _kernels_of(device), live:
        lens_rows(lens, [pair.teacher for pair in plan.objective.pairs], ids_BT, rows_N)
    return live.peak


def _batch(batch: BatchShape) -> tuple[Tensor, Tensor]:
    ids_BT = torch.empty(batch.records, batch.length, dtype=torch.int64, device=META)
    return ids_BT, torch.empty(batch.rows, dtype=torch.int64, device=META)
