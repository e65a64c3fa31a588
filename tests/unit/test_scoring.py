"""Scores from other processes: the same as from this one, loud in failure, gone with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distilllens.evaluation.scoring import pool as scoring
from distilllens.evaluation.scoring.pool import Score, Scorer, score_answer

PROJECT = Path(__file__).resolve().parents[2]
WORDS = ("red", "running", "cats", "naïve", "你好", "42", "?!", "\u2028", "\n", '"', "\\")


def random_rows(count: int) -> dict[int, tuple[str, list[str]]]:
    rng = random.Random(3)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(12)))

    return {7 * row: (text(), [text() for _ in range(1 + row % 3)]) for row in range(count)}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_processes_give_the_scores_of_this_one(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MIN_PAIRS", 0)
    rows = random_rows(200)
    expected = {row: score_answer(*pair) for row, pair in rows.items()}
    assert len({score.rouge_l for score in expected.values()}) > 20
    with Scorer(workers, pairs=1) as scorer:
        for half in (list(rows)[:100], list(rows)[100:]):
            for row in half:
                scorer.add(row, *rows[row])
            assert scorer.collect() == {row: expected[row] for row in half}
        assert scorer.collect() == {}
        processes = [worker._process for worker in scorer._workers]
    assert len(processes) == workers
    assert all(process.poll() is not None for process in processes)


def test_a_few_pairs_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_Worker", None)
    with Scorer(4, pairs=scoring.MIN_PAIRS - 1) as scorer:
        scorer.add(0, "a b", ["a b"])
        assert scorer.collect() == {0: Score(rouge_l=1.0, exact_match=True)}


def test_an_error_there_is_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MIN_PAIRS", 0)
    with Scorer(1, pairs=1) as scorer:
        scorer.add(0, "a", ["a"])
        scorer.add(1, "a", [])  # no reference: max() of nothing
        with pytest.raises(RuntimeError, match=r"exit code 1.*Traceback(.|\n)*ValueError"):
            scorer.collect()
    with Scorer(1, pairs=1) as scorer:
        scorer.add(0, "a", ["a"])
        assert len(scorer.collect()) == 1
        scorer._workers[0]._process.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            while True:
                scorer.add(1, "a", ["a"])
                scorer.collect()


@pytest.mark.parametrize("noise", ["module loaded: cuda", "[1, 2]", "naïve"])
def test_whatever_is_no_score_ends_the_wait(
    noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's own Python start-up file may write to the same pipe."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nos.write(1, {(noise + chr(10)).encode()!r})"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(scoring, "MIN_PAIRS", 0)
    found: list[Exception] = []

    def score() -> None:
        with Scorer(1, pairs=1) as scorer:
            scorer.add(0, "a", ["a"])
            try:
                scorer.collect()
            except RuntimeError as error:
                found.append(error)

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "score_workers 0" in str(found[0])


def test_the_process_loads_no_heavy_library() -> None:
    code = (
        "import sys, distilllens.evaluation.scoring.worker; "
        "sys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


OWNER = """
import time
from distilllens.evaluation.scoring import pool as scoring
scoring.MIN_PAIRS = 0
with scoring.Scorer(2, pairs=1) as scorer:
    scorer.add(0, "a", ["a"])
    scorer.collect()
    print(*(worker._process.pid for worker in scorer._workers), flush=True)
    time.sleep(120)
"""


def test_an_interrupt_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MIN_PAIRS", 0)
    with pytest.raises(KeyboardInterrupt), Scorer(1, pairs=1) as scorer:
        scorer.add(0, "a", ["a"])
        process = scorer._workers[0]._process
        assert os.getsid(process.pid) == process.pid  # so that Ctrl-C does not reach it
        raise KeyboardInterrupt
    assert process.poll() is not None


@pytest.mark.slow
def test_a_killed_owner_leaves_nobody_behind() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=PROJECT,
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=30)
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
