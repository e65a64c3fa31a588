"""Exposure bias as excess accumulated error (Arora et al. 2022, as in MiniLLM, Gu et al. 2024).

A student q that imitates a teacher p errs at each step by KL(p‖q) of the next token. Along texts of
the teacher, the contexts that distillation on its texts knows, the error adds up to

    l·ε(l) = Σ_{t ≤ l} E_{y<t ~ p} KL(p(·|y<t, x)‖q(·|y<t, x)),

and along its own texts, the contexts it meets when it writes, to

    R(l) = Σ_{t ≤ l} E_{y<t ~ q} KL(p(·|y<t, x)‖q(·|y<t, x)).

ExAccErr(l) = (R(l) − l·ε(l)) / (l·ε(l)) × 100 % is what the difference of contexts alone adds.

Where an answer has ended there is no next token, so nothing is added: l·ε(l) is then exactly the
KL of the two distributions of whole answers cut at l tokens (chain rule), and every sum is an
unbiased mean over answers. MiniLLM's code divides, for each prompt and step, by those of its ten
answers that still go on; with one answer a prompt that is the same. A student whose answers are
shorter than the teacher's has fewer steps to err in; ``ex_acc_err_per_token``, the same quotient
of the errors per token, is free of that.

Shapes: P prompts, L longest answer in tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distilllens.config import SamplingConfig
from distilllens.data.encode import encode_prompts
from distilllens.divergence import forward_kl
from distilllens.evaluation.generation import generate_answers, get_eos_id
from distilllens.evaluation.measures.teacher_forcing import (
    Chunk,
    TokenScorer,
    TokenText,
    score_texts,
)

ROUNDING = 1e-6
"""Nats per token: a smaller error is that of float32, and its quotients mean nothing."""


def plain_sampling(settings: SamplingConfig) -> SamplingConfig:
    """Returns the settings with which answers are samples of the model itself."""
    return dataclasses.replace(
        settings, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=0
    )


def measure_exposure_bias(
    student: TokenScorer,
    teacher: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    settings: SamplingConfig,
    seed: int,
    max_prompt_length: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Lets both models answer, measures both texts under both models.

    Args:
        student: q.
        teacher: p, over the same tokens.
        tokenizer: Of both.
        prompts: Complete prompts.
        settings: Longest answer and batch size; temperature and filters are not taken from here.
        seed: Sampling seed, the same for both models.
        max_prompt_length: Longest prompt in tokens.
        advance: Called with numbers of prompts: four times over all of them.

    Returns:
        As `excess_accumulated_error`.

    Raises:
        ConfigError, NumericsError: As `generate_answers` and `score_texts`.
    """
    prompt_ids = encode_prompts(tokenizer, prompts)
    errors, lengths = [], []
    for writer in (student, teacher):
        answers = generate_answers(
            writer.model,
            tokenizer,
            prompts,
            settings=plain_sampling(settings),
            seed=seed,
            max_prompt_length=max_prompt_length,
            progress=advance,
        )
        # What was sampled, with the end-of-text token: ending is a choice as any other.
        texts = [
            TokenText(
                prompt_ids=prompt,
                response_ids=[*answer.ids, *([] if answer.truncated else [get_eos_id(tokenizer)])],
            )
            for prompt, answer in zip(prompt_ids, answers, strict=True)
        ]
        errors.append(
            _step_errors(
                student,
                teacher,
                texts,
                settings=settings,
                advance=advance,
            )
        )
        lengths.append(np.array([len(text.response_ids) for text in texts]))
    student_errors_PL, teacher_errors_PL = errors
    return excess_accumulated_error(student_errors_PL, teacher_errors_PL, *lengths)


def _step_errors(
    student: TokenScorer,
    teacher: TokenScorer,
    texts: Sequence[TokenText],
    *,
    settings: SamplingConfig,
    advance: Callable[[int], None],
) -> NDArray[np.float64]:
    """Returns KL(teacher‖student) in nats, [P, L]: 0 where an answer has ended."""
    shape, device = (len(texts), settings.max_new_tokens), student.model.device
    errors_PL = torch.zeros(shape, dtype=torch.float64, device=device)
    for texts_n, positions_n, errors_n in score_texts(
        [student, teacher],
        texts,
        measure=_chunk_errors,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        advance=advance,
    ):
        errors_PL[texts_n, positions_n] = errors_n
    return errors_PL.cpu().numpy()


def _chunk_errors(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the places of a chunk's rows, and KL(teacher‖student) there."""
    log_q, log_p = chunk.log_probs_nV
    return chunk.texts_n, chunk.positions_n, forward_kl(log_p, log_q).double()


def excess_accumulated_error(
    student_errors_PL: NDArray[np.float64],
    teacher_errors_PL: NDArray[np.float64],
    student_lengths_P: NDArray[np.int64],
    teacher_lengths_P: NDArray[np.int64],
) -> dict[str, Any]:
    """Returns the excess accumulated error by length, from errors by prompt and step.

    Args:
        student_errors_PL: KL(p‖q) along the student's answers, 0 behind their ends.
        teacher_errors_PL: The same along the teacher's, same prompts.
        student_lengths_P: Tokens of the student's answers, end-of-text token included.
        teacher_lengths_P: Tokens of the teacher's.

    Returns:
        ``metrics``: ``ex_acc_err`` at the longest length, its standard error over prompts
        ``ex_acc_err_se`` (None for one prompt), and ``ex_acc_err_per_token``; in percent, or None
        with a ``reason``. ``curve``: for each length l that some answer has the errors R(l) and
        l·ε(l) in nats, ExAccErr(l), and how many answers of each model go on to l.
        ``mean_tokens``: of both models' answers.
    """
    longest = int(max(student_lengths_P.max(), teacher_lengths_P.max()))
    own_L = student_errors_PL.mean(0).cumsum()[:longest]
    known_L = teacher_errors_PL.mean(0).cumsum()[:longest]
    own, known = float(own_L[-1]), float(known_L[-1])
    own_tokens, known_tokens = float(student_lengths_P.mean()), float(teacher_lengths_P.mean())
    metrics: dict[str, float | None] = dict.fromkeys(
        ("ex_acc_err", "ex_acc_err_se", "ex_acc_err_per_token")
    )
    reason = None
    if known / known_tokens > ROUNDING:
        metrics["ex_acc_err"] = _excess(own, known)
        metrics["ex_acc_err_se"] = _standard_error(student_errors_PL, teacher_errors_PL)
        metrics["ex_acc_err_per_token"] = _excess(own / own_tokens, known / known_tokens)
    else:
        reason = (
            f"along the teacher's answers the two models differ by {known / known_tokens:.1e} "
            f"nats a token, no more than rounding: the quotient means nothing"
        )
    steps = np.arange(1, longest + 1)
    return {
        "metrics": metrics,
        "reason": reason,
        "mean_tokens": {"student": own_tokens, "teacher": known_tokens},
        "curve": {
            "length": steps.tolist(),
            "student_error": own_L.tolist(),
            "teacher_error": known_L.tolist(),
            "ex_acc_err": [
                _excess(r, e) if e > ROUNDING * step else None
                for step, r, e in zip(steps.tolist(), own_L, known_L, strict=True)
            ],
            "student_answers": (student_lengths_P >= steps[:, None]).sum(1).tolist(),
            "teacher_answers": (teacher_lengths_P >= steps[:, None]).sum(1).tolist(),
        },
    }


def describe_excess(measured: Mapping[str, Any], num_prompts: int) -> str:
    """Returns the excess accumulated error with its noise, or why there is none, for the screen."""
    metrics = measured["metrics"]
    excess, error = metrics["ex_acc_err"], metrics["ex_acc_err_se"]
    if excess is None:
        return str(measured["reason"])
    spread, what = ("", "") if error is None else (f" ± {error:.2f}", "standard error, ")
    return f"{excess:.2f} %{spread} excess accumulated error ({what}n = {num_prompts} prompts)"


def _excess(own: float, known: float) -> float:
    return 100 * float(own / known - 1)


def _standard_error(
    student_errors_PL: NDArray[np.float64], teacher_errors_PL: NDArray[np.float64]
) -> float | None:
    """Returns the standard error of ExAccErr over prompts: delta method of a quotient of means.

    Both answers of a prompt stay together, as they depend on the prompt, and on the same noise.
    """
    own_P, known_P = student_errors_PL.sum(1), teacher_errors_PL.sum(1)
    count, known = len(known_P), float(known_P.mean())
    if count < 2:
        return None
    rest_P = own_P - own_P.mean() / known * known_P
    return 100 * float(rest_P.std(ddof=1)) / (known * math.sqrt(count))
