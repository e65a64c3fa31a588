"""The variants of the lens loss that `benchmarks.loss` compares, and the case that they compute.

Shapes: ``P`` positions (batch × padded length), ``N`` response rows of one layer, ``n`` rows of a
chunk, ``K`` layer pairs, ``D`` student width, ``E`` teacher width, ``V`` vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Variant
from benchmarks.published import PUBLISHED_KINDS, published_divergence
from distilllens.divergence import DivergenceOptions, divergence
from distilllens.fused import Term, Unembedding, fused_linear_terms
from distilllens.kernels.chunks import COLUMNS, default_chunk_rows
from distilllens.kernels.products import accumulate_outer_, project, pull_back

SHAPES = {
    "gpt2": (768, 1600, 50257),
    "llama": (2048, 4096, 32000),
    "qwen": (1536, 2048, 151936),
    "tiny": (24, 40, 307),
}
"""Student width, teacher width, vocabulary."""
LOGIT_SPREAD = 3.0
"""Standard deviation of a row's logits."""
FROZEN = "-frozen-head"


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one loss."""

    student_hidden_KPD: tuple[Tensor, ...]
    """One leaf per layer, as the hooks on the blocks hand them over."""
    teacher_hidden_KPE: tuple[Tensor, ...]
    student_head_VD: Tensor
    teacher_head_VE: Tensor
    mask_P: Tensor
    index_N: Tensor
    """Places of the response rows among the positions; in training the collator makes it."""
    batch: int
    kind: str
    options: DivergenceOptions
    chunk_rows: int

    def parameters(self) -> dict[str, Any]:
        """Returns the CSV columns that describe the case."""
        vocab, student_width = self.student_head_VD.shape
        return {
            "kind": self.kind,
            "beta": self.options.beta,
            "layers": len(self.student_hidden_KPD),
            "batch": self.batch,
            "length": len(self.mask_P) // self.batch,
            "rows": len(self.index_N),
            "student_width": student_width,
            "teacher_width": self.teacher_head_VE.shape[1],
            "vocab": vocab,
            "chunk_rows": self.chunk_rows,
        }


def build_case(arguments: argparse.Namespace, device: torch.device) -> Case:
    """Makes random hidden rows, heads that spread the logits, and a run of response tokens."""
    student_width, teacher_width, vocab = SHAPES[arguments.shape]
    layers, batch, length = arguments.layers, arguments.batch, arguments.length
    dtype = DTYPES[arguments.dtype]
    generator = torch.Generator().manual_seed(arguments.seed)

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, generator=generator) * scale).to(device, dtype)

    mask_BT = torch.zeros(batch, length, dtype=torch.bool)
    answer = max(1, round(arguments.share * length))
    for row in mask_BT:  # prompt before, padding behind
        start = int(torch.randint(length - answer + 1, (), generator=generator))
        row[start : start + answer] = True
    mask_P = mask_BT.flatten().to(device)
    return Case(
        student_hidden_KPD=tuple(
            normal(batch * length, student_width).requires_grad_() for _ in range(layers)
        ),
        teacher_hidden_KPE=tuple(normal(batch * length, teacher_width) for _ in range(layers)),
        student_head_VD=normal(
            vocab, student_width, LOGIT_SPREAD / student_width**0.5
        ).requires_grad_(),
        teacher_head_VE=normal(vocab, teacher_width, LOGIT_SPREAD / teacher_width**0.5),
        mask_P=mask_P,
        index_N=mask_P.nonzero().squeeze(1),
        batch=batch,
        kind=arguments.kind,
        options=DivergenceOptions(beta=arguments.beta),
        chunk_rows=arguments.chunk_rows or default_chunk_rows(vocab, device),
    )


# --- The losses: case -> mean over response rows and layers, in nats --------------------------


def published_loss(case: Case) -> Tensor:
    """The published way; about ten float32 tensors [K, P, V] exist at its peak."""
    with torch.no_grad():
        teacher_logits_KPV = torch.stack(case.teacher_hidden_KPE) @ case.teacher_head_VE.T
    return published_divergence(
        case.kind,
        teacher_logits=teacher_logits_KPV,
        student_logits=torch.stack(case.student_hidden_KPD) @ case.student_head_VD.T,
        mask=case.mask_P,
        beta=case.options.beta,
    )


def gathered_rows(case: Case) -> tuple[Tensor, Tensor]:
    """Returns all layers' response rows of student and teacher, ``[K·N, D]`` and ``[K·N, E]``."""
    student = [hidden_PD[case.index_N] for hidden_PD in case.student_hidden_KPD]
    teacher = [hidden_PE[case.index_N] for hidden_PE in case.teacher_hidden_KPE]
    return torch.cat(student), torch.cat(teacher)


def gathered_loss(case: Case) -> Tensor:
    """The dense reference mathematics, on response rows only."""
    student_rows, teacher_rows = gathered_rows(case)
    value = divergence(
        case.kind,
        teacher_logits_NV=teacher_rows @ case.teacher_head_VE.T,
        student_logits_NV=student_rows @ case.student_head_VD.T,
        beta=case.options.beta,
    )
    return value.mean()


def fused_loss(case: Case) -> Tensor:
    """One term per layer, as training does."""
    weight = 1 / (len(case.index_N) * len(case.student_hidden_KPD))
    terms = [
        Term(
            student_hidden_ND=student_PD[case.index_N],
            teacher_hidden_NE=teacher_PE[case.index_N],
            kind=case.kind,
            options=case.options,
            divergence_weight=weight,
            train_head=case.student_head_VD.requires_grad,
        )
        for student_PD, teacher_PE in zip(
            case.student_hidden_KPD, case.teacher_hidden_KPE, strict=True
        )
    ]
    loss, _ = fused_linear_terms(
        terms,
        student=Unembedding(head_VD=case.student_head_VD),
        teacher=Unembedding(head_VD=case.teacher_head_VE),
        chunk_rows=case.chunk_rows,
    )
    return loss


def build_liger_loss(beta: float, *, compiled: bool) -> Callable[[Case], Tensor]:
    """Returns Liger's loss without its hard part; its beta too is the teacher's weight.

    It averages over all targets that are not −100, hence over all gathered rows.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # optional

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.0, compiled=compiled
    )

    def loss(case: Case) -> Tensor:
        student_rows, teacher_rows = gathered_rows(case)
        targets = torch.zeros(len(student_rows), dtype=torch.int64, device=student_rows.device)
        value: Tensor = module(
            student_rows, case.student_head_VD, teacher_rows, case.teacher_head_VE, targets
        )
        return value

    return loss


def with_frozen_head(case: Case) -> Case:
    """Returns the case with a head that wants no gradient."""
    return replace(case, student_head_VD=case.student_head_VD.detach())


def differentiate(loss: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss and the gradients of all layers' rows, and last the head's if wanted."""
    leaves = [*case.student_hidden_KPD]
    if case.student_head_VD.requires_grad:
        leaves.append(case.student_head_VD)
    value = loss(case)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def build_floor(case: Case) -> Variant:
    """Returns the matrix products of `fused_loss` alone, by its own routines and in its chunks."""
    student_head, teacher_head = case.student_head_VD.detach(), case.teacher_head_VE
    on_cpu = student_head.device.type == "cpu"
    operands = [head.float() if on_cpu else head for head in (student_head, teacher_head)]
    rows, vocab = min(case.chunk_rows, len(case.index_N)), len(student_head)
    chunks = [
        (student_PD.detach()[part], teacher_PE[part])
        for student_PD, teacher_PE in zip(
            case.student_hidden_KPD, case.teacher_hidden_KPE, strict=True
        )
        for part in case.index_N.split(rows)
    ]
    # As in `distilllens.kernels.chunks`: on a GPU in buffers whose rows are aligned.
    width = -(-vocab // COLUMNS) * COLUMNS
    buffers = None if on_cpu else torch.zeros(2, rows, width, device=student_head.device)
    gradient = torch.zeros(
        rows,
        width,
        dtype=torch.float32 if on_cpu else student_head.dtype,
        device=student_head.device,
    )[:, :vocab]
    head_gradient = None
    if case.student_head_VD.requires_grad:
        head_gradient = torch.zeros(student_head.shape, device=student_head.device)

    def run() -> None:
        for hidden in chunks:
            n = len(hidden[0])
            for side, (rows_nD, head_VD) in enumerate(zip(hidden, operands, strict=True)):
                out = None if buffers is None else buffers[side, :n, :vocab]
                project(rows_nD, head_VD, None, out=out)
            pull_back(gradient[:n], student_head)
            if head_gradient is not None:
                accumulate_outer_(head_gradient, gradient[:n], hidden[0])

    return Variant(name="floor" if head_gradient is not None else f"floor{FROZEN}", run=run)


def build_losses(
    arguments: argparse.Namespace, case: Case
) -> tuple[dict[str, tuple[Callable[[Case], Tensor], Case]], dict[str, str]]:
    """Returns each chosen loss with its case, by name; and why others cannot run."""
    losses: dict[str, tuple[Callable[[Case], Tensor], Case]] = {}
    skipped = {}
    if case.kind in PUBLISHED_KINDS:
        losses["published"] = (published_loss, case)
    else:
        skipped["published"] = f"the published code has no {case.kind}"
    losses["gathered"] = (gathered_loss, case)
    losses["fused"] = (fused_loss, case)
    losses[f"fused{FROZEN}"] = (fused_loss, with_frozen_head(case))
    if case.kind != "jsd":
        skipped["liger"] = f"its loss is jsd, not {case.kind}"
    elif find_spec("liger_kernel") is None:
        skipped["liger"] = "liger-kernel is not installed (pip install liger-kernel)"
    elif "liger" in arguments.variants:
        compiled = not arguments.liger_eager
        losses["liger"] = (build_liger_loss(case.options.beta, compiled=compiled), case)
    chosen = {name: losses[name] for name in losses if name in arguments.variants}
    return chosen, {name: why for name, why in skipped.items() if name in arguments.variants}
