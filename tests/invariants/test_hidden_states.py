"""The gradient with hidden states is the global batch's mean too, student and projectors alike.

The oracle is a plain float64 computation with the models' own hidden states.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, Workspace
from datasets import load_from_disk
from gradient_worker import one_step_gradients
from safetensors.torch import load_file
from test_global_batch import WORKER, worst
from transformers import GPT2LMHeadModel

from distilllens.__main__ import main as command
from distilllens.data.order import epoch_batches
from distilllens.data.tokenize import record_lengths
from distilllens.hidden import HiddenComparison

TOLERANCE = 3e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """An objective: 0.3 CE + 0.7 (KL(q‖p) + lens · mean of two JSDs + 2 · mean distance)."""

    loss: str
    norm: str = "final"
    lens: float = 0.0

    @property
    def flags(self) -> list[str]:
        approach = "distill_lens" if self.lens else "kd"
        return [
            *("--objective.approach", approach, "--objective.kd_ratio", "0.7"),
            *("--objective.lens.coeff", str(self.lens or 1.0), "--objective.lens.norm", self.norm),
            *("--objective.hidden.coeff", "2", "--objective.hidden.loss", self.loss),
            *("--objective.divergence", "rkl", "--optim.clip_grad", "0"),
        ]


def expected_gradients(workspace: Workspace, case: Case) -> dict[str, torch.Tensor]:
    train = load_from_disk(str(workspace.root / "tokens" / "train"))
    lengths = record_lengths(train)
    batches = epoch_batches(lengths, batch_size=8, seed=10, epoch=0, group_by_length=True)
    student = GPT2LMHeadModel.from_pretrained(workspace.root / "student").double().eval()
    teacher = GPT2LMHeadModel.from_pretrained(workspace.root / "teacher").double().eval()
    begun = HiddenComparison(2, 24, 48, loss="mse", seed=10)
    projectors = [p.detach().double().requires_grad_() for p in begun.parameters()]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index in batches[0].tolist():
        prompt, response = train[index]["prompt_ids"], train[index]["response_ids"]
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, ids.shape[1] - 1)
        s, t = (m(ids, output_hidden_states=True) for m in (student, teacher))
        log_q = s.logits[0, rows].log_softmax(-1)
        log_p = t.logits[0, rows].log_softmax(-1).detach()
        ce = F.nll_loss(log_q, ids[0, len(prompt) :], reduction="sum")
        kd = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        lens, distance = torch.zeros(2, dtype=torch.float64)
        for (teacher_layer, student_layer), matrix in zip(
            ((2, 1), (4, 2)), projectors, strict=True
        ):
            h = _rows(student, s.hidden_states[student_layer][0, rows], case.norm)
            g = _rows(teacher, t.hidden_states[teacher_layer][0, rows], case.norm).detach()
            mapped = h @ matrix.T
            if case.loss == "mse":
                distance = distance + F.mse_loss(mapped, g, reduction="sum") / 48
            else:
                distance = distance + (1 - F.cosine_similarity(mapped, g)).sum()
            q, p = student.lm_head(h).softmax(-1), teacher.lm_head(g).softmax(-1)
            m = ((p + q) / 2).log()
            lens = lens + (p * (p.log() - m) + q * (q.log() - m)).sum() / 2
        total = total + 0.3 * ce + 0.7 * (kd + case.lens * lens / 2 + 2 * distance / 2)
        tokens += len(response)
    (total / tokens).backward()
    found = {n: p.grad for n, p in student.named_parameters()}
    found |= {f"hidden.projectors.{k}.weight": p.grad for k, p in enumerate(projectors)}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _rows(model: GPT2LMHeadModel, hidden: torch.Tensor, norm: str) -> torch.Tensor:
    return model.transformer.ln_f(hidden) if norm == "final" else hidden


def job(workspace: Workspace, case: Case, cut: tuple[int, int, int]) -> tuple[str, list[str]]:
    """Returns the file for the gradients of a case, and its command line."""
    micro_batch, accumulation, stage = cut
    name = f"stage{stage}"
    size = ("--optim.micro_batch_size", str(micro_batch), "--optim.accumulation", str(accumulation))
    flags = workspace.flags(*case.flags, *size, "--deepspeed", workspace.deepspeed(stage), out=name)
    return str(workspace.root / f"{name}.safetensors"), flags


@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (Case(loss="mse"), (8, 1, 0)),
        (Case(loss="cosine", norm="none"), (2, 4, 1)),
        (Case(loss="mse", lens=1.5), (4, 2, 2)),
        (Case(loss="cosine", lens=1.5), (1, 8, 3)),
    ],
    ids=str,
)
def test_one_process(workspace: Workspace, case: Case, cut: tuple[int, int, int]) -> None:
    actual = one_step_gradients(job(workspace, case, cut)[1])
    assert worst(actual, expected_gradients(workspace, case)) < TOLERANCE


@pytest.mark.parametrize("norm", ["final", "none"])
def test_cached_teacher(workspace: Workspace, norm: str) -> None:
    case = Case(loss="mse", norm=norm)
    flags = job(workspace, case, (4, 2, 0))[1]
    flags += [
        "--model.teacher_cache",
        str(workspace.root / "rows"),
        "--model.teacher_cache_bits=32",
    ]
    assert command(["cache-teacher", *flags]) == 0
    assert worst(one_step_gradients(flags), expected_gradients(workspace, case)) < TOLERANCE


def test_the_check_can_fail(workspace: Workspace) -> None:
    case = Case(loss="mse")
    actual = one_step_gradients(job(workspace, case, (4, 1, 0))[1])  # half the global batch
    assert worst(actual, expected_gradients(workspace, case)) > 100 * TOLERANCE


@pytest.mark.slow
def test_two_processes(workspace: Workspace) -> None:
    """Two processes make the gradient of one, whole or in parts."""
    case = Case(loss="mse", lens=1.5)
    jobs = [job(workspace, case, cut) for cut in ((4, 1, 0), (2, 2, 1), (2, 2, 3))]
    list_file = workspace.root / "jobs.json"
    list_file.write_text(json.dumps(jobs))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(list_file)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = expected_gradients(workspace, case)
    for out, _ in jobs:
        assert worst(load_file(out), expected) < TOLERANCE, out
