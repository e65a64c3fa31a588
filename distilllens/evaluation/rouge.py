"""Rouge-L and exact match of an answer against its references.

Rouge-L is that of the package rouge-score (``RougeScorer(["rougeL"], use_stemmer=True)``, F1), bit
for bit: its own tokenizer cuts the words, so only the two slow parts are exchanged. The Porter
stemmer is cached by word, and the longest common subsequence comes from rapidfuzz (bit-parallel,
C++) in place of a Python table of len(reference) × len(prediction).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache

from rapidfuzz.distance import LCSseq
from rouge_score import tokenize, tokenizers


class _CachedStemmer:
    """rouge-score's Porter stemmer, with a memory: 65,536 words take about 10 MB."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=65_536)(tokenizers.porter.PorterStemmer().stem)


_STEMMER = _CachedStemmer()


@lru_cache(maxsize=8_192)
def _tokens(text: str) -> tuple[str, ...]:
    """Returns the stemmed words of a text; cached, because references recur with every seed."""
    return tuple(tokenize.tokenize(text, _STEMMER))


def forget_texts() -> None:
    """Empties both memories, for measurements."""
    _tokens.cache_clear()
    _STEMMER.stem.cache_clear()


def rouge_l(prediction: str, reference: str) -> float:
    """Returns the F1 of Rouge-L with stemming, in [0, 1].

    Texts without a word of a–z and 0–9 have no tokens and score 0, also against each other.
    """
    prediction_tokens, reference_tokens = _tokens(prediction), _tokens(reference)
    if not prediction_tokens or not reference_tokens:
        return 0.0
    common = LCSseq.similarity(reference_tokens, prediction_tokens)
    if common == 0:
        return 0.0
    # The order of the operations is that of rouge-score: any other differs in the last bit.
    precision = common / len(prediction_tokens)
    recall = common / len(reference_tokens)
    return 2 * precision * recall / (precision + recall)


def rouge_l_max(prediction: str, references: Sequence[str]) -> float:
    """Returns the best Rouge-L F1 over the references, in [0, 1].

    Raises:
        ValueError: There is no reference.
    """
    return max(rouge_l(prediction, reference) for reference in references)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lowers the case, removes ASCII punctuation, makes every run of white space one blank.

    This is the normalisation of Super-NaturalInstructions' ``compute_metrics.py`` (Tk-Instruct).
    SQuAD's, from which it comes, removes the articles a, an and the too; these are kept here.
    Note that "1.5" and "15" become equal.
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Tells whether the normalised answer equals any of the normalised references."""
    normalized = normalize_answer(prediction)
    return any(normalized == normalize_answer(reference) for reference in references)
