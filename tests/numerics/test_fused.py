"""The fused loss against a dense float64 computation with autograd: values and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distilllens.divergence import DIVERGENCES, DivergenceOptions
from distilllens.fused import fused_linear_divergence, fused_linear_terms
from distilllens.kernels.chunks import LogitTransform, Term, Unembedding, default_chunk_rows

KINDS = sorted(DIVERGENCES)


def dense_rows(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """Written from the formulas in probabilities, in float64: another way than the product's."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.special.entr(a).neg() - torch.special.xlogy(a, b)).sum(-1)

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
        return (p - q).abs().sum(-1) / 2
    assert kind == "akl"
    shares = []
    for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True):
        order = sorted(range(len(row_p)), key=lambda v: -row_p[v])
        head, total = 0.0, 0.0
        for place, v in enumerate(order):
            total += row_p[v]
            if place == 0 or total <= 0.5:
                head += abs(row_p[v] - row_q[v])
        shares.append(head / sum(abs(a - b) for a, b in zip(row_p, row_q, strict=True)))
    share = torch.tensor(shares, dtype=p.dtype)
    return share * kl(p, q) + (1 - share) * kl(q, p)


@dataclass
class Case:
    """Random inputs in one dtype, and the same numbers in float64."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor

    @classmethod
    def make(cls, rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator)).to(dtype)

        return cls(
            randn(rows, 12).requires_grad_(),
            randn(vocab, 12, scale=0.6).requires_grad_(),
            randn(vocab).requires_grad_(),
            randn(rows, 20),
            randn(vocab, 20, scale=0.5),
            randn(vocab),
        )

    def double(self) -> Case:
        tensors = [t.detach().double() for t in vars(self).values()]
        return Case(*[t.requires_grad_() for t in tensors[:3]], *tensors[3:])

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head, self.bias]


Transform = Callable[[Tensor], Tensor]


def dense(case: Case, kind: str, temperature: float, transform: Transform | None) -> Tensor:
    student = case.hidden @ case.head.T + case.bias
    teacher = case.teacher_hidden @ case.teacher_head.T + case.teacher_bias
    if transform is not None:
        student, teacher = transform(student), transform(teacher)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return dense_rows(kind, p, q).sum()


def fused(
    case: Case,
    kind: str,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    transform: Transform | None = None,
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
        beta=0.3,
        mu=0.5,
        alpha=0.2,
        fkl_coeff=0.7,
        rkl_coeff=1.3,
        temperature=temperature,
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
CAP = LogitTransform(scale=0.5, softcap=3.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "vocab", "chunk"), [(1, 3, None), (37, 1001, 16), (64, 129, 64)])
def test_value_and_gradients(
    kind: str, dtype: torch.dtype, rows: int, vocab: int, chunk: int | None
) -> None:
    case = Case.make(rows, vocab, dtype)
    exact = case.double()
    loss, expected = fused(case, kind, chunk), dense(exact, kind, 1.0, None)
    (2.5 * loss).backward()
    (2.5 * expected).backward()
    assert relative(loss.detach(), expected.detach()) < TOLERANCE[dtype]
    for leaf, exact_leaf in zip(case.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert relative(leaf.grad, exact_leaf.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "transform",
    [CAP, LogitTransform(scale=0.25), lambda z: 3 * torch.tanh(z / 3)],
    ids=["cap", "scale", "callable"],
)
def test_logit_transforms_and_temperature(
    kind: str, temperature: float, transform: Transform
) -> None:
    case = Case.make(19, 203)
    exact = case.double()
    loss = fused(case, kind, 8, temperature, transform)
    loss.backward()
    expected = dense(exact, kind, temperature, transform)
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for leaf, exact_leaf in zip(case.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad, exact_leaf.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_give_a_differentiable_zero(kind: str) -> None:
    case = Case.make(0, 50)
    loss = fused(case, kind)
    loss.backward()
    assert loss.item() == 0
    for leaf in case.leaves:
        assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_masked_in_both_models(kind: str) -> None:
    case = Case.make(9, 60)
    masked = torch.zeros(60)
    masked[7:11] = -math.inf
    case.bias.data += masked
    case.teacher_bias += masked
    loss = fused(case, kind, 4)
    loss.backward()
    kept = [i for i in range(60) if not 7 <= i < 11]
    smaller = Case(*(t.detach()[kept] if len(t) == 60 else t.detach() for t in vars(case).values()))
    for leaf in smaller.leaves:
        leaf.requires_grad_()
    expected = fused(smaller, kind, 4)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(case.hidden.grad, smaller.hidden.grad)
    assert case.head.grad is not None and (case.head.grad[7:11] == 0).all()


@pytest.mark.parametrize("kind", ["rkl", "fkl+rkl"])
def test_infinite_divergence_is_infinite(kind: str) -> None:
    case = Case.make(5, 40)
    case.teacher_bias[3] = -math.inf
    assert fused(case, kind).item() == math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_loss(kind: str) -> None:
    case = Case.make(5, 40)
    case.hidden.data[2, 2] = math.nan
    assert math.isnan(fused(case, kind).item())


def test_terms_share_one_pass() -> None:
    """CE + divergence of the final rows and two lens terms, one of them with a frozen head."""
    case = Case.make(23, 151)
    exact = case.double()
    lens = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (23, 9)]
    targets = torch.randint(0, 140, (23,), generator=torch.Generator().manual_seed(1))
    options = DivergenceOptions(temperature=2.0)
    terms = [
        Term(
            student_hidden_ND=case.hidden,
            teacher_hidden_NE=case.teacher_hidden,
            targets_N=targets,
            kind="fkl",
            options=options,
            divergence_weight=0.6,
            cross_entropy_weight=0.4,
        ),
        *(
            Term(
                student_hidden_ND=hidden.requires_grad_(),
                teacher_hidden_NE=case.teacher_hidden[: len(hidden)],
                kind="jsd",
                divergence_weight=0.25,
                train_head=train_head,
            )
            for hidden, train_head in zip(lens, (True, False), strict=True)
        ),
    ]
    student = Unembedding(head_VD=case.head, bias_V=case.bias)
    teacher = Unembedding(head_VD=case.teacher_head, bias_V=case.teacher_bias)
    loss, sums = fused_linear_terms(
        terms, student=student, teacher=teacher, vocab_size=140, chunk_rows=7
    )
    loss.backward()

    head, bias = exact.head[:140], exact.bias[:140]
    exact_lens = [hidden.detach().double().requires_grad_() for hidden in lens]
    teacher_logits = exact.teacher_hidden @ exact.teacher_head[:140].T + exact.teacher_bias[:140]
    logits = exact.hidden @ head.T + bias
    ce = F.cross_entropy(logits, targets, reduction="sum")
    kd = F.kl_div((logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1), reduction="sum")

    def jsd(student_logits: Tensor) -> Tensor:
        p, q = teacher_logits[: len(student_logits)].softmax(-1), student_logits.softmax(-1)
        m = ((p + q) / 2).log()
        return (p * (p.log() - m)).sum() / 2 + (q * (q.log() - m)).sum() / 2

    first = jsd(exact_lens[0] @ head.T + bias)
    second = jsd(exact_lens[1] @ head.detach().T + bias.detach())
    expected = 0.4 * ce + 0.6 * kd + 0.25 * (first + second)
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    expected_sums = torch.tensor(
        [[ce.item(), kd.item()], [0, first.item()], [0, second.item()]], dtype=torch.float64
    )
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    pairs = zip([*case.leaves, *lens], [*exact.leaves, *exact_lens], strict=True)
    for leaf, exact_leaf in pairs:
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad, exact_leaf.grad) < 1e-5
    assert case.head.grad is not None and (case.head.grad[140:] == 0).all()


def test_weight_zero_reports_but_does_not_train() -> None:
    case = Case.make(6, 30)
    case.teacher_bias[3] = -math.inf  # the divergence is infinite and has weight 0
    term = Term(
        student_hidden_ND=case.hidden,
        teacher_hidden_NE=case.teacher_hidden,
        targets_N=torch.zeros(6, dtype=torch.int64),
        kind="rkl",
        divergence_weight=0.0,
        cross_entropy_weight=1.0,
    )
    loss, sums = fused_linear_terms(
        [term],
        student=Unembedding(head_VD=case.head, bias_V=case.bias),
        teacher=Unembedding(head_VD=case.teacher_head, bias_V=case.teacher_bias),
    )
    loss.backward()
    logits = (case.hidden @ case.head.T + case.bias).detach()
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="sum")
    )
    assert sums[0, 1] == math.inf
    assert case.hidden.grad is not None and torch.isfinite(case.hidden.grad).all()


def test_without_gradients_nothing_is_kept() -> None:
    case = Case.make(8, 30)
    with torch.no_grad():
        loss = fused(case, "jsd")
    assert not loss.requires_grad
    case.head.requires_grad_(False)
    case.bias.requires_grad_(False)
    fused(case, "jsd").backward()
    assert case.hidden.grad is not None and case.head.grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_never_holds_the_logits_of_all_rows(kind: str) -> None:
    rows, vocab, chunk = 640, 500, 128
    case = Case.make(rows, vocab)
    with LargestTensor() as largest:
        fused(case, kind, chunk).backward()
    assert largest.elements <= chunk * vocab < rows * vocab


def test_second_backward_is_refused() -> None:
    loss = fused(Case.make(4, 20), "rkl")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_refusals(users_view: None) -> None:
    case = Case.make(4, 20)
    with pytest.raises(ValueError, match="unknown divergence"):
        fused(case, "kl")
    case.teacher_hidden = case.teacher_hidden[:3]
    with pytest.raises(ValueError, match=r"teacher rows \(3, 20\), expected \(4, 20\)"):
        fused(case, "fkl")
    case = Case.make(4, 20)
    case.teacher_head = case.teacher_head[:19]
    with pytest.raises(ValueError, match="student head has 20 tokens, teacher head 19"):
        fused(case, "fkl")


@pytest.mark.parametrize(("vocab", "rows"), [(1_000, 4096), (50_257, 256), (400_000, 128)])
def test_chunks_fit_a_budget(vocab: int, rows: int) -> None:
    assert default_chunk_rows(vocab, torch.device("cpu")) == rows
    assert default_chunk_rows(50_257, torch.device("cuda")) == 1_536


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_as_in_float64(kind: str, dtype: torch.dtype) -> None:
    case = Case.make(300, 5003, dtype)
    exact = case.double()
    on_gpu = Case(*(t.detach().cuda() for t in vars(case).values()))
    for leaf in on_gpu.leaves:
        leaf.requires_grad_()
    loss, expected = fused(on_gpu, kind, 128), dense(exact, kind, 1.0, None)
    loss.backward()
    expected.backward()
    assert relative(loss.detach().cpu(), expected.detach()) < TOLERANCE[dtype]
    for leaf, exact_leaf in zip(on_gpu.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None and exact_leaf.grad is not None
        assert relative(leaf.grad.cpu(), exact_leaf.grad) < TOLERANCE[dtype]
