"""Requests to stop and to save, and a screen that goes away."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distilllens.errors import ConfigError
from distilllens.runtime import distributed, signals
from distilllens.runtime.screen import SteadyStream
from distilllens.runtime.signals import Request, Stopped, StopRequest, poll, stoppable

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signals.SLURM_END, raising=False)


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")],
)
def test_a_signal_stops_with_its_code(number: int, code: int, name: str) -> None:
    stop = StopRequest(resume_command="python train.py --x 1")
    with stop.listening():
        assert stop.agreed() is Request.NONE and not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed() is Request.STOP
    error = stop.error(41)
    assert error.exit_code == code
    assert error.what == f"{name}: saved step 41"
    assert error.fix == "resume with: python train.py --x 1"


def test_the_time_limit_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    stop = StopRequest("1:00:00")
    monkeypatch.setattr(time, "monotonic", lambda: now + 3590)
    assert stop.agreed() is Request.NONE
    monkeypatch.setattr(time, "monotonic", lambda: now + 3610)
    assert stop.agreed() is Request.STOP
    assert stop.error(7).what == "time limit: saved step 7" and stop.error(7).exit_code == 75


def test_slurms_end_time_limits_with_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.SLURM_END, str(int(time.time()) + 3600))
    stop, started = StopRequest("2:00:00"), time.monotonic()
    for left, request in ((200, Request.NONE), (170, Request.STOP)):
        monkeypatch.setattr(time, "monotonic", lambda left=left: started + 3600 - left)
        assert stop.agreed() is request, left
    assert stop.error(3).what == "Slurm's end time: saved step 3"
    assert stop.error(3).exit_code == 75
    monkeypatch.setattr(time, "monotonic", lambda: started)
    assert StopRequest("0:10:00").limit == "time limit"  # the nearer one counts


def test_a_slurm_end_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.SLURM_END, "tomorrow")
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME='tomorrow'"):
        StopRequest()


def test_sigusr1_asks_for_one_save() -> None:
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        assert stop.agreed() is Request.SAVE
        assert stop.agreed() is Request.SAVE  # until it is done
        assert stop.saved(5) == "saved step 5, as asked"
        assert stop.agreed() is Request.NONE


def test_a_touched_file_asks_for_one_save(tmp_path: Path) -> None:
    stop = StopRequest(save_file=tmp_path / "save.now")
    assert stop.agreed() is Request.NONE
    (tmp_path / "save.now").touch()
    assert stop.agreed() is Request.SAVE
    stop.saved(5)
    assert not (tmp_path / "save.now").exists() and stop.agreed() is Request.NONE


def test_a_save_file_that_cannot_be_removed_saves_once(tmp_path: Path) -> None:
    stop = StopRequest(save_file=tmp_path / "save.now")
    (tmp_path / "save.now").mkdir()
    assert stop.agreed() is Request.SAVE
    assert "save.now cannot be removed" in stop.saved(5)
    assert stop.agreed() is Request.NONE


def test_a_stop_wins_over_a_save(tmp_path: Path) -> None:
    stop = StopRequest(save_file=tmp_path)
    with stop.listening():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() is Request.STOP


@pytest.mark.parametrize("others", [1, 75, 130, 143])
def test_a_process_without_a_request_learns_the_others(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "max_over_hosts", lambda own: max(own, others))
    stop = StopRequest()
    assert stop.agreed() is (Request.SAVE if others == 1 else Request.STOP)
    if others > 1:
        assert stop.error(2).exit_code == others
        with pytest.raises(Stopped, match="stopped while thinking") as caught:
            stop.check("thinking")
        assert caught.value.exit_code == others
    else:
        stop.check("thinking")  # a save is no reason to end


def test_poll_ends_a_loop_after_a_signal_but_not_at_the_time_limit() -> None:
    poll("nobody listens")
    stop = StopRequest("0:00:00")
    with stop.listening():
        poll("working")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM: stopped while working") as caught:
            poll("working")
        assert caught.value.exit_code == 143
    poll("nobody listens any more")


def test_stoppable_listens_only_where_nobody_does() -> None:
    with stoppable():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            poll("working")
    outer = StopRequest()
    with outer.listening(), stoppable():
        signal.raise_signal(signal.SIGTERM)
        assert outer.received == signal.SIGTERM


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.CAUGHT]
    with StopRequest().listening(), StopRequest().listening():
        assert [signal.getsignal(number) for number in signals.CAUGHT] != before
    assert [signal.getsignal(number) for number in signals.CAUGHT] == before


TWO_INTERRUPTS = """
import hashlib, os, signal, sys, threading
from pathlib import Path
from distilllens.runtime.signals import StopRequest

stop = StopRequest(resume_command="THE COMMAND")
stop.before_abort = lambda: Path(sys.argv[1]).write_text("told")

def press():
    for _ in range(2):
        print("pressed", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.2)

with stop.listening():
    threading.Thread(target=press).start()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000_000)  # minutes in C: no handler runs
"""


def test_a_second_sigint_ends_at_once_even_inside_c_code(tmp_path: Path) -> None:
    """As in a collective operation whose other processes are gone."""
    code_file = tmp_path / "code"
    done = subprocess.run(
        [sys.executable, "-c", TWO_INTERRUPTS, str(tmp_path / "status")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PROJECT,
        env={**os.environ, "DISTILLLENS_CODE_FILE": str(code_file)},
    )
    assert done.returncode == 130
    assert done.stdout.count("pressed") == 2
    assert "SIGINT twice: ended without saving; resume with: THE COMMAND" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "status").read_text() == "told" and code_file.read_text() == "130"


# --- The screen ---------------------------------------------------------------------------------


def test_a_stream_without_reader_is_written_to_no_more() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        stream = SteadyStream(pipe)
        for _ in range(3):
            assert stream.write("x" * 100_000) == 100_000  # more than a buffer
            stream.flush()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("settings", "is_terminal"),
    [
        ({"COLUMNS": "80"}, True),
        ({"COLUMNS": "40"}, False),
        ({"COLUMNS": "80", "NO_COLOR": "1"}, False),
        ({"COLUMNS": "80", "NO_COLOR": ""}, True),
    ],
)
def test_no_color_and_few_columns_make_a_plain_screen(
    settings: dict[str, str], is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert SteadyStream(Terminal()).isatty() is is_terminal
    assert SteadyStream(io.StringIO()).isatty() is False


def test_a_screen_of_ascii_gets_question_marks() -> None:
    raw = io.BytesIO()
    stream = SteadyStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("λ = 1 …")
    stream.flush()
    assert raw.getvalue() == b"? = 1 ?"


def test_other_attributes_are_the_streams() -> None:
    call: Callable[[], str] = SteadyStream(io.StringIO("text")).getvalue  # type: ignore[assignment]
    assert call() == "text"
