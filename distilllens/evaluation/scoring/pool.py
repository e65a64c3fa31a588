"""Scores of answers: lines of samples.jsonl, their means, processes that score meanwhile."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from distilllens.data.records import Record
from distilllens.evaluation.generation import Answer
from distilllens.evaluation.rouge import exact_match, rouge_l_max
from distilllens.evaluation.scoring.text_metrics import compute_text_metrics

MIN_PAIRS = 20_000
"""Pairs of an answer and a reference from which on processes are started. One costs about a second
of CPU time before its first score; this process scores about 18,000 pairs in that time."""


class Score(NamedTuple):
    """The scores of one answer."""

    rouge_l: float
    """F1 with the best reference, in [0, 1]."""
    exact_match: bool


def score_answer(answer: str, references: Sequence[str]) -> Score:
    """Scores one answer; what `Scorer`'s processes do too."""
    return Score(rouge_l_max(answer, references), exact_match(answer, references))


def score_samples(
    answers: Sequence[Answer],
    records: Sequence[Record],
    scores: Sequence[Score] | None = None,
) -> list[dict[str, Any]]:
    """Returns the line of samples.jsonl of each answer; ``rougeL`` is in [0, 1].

    Args:
        answers: In the order of the records.
        records: What they answer.
        scores: Theirs, where they are known; default: computed here.
    """
    if scores is None:
        pairs = zip(answers, records, strict=True)
        scores = [score_answer(answer.text, record.outputs) for answer, record in pairs]
    return [
        {
            "index": index,
            "prompt": record.prompt,
            "references": list(record.outputs),
            "answer": answer.text,
            "num_tokens": answer.num_tokens,
            "truncated": answer.truncated,
            "rougeL": score.rouge_l,
            "exact_match": score.exact_match,
        }
        for index, (answer, record, score) in enumerate(zip(answers, records, scores, strict=True))
    ]


def compute_metrics(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the means over samples.

    Returns:
        ``rougeL`` and ``exact_match`` × 100, ``num`` samples, ``truncated`` of them,
        ``mean_tokens``, and what `compute_text_metrics` finds.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("no samples to score")
    count = len(samples)
    # fsum is exact, so shares of a set, gathered in any order, give the same mean.
    return {
        "rougeL": 100 * math.fsum(sample["rougeL"] for sample in samples) / count,
        "exact_match": 100 * sum(sample["exact_match"] for sample in samples) / count,
        "num": count,
        "truncated": sum(sample["truncated"] for sample in samples),
        "mean_tokens": sum(sample["num_tokens"] for sample in samples) / count,
        **compute_text_metrics(samples),
    }


def score(answers: Sequence[Answer], records: Sequence[Record]) -> dict[str, float]:
    """Returns the metrics of answers to records; see `compute_metrics`."""
    return compute_metrics(score_samples(answers, records))


class Scorer:
    """Scores answers while the next ones are generated.

    multiprocessing would load the main module, and torch with it, in each process again, and leave
    its processes behind when this one is killed. These are plain ones with two pipes, in a session
    of their own: Ctrl-C reaches this process only, and the end of their input ends them.

    Args:
        workers: Processes; 0: all is scored in this one.
        pairs: Answers × references that will come; fewer than `MIN_PAIRS` are scored here too.
    """

    def __init__(self, workers: int, *, pairs: int) -> None:
        self._num_workers = workers if pairs >= MIN_PAIRS else 0
        self._workers: list[_Worker] = []
        self._scores: dict[int, Score] = {}
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def add(self, row: int, answer: str, references: Sequence[str]) -> None:
        """Takes the answer to a row.

        Raises:
            RuntimeError: A process has failed; its traceback.
        """
        if self._num_workers == 0:
            self._scores[row] = score_answer(answer, references)
            return
        if not self._workers:
            self._workers = [_Worker() for _ in range(self._num_workers)]
        self._workers[self._count % self._num_workers].send(row, answer, references)
        self._count += 1

    def collect(self) -> dict[int, Score]:
        """Waits for the scores of all that was added since the last call, and returns them.

        Raises:
            RuntimeError: A process has failed; its traceback.
        """
        scores, self._scores = self._scores, {}
        for worker in self._workers:
            scores |= worker.collect()
        return scores


class _Worker:
    """One process, and a thread that reads its replies as they come, so that no pipe fills up."""

    def __init__(self) -> None:
        package = str(Path(__file__).resolve().parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distilllens.evaluation.scoring.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self._waiting = 0
        self._replies: dict[int, Score] = {}
        self._error = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Takes replies until there are no more; however that ends, whoever waits is told."""
        assert self._process.stdout is not None
        problem = "it ended without a word"
        try:
            for line in self._process.stdout:
                match json.loads(line):
                    case [int(row), int() | float() as rouge_l, bool(is_exact)]:
                        with self._changed:
                            self._replies[row] = Score(rouge_l, is_exact)
                            self._changed.notify()
                    case {"error": str(problem)}:
                        pass
                    case _:
                        raise ValueError(f"{line!r:.200} is no score")
        except Exception as error:
            problem = (
                f"{error} (does something else, a sitecustomize perhaps, write to the standard "
                "output of each Python process here? --score_workers 0 starts none)"
            )
            self._process.kill()  # nobody reads what it writes any more
        with self._changed:
            self._error = problem
            self._changed.notify()

    def send(self, row: int, answer: str, references: Sequence[str]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([row, answer, list(references)]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        self._waiting += 1

    def collect(self) -> dict[int, Score]:
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._replies) == self._waiting)
            replies, self._replies = self._replies, {}
        if len(replies) < self._waiting:
            raise self._failure()
        self._waiting = 0
        return replies

    def _failure(self) -> RuntimeError:
        code = self._process.wait()
        self._reader.join()
        return RuntimeError(f"a scoring process failed (exit code {code}): {self._error}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
