"""Samples side by side: the same prompts, and what each method answered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import LCSseq

from distilllens.errors import DataError
from distilllens.report.scores.load import Method, Score


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of samples.jsonl."""

    index: int
    prompt: str
    references: tuple[str, ...]
    text: str
    rouge_l: float
    """F1 in [0, 1], the best over the references."""
    truncated: bool
    """Cut at max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with its references and the answers, in the order of the methods."""

    index: int
    prompt: str
    references: tuple[str, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples of one test set."""

    test_set: str
    methods: tuple[str, ...]
    """Labels, one for each answer of a sample."""
    seeds: tuple[int, ...]
    """Sampling seed of each method's answers."""
    samples: tuple[Sample, ...]


def collect_samples(
    methods: Sequence[Method], *, sets: Sequence[str], count: int = 10
) -> list[SampleSet]:
    """Puts the first answers of all methods to the same prompts side by side.

    Args:
        methods: Those without samples.jsonl in a set are left out of it.
        sets: Test sets, in this order.
        count: Prompts per set: the first that every method of the set answered.

    Raises:
        DataError: A samples.jsonl is malformed (file and line).
    """
    collected = []
    for test_set in sets:
        chosen = _choose_scores(methods, test_set)
        answers = {label: _read_answers(_samples_file(score)) for label, score in chosen.items()}
        samples = _side_by_side(list(answers.values()), count)
        if samples:
            collected.append(
                SampleSet(
                    test_set=test_set,
                    methods=tuple(chosen),
                    seeds=tuple(score.sampling_seed for score in chosen.values()),
                    samples=samples,
                )
            )
    return collected


def _samples_file(score: Score) -> Path:
    return score.file.with_name("samples.jsonl")


def _choose_scores(methods: Sequence[Method], test_set: str) -> dict[str, Score]:
    """Returns one score with samples per method, of the smallest seed that all share if any."""
    candidates = {
        method.label: [
            score
            for score in method.scores
            if score.test_set == test_set and _samples_file(score).is_file()
        ]
        for method in methods
    }
    candidates = {label: scores for label, scores in candidates.items() if scores}
    if not candidates:
        return {}
    seeds = [{score.sampling_seed for score in scores} for scores in candidates.values()]
    shared = sorted(set.intersection(*seeds))
    chosen = {}
    for label, scores in candidates.items():
        seed = shared[0] if shared else min(score.sampling_seed for score in scores)
        chosen[label] = next(score for score in scores if score.sampling_seed == seed)
    return chosen


def _side_by_side(answers: Sequence[Mapping[int, Answer]], count: int) -> tuple[Sample, ...]:
    if not answers:
        return ()
    first, *others = answers
    samples = []
    for index, answer in first.items():
        same = [a[index] for a in others if index in a and a[index].prompt == answer.prompt]
        if len(same) == len(others):
            samples.append(
                Sample(
                    index=index,
                    prompt=answer.prompt,
                    references=answer.references,
                    answers=(answer, *same),
                )
            )
        if len(samples) == count:
            break
    return tuple(samples)


def _read_answers(path: Path) -> dict[int, Answer]:
    """Reads samples.jsonl by index, in the file's order."""
    answers = {}
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            answer = _parse_answer(json.loads(raw.decode("utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: not a sample of evaluate.py: {type(error).__name__} {error}",
                fix="evaluate again with --overwrite",
            ) from None
        answers[answer.index] = answer
    return answers


def _parse_answer(line: Mapping[str, Any]) -> Answer:
    references = line["references"]
    if not isinstance(references, list):
        raise TypeError(f"references={references!r:.40} is not a list")
    return Answer(
        index=int(line["index"]),
        prompt=str(line["prompt"]),
        references=tuple(str(reference) for reference in references),
        text=str(line["answer"]),
        rouge_l=float(line["rougeL"]),
        truncated=bool(line["truncated"]),
    )


def shown_prompt(prompt: str) -> str:
    """Returns a prompt without the template's fixed first and last line; other prompts as is."""
    _, found, rest = prompt.partition("### Instruction:\n")
    return (rest if found else prompt).removesuffix("### Response:\n").strip()


def marked_words(text: str, reference: str) -> list[tuple[str, bool]]:
    """Cuts a text into pieces, and tells of each whether the reference has it in the same order.

    The pieces joined are the text. Words are compared in lower case and without stemming; marked is
    what a longest common subsequence of both holds, which is what Rouge-L counts.
    """
    pieces = re.split(r"(\w+)", text)
    at = range(1, len(pieces), 2)  # split puts what it split at in the odd places
    own = [pieces[place].lower() for place in at]
    theirs = [word.lower() for word in re.findall(r"\w+", reference)]
    shared: set[int] = set()
    for block in LCSseq.opcodes(own, theirs):
        if block.tag == "equal":
            shared.update(at[block.src_start : block.src_end])
    return [(piece, place in shared) for place, piece in enumerate(pieces) if piece]
