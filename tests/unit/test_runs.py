"""The files that tell about a run: status, environment, and what they must not tell."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from distilllens import runs
from distilllens.errors import ConfigError
from distilllens.runs import (
    HIDDEN,
    RunFolder,
    check_unused,
    create_run_folder,
    environment_record,
    is_finished,
    is_secret_name,
    newest_state,
    read_status,
    redact,
    replace_text,
    shown_command,
    write_json,
    write_status,
)

SECRET = "aV3ry5ecretValue"
HEX40 = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return create_run_folder(str(tmp_path / "run"))


def commit_state(folder: RunFolder, step: int) -> Path:
    state = folder.state / f"step-{step}"
    state.mkdir(parents=True)
    (state / "manifest.json").write_text("{}")
    return state


# --- status.json --------------------------------------------------------------------------------


def test_status_has_its_keys_and_the_newest_state(folder: RunFolder) -> None:
    write_status(folder, state="running", code=None, step=0, resume_command="go on")
    before = json.loads(folder.status.read_text())
    assert before["last_checkpoint"] is None and before["exit"] is None
    states = [commit_state(folder, step) for step in (90, 100)]
    (folder.state / "step-200").mkdir()  # without a manifest it is no state
    write_status(folder, state="stopped", code=143, step=100, exit="DL-STOPPED", error="why")
    status = json.loads(folder.status.read_text())
    assert time.time() - status.pop("time") < 60
    assert status == {
        "state": "stopped",
        "exit": "DL-STOPPED",
        "code": 143,
        "step": 100,
        "last_checkpoint": str(states[1]),
        "resume_command": "go on",  # as it stood there
        "error": "why",
    }
    assert newest_state(folder) == states[1]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_broken_status_is_an_unknown_run(content: str, folder: RunFolder) -> None:
    folder.status.write_text(content)
    assert read_status(folder) == {"state": "unknown"}
    assert not is_finished(folder)
    with pytest.raises(ConfigError, match=r"holds a run already \(state: unknown\)"):
        check_unused(folder)
    write_status(folder, state="finished", code=0, step=1)
    assert is_finished(folder)


def test_no_status_is_no_run(folder: RunFolder) -> None:
    assert read_status(folder) == {} and not is_finished(folder)
    check_unused(folder)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(
    failing: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(folder.status, {"state": "old"})

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space"):
        write_status(folder, state="new", code=None, step=1)
    assert read_status(folder) == {"state": "old"}
    assert [path.name for path in folder.root.iterdir()] == ["status.json"]


def test_a_reader_never_sees_half_a_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_text(folder.status, "old")
    seen = []
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(folder.status.read_text())  # all is written by now, but not in its place
        real(descriptor)

    monkeypatch.setattr(runs.os, "fsync", look)
    replace_text(folder.status, "new" * 10_000)
    assert seen == ["old"] and folder.status.read_text() == "new" * 10_000


def test_logs_by_rank(folder: RunFolder) -> None:
    names = [folder.rank_log(rank).name for rank in (0, 1, 12)]
    assert names == ["log.txt", "log-rank1.txt", "log-rank12.txt"]


# --- Secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")),
        *((name, True) for name in ("--hub.token", "DB_PASSWORD", "apikey", "client-secret")),
        *((name, True) for name in ("GOOGLE_APPLICATION_CREDENTIALS", "Credential", "GIT_PASSWD")),
        *((name, False) for name in ("TOKENIZERS_PARALLELISM", "--eval.max_new_tokens")),
        *((name, False) for name in ("OMP_NUM_THREADS", "--model.student", "PATH", "KEYBOARD")),
    ],
)
def test_names_of_secrets(name: str, is_secret: bool) -> None:
    assert is_secret_name(name) is is_secret


@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUv",
        "sk-proj-AbCdEfGhIjKlMnOp_12",
        "ghp_0123456789abcdefABCD",
        "github_pat_11ABCDEFG0123456789",
        "glpat-AbCdEfGhIjKlMnOpQrSt",
        "xoxb-123456789012-abc",
        "AKIAIOSFODNN7EXAMPLE",
        "AIzaSyA0123456789abcdefghijklmnopqrstu",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
    ],
)
def test_values_that_look_like_keys_are_redacted_anywhere(secret: str) -> None:
    text = redact(f"name: x\nurl=https://host/{secret}?a=1 '{secret}'\n")
    assert secret not in text and text.count(HIDDEN) == 2
    assert text.startswith("name: x\nurl=https://host/") and text.endswith("'\n")


@pytest.mark.parametrize(
    "text",
    [
        HEX40,  # a commit
        f"model.revision: {HEX40}",
        "results/train/task-0123456789abcdef0123/desk-top-abcdefghijklmnop",
        "https://huggingface.co:443/gpt2",
        "max_new_tokens: 256",
        "epoch 3: loss 1.25e-3",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text


def test_the_password_of_an_address_is_redacted() -> None:
    assert redact("http://me:hunter2@proxy:80/x") == f"http://me:{HIDDEN}@proxy:80/x"


def test_secrets_of_the_environment_are_redacted_in_any_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("SOME_PASSWORD", "short")  # a word: searched for, it would spoil texts
    monkeypatch.setenv("KEY_FOLDER_KEY", "/home/somebody")
    text = f"GET /?auth={SECRET} failed in a short time in /home/somebody/run"
    assert redact(text) == text.replace(SECRET, HIDDEN)


def test_a_command_hides_the_values_of_secret_flags() -> None:
    command = ["train.py", "--hub.token", SECRET, "--x_key=" + SECRET, "--optim.lr", "1e-3"]
    command += ["--eval.max_new_tokens", "8", "--a.password", "--debug", "--run.name", "two words"]
    shown = shown_command(command)
    assert SECRET not in shown
    assert shown == (
        f"train.py --hub.token '{HIDDEN}' '--x_key={HIDDEN}' --optim.lr 1e-3 "
        "--eval.max_new_tokens 8 --a.password --debug --run.name 'two words'"
    )


def test_the_environment_record_tells_what_matters_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_BASE_URL", f"https://me:{SECRET}@wandb.example")
    monkeypatch.setenv("UNRELATED", "not recorded")
    record = environment_record(["--run.name", "x", "--some.token", SECRET])
    assert SECRET not in json.dumps(record) and "not recorded" not in json.dumps(record)
    assert record["environment"]["NCCL_DEBUG"] == "INFO"
    assert record["environment"]["HF_TOKEN"] == HIDDEN
    assert record["command"].endswith(f"--run.name x --some.token '{HIDDEN}'")
