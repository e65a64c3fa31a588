"""Rouge-L against rouge-score itself, bit for bit; exact match against hand-made cases."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from distilllens.data.skills.records import generate_skills
from distilllens.evaluation.rouge import exact_match, normalize_answer, rouge_l, rouge_l_max

SCORER = RougeScorer(["rougeL"], use_stemmer=True)
DOLLY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dolly" / "valid.jsonl"

WORDS = [
    *("the", "cat", "running", "quickly", "nationalization", "generalizations", "happily", "flies"),
    *("dying", "news", "skis", "agreed", "hopping", "relational", "42", "3rd", "U.S.", "don't"),
    *("naïve", "İstanbul", "Straße", "你好", "é", "--", "a", "I", "\u00a0"),
]


def oracle(prediction: str, reference: str) -> float:
    return SCORER.score(reference, prediction)["rougeL"].fmeasure


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(0, 40)))


@given(st.text(), st.text())
def test_any_unicode_equals_rouge_score(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == oracle(prediction, reference)


@given(st.lists(st.sampled_from(WORDS)), st.lists(st.sampled_from(WORDS)))
@settings(max_examples=300)
def test_shared_words_equal_rouge_score(prediction: list[str], reference: list[str]) -> None:
    texts = " ".join(prediction), " ".join(reference)
    assert rouge_l(*texts) == oracle(*texts)


def test_thousands_of_random_sentences_equal_rouge_score() -> None:
    rng = random.Random(7)
    pairs = [(random_text(rng), random_text(rng)) for _ in range(2500)]
    scores = [rouge_l(*pair) for pair in pairs]
    assert scores == [oracle(*pair) for pair in pairs]
    assert len(set(scores)) > 500  # the pairs do tell implementations apart


@pytest.mark.skipif(not DOLLY.is_file(), reason="shared/data/dolly/valid.jsonl is not there")
def test_real_answers_equal_rouge_score() -> None:
    lines = DOLLY.read_text(encoding="utf-8").splitlines()[:150]
    outputs = [json.loads(line)["output"] for line in lines]
    texts = [text[0] if isinstance(text, list) else text for text in outputs]
    texts = [text[:600] for text in texts]
    for prediction, reference in pairwise(texts):
        assert rouge_l(prediction, reference) == oracle(prediction, reference)


def test_ten_thousand_pairs_equal_rouge_score() -> None:
    """Generated answers and sentences, cut, shuffled, joined; several references; one long pair."""
    rng = random.Random(12)
    rows = generate_skills(seed=5, train=700, dev=1, test=1).train
    texts = [str(row["output"]) for row in rows]
    texts += [random_text(rng) for _ in range(300)]
    for text in (" ".join(rng.sample(texts, 5)) for _ in range(500)):
        words = text.split()
        answers = [
            *("", text, text[: rng.randrange(len(text))], " ".join(rng.sample(words, len(words)))),
            *(rng.choice(texts) for _ in range(3)),
        ]
        references = [text, rng.choice(texts), "".join(rng.sample(text, 20))]
        for answer in answers:
            scores = [oracle(answer, reference) for reference in references]  # 10,500 in all
            assert [rouge_l(answer, reference) for reference in references] == scores
            assert rouge_l_max(answer, references) == max(scores)
    long = [" ".join(rng.choices(texts, k=150)) for _ in range(2)]
    assert rouge_l(*long) == oracle(*long) > 0


def test_f1_of_a_hand_counted_case() -> None:
    # Longest common subsequence "police the gunman": 3 of 4 predicted, 3 of 5 reference words.
    score = rouge_l("police kill the gunman", "police have ended the gunman")
    assert score == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


@pytest.mark.parametrize(
    ("prediction", "reference"), [("", ""), ("", "a"), ("a", ""), ("?!", "?!")]
)
def test_texts_without_words_score_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == 0.0


def test_best_reference_counts() -> None:
    assert rouge_l_max("a b", ["x y", "a b", "a c"]) == 1.0
    with pytest.raises(ValueError):
        rouge_l_max("a", [])


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("  The Answer,\nis: 42! ", ["nothing", "the answer is 42"], True),
        ("an apple", ["apple"], False),  # articles stay, unlike in SQuAD
        ("Paris", ["paris."], True),
        ("paris france", ["paris"], False),
        ("", ["yes"], False),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: bool) -> None:
    assert exact_match(prediction, references) is expected


@given(st.text())
def test_normalisation_is_idempotent(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
