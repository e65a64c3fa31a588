"""How far student layers are from teacher layers, seen through their lenses.

A cell is the divergence between what a teacher block and a student block would say if their model
stopped there (own final norm, own LM head), averaged over response tokens. The lens maps of reports
are made of Jensen-Shannon divergences; rule ``lens_similarity`` takes the lens term's own kind.

Shapes: B batch, T tokens (or teacher layers in an ``_ST`` array), N response rows, n rows of one
chunk, D width, V vocabulary, L layers, S student layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from distilllens.data.collate import Batch
from distilllens.divergence import MIXTURE_FLOOR, DivergenceOptions, log_probs
from distilllens.families import gather_rows, run_body
from distilllens.fused import fused_linear_terms
from distilllens.kernels.chunks import Term
from distilllens.layers import LayerPair
from distilllens.lens import LogitLens

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory for the probabilities of one chunk of rows in all student layers at once."""
WORKING_COPIES = 6
"""Further [n, V] tensors alive beside them: teacher logits, probabilities, mixture, its log."""
TERM_ROWS = 256
"""Rows per chunk of `lens_divergences`: what a progress line moves by."""


def _nothing(_rows: int) -> None:
    """Stands where no progress is shown."""


@dataclass(frozen=True, kw_only=True)
class LensRows:
    """A model's lens and the raw output of its blocks at the chosen response rows."""

    lens: LogitLens
    hidden_LND: tuple[Tensor, ...]
    """One [N, D] tensor per collected block, first block first, on the model's device."""
    targets_N: Tensor
    """The response tokens that these rows predict (int64), on the model's device."""
    num_available: int
    """Response tokens of the batches, of which N were chosen."""


@dataclass(frozen=True, kw_only=True)
class LensMap:
    """Divergence and entropy by layer, in nats, means over the same response tokens."""

    divergence_ST: NDArray[np.float64]
    """[s − 1, t − 1]: student block s against teacher block t; at most ln 2 for β = 0.5."""
    student_entropy_S: NDArray[np.float64]
    teacher_entropy_T: NDArray[np.float64]
    num_tokens: int
    num_available: int

    def paired_mean(self, pairs: Sequence[LayerPair]) -> float:
        """Returns the mean divergence over paired layers; NaN without pairs."""
        cells = [self.divergence_ST[pair.student - 1, pair.teacher - 1] for pair in pairs]
        return float(np.mean(cells)) if cells else float("nan")


@torch.no_grad()  # not inference_mode: what a model caches in its forward may serve training
def collect_rows(
    lens: LogitLens,
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    layers: Sequence[int] | None = None,
) -> LensRows:
    """Runs a model over batches and keeps its blocks' outputs where a response token is predicted.

    Args:
        lens: Of the model, which is in eval mode.
        batches: Prompts with reference answers (teacher forcing).
        max_tokens: Keep at most this many rows, evenly spread over all of them, so that long
            answers and short ones, beginnings and ends are all there. The choice depends on the
            batches only: every model gets the same rows.
        layers: Blocks, counted from 1; default: all.

    Raises:
        ValueError: The batches hold no response token.
    """
    batches = list(batches)
    num_available = sum(batch.num_tokens for batch in batches)
    if num_available == 0:
        raise ValueError("no response token in the batches")
    num_kept = min(num_available, max_tokens)
    kept_N = torch.linspace(0, num_available - 1, num_kept, dtype=torch.float64).round().long()
    device = next(lens.model.parameters()).device
    layers = range(1, len(lens.parts.blocks) + 1) if layers is None else layers
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    targets: list[Tensor] = []
    first = 0
    for batch in batches:
        inside = kept_N[(kept_N >= first) & (kept_N < first + batch.num_tokens)] - first
        first += batch.num_tokens
        if not len(inside):
            continue
        inside = inside.to(batch.rows_N.device)
        rows = batch.rows_N[inside].to(device)
        targets.append(batch.targets_N[inside].to(device))
        _, hidden = run_body(lens.parts, batch.input_ids_BT.to(device), layers)
        for layer in layers:
            collected[layer].append(gather_rows(hidden[layer], rows))
    hidden_LND = tuple(torch.cat(rows) for rows in collected.values())
    return LensRows(
        lens=lens,
        hidden_LND=hidden_LND,
        targets_N=torch.cat(targets),
        num_available=num_available,
    )


@torch.inference_mode()
def compute_lens_map(
    teacher: LensRows,
    student: LensRows,
    *,
    beta: float = 0.5,
    chunk_rows: int | None = None,
    advance: Callable[[int], None] = _nothing,
) -> LensMap:
    """Compares all layers of two models at the same rows.

    The rows are worked through in chunks. Of a chunk the student's probabilities are held for all
    layers, the teacher's for one, so each head runs once per layer and row. With the entropies H at
    hand a cell costs one mixture: JSD_β = H(βp + (1−β)q) − β H(p) − (1−β) H(q). That
    equals `divergence("jsd")`, which took 66 ns per row and token where this took 2.6 (32 rows,
    V 50,257, two cores).

    Args:
        teacher: Rows of the teacher.
        student: Rows of the student; N is the same.
        beta: Weight of the teacher in the mixture, in (0, 1).
        chunk_rows: Rows per chunk; default: as many as `CHUNK_BYTES` holds.
        advance: Called with the number of rows of each chunk when it is done.

    Returns:
        The map. A vocabulary that is padded on one side is cut to the shared tokens.

    Raises:
        ValueError: The two sides hold different numbers of rows.
    """
    num_rows = len(teacher.hidden_LND[0])
    if len(student.hidden_LND[0]) != num_rows:
        raise ValueError(f"teacher has {num_rows} rows, student {len(student.hidden_LND[0])}")
    vocabulary = min(teacher.lens.parts.vocab_size, student.lens.parts.vocab_size)
    if chunk_rows is None:
        chunk_rows = _chunk_rows(student, vocabulary)
    num_teacher, num_student = len(teacher.hidden_LND), len(student.hidden_LND)
    mixture_ST = np.zeros((num_student, num_teacher))
    entropy_S, entropy_T = np.zeros(num_student), np.zeros(num_teacher)
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_rows))
        student_probs = []
        for s, hidden_ND in enumerate(student.hidden_LND):
            probs, entropy = _probs_and_entropy(student.lens, hidden_ND[chunk], vocabulary)
            student_probs.append(probs)
            entropy_S[s] += entropy
        scratch = (torch.empty_like(student_probs[0]), torch.empty_like(student_probs[0]))
        for t, hidden_ND in enumerate(teacher.hidden_LND):
            teacher_probs, entropy = _probs_and_entropy(teacher.lens, hidden_ND[chunk], vocabulary)
            entropy_T[t] += entropy
            for s, probs in enumerate(student_probs):
                mixture_ST[s, t] += _mixture_entropy(teacher_probs, probs, beta, scratch)
        advance(chunk.stop - chunk.start)
    mixture_ST, entropy_S, entropy_T = (
        total / num_rows for total in (mixture_ST, entropy_S, entropy_T)
    )
    divergence_ST = mixture_ST - beta * entropy_T[None, :] - (1 - beta) * entropy_S[:, None]
    return LensMap(
        # Equal layers come out as 0 up to float32 rounding of the entropies, about 1e-6.
        divergence_ST=np.maximum(divergence_ST, 0.0),
        student_entropy_S=entropy_S,
        teacher_entropy_T=entropy_T,
        num_tokens=num_rows,
        num_available=teacher.num_available,
    )


def _chunk_rows(student: LensRows, vocabulary: int) -> int:
    """Returns how many rows of float32 probabilities fit, between 1 and 256."""
    budget = CHUNK_BYTES["cuda" if student.hidden_LND[0].is_cuda else "cpu"]
    per_row = 4 * vocabulary * (len(student.hidden_LND) + WORKING_COPIES)
    return max(1, min(256, budget // per_row))


def _probs_and_entropy(
    lens: LogitLens, hidden_nD: Float[Tensor, "n D"], vocabulary: int
) -> tuple[Float[Tensor, "n V"], float]:
    """Returns a layer's distributions and the sum of their entropies in nats."""
    log_probs_nV = log_probs(lens.logits(hidden_nD)[:, :vocabulary])
    probs_nV = log_probs_nV.exp()
    return probs_nV, -float((probs_nV * log_probs_nV).sum(-1).double().sum())


def _mixture_entropy(
    teacher_probs_nV: Float[Tensor, "n V"],
    student_probs_nV: Float[Tensor, "n V"],
    beta: float,
    scratch: tuple[Tensor, Tensor],
) -> float:
    """Returns the entropy of βp + (1−β)q in nats, summed over rows.

    Args:
        teacher_probs_nV: p.
        student_probs_nV: q.
        beta: β.
        scratch: Two tensors of that shape, overwritten. Made anew for each of some hundred pairs
            they cost more than the arithmetic: fresh memory comes page by page.
    """
    mixture_nV, log_mixture_nV = scratch
    torch.lerp(student_probs_nV, teacher_probs_nV, beta, out=mixture_nV)
    torch.log(mixture_nV.clamp_(min=MIXTURE_FLOOR), out=log_mixture_nV)
    return -float(mixture_nV.mul_(log_mixture_nV).sum(-1).double().sum())


# --- Any kind of divergence ---------------------------------------------------------------------


@torch.no_grad()
def lens_divergences(
    kind: str,
    options: DivergenceOptions,
    *,
    teacher: LensRows,
    student: LensRows,
    advance: Callable[[int], None] = _nothing,
) -> NDArray[np.float64]:
    """Compares layers of two models by the divergence that a lens term would train.

    Args:
        kind: A key of `distilllens.divergence.DIVERGENCES`.
        options: Of the divergence.
        teacher: Rows of the teacher.
        student: Rows of the student; N is the same.
        advance: Called with the number of rows of each chunk when it is done.

    Returns:
        [S, T]: means over the rows in nats.
    """
    if kind == "jsd" and options.top_k is None:  # each head runs once per layer then, not per pair
        jsd = compute_lens_map(teacher, student, beta=options.beta, advance=advance)
        return jsd.divergence_ST
    vocabulary = min(teacher.lens.parts.vocab_size, student.lens.parts.vocab_size)
    num_rows = len(teacher.hidden_LND[0])
    sums_ST = np.zeros((len(student.hidden_LND), len(teacher.hidden_LND)))
    for start in range(0, num_rows, TERM_ROWS):
        chunk = slice(start, min(start + TERM_ROWS, num_rows))
        student_SnD = [student.lens.normalize(hidden_ND[chunk]) for hidden_ND in student.hidden_LND]
        for t, hidden_ND in enumerate(teacher.hidden_LND):
            teacher_nE = teacher.lens.normalize(hidden_ND[chunk])
            terms = [
                Term(
                    student_hidden_ND=student_nD,
                    teacher_hidden_NE=teacher_nE,
                    kind=kind,
                    options=options,
                )
                for student_nD in student_SnD
            ]
            _, sums_S2 = fused_linear_terms(
                terms,
                student=student.lens.unembedding(),
                teacher=teacher.lens.unembedding(),
                vocab_size=vocabulary,
            )
            sums_ST[:, t] += sums_S2[:, 1].double().cpu().numpy()
        advance(chunk.stop - chunk.start)
    return sums_ST / num_rows
