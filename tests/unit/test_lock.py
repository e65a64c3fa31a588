"""The lock of a run's folder: one owner, refused to others, taken over from the dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distilllens.errors import ConfigError, StorageError
from distilllens.runtime import distributed
from distilllens.runtime.lock import holder, locked

PROJECT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from distilllens.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(120)
"""
SINCE = "2026-01-02T03:04:05+0000"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "run.lock"


def write_owner(file: Path, pid: int, host: str) -> None:
    file.write_text(json.dumps({"pid": pid, "host": host, "since": SINCE}))


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_living_process_keeps_others_out_and_a_killed_one_is_taken_over_from(file: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True, cwd=PROJECT
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "locked\n"
        before = file.read_bytes()
        told = (
            rf"in use by pid {child.pid} on host {re.escape(socket.gethostname())} since \d{{4}}-"
        )
        with pytest.raises(ConfigError, match=told) as caught, locked(file):
            pass
        assert caught.value.exit_code == 2
        assert file.read_bytes() == before
        owner = holder(file)
        assert owner is not None and owner.pid == child.pid
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert holder(file) is None
    with locked(file) as note:
        assert f"taken over from pid {child.pid} on host" in note
        owner = holder(file)
        assert owner is not None and owner.pid == os.getpid()


def test_one_process_cannot_lock_twice(file: Path) -> None:
    with locked(file), pytest.raises(ConfigError, match=f"in use by pid {os.getpid()}"):  # noqa: SIM117
        with locked(file):
            pass


def test_a_released_lock_is_free_and_says_nothing(file: Path) -> None:
    for _ in range(2):
        with locked(file) as note:
            assert note == ""
        assert file.read_bytes() == b"" and holder(file) is None


def test_an_error_releases_the_lock(file: Path) -> None:
    with pytest.raises(KeyError), locked(file):
        raise KeyError
    with locked(file) as note:
        assert note == ""


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"pid": 1}', "7"])
def test_an_owner_who_left_no_record(content: str, file: Path) -> None:
    file.write_text(content)
    other = os.open(file, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="in use by another process"), locked(file):
        pass
    os.close(other)
    with locked(file) as note:
        assert note == ""


def test_a_free_lock_of_another_machine_is_taken_over(file: Path) -> None:
    """A job that is started again elsewhere goes on by itself; the kernel says that it is free."""
    write_owner(file, 1, "elsewhere")
    with locked(file) as note:
        assert note.startswith(f"lock taken over from pid 1 on host elsewhere since {SINCE}")


class TestFileSystemWithoutLocks:
    """There the record decides."""

    @pytest.fixture(autouse=True)
    def no_flock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: int) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(fcntl, "flock", refuse)

    @pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
    def test_a_living_or_unknown_owner_keeps_it(self, host: str, file: Path) -> None:
        write_owner(file, os.getppid(), host)
        before = file.read_bytes()
        told = f"in use by pid {os.getppid()} on host {re.escape(host)}"
        with pytest.raises(ConfigError, match=told) as caught, locked(file):
            pass
        assert f"delete {file}" in caught.value.fix and file.read_bytes() == before

    def test_a_dead_owner_loses_it(self, file: Path) -> None:
        for pid in (dead_pid(), os.getpid()):  # the same pid: an earlier life of a container
            write_owner(file, pid, socket.gethostname())
            with locked(file) as note:
                assert f"taken over from pid {pid}" in note

    def test_a_free_one_is_had(self, file: Path) -> None:
        with locked(file) as note:
            assert note == "" and json.loads(file.read_text())["pid"] == os.getpid()


def test_a_lock_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    refused = pytest.raises(StorageError, match=r"run\.lock cannot be locked")
    with refused as caught, locked(tmp_path / "gone" / "run.lock"):
        pass
    assert caught.value.exit_code == 6


def test_only_the_first_process_locks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(file) as note:
        assert note == "" and not file.exists()


def test_all_processes_learn_that_the_first_was_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "max_over_hosts", lambda own: max(own, 1))
    with pytest.raises(ConfigError, match="the first process got no lock"), locked(file):
        pass
