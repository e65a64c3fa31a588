"""The GPU row kernel against float64 autograd over torch.distributions, in Triton's interpreter.

The interpreter takes over only where `TRITON_INTERPRET` is set before Triton is imported, so it
runs in a process of its own; this one compiles the kernel for real, as far as that goes without a
GPU.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from distilllens.divergence import DIVERGENCES, DivergenceOptions
from distilllens.kernels.row_gradients import (
    add_cross_entropy_gradient_,
    cross_entropy,
    divergence_and_gradient_,
    softmax_,
)

KINDS = sorted(DIVERGENCES)
UNBOUNDED = ("fkl", "rkl", "fkl+rkl", "akl")
OPTIONS = DivergenceOptions(beta=0.3, mu=0.6, alpha=0.2, fkl_coeff=0.7, rkl_coeff=1.3)
INF, NAN = torch.inf, torch.nan


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything `compare_rows` takes; ``gradient`` None means a new float32 tensor."""

    student: Tensor
    teacher: Tensor | None = None
    targets: Tensor | None = None
    kind: str | None = None
    options: DivergenceOptions = OPTIONS
    divergence_weight: float = 1.0
    cross_entropy_weight: float = 1.0
    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    gradient: Tensor | None = field(default=None)


def random_case(kind: str | None, vocab: int, *, rows: int = 3, seed: int = 0, **more: Any) -> Case:
    """Peaked rows around −100 (as GPT-2's are) and 20, with targets."""
    generator = torch.Generator().manual_seed(seed)
    student = 4 * torch.randn(rows, vocab, generator=generator) - 100
    teacher = 4 * torch.randn(rows, vocab, generator=generator) + 20
    targets = torch.randint(vocab, (rows,), generator=generator)
    defaults: dict[str, Any] = {"divergence_weight": 0.6, "cross_entropy_weight": 0.4}
    return Case(
        student=student,
        teacher=None if kind is None else teacher,
        targets=targets,
        kind=kind,
        **(defaults | more),
    )


Result = tuple[Tensor, Tensor]
Compare = Callable[[Case], Result]


def call_kernel(case: Case) -> Result:
    """Returns the two sums and the gradient."""
    from distilllens.kernels.row_kernel import compare_rows

    gradient = torch.empty_like(case.student) if case.gradient is None else case.gradient
    sums = compare_rows(
        case.student,
        case.teacher,
        case.targets,
        kind=case.kind,
        options=case.options,
        divergence_weight=case.divergence_weight,
        cross_entropy_weight=case.cross_entropy_weight,
        student_scale=case.student_scale,
        student_softcap=case.student_softcap,
        teacher_scale=case.teacher_scale,
        teacher_softcap=case.teacher_softcap,
        gradient_nV=gradient,
    )
    return sums, gradient


def call_pickled(case: bytes) -> bytes:
    """Pickles keep strides and shared storage, and need no shared memory between processes."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    return pickle.dumps(call_kernel(pickle.loads(case)))


def call_on_cuda(case: Case) -> Result:
    tensors = {name: value for name, value in vars(case).items() if isinstance(value, Tensor)}
    sums, gradient = call_kernel(replace(case, **moved(tensors, "cuda")))
    back = moved({"sums": sums, "gradient": gradient}, "cpu")
    return back["sums"], back["gradient"]


def moved(tensors: dict[str, Tensor], device: str) -> dict[str, Any]:
    """Returns them on a device with the same strides in storages shared by the same ones."""
    storages = {
        storage.data_ptr(): torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage)
        for storage in (tensor.untyped_storage() for tensor in tensors.values())
    }
    return {
        name: torch.empty(0, dtype=tensor.dtype, device=device).set_(
            storages[tensor.untyped_storage().data_ptr()],
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        for name, tensor in tensors.items()
    }


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(
    scope="module",
    params=["interpreter", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])],
)
def compare(request: pytest.FixtureRequest) -> Iterator[Compare]:
    """`compare_rows` of a case, on tensors of the CPU."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        yield call_on_cuda
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("PYTHONWARNINGS", "ignore::RuntimeWarning")  # numpy's, of inf − inf
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # has started, with these variables
            patch.undo()
            yield lambda case: pickle.loads(pool.submit(call_pickled, pickle.dumps(case)).result())


# --- The oracle: distributions in float64, gradients by autograd ------------------------------


def divergence_of(kind: str, p: Categorical, q: Categorical, o: DivergenceOptions) -> Tensor:
    """One value per row."""

    def mixture(a: Categorical, b: Categorical, share: float) -> Categorical:
        return Categorical(probs=share * a.probs + (1 - share) * b.probs)

    if kind == "fkl":
        return kl_divergence(p, q)
    if kind == "rkl":
        return kl_divergence(q, p)
    if kind == "fkl+rkl":
        return o.fkl_coeff * kl_divergence(p, q) + o.rkl_coeff * kl_divergence(q, p)
    if kind == "jsd":
        m = mixture(p, q, o.beta)
        return o.beta * kl_divergence(p, m) + (1 - o.beta) * kl_divergence(q, m)
    if kind == "skew_fkl":
        return kl_divergence(p, mixture(p, q, o.alpha))
    if kind == "skew_rkl":
        return kl_divergence(q, mixture(q, p, o.alpha))
    if kind == "tvd":
        return (p.probs - q.probs).clamp(min=0).sum(-1)
    assert kind == "akl"
    shares = []
    for row_p, row_q in zip(p.probs.tolist(), q.probs.tolist(), strict=True):
        total, head = 0.0, 0.0
        for place, v in enumerate(sorted(range(len(row_p)), key=lambda v: -row_p[v])):
            total += row_p[v]
            if place > 0 and total > o.mu:
                break
            head += abs(row_p[v] - row_q[v])
        gaps = sum(abs(a - b) for a, b in zip(row_p, row_q, strict=True))
        shares.append(head / gaps if gaps else 0.0)
    share = torch.tensor(shares, dtype=torch.float64)
    return share * kl_divergence(p, q) + (1 - share) * kl_divergence(q, p)


def oracle(case: Case) -> Result:
    def transformed(raw: Tensor, scale: float, cap: float | None) -> Tensor:
        return raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)

    raw = case.student.double().requires_grad_()
    student = transformed(raw, case.student_scale, case.student_softcap)
    cross_entropy, value = torch.zeros(2, dtype=torch.float64)
    if case.targets is not None:
        cross_entropy = F.cross_entropy(student, case.targets, reduction="sum")
    if case.kind is not None:
        assert case.teacher is not None
        teacher = transformed(case.teacher.double(), case.teacher_scale, case.teacher_softcap)
        p = Categorical(logits=teacher / case.options.temperature)
        q = Categorical(logits=student / case.options.temperature)
        value = divergence_of(case.kind, p, q, case.options).sum()
    loss = case.cross_entropy_weight * cross_entropy + case.divergence_weight * value
    (gradient,) = torch.autograd.grad(loss, raw)
    return torch.stack([cross_entropy.detach(), value.detach()]), gradient


def assert_matches(result: Result, expected: Result, tolerance: float = 1e-5) -> None:
    (sums, gradient), (expected_sums, expected_gradient) = result, expected
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-7)
    error = gradient.double() - expected_gradient
    assert error.abs().max() <= tolerance * expected_gradient.abs().max()
    assert error.norm() <= tolerance * expected_gradient.norm()


# --- Numbers ----------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"options": replace(OPTIONS, temperature=2.0)},
    "transformed": {
        "student_scale": 0.02,
        "student_softcap": 3.0,
        "teacher_scale": 1.5,
        "teacher_softcap": 30.0,
        "options": replace(OPTIONS, temperature=0.5),
    },
    "scaled": {"student_scale": 0.5, "teacher_scale": 2.0, "targets": None},
}


@pytest.mark.parametrize(
    ("setting", "vocab"),
    [*((name, vocab) for name in SETTINGS for vocab in (1, 7, 4096)), ("transformed", 50257)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradient_equal_float64_autograd(
    compare: Compare, kind: str, setting: str, vocab: int
) -> None:
    case = replace(random_case(kind, vocab, seed=vocab), **SETTINGS[setting])
    assert_matches(compare(case), oracle(case))


@pytest.mark.parametrize("vocab", [1, 7, 50257])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cross_entropy_alone_equals_float64_autograd(
    compare: Compare, softcap: float | None, vocab: int
) -> None:
    case = random_case(None, vocab, student_softcap=softcap, student_scale=0.25)
    assert_matches(compare(case), oracle(case))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_sums_and_gradient_equal_the_closed_forms_of_the_cpu(
    compare: Compare, kind: str | None
) -> None:
    case = random_case(kind, 331, divergence_weight=1.0, cross_entropy_weight=1.0)
    assert case.targets is not None
    log_q, q = softmax_(case.student.clone(), torch.empty_like(case.student))
    expected_value, expected_gradient = torch.zeros(3), torch.zeros_like(q)
    if kind is not None:
        assert case.teacher is not None
        log_p, p = softmax_(case.teacher.clone(), torch.empty_like(case.teacher))
        expected_value, expected_gradient = divergence_and_gradient_(
            kind, log_p, p, log_q, q, OPTIONS, torch.empty_like(p)
        )
    add_cross_entropy_gradient_(expected_gradient, q, case.targets, 1.0)
    sums, gradient = compare(case)
    expected = torch.stack([cross_entropy(log_q, case.targets).sum(), expected_value.sum()])
    torch.testing.assert_close(sums, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [None, "rkl", "jsd"])
def test_gradient_is_written_in_its_own_dtype(
    compare: Compare, kind: str | None, dtype: torch.dtype
) -> None:
    case = random_case(kind, 5001)
    case = replace(case, gradient=torch.empty(3, 5001, dtype=dtype))
    result = compare(case)
    assert result[1].dtype == dtype
    assert_matches(result, oracle(case), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_in_place_and_strided_rows_give_the_same_bits(compare: Compare, kind: str | None) -> None:
    case = random_case(kind, 4099)
    expected_sums, expected_gradient = compare(case)

    own = case.student.clone()
    sums, gradient = compare(replace(case, student=own, gradient=own))
    assert torch.equal(sums, expected_sums) and torch.equal(gradient, expected_gradient)

    def embedded(rows: Tensor | None, width: int) -> Tensor | None:
        return None if rows is None else F.pad(rows, (5, width), value=NAN)[:, 5 : 5 + 4099]

    wide = torch.full((3, 4200), 7.0)
    student = embedded(case.student, 2)
    assert student is not None and not student.is_contiguous()
    strided = replace(
        case,
        student=student,
        teacher=embedded(case.teacher, 40),
        targets=None if case.targets is None else torch.stack([case.targets] * 2, 1)[:, 0],
        gradient=wide[:, 3 : 3 + 4099],
    )
    sums, gradient = compare(strided)
    assert torch.equal(sums, expected_sums) and torch.equal(gradient, expected_gradient)


def test_nothing_is_written_beside_the_rows(compare: Compare) -> None:
    wide = torch.full((4, 4200), 7.0)
    case = replace(random_case("jsd", 4099), gradient=wide[:3, 3 : 3 + 4099])
    _, gradient = compare(case)
    buffer = gradient.as_strided((4, 4200), (4200, 1), 0)  # what the rows are a view of
    inside = torch.zeros(4, 4200, dtype=torch.bool)
    inside[:3, 3 : 3 + 4099] = True
    assert (buffer[~inside] == 7).all() and (buffer[inside] != 7).all()


@pytest.mark.parametrize("kind", [None, "jsd"])
def test_zero_rows_sum_to_zero(compare: Compare, kind: str | None) -> None:
    sums, gradient = compare(random_case(kind, 9, rows=0))
    assert sums.tolist() == [0, 0] and gradient.shape == (0, 9)


# --- The ends of the range --------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["plain", "tempered"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_columns_of_minus_infinity_change_nothing(
    compare: Compare, kind: str | None, setting: str
) -> None:
    case = replace(random_case(kind, 100), **SETTINGS[setting])
    padded = replace(
        case,
        student=F.pad(case.student, (0, 12), value=-INF),
        teacher=None if case.teacher is None else F.pad(case.teacher, (0, 12), value=-INF),
    )
    sums, gradient = compare(padded)
    assert (gradient[:, 100:] == 0).all()
    assert_matches((sums, gradient[:, :100]), oracle(case))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_mass_where_the_other_side_has_none(compare: Compare, kind: str, side: str) -> None:
    """Infinite for the unbounded kinds, if the side with the mass weighs; else the limit."""
    case = replace(random_case(kind, 8, divergence_weight=1.0), targets=None)
    assert case.teacher is not None
    rows = case.student if side == "student" else case.teacher
    rows[1, 2:4] = -INF
    sums, gradient = compare(case)
    infinite = kind in UNBOUNDED and kind != {"student": "rkl", "teacher": "fkl"}[side]
    if infinite:
        assert sums[1] == INF
        return
    rows[1, 2:4] = rows[1].max() - 300  # whose probability is 0 in float32, but not in float64
    assert_matches((sums, gradient), oracle(case))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    ("kind", "side"),
    [(None, "student"), *((kind, side) for kind in KINDS for side in ("student", "teacher"))],
)
def test_nan_and_infinity_come_out_as_nan(
    compare: Compare, kind: str | None, side: str, bad: float
) -> None:
    case = random_case(kind, 5000, options=replace(OPTIONS, temperature=1.5))
    getattr(case, side)[1, 4500] = bad
    sums, gradient = compare(case)
    assert sums[0].isnan() == (side == "student")
    assert kind is None or sums[1].isnan()
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", [None, "jsd"])
def test_a_row_without_any_mass_is_nan(compare: Compare, kind: str | None) -> None:
    case = random_case(kind, 20)
    case.student[1] = -INF
    sums, gradient = compare(case)
    assert sums[0].isnan() and gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("target", [-100, 20])
def test_a_target_outside_the_vocabulary_is_nan(compare: Compare, target: int) -> None:
    case = random_case("jsd", 20)
    sums, _ = compare(replace(case, targets=torch.tensor([3, target, 4])))
    assert sums[0].isnan() and sums[1].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_values_near_convergence_stay_at_zero(compare: Compare, kind: str) -> None:
    case = replace(random_case(kind, 50257, rows=2), targets=None)
    assert case.teacher is not None
    noise = torch.randn(2, 50257, generator=torch.Generator().manual_seed(1))
    nearly = replace(case, student=case.teacher + 1e-4 * noise)
    sums, _ = compare(nearly)
    assert sums[1].item() == pytest.approx(oracle(nearly)[0][1].item(), abs=1e-6)
    sums, gradient = compare(replace(case, student=case.teacher.clone()))
    assert abs(sums[1].item()) < 1e-6
    if kind != "tvd":  # whose gradient jumps there
        assert gradient.abs().max() < 1e-6


# --- Compiled for real, without a GPU ---------------------------------------------------------

PLAIN = {"STUDENT_SCALE": 1.0, "STUDENT_SOFTCAP": None}
CAPPED = {"STUDENT_SCALE": 0.5, "STUDENT_SOFTCAP": 30.0}
COMPILED: dict[str, dict[str, Any]] = {
    "cross entropy": {"KIND": None, "targets": True, "capability": 80},
    "fkl": {"KIND": "fkl", "targets": True},
    "rkl, unaligned rows": {"KIND": "rkl", "targets": True, "aligned": False},
    "jsd": {"KIND": "jsd"},
    "jsd on A100": {"KIND": "jsd", "capability": 80},
    "jsd with everything": {"KIND": "jsd", "targets": True, "TEMPERED": True, **CAPPED},
    "akl": {"KIND": "akl", "targets": True, "TEMPERED": True},
    "skew_fkl": {"KIND": "skew_fkl", "gradient": "fp32"},
    "skew_rkl": {"KIND": "skew_rkl", "targets": True, "gradient": "fp16", **CAPPED},
    "tvd": {"KIND": "tvd", "targets": True},
    "one column": {"KIND": "jsd", "targets": True, "vocab_size": 1},
}


def compile_kernel(
    *,
    capability: int = 90,
    targets: bool = False,
    gradient: str = "bf16",
    aligned: bool = True,
    vocab_size: int | None = None,
    **flags: Any,
) -> bytes:
    """Returns the machine code for a compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from distilllens.kernels.row_kernel import BLOCK, NUM_WARPS, _compare_row

    constants = {"TEMPERED": False, **PLAIN, **flags, "BLOCK": BLOCK}
    constants |= {
        "TEACHER_SCALE": constants["STUDENT_SCALE"],
        "TEACHER_SOFTCAP": constants["STUDENT_SOFTCAP"],
    }
    if constants["KIND"] is None:
        constants["teacher_ptr"] = None
    if constants["KIND"] != "akl":
        constants["shares_ptr"] = None
    if not targets:
        constants["targets_ptr"] = None
    if vocab_size is not None:
        constants["vocab_size"] = vocab_size
    names = _compare_row.arg_names
    signature = {
        name: "constexpr" if name in constants else argument_type(name, gradient) for name in names
    }
    sixteen = [["tt.divisibility", 16]]
    attributes = {
        (place,): sixteen
        for place, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (aligned and kind == "i32")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(_compare_row, signature, places, attributes)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def argument_type(name: str, gradient: str) -> str:
    if name.endswith("_ptr"):
        return {"targets_ptr": "*i64", "gradient_ptr": f"*{gradient}"}.get(name, "*fp32")
    return "i32" if name.endswith(("_stride", "_size")) else "fp32"


@pytest.mark.parametrize("flags", COMPILED.values(), ids=COMPILED)
def test_kernel_compiles_to_machine_code_without_spilled_registers(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_kernel(**flags))
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"_compare_row:\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    assert registers <= 64 and stack == local == 0  # 64 is what 1,024 threads can have
