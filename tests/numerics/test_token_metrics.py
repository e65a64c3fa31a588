"""Token metrics and exposure bias: float64 closed forms, enumerations, odd shapes, every dtype."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilllens.config import SamplingConfig
from distilllens.data.records import Record
from distilllens.errors import ConfigError, NumericsError
from distilllens.evaluation.measures.exposure_bias import (
    describe_excess,
    excess_accumulated_error,
    measure_exposure_bias,
    plain_sampling,
)
from distilllens.evaluation.measures.teacher_forcing import TokenScorer, TokenText
from distilllens.evaluation.measures.token_metrics import compute_token_metrics, encode_references

VOCAB = 37
TEXTS = [
    TokenText(prompt_ids=[5, 6, 7], response_ids=[8, 9, 0]),
    TokenText(prompt_ids=[1], response_ids=[2]),
    TokenText(prompt_ids=list(range(1, 30)), response_ids=[3, 3, 3, 3, 0]),
    TokenText(prompt_ids=[4, 4], response_ids=list(range(20, 36))),
    TokenText(prompt_ids=[36], response_ids=[]),
]
NUM_TOKENS = 3 + 1 + 5 + 16


def ignore(_: int) -> None:
    """Takes a progress nobody looks at."""


@pytest.fixture(scope="module")
def models(
    tiny_gpt2: Callable[..., PreTrainedModel], tiny_llama: Callable[..., PreTrainedModel]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher whose heads are padded differently, with spread-out predictions."""
    student, teacher = tiny_gpt2(vocab=VOCAB + 3, seed=3), tiny_llama(vocab=VOCAB + 11, seed=4)
    with torch.no_grad():
        for model in (student, teacher):
            model.get_output_embeddings().weight.mul_(40)
    return student.double(), teacher.double()


def distributions(model: PreTrainedModel, text: TokenText) -> list[Categorical]:
    """The model's own logits, one text alone, over the known tokens."""
    ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :, :VOCAB].double()
    first = len(text.prompt_ids) - 1
    return [Categorical(logits=logits[first + i]) for i in range(len(text.response_ids))]


def expected_metrics(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, float]:
    rows = [
        (q, p, target)
        for text in TEXTS
        for q, p, target in zip(
            distributions(student, text),
            distributions(teacher, text),
            text.response_ids,
            strict=True,
        )
    ]
    assert len(rows) == NUM_TOKENS
    nll = np.mean([-q.log_prob(torch.tensor(target)).item() for q, _, target in rows])
    sure = [(q.probs.max().item(), int(q.probs.argmax()) == target) for q, _, target in rows]
    ece = 0.0
    for m in range(15):
        inside = [(c, hit) for c, hit in sure if m / 15 < c <= (m + 1) / 15]
        if inside:
            gap = abs(sum(c for c, _ in inside) - sum(hit for _, hit in inside))
            ece += gap / NUM_TOKENS
    entropy = np.mean([q.entropy().item() for q, _, _ in rows])
    teacher_entropy = np.mean([p.entropy().item() for _, p, _ in rows])
    agree = np.mean([int(q.probs.argmax()) == int(p.probs.argmax()) for q, p, _ in rows])
    return {
        "nll": float(nll),
        "perplexity": math.exp(nll),
        "top1": 100 * float(np.mean([hit for _, hit in sure])),
        "ece": 100 * float(ece),
        "entropy": float(entropy),
        "teacher_entropy": float(teacher_entropy),
        "entropy_gap": float(entropy - teacher_entropy),
        "kl_teacher_student": float(np.mean([kl_divergence(p, q).item() for q, p, _ in rows])),
        "kl_student_teacher": float(np.mean([kl_divergence(q, p).item() for q, p, _ in rows])),
        "agreement": 100 * float(agree),
    }


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel | None, **options: Any
) -> dict[str, Any]:
    return compute_token_metrics(
        TokenScorer(student, num_tokens=VOCAB),
        TEXTS,
        teacher=None if teacher is None else TokenScorer(teacher, num_tokens=VOCAB),
        advance=ignore,
        batch_tokens=40,  # now and then fewer than batch_size fit
        **options,
    )


@pytest.mark.parametrize(("batch_size", "chunk_rows"), [(1, 1), (2, 7), (3, None), (64, 25)])
def test_float64_closed_form(
    models: tuple[PreTrainedModel, PreTrainedModel], batch_size: int, chunk_rows: int | None
) -> None:
    measured = measure(*models, batch_size=batch_size, chunk_rows=chunk_rows)
    assert measured["num_tokens"] == NUM_TOKENS
    expected = expected_metrics(*models)
    assert measured["metrics"] == pytest.approx(expected, rel=1e-10)
    assert expected["kl_teacher_student"] > 0.05  # the case says something
    assert expected["ece"] > 0.05


def fail_over(
    texts: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int]]:
    """Gives the device so little memory; returns the sizes of batches and chunks that fitted."""
    bodies: list[int] = []
    heads: list[int] = []
    body, head = TokenScorer.rows, TokenScorer.log_probs

    def run_body(self: TokenScorer, input_ids_BT: torch.Tensor, rows_N: torch.Tensor) -> Any:
        if len(input_ids_BT) > texts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        bodies.append(len(input_ids_BT))
        return body(self, input_ids_BT, rows_N)

    def run_head(self: TokenScorer, hidden_nD: torch.Tensor) -> Any:
        if len(hidden_nD) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        heads.append(len(hidden_nD))
        return head(self, hidden_nD)

    monkeypatch.setattr(TokenScorer, "rows", run_body)
    monkeypatch.setattr(TokenScorer, "log_probs", run_head)
    return bodies, heads


@pytest.mark.parametrize(("texts", "rows"), [(1, 99), (9, 1), (2, 3)])
def test_too_little_memory_halves_batches_and_chunks(
    models: tuple[PreTrainedModel, PreTrainedModel],
    texts: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = expected_metrics(*models)
    bodies, heads = fail_over(texts, rows, monkeypatch)
    advanced: list[int] = []
    student, teacher = (TokenScorer(model, num_tokens=VOCAB) for model in models)
    measured = compute_token_metrics(
        student, TEXTS, teacher=teacher, batch_size=5, batch_tokens=200, advance=advanced.append
    )
    assert measured["metrics"] == pytest.approx(expected, rel=1e-10)
    assert measured["num_tokens"] == NUM_TOKENS
    assert sum(advanced) == len(TEXTS)
    assert max(bodies) <= texts and max(heads) <= rows
    assert sum(bodies) == 2 * len(TEXTS)  # once through each model, and not a text twice
    assert "out of memory with" in caplog.text


def test_no_room_for_one_is_told_as_in_generation(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for texts, rows, one in ((0, 9, "one text of 34 tokens"), (9, 0, "one row")):
        with monkeypatch.context() as patch:
            fail_over(texts, rows, patch)
            with pytest.raises(ConfigError, match=f"not even {one}") as caught:
                measure(*models, batch_size=2)
        assert caught.value.why.startswith("CUDA out of memory")
        assert "more" not in caught.value.why


def test_without_a_teacher_the_same_numbers_of_the_student(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    alone = measure(models[0], None, batch_size=2)["metrics"]
    both = measure(*models, batch_size=2)["metrics"]
    assert alone == {name: both[name] for name in alone}
    assert set(both) - set(alone) == {
        *("teacher_entropy", "entropy_gap", "agreement"),
        *("kl_teacher_student", "kl_student_teacher"),
    }


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrow_models(
    models: tuple[PreTrainedModel, PreTrainedModel], dtype: torch.dtype, rel: float
) -> None:
    expected = expected_metrics(*models)
    student, teacher = copy.deepcopy(models)
    modules: tuple[torch.nn.Module, ...] = (student, teacher)
    for module in modules:
        module.to(dtype)
    measured = measure(student, teacher, batch_size=3)["metrics"]
    smooth = ("nll", "entropy", "teacher_entropy", "kl_teacher_student", "kl_student_teacher")
    for name in smooth:
        assert measured[name] == pytest.approx(expected[name], rel=rel)


def test_reliability_bins_add_up(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    measured = measure(*models, batch_size=2)
    bins = measured["reliability"]
    assert [(b["lower"], b["upper"]) for b in bins] == [(m / 15, (m + 1) / 15) for m in range(15)]
    assert sum(b["tokens"] for b in bins) == NUM_TOKENS
    filled = [b for b in bins if b["tokens"]]
    assert all(b["lower"] < b["confidence"] <= b["upper"] for b in filled)
    ece = sum(b["tokens"] * abs(b["accuracy"] - b["confidence"]) for b in filled) / NUM_TOKENS
    assert measured["metrics"]["ece"] == pytest.approx(100 * ece)
    hits = sum(b["tokens"] * b["accuracy"] for b in filled) / NUM_TOKENS
    assert measured["metrics"]["top1"] == pytest.approx(100 * hits)
    assert all(b["confidence"] is None for b in bins if not b["tokens"])


def test_a_model_against_itself(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    metrics = measure(models[0], models[0], batch_size=2)["metrics"]
    assert metrics["kl_teacher_student"] == metrics["kl_student_teacher"] == 0.0
    assert (metrics["agreement"], metrics["entropy_gap"]) == (100.0, 0.0)


def test_nan_weights_are_an_error(tiny_gpt2: Callable[..., PreTrainedModel]) -> None:
    model = tiny_gpt2(vocab=VOCAB)
    scorer = TokenScorer(model, num_tokens=VOCAB)
    scorer.check = ignore  # type: ignore[method-assign,assignment]  # it would find them first
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        compute_token_metrics(scorer, TEXTS, batch_size=2, batch_tokens=64, advance=ignore)


def test_references_are_encoded_as_in_training(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        Record(instruction="Sort.", input="", outputs=("apple, fig", "another")),
        Record(instruction="Say nothing.", input="", outputs=(" ",)),
        Record(instruction="Sort.", input="", outputs=("fig " * 500,)),
    ]
    references = encode_references(tiny_tokenizer, records, max_length=200)
    assert (len(references.texts), references.num_empty, references.num_cut) == (2, 1, 1)
    first, second = references.texts
    eos = tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(first.prompt_ids) == records[0].prompt
    assert tiny_tokenizer.decode(first.response_ids[:-1]) == "apple, fig"
    assert first.response_ids[-1] == eos
    assert len(second) == 200
    assert eos not in second.response_ids


# --- Exposure bias ------------------------------------------------------------------------------

WORDS = ("<eos>", "a", "b", "c", "d")
LONGEST = 4
PROMPT = "a b"


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="d"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="module")
def speakers(tiny_gpt2: Callable[..., PreTrainedModel]) -> list[PreTrainedModel]:
    """A student and a teacher of five words, in float64, far from uniform and from each other."""
    sizes = {"vocab": 5, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
    models = [tiny_gpt2(**sizes, seed=seed) for seed in (5, 6)]
    for model in models:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.dim() == 2 else 1)
    return [model.double() for model in models]


def enumerate_errors(
    student: PreTrainedModel, teacher: PreTrainedModel, writer: PreTrainedModel
) -> list[float]:
    """Expected KL(teacher‖student) at each step along the writer's answers, all of them."""
    steps = [0.0] * LONGEST
    for step in range(LONGEST):
        for prefix in itertools.product(range(1, 5), repeat=step):  # 0 would have ended it
            ids = torch.tensor([[1, 2, *prefix]])
            with torch.no_grad():
                log_w = writer(input_ids=ids).logits[0].log_softmax(-1)
                q, p = (
                    Categorical(logits=model(input_ids=ids).logits[0, -1])
                    for model in (student, teacher)
                )
            chance = sum(log_w[1 + i, token].item() for i, token in enumerate(prefix))
            steps[step] += math.exp(chance) * kl_divergence(p, q).item()
    return steps


def test_sampled_estimate_agrees_with_the_enumeration(
    speakers: list[PreTrainedModel], words: PreTrainedTokenizerFast
) -> None:
    student, teacher = speakers
    count = 4000
    advanced: list[int] = []
    measured = measure_exposure_bias(
        TokenScorer(student, num_tokens=5),
        TokenScorer(teacher, num_tokens=5),
        words,
        [PROMPT] * count,
        # What evaluation's own settings filter must not filter here.
        settings=SamplingConfig(
            max_new_tokens=LONGEST, batch_size=1000, temperature=0.1, no_repeat_ngram_size=2
        ),
        seed=7,
        max_prompt_length=8,
        advance=advanced.append,
    )
    assert sum(advanced) == 4 * count
    own = np.cumsum(enumerate_errors(student, teacher, student))
    known = np.cumsum(enumerate_errors(student, teacher, teacher))
    curve = measured["curve"]
    assert curve["length"] == [1, 2, 3, 4]
    expected = 100 * (own - known) / known
    error = measured["metrics"]["ex_acc_err_se"]
    assert abs(measured["metrics"]["ex_acc_err"] - expected[-1]) < 3.5 * error
    assert abs(expected[-1]) > 5 * error  # the case says something
    # All first steps have the same context.
    assert curve["student_error"][0] == pytest.approx(own[0], rel=1e-9)
    assert curve["teacher_error"][0] == pytest.approx(known[0], rel=1e-9)
    assert curve["ex_acc_err"][0] == pytest.approx(0.0, abs=1e-6)
    assert curve["student_error"] == pytest.approx(own, rel=0.05)
    assert curve["teacher_error"] == pytest.approx(known, rel=0.05)
    # Chain rule: l·ε(l) is the KL of the two distributions of whole answers.
    assert known[-1] == pytest.approx(whole_answers_kl(student, teacher), rel=1e-9)


def whole_answers_kl(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    total = 0.0
    for length in range(1, LONGEST + 1):
        ends = range(5) if length == LONGEST else (0,)
        for *body, last in itertools.product(*[range(1, 5)] * (length - 1), ends):
            ids = torch.tensor([[1, 2, *body]])
            chances = []
            for model in (teacher, student):
                with torch.no_grad():
                    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
                tokens = [*body, last]
                chances.append(sum(log_p[1 + i, t].item() for i, t in enumerate(tokens)))
            total += math.exp(chances[0]) * (chances[0] - chances[1])
    return total


def test_too_little_memory_changes_no_exposure_bias(
    speakers: list[PreTrainedModel],
    words: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = (TokenScorer(model, num_tokens=5) for model in speakers)

    def measured() -> dict[str, Any]:
        return measure_exposure_bias(
            student,
            teacher,
            words,
            [PROMPT] * 12,
            settings=SamplingConfig(max_new_tokens=LONGEST, batch_size=8),
            seed=1,
            max_prompt_length=8,
            advance=ignore,
        )

    expected = measured()["curve"]
    bodies, heads = fail_over(3, 2, monkeypatch)
    for name, values in measured()["curve"].items():
        assert values == pytest.approx(expected[name], rel=1e-9)
    assert max(bodies) <= 3 and max(heads) <= 2


def test_equal_models_have_no_quotient(
    speakers: list[PreTrainedModel], words: PreTrainedTokenizerFast
) -> None:
    scorer = TokenScorer(speakers[0], num_tokens=5)
    measured = measure_exposure_bias(
        scorer,
        scorer,
        words,
        [PROMPT] * 3,
        settings=SamplingConfig(max_new_tokens=LONGEST, batch_size=2),
        seed=1,
        max_prompt_length=8,
        advance=ignore,
    )
    assert set(measured["metrics"].values()) == {None}
    assert "rounding" in measured["reason"]
    assert set(measured["curve"]["ex_acc_err"]) == {None}


def test_by_hand() -> None:
    own = np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])  # the second answer ends at once
    known = np.array([[1.0, 0.5, 0.5], [1.0, 1.0, 0.0]])
    measured = excess_accumulated_error(own, known, np.array([2, 1]), np.array([3, 2]))
    curve = measured["curve"]
    assert curve["length"] == [1, 2, 3]
    assert curve["student_error"] == [1.0, 2.0, 2.0]
    assert curve["teacher_error"] == [1.0, 1.75, 2.0]
    assert curve["ex_acc_err"] == pytest.approx([0.0, 100 * 0.25 / 1.75, 0.0])
    assert curve["student_answers"] == [2, 1, 0]
    assert curve["teacher_answers"] == [2, 2, 1]
    assert measured["mean_tokens"] == {"student": 1.5, "teacher": 2.5}
    metrics = measured["metrics"]
    assert metrics["ex_acc_err"] == pytest.approx(0.0)
    assert metrics["ex_acc_err_per_token"] == pytest.approx(100 * ((2 / 1.5) / (2 / 2.5) - 1))
    # Sums by prompt are 3, 1 and 2, 2; their residuals 1, −1 have the sd √2.
    assert metrics["ex_acc_err_se"] == pytest.approx(100 * math.sqrt(2) / (2 * math.sqrt(2)))
    told = "0.00 % ± 50.00 excess accumulated error (standard error, n = 2 prompts)"
    assert describe_excess(measured, 2) == told
    alone = excess_accumulated_error(own[:1], known[:1], np.array([2]), np.array([3]))
    assert describe_excess(alone, 1) == "50.00 % excess accumulated error (n = 1 prompts)"


def test_standard_error_is_that_of_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(400):
        known = generator.gamma(2.0, size=(200, 1))
        own = known * 1.3 + generator.gamma(1.0, size=(200, 1))
        ones = np.ones(200, dtype=int)
        metrics = excess_accumulated_error(own, known, ones, ones)["metrics"]
        estimates.append(metrics["ex_acc_err"])
        errors.append(metrics["ex_acc_err_se"])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_settings_are_plain() -> None:
    settings = plain_sampling(SamplingConfig(do_sample=False, top_k=3, top_p=0.5, max_new_tokens=9))
    assert settings.do_sample
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    assert (settings.no_repeat_ngram_size, settings.max_new_tokens) == (0, 9)
