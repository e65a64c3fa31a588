"""Where the numbers go: metrics.jsonl, the screen, log.txt, and a tracker that may fail."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distilllens.tracking import Tracker, describe

METRICS = {
    "train/loss": 1.23456,
    "train/lens/jsd/L06": 0.5,
    "train/lr": 2e-4,
    "perf/response_tokens_per_s": 1534.0,
    "perf/memory_gb": 3.14159,
}
ESCAPE = "\x1b"


def tracker(folder: Path, **options: Any) -> Tracker:
    settings = {"active": True, "total_steps": 8} | options
    return Tracker(folder / "metrics.jsonl", folder / "log.txt", **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_call_is_one_line_of_metrics(tmp_path: Path) -> None:
    with tracker(tmp_path) as running:
        running.log(METRICS, step=2, epoch=1 / 3)
        assert len(lines(tmp_path)) == 1  # there at once, not at the end
        running.log({"eval/dev/loss": 0.25}, step=4, epoch=1.0)
    first, second = lines(tmp_path)
    assert first.items() >= {"step": 2, "epoch": 0.333333, **METRICS}.items()
    assert second["eval/dev/loss"] == 0.25 and second["step"] == 4
    assert abs(second["time"] - first["time"]) < 60 and first["time"] > 1.7e9


def test_a_second_tracker_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    for step in (1, 2):
        with tracker(tmp_path) as running:
            running.log(METRICS, step=step, epoch=0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_broken_numbers_are_written_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path) as running:
        running.log({"train/loss": math.nan, "train/loss/kd": math.inf}, step=1, epoch=0.0)
    assert "NaN" in (tmp_path / "metrics.jsonl").read_text()
    (line,) = lines(tmp_path)
    assert math.isnan(line["train/loss"]) and line["train/loss/kd"] == math.inf
    assert "loss nan  loss/kd inf" in capsys.readouterr().out


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, active=False, wandb_mode="online") as running:
        running.start()
        running.say("hello")
        running.advance(1)
        running.log(METRICS, step=1, epoch=0.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a terminal: one line each, however narrow, without control codes."""
    monkeypatch.setenv("COLUMNS", "40")
    now = iter([100.0, 110.0])
    clock = SimpleNamespace(monotonic=lambda: next(now, 110.0), time=lambda: 1.8e9)
    monkeypatch.setattr("distilllens.tracking.time", clock)
    with tracker(tmp_path) as running:
        running._start = (100.0, 0)
        running.say("a path with [brackets] and [/more]")
        running.log(METRICS, step=2, epoch=0.0)
    screen = capsys.readouterr().out
    expected = "step 2/8  loss 1.235  lr 2.00e-04  1.53K response tokens/s  3.14 GB  left 0:00:30"
    assert screen.splitlines()[-1] == expected  # 10 s for 2 steps, 6 are left
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == expected
    assert ESCAPE not in screen and "\r" not in screen
    assert "[brackets]" in screen and "[/more]" in (tmp_path / "log.txt").read_text()


def test_a_terminal_gets_a_progress_bar_and_the_log_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    monkeypatch.setenv("COLUMNS", "150")
    with tracker(tmp_path) as running:
        running.start()
        running.say("loading 5 files")
        running.advance(2)
        running.log(METRICS, step=2, epoch=0.0)
        running.log({"eval/dev/loss": 0.25}, step=2, epoch=0.0)
        running.advance(3)
    screen = capsys.readouterr().out
    assert ESCAPE in screen and "3/8" in screen
    assert "loss 1.235" in screen and "dev/loss 0.25" in screen
    log = (tmp_path / "log.txt").read_text()
    assert ESCAPE not in log and "loading 5 files" in log and "dev/loss 0.25" in log


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"perf/response_tokens_per_s": 12.0}, "12 response tokens/s"),
        ({"perf/response_tokens_per_s": 2_500_000.0}, "2.5M response tokens/s"),
        ({"eval/dev/rougeL": 21.1234, "eval/dev/loss": 2.0}, "dev/rougeL 21.12  dev/loss 2"),
        ({"train/grad_norm": 3.0, "perf/step_s": 1.0}, ""),
    ],
)
def test_describe(metrics: dict[str, float], text: str) -> None:
    assert describe(metrics) == text


# --- Weights & Biases ---------------------------------------------------------------------------


class BrokenWandb:
    """Stands for the library; fails at one point."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise RuntimeError(f"{name} broke\nwith a second line")

    def Settings(self, **options: Any) -> dict[str, Any]:
        assert options["init_timeout"] <= 10  # else an unreachable server takes 90 s
        self._call("Settings")
        return options

    def init(self, **_: Any) -> BrokenWandb:
        self._call("init")
        return self

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        assert metrics == METRICS and step in (1, 2)
        self._call("log")

    def finish(self, *, exit_code: int) -> None:
        assert exit_code == 0
        self._call("finish")


@pytest.mark.parametrize(
    ("fails_at", "calls"),
    [
        ("nowhere", ["Settings", "init", "log", "log", "finish"]),
        ("Settings", ["Settings"]),
        ("init", ["Settings", "init"]),
        ("log", ["Settings", "init", "log"]),
        ("finish", ["Settings", "init", "log", "log", "finish"]),
    ],
)
def test_wandb_never_stops_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails_at: str,
    calls: list[str],
) -> None:
    broken = BrokenWandb(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with caplog.at_level(logging.WARNING), tracker(tmp_path, wandb_mode="online") as running:
        for step in (1, 2):
            running.log(METRICS, step=step, epoch=0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert broken.calls == calls
    told = {record.getMessage() for record in caplog.records}
    assert told == (
        set()
        if fails_at == "nowhere"
        else {f"wandb: {fails_at} broke; training goes on without it"}
    )


def test_wandb_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracker(tmp_path, wandb_mode="offline") as running:
        running.log(METRICS, step=1, epoch=0.0)
    assert len(lines(tmp_path)) == 1 and "training goes on" in caplog.text


def test_wandb_is_not_touched_when_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BrokenWandb("init")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with tracker(tmp_path) as running:
        running.log(METRICS, step=1, epoch=0.0)
    assert broken.calls == []


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, without a network or a key."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    settings = {"project": "p", "name": "n", "dir": str(tmp_path), "config": {"a": {"b": 1}}}
    with tracker(tmp_path, wandb_mode="offline", wandb_settings=settings) as running:
        running.log(METRICS, step=1, epoch=0.0)
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # The library's own process writes the file, a little after finish() has returned.
    for _ in range(100):
        if b"train/lens/jsd/L06" in record.read_bytes():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"no metrics in {record}")
