"""Wrong input to the real commands: a clear message, the right exit code, no traceback, no mess."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT, Workspace, write_records

from distilllens.__main__ import COMMANDS
from distilllens.__main__ import main as command_main
from train import main

Prepare = Callable[[Workspace], None]


@dataclass(frozen=True)
class Case:
    """Something wrong, and what the user is told."""

    code: int
    told: str
    flags: tuple[str, ...] = ()
    prepare: Prepare = lambda _: None
    makes_folder: bool = True


def raw_lines(place: Workspace) -> list[str]:
    return (place.root / "data/toy/raw.jsonl").read_text().splitlines()


def write_raw(place: Workspace, lines: list[str]) -> None:
    (place.root / "data/toy/raw.jsonl").write_text("".join(f"{line}\n" for line in lines))


def break_line_4(place: Workspace) -> None:
    lines = raw_lines(place)
    lines[3] = '{"instruction": "x", "output": }'
    write_raw(place, lines)


def number_as_output(place: Workspace) -> None:
    lines = raw_lines(place)
    lines[1] = '{"instruction": "x", "input": "", "output": 5}'
    write_raw(place, lines)


def remove_weights(place: Workspace) -> None:
    for name in ("student", "teacher"):
        (place.root / name / "model.safetensors").unlink()


def other_tokenizer(place: Workspace) -> None:
    """Swaps two tokens of the teacher's."""
    path = place.root / "teacher/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    vocabulary[names[11]], vocabulary[names[23]] = 23, 11
    path.write_text(json.dumps(content))


def deepspeed_file(content: str) -> Prepare:
    def write(place: Workspace) -> None:
        (place.root / "ds.json").write_text(content)

    return write


def blocking_file(place: Workspace) -> None:
    (place.root / "file").write_text("not a folder")


DS_FILE = ("--deepspeed", "ROOT/ds.json")
LENS = ("--objective.lens.teacher_layers", "--objective.lens.student_layers")

CASES = {
    "broken JSON line": Case(3, r"raw\.jsonl:4: invalid JSON at column 32", prepare=break_line_4),
    "field of a wrong type": Case(3, r"raw\.jsonl:2: .*output", prepare=number_as_output),
    "empty data file": Case(
        3, r"raw\.jsonl: the file is empty", prepare=lambda place: write_raw(place, [])
    ),
    "missing data file": Case(3, r"raw\.jsonl: no such file", ("--data.path", "ROOT/gone")),
    "fewer records than a batch": Case(
        3,
        "3 training records of .* are fewer than one global batch of 8",
        prepare=lambda place: write_records(place.root / "data/toy/raw.jsonl", 15),
    ),
    "fewer records than the dev set": Case(
        3, r"12", prepare=lambda place: write_records(place.root / "data/toy/raw.jsonl", 12)
    ),
    "missing teacher": Case(
        2,
        r"model folder ROOT/gone not found\n  fix: .* another --model\.teacher\n",
        ("--model.teacher", "ROOT/gone"),
    ),
    "missing student": Case(
        2,
        r"model folder ROOT/gone not found\n  fix: .* another --model\.student\n",
        ("--model.student", "ROOT/gone"),
    ),
    "weights are missing": Case(2, r"cannot load ROOT/teacher", prepare=remove_weights),
    "lens lists of unequal length": Case(
        2,
        r"teacher_layers has 3 entries \[1, 2, 3\], .*student_layers has 2 \[1, 2\]",
        (LENS[0], "[1, 2, 3]", LENS[1], "[1, 2]"),
        remove_weights,
    ),
    "layer out of range": Case(
        2,
        r"objective\.lens\.teacher_layers: layer 7 is out of range \[1, 6\]"
        r"[\s\S]*fix: --objective\.lens\.teacher_layers with numbers from 1 to 6",
        (LENS[0], "[2, 7]", LENS[1], "[1, 2]"),
        remove_weights,  # told all the same: before weights load
    ),
    "more pairs than layers": Case(
        2, r"lens\.count=3 must be in \[1, 2\]", ("--objective.lens.count", "3"), remove_weights
    ),
    "lens weights": Case(
        2, r"lens\.weights has 1 entries", ("--objective.lens.weights", "[1]"), remove_weights
    ),
    "different tokenizers": Case(
        2,
        r"tokenizers differ: 2 of 300 ids differ, first 11: '.' against '.'",
        prepare=other_tokenizer,
    ),
    "unknown flag": Case(
        2,
        r"unknown flag --optim\.lrr \(did you mean --optim\.lr\?\)",
        ("--optim.lrr", "1"),
        makes_folder=False,
    ),
    "value out of range": Case(
        2, r"optim\.lr=-1\.0 must be > 0", ("--optim.lr=-1", "--optim.lr_min=0"), makes_folder=False
    ),
    "deepspeed file is missing": Case(2, r"ds\.json: no such file", DS_FILE),
    "deepspeed file is no JSON": Case(2, r"ds\.json: not JSON", DS_FILE, deepspeed_file("{")),
    "deepspeed file is a list": Case(2, "a JSON object", DS_FILE, deepspeed_file("[]")),
    "offload in one word": Case(
        2,
        "offload_optimizer must be an object, got 'cpu'",
        DS_FILE,
        deepspeed_file('{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}'),
    ),
    "deepspeed file has an optimizer": Case(
        2, r"ds\.json: remove optimizer", DS_FILE, deepspeed_file('{"optimizer": {}}')
    ),
    "bf16 with stage 0": Case(
        2, "bf16 needs ZeRO stage 1", DS_FILE, deepspeed_file('{"bf16": {"enabled": true}}')
    ),
    "precision in conflict": Case(
        2, r"model\.dtype=bfloat16, but .* is for fp32", ("--model.dtype", "bfloat16")
    ),
    "output folder under a file": Case(
        6,
        r"run\.output_dir=ROOT/file/run cannot be written",
        ("--run.output_dir", "ROOT/file/run"),
        blocking_file,
        makes_folder=False,
    ),
    "output folder is a file": Case(
        6,
        r"run\.output_dir=ROOT/file cannot be written",
        ("--run.output_dir", "ROOT/file"),
        blocking_file,
        makes_folder=False,
    ),
}


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(
    name: str,
    workspace: Workspace,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, root = CASES[name], workspace.root
    case.prepare(workspace)
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    before = files(root)
    flags = workspace.flags(*(flag.replace("ROOT", str(root)) for flag in case.flags))
    assert main(flags) == case.code
    output, errors = capsys.readouterr()
    assert re.search(case.told.replace("ROOT", re.escape(str(root))), errors)
    assert "Traceback" not in output + errors
    lines = errors.splitlines()
    assert 1 <= len(lines) <= 4 and lines[0].startswith("error[DL-")
    assert all(re.match(r"  (why|fix|kept): \S", line) for line in lines[1:])
    # Nothing is written but the run's own folder and the tokenised data.
    new = {path for path in files(root) - before if not path.startswith(("run", "tokens"))}
    assert not new and files(here) == set()
    assert (root / "run").exists() == case.makes_folder
    if case.makes_folder:
        status = json.loads((root / "run/status.json").read_text())
        assert (status["state"], status["code"]) == ("failed", case.code)
        log = (root / "run/log.txt").read_text()
        assert "Traceback" in log and lines[0] in log


def test_debug_shows_the_traceback(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("--model.teacher", f"{workspace.root}/gone")
    assert main([*workspace.flags(*missing), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_dry_run_refuses_the_same(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    break_line_4(workspace)
    assert main([*workspace.flags(), "--dry_run"]) == 3
    assert "raw.jsonl:4: invalid JSON at column 32" in capsys.readouterr().err
    assert not (workspace.root / "run").exists()


def test_broken_lines_can_be_skipped(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    break_line_4(workspace)
    assert main([*workspace.flags("--data.bad_lines", "skip"), "--dry_run"]) == 0
    assert "1 broken lines skipped" in " ".join(capsys.readouterr().out.split())


def test_a_missing_adapter(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(workspace.flags("--model.teacher_lora", f"{workspace.root}/gone")) == 2
    assert "gone not found" in capsys.readouterr().err


def test_records_longer_than_the_positions(workspace: Workspace) -> None:
    """The tiny models know 128 positions, data.max_length allows 512 tokens."""
    lines = raw_lines(workspace)
    lines[40] = json.dumps({"instruction": "Repeat", "input": "", "output": "x y " * 200})
    write_raw(workspace, lines)
    assert main(workspace.flags()) in (2, 3)


# --- The other commands -------------------------------------------------------------------------


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_main(["reprot"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error[DL-CONFIG]: unknown command 'reprot'")
    assert all(name in told for name in COMMANDS)


def test_help_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert command_main(arguments) == code
        told = capsys.readouterr().out
        assert all(name in told for name in COMMANDS)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PROJECT,
        env=environment,
    )


def test_exit_codes_of_processes() -> None:
    """As a shell sees them."""
    assert run_python("-m", "distilllens", "--help").returncode == 0
    done = run_python("-m", "distilllens", "reprot")
    assert done.returncode == 2 and "unknown command" in done.stderr
    done = run_python("train.py", "--optim.lrr", "1")
    assert done.returncode == 2 and done.stderr.splitlines()[-2].startswith("error[DL-CONFIG]")
    assert "Traceback" not in done.stderr
