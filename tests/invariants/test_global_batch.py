"""The gradient is the mean over the response tokens of the global batch, however it is cut.

The oracle is a plain float64 computation with the models' full logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT, Workspace
from datasets import load_from_disk
from gradient_worker import one_step_gradients
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from distilllens.__main__ import main as command
from distilllens.data.order import epoch_batches
from distilllens.data.tokenize import record_lengths

WORKER = Path(__file__).with_name("gradient_worker.py")
TOLERANCE = 2e-6
WEIGHTS = (
    *("--objective.kd_ratio", "0.7", "--objective.lens.coeff", "1.5", "--objective.divergence"),
    *("rkl", "--optim.clip_grad", "0"),
)


def expected_gradients(workspace: Workspace) -> dict[str, torch.Tensor]:
    """0.3 CE + 0.7 (KL(q‖p) + 1.5 · mean of two JSDs), averaged over all tokens of the batch."""
    train = load_from_disk(str(workspace.root / "tokens" / "train"))
    batches = epoch_batches(
        record_lengths(train), batch_size=8, seed=10, epoch=0, group_by_length=True
    )
    indices = batches[0].tolist()
    student = GPT2LMHeadModel.from_pretrained(workspace.root / "student").double().eval()
    teacher = GPT2LMHeadModel.from_pretrained(workspace.root / "teacher").double().eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index in indices:
        prompt, response = train[index]["prompt_ids"], train[index]["response_ids"]
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, ids.shape[1] - 1)
        s, t = (m(ids, output_hidden_states=True) for m in (student, teacher))
        log_q = s.logits[0, rows].log_softmax(-1)
        log_p = t.logits[0, rows].log_softmax(-1).detach()
        ce = F.nll_loss(log_q, ids[0, len(prompt) :], reduction="sum")
        kd = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        lens = torch.zeros((), dtype=torch.float64)
        for teacher_layer, student_layer in ((2, 1), (4, 2)):
            q = _lens(student, s.hidden_states[student_layer][0, rows])
            p = _lens(teacher, t.hidden_states[teacher_layer][0, rows]).detach()
            m = ((p + q) / 2).log()
            lens = lens + (p * (p.log() - m) + q * (q.log() - m)).sum() / 2
        total = total + 0.3 * ce + 0.7 * (kd + 1.5 * lens / 2)
        tokens += len(response)
    (total / tokens).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def _lens(model: GPT2LMHeadModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.transformer.ln_f(hidden)).softmax(-1)


def job(
    workspace: Workspace, micro_batch: int, accumulation: int, stage: int, *more: str
) -> tuple[str, list[str]]:
    """Returns the file for the gradients of a case, and its command line."""
    name = f"stage{stage}-{micro_batch}x{accumulation}"
    cut = ("--optim.micro_batch_size", str(micro_batch), "--optim.accumulation", str(accumulation))
    stage_file = ("--deepspeed", workspace.deepspeed(stage))
    flags = workspace.flags(*WEIGHTS, *cut, *more, *stage_file, out=name)
    return str(workspace.root / f"{name}.safetensors"), flags


def worst(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(
        ((actual[n].double() - expected[n]).norm() / expected[n].norm()).item() for n in expected
    )


def one_process(
    workspace: Workspace, micro_batch: int, accumulation: int, stage: int, *more: str
) -> dict[str, torch.Tensor]:
    return one_step_gradients(job(workspace, micro_batch, accumulation, stage, *more)[1])


@pytest.mark.parametrize("cut", [(8, 1, 0), (4, 2, 1), (2, 4, 0), (1, 8, 2)])
def test_one_process_however_accumulated(workspace: Workspace, cut: tuple[int, int, int]) -> None:
    actual = one_process(workspace, *cut)
    assert worst(actual, expected_gradients(workspace)) < TOLERANCE


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.packing", "true"),
        ("--model.gradient_checkpointing", "true"),
        ("--model.attention", "eager"),
        pytest.param(("--model.compile", "true"), marks=pytest.mark.slow),
        pytest.param(
            ("--model.compile", "true", "--model.gradient_checkpointing", "true"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_one_process_however_computed(workspace: Workspace, flags: tuple[str, ...]) -> None:
    actual = one_process(workspace, 4, 2, 0, *flags)
    assert worst(actual, expected_gradients(workspace)) < TOLERANCE


def test_cached_teacher(workspace: Workspace) -> None:
    flags = ["--model.teacher_cache", str(workspace.root / "rows"), "--model.teacher_cache_bits=32"]
    assert command(["cache-teacher", *job(workspace, 4, 2, 0, *flags)[1]]) == 0
    expected = expected_gradients(workspace)
    (workspace.root / "teacher" / "model.safetensors").touch()  # looked at again, still the same
    assert worst(one_process(workspace, 4, 2, 0, *flags), expected) < TOLERANCE


def test_the_check_can_fail(workspace: Workspace) -> None:
    actual = one_process(workspace, 4, 1, 0)  # half the global batch
    assert worst(actual, expected_gradients(workspace)) > 100 * TOLERANCE


def test_two_processes(workspace: Workspace) -> None:
    jobs = [job(workspace, *cut) for cut in ((4, 1, 0), (2, 2, 1), (1, 4, 2), (2, 2, 3))]
    list_file = workspace.root / "jobs.json"
    list_file.write_text(json.dumps(jobs))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(WORKER), str(list_file)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    expected = expected_gradients(workspace)
    for out, _ in jobs:
        assert worst(load_file(out), expected) < TOLERANCE, out
