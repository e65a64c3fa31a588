"""Top-k divergences against torch.distributions on distributions merged token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import CAP, TOLERANCE, Case, LargestTensor, relative
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from distilllens.divergence import DIVERGENCES, DivergenceOptions, divergence, likeliest_tokens
from distilllens.fused import fused_linear_divergence, fused_linear_terms
from distilllens.kernels import chunks
from distilllens.kernels.chunks import LogitTransform, Term, Unembedding

KINDS = sorted(DIVERGENCES)
F_DIVERGENCES = [kind for kind in KINDS if kind != "akl"]
OPTIONS: dict[str, Any] = {
    "beta": 0.3,
    "mu": 0.6,
    "alpha": 0.2,
    "fkl_coeff": 0.7,
    "rkl_coeff": 1.3,
}


def chosen_ids(logits: Tensor, k: int) -> list[int]:
    """The k largest of one row, in Python; of equal ones the smaller id."""
    values = logits.tolist()
    return sorted(sorted(range(len(values)), key=lambda v: (-values[v], v))[:k])


def merged(probs: Tensor, chosen: list[int]) -> Tensor:
    """The chosen tokens' probabilities, then the sum of all others."""
    rest = [v for v in range(len(probs)) if v not in set(chosen)]
    return torch.cat([probs[chosen], probs[rest].sum(0, keepdim=True)])


def kl(a: Tensor, b: Tensor) -> Tensor:
    return kl_divergence(Categorical(probs=a), Categorical(probs=b))


def of_distributions(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """One divergence of two distributions, by the options above."""
    if kind == "fkl":
        return kl(p, q)
    if kind == "rkl":
        return kl(q, p)
    if kind == "fkl+rkl":
        return 0.7 * kl(p, q) + 1.3 * kl(q, p)
    if kind == "jsd":
        m = 0.3 * p + 0.7 * q
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    if kind == "skew_fkl":
        return kl(p, 0.2 * p + 0.8 * q)
    if kind == "skew_rkl":
        return kl(q, 0.8 * p + 0.2 * q)
    if kind == "tvd":
        return (p - q).abs().sum() / 2
    assert kind == "akl"
    order = sorted(range(len(p)), key=lambda v: (-p[v].item(), v))
    totals = list(itertools.accumulate(p[v].item() for v in order))
    head = [order[0], *(order[place] for place in range(1, len(p)) if totals[place] <= 0.6)]
    gap = (p - q).abs().detach()
    share = gap[head].sum() / gap.sum()
    return share * kl(p, q) + (1 - share) * kl(q, p)


def oracle(kind: str, teacher: Tensor, student: Tensor, k: int, temperature: float = 1) -> Tensor:
    """Values by row of float64 logits, differentiable in the student's."""
    values = []
    for row_p, row_q in zip(teacher, student, strict=True):
        chosen = chosen_ids(row_p, k)
        p, q = ((row / temperature).softmax(-1) for row in (row_p, row_q))
        values.append(of_distributions(kind, merged(p, chosen), merged(q, chosen)))
    return torch.stack(values)


def reference(kind: str, teacher: Tensor, student: Tensor, k: int | None, **more: Any) -> Tensor:
    return divergence(
        kind, teacher_logits_NV=teacher, student_logits_NV=student, top_k=k, **OPTIONS, **more
    )


def fused(
    case: Case,
    kind: str,
    k: int | None,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    transform: LogitTransform | None = None,
) -> Tensor:
    return fused_linear_divergence(
        kind,
        student_hidden_ND=case.hidden,
        student_head_VD=case.head,
        student_bias_V=case.bias,
        teacher_hidden_NE=case.teacher_hidden,
        teacher_head_VE=case.teacher_head,
        teacher_bias_V=case.teacher_bias,
        chunk_rows=chunk_rows,
        student_transform=transform,
        teacher_transform=transform,
        temperature=temperature,
        top_k=k,
        **OPTIONS,
    )


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's."""
    teacher = case.teacher_hidden @ case.teacher_head.T + case.teacher_bias
    return teacher, case.hidden @ case.head.T + case.bias


def random_logits(seed: int, size: tuple[int, int] = (6, 23)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    return teacher, teacher + torch.randn(size, generator=generator, dtype=torch.float64)


# --- The reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 2, 7, 22])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, k: int, temperature: float) -> None:
    teacher, student = random_logits(k)
    student.requires_grad_()
    actual = reference(kind, teacher, student, k, temperature=temperature)
    expected = oracle(kind, teacher, student, k, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    gradients = [torch.autograd.grad(v @ weights, student)[0] for v in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    teacher = torch.tensor([[0.1, 0.5, 0.3, 0.1]], dtype=torch.float64).log()
    student = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    fkl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert reference("fkl", teacher, student, 1).item() == pytest.approx(fkl, abs=1e-12)
    assert reference("tvd", teacher, student, 1).item() == pytest.approx(0.25, abs=1e-12)
    assert reference("tvd", teacher, student, 2).item() == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_the_full_divergence(kind: str) -> None:
    teacher, student = random_logits(1)
    full = reference(kind, teacher, student, None)
    for k in (23, 24, 10**9):
        assert torch.equal(reference(kind, teacher, student, k), full)
    # A bucket of one token is that token.
    torch.testing.assert_close(reference(kind, teacher, student, 22), full, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_gradcheck(kind: str) -> None:
    teacher, student = random_logits(2, (3, 9))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference(kind, teacher, z, 4), student)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 60), k=st.integers(1, 40))
def test_merging_outcomes_never_adds_divergence(seed: int, scale: float, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, 4, 41, generator=generator)
    for kind in F_DIVERGENCES:
        coarse, full = (reference(kind, teacher, student, few) for few in (k, None))
        assert (coarse >= -1e-6).all(), kind
        assert (coarse <= full * (1 + 1e-5) + 1e-6).all(), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 8, 29])
def test_of_equal_logits_the_smaller_ids_are_chosen(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 5, (50, 30), generator=generator).to(dtype)
    logits[0] = 1.0
    logits[1, :20] = -math.inf
    expected = [chosen_ids(row, k) for row in logits]
    assert likeliest_tokens(logits, k).tolist() == expected
    assert expected[0] == list(range(k))


def test_the_choice_is_made_before_the_temperature_rounds() -> None:
    """The first two logits differ by one ulp, and no longer after the division."""
    high = torch.tensor(1.99)
    low = high.nextafter(torch.tensor(0.0))
    teacher, student = torch.stack([low, high, -high])[None], torch.tensor([[0.0, 4.0, -1.0]])
    assert low < high and low / 1.9 == high / 1.9
    expected = oracle("rkl", teacher.double(), student.double(), 1, 1.9).float()
    for k, same in ((1, True), (2, False)):
        actual = reference("rkl", teacher, student, k, temperature=1.9)
        assert torch.allclose(actual, expected) == same
    loss = fused(from_row(teacher[0], student[0]), "rkl", 1, temperature=1.9)
    torch.testing.assert_close(loss.detach(), expected[0])


# --- The fused loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "vocab", "chunk", "k"), [(1, 3, None, 1), (37, 301, 16, 9), (20, 65, 64, 64)]
)
def test_fused_value_and_gradients(
    kind: str, dtype: torch.dtype, rows: int, vocab: int, chunk: int | None, k: int
) -> None:
    case = Case.make(rows, vocab, dtype)
    exact = case.double()
    loss, expected = fused(case, kind, k, chunk), oracle(kind, *logits_of(exact), k).sum()
    (2.5 * loss).backward()
    (2.5 * expected).backward()
    assert relative(loss.detach(), expected.detach()) < TOLERANCE[dtype]
    for leaf, exact_leaf in zip(case.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert relative(leaf.grad, exact_leaf.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("transform", [CAP, LogitTransform(scale=0.25), LogitTransform()])
def test_fused_with_transform_and_temperature(
    kind: str, temperature: float, transform: LogitTransform
) -> None:
    case = Case.make(11, 83)
    exact = case.double()
    loss = fused(case, kind, 6, 4, temperature, transform)
    loss.backward()
    logits = [transform(z) for z in logits_of(exact)]
    expected = oracle(kind, logits[0], logits[1], 6, temperature).sum()
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for leaf, exact_leaf in zip(case.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad, exact_leaf.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_reference(kind: str) -> None:
    case = Case.make(33, 97, torch.float64)
    for k in (1, 5, 96, 97, 500, None):
        teacher, student = logits_of(case)
        expected = reference(kind, teacher, student, k, temperature=1.5).sum()
        loss = fused(case, kind, k, 8, 1.5)
        torch.testing.assert_close(loss, expected)
        pairs = [torch.autograd.grad(value, case.leaves) for value in (loss, expected)]
        for actual, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_lens_and_padded_vocabulary_beside_it(temperature: float) -> None:
    """Cross entropy sees every token; each term has its own k; the padding has no part."""
    case = Case.make(23, 151)
    exact = case.double()
    targets = torch.randint(0, 140, (23,), generator=torch.Generator().manual_seed(1))
    case.teacher_bias[140:] += 50  # would be chosen first
    final = Term(
        student_hidden_ND=case.hidden,
        teacher_hidden_NE=case.teacher_hidden,
        targets_N=targets,
        kind="rkl",
        options=DivergenceOptions(temperature=temperature, top_k=5),
        divergence_weight=0.6,
        cross_entropy_weight=0.4,
    )
    lens = Term(
        student_hidden_ND=case.hidden,
        teacher_hidden_NE=case.teacher_hidden,
        kind="fkl",
        options=DivergenceOptions(top_k=2),
        divergence_weight=0.25,
    )
    loss, sums = fused_linear_terms(
        [final, lens],
        student=Unembedding(head_VD=case.head, bias_V=case.bias),
        teacher=Unembedding(head_VD=case.teacher_head, bias_V=case.teacher_bias),
        vocab_size=140,
        chunk_rows=7,
    )
    loss.backward()
    teacher, student = (logits[:, :140] for logits in logits_of(exact))
    parts = [
        F.cross_entropy(student, targets, reduction="sum"),
        oracle("rkl", teacher, student, 5, temperature).sum(),
        oracle("fkl", teacher, student, 2).sum(),
    ]
    expected = 0.4 * parts[0] + 0.6 * parts[1] + 0.25 * parts[2]
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    told = torch.stack([sums[0, 0], sums[0, 1], sums[1, 1]]).double()
    torch.testing.assert_close(told, torch.stack(parts).detach(), rtol=1e-5, atol=1e-5)
    for leaf, exact_leaf in zip(case.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad, exact_leaf.grad) < 1e-5


def from_logits(teacher: Tensor, student: Tensor) -> Case:
    """A case whose logits are exactly these."""
    eye, zeros = torch.eye(teacher.shape[1]), torch.zeros(teacher.shape[1])
    tensors = [student.clone(), eye.clone(), zeros.clone(), teacher, eye, zeros]
    return Case(*(t.requires_grad_() for t in tensors[:3]), *tensors[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_fused_among_equal_logits(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randint(0, 4, (9, 40), generator=generator).float()
    student = torch.randn(9, 40, generator=generator)
    exact = student.double().requires_grad_()
    expected = oracle(kind, teacher.double(), exact, 6).sum()
    expected.backward()
    case = from_logits(teacher, student)
    loss = fused(case, kind, 6)
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    assert case.hidden.grad is not None and exact.grad is not None
    assert relative(case.hidden.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_a_tiny_bucket_keeps_its_logarithm(kind: str, gap: float) -> None:
    """1 − Σ of the chosen is 0 in float32 on both sides, and e⁻²⁰⁰ has no float32 at all."""
    noise = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(3))
    teacher, student = noise[0], noise[1]
    teacher[:, 3:] -= gap
    student[:2, 3:] -= gap / 2
    case = from_logits(teacher, student)
    exact = student.double().requires_grad_()
    rows = oracle_in_logs(kind, teacher.double(), exact, 3)
    rows.sum().backward()
    actual = reference(kind, teacher, student, 3)
    torch.testing.assert_close(actual.double(), rows.detach(), rtol=1e-5, atol=1e-6)
    loss = fused(case, kind, 3)
    loss.backward()
    assert relative(loss.detach(), rows.detach().sum()) < 1e-5
    assert case.hidden.grad is not None and exact.grad is not None
    assert relative(case.hidden.grad, exact.grad) < 1e-5


def oracle_in_logs(kind: str, teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """The full divergence of k + 1 logits, the last one Σ exp of the rest: exact in float64."""
    rows = []
    for row_p, row_q in zip(teacher, student, strict=True):
        chosen = chosen_ids(row_p, k)
        rest = [v for v in range(len(row_p)) if v not in chosen]
        rows.append(
            [torch.cat([row[chosen], row[rest].exp().sum().log()[None]]) for row in (row_p, row_q)]
        )
    p, q = (torch.stack(side) for side in zip(*rows, strict=True))
    return reference(kind, p, q, None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_bucket(kind: str) -> None:
    teacher, student = (z.float() for z in random_logits(4, (5, 12)))
    teacher[:, :5] += 20  # those are chosen
    full = reference(kind, teacher[:, :5], student[:, :5], None)
    teacher[:, 5:] = student[:, 5:] = -math.inf
    torch.testing.assert_close(reference(kind, teacher, student, 5), full)
    leaf = student.clone().requires_grad_()
    reference(kind, teacher, leaf, 5).sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    for k in (5, 7):  # 7: the likeliest tokens hold some that are impossible
        case = Case.make(5, 12)
        case.teacher_bias[5:] = case.bias.data[5:] = -math.inf
        loss = fused(case, kind, k)
        loss.backward()
        teacher_logits, student_logits = (z.detach()[:, :5] for z in logits_of(case))
        expected = reference(kind, teacher_logits, student_logits, None).sum()
        torch.testing.assert_close(loss.detach(), expected)
        assert all(torch.isfinite(t.grad).all() for t in case.leaves if t.grad is not None)


def test_mass_where_the_other_side_has_none() -> None:
    masked = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]])
    open_ = torch.tensor([[0.0, 1.0, 2.0, 0.5]])
    for teacher, student, infinite in ((masked, open_, "rkl"), (open_, masked, "fkl")):
        for kind in KINDS:
            value = reference(kind, teacher, student, 2).item()
            summed = fused(from_row(teacher[0], student[0]), kind, 2).item()
            assert value == pytest.approx(summed, rel=1e-5), kind
            assert not math.isnan(value), kind
            if kind in (infinite, "fkl+rkl"):
                assert value == math.inf
            elif kind != "akl":
                assert value < 10


def from_row(teacher_V: Tensor, student_V: Tensor) -> Case:
    """A case of one row whose logits, some of them −inf perhaps, stand in the biases."""
    return Case(
        torch.zeros(1, 2).requires_grad_(),
        torch.zeros(len(student_V), 2).requires_grad_(),
        student_V.clone().requires_grad_(),
        torch.zeros(1, 2),
        torch.zeros(len(teacher_V), 2),
        teacher_V,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_value_and_loss(kind: str) -> None:
    teacher, student = random_logits(5)
    for side in (0, 1):
        pair = [teacher.clone(), student.clone()]
        pair[side][2, 5] = math.nan
        value = reference(kind, pair[0], pair[1], 4)
        assert math.isnan(value[2].item()) and torch.isfinite(value[[0, 1, 3]]).all()
    case = Case.make(5, 40)
    case.hidden.data[2, 2] = math.nan
    assert math.isnan(fused(case, kind, 4).item())
    case = Case.make(5, 40)
    case.teacher_hidden[2, 2] = math.nan
    assert math.isnan(fused(case, kind, 4).item())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows(kind: str) -> None:
    empty = torch.zeros(0, 5)
    assert reference(kind, empty, empty, 2).shape == (0,)
    case = Case.make(0, 50)
    loss = fused(case, kind, 3)
    loss.backward()
    assert loss.item() == 0 and case.head.grad is not None and (case.head.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_never_holds_the_logits_of_all_rows(kind: str) -> None:
    rows, vocab, chunk = 640, 500, 128
    case = Case.make(rows, vocab)
    with LargestTensor() as largest:
        fused(case, kind, 8, chunk).backward()
    assert largest.elements <= chunk * vocab < rows * vocab


def test_terms_with_top_k_leave_the_kernel_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str | None] = []

    def compare(buffers: Any, spec: Any, term: Term, *rows: Any) -> tuple[Tensor, Tensor]:
        sent.append(term.kind)
        return chunks._compare_in_blocks(spec, term, *rows)

    monkeypatch.setitem(chunks.KERNEL_ON, "cpu", True)
    monkeypatch.setattr(chunks, "_compare_in_kernel", compare)
    case = Case.make(6, 30)
    kinds = {"fkl": 4, "rkl": None, "jsd": 30, "tvd": 29}
    terms = [
        Term(
            student_hidden_ND=case.hidden,
            teacher_hidden_NE=case.teacher_hidden,
            kind=kind,
            options=DivergenceOptions(top_k=k),
        )
        for kind, k in kinds.items()
    ]
    student, teacher = Unembedding(head_VD=case.head), Unembedding(head_VD=case.teacher_head)
    mixed, sums = fused_linear_terms(terms, student=student, teacher=teacher)
    assert sent == ["rkl", "jsd"]
    monkeypatch.setitem(chunks.KERNEL_ON, "cpu", False)
    blocks, blocks_sums = fused_linear_terms(terms, student=student, teacher=teacher)
    assert torch.equal(mixed, blocks) and torch.equal(sums, blocks_sums)


@pytest.mark.parametrize("k", [0, -1, True, False, 2.5, "3"])
def test_refused_k(k: Any, users_view: None) -> None:
    teacher, student = random_logits(6)
    with pytest.raises(ValueError, match=f"top_k={k!r} must be a whole number ≥ 1"):
        reference("fkl", teacher, student, k)
    with pytest.raises(ValueError, match=f"top_k={k!r} must be a whole number ≥ 1"):
        fused(Case.make(4, 20), "fkl", k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_as_in_float64(kind: str, dtype: torch.dtype) -> None:
    case = Case.make(300, 503, dtype)
    exact = case.double()
    on_gpu = Case(*(t.detach().cuda() for t in vars(case).values()))
    for leaf in on_gpu.leaves:
        leaf.requires_grad_()
    loss, expected = fused(on_gpu, kind, 16, 128), oracle(kind, *logits_of(exact), 16).sum()
    loss.backward()
    expected.backward()
    assert relative(loss.detach().cpu(), expected.detach()) < TOLERANCE[dtype]
    for leaf, exact_leaf in zip(on_gpu.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad.cpu(), exact_leaf.grad) < TOLERANCE[dtype]
