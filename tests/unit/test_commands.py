"""Commands as a shell sees them: help and typos load no library, usage lines can be copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distilllens.__main__ import COMMANDS

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "peft", "huggingface_hub", "matplotlib")

LOOK = f"""
import contextlib, importlib, io, sys
for name, start in {{programs!r}}.items():
    module, function = start
    main = getattr(importlib.import_module(module), function)
    for flag in ("--help", "--no.such_flag"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    code = main([*name.split(), flag])
                except SystemExit as end:
                    code = end.code
        told = out.getvalue() + err.getvalue()
        assert code == (0 if flag == "--help" else 2), (name, flag, code, told)
        assert "Traceback" not in told and told, (name, flag, told)
        usage = "usage: python -m distilllens " + name if name.strip() else "usage: python "
        assert flag != "--help" or told.startswith(usage), (name, told)
        loaded = [m for m in {HEAVY!r} if m in sys.modules]
        assert not loaded, (name, flag, loaded)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PROJECT,
        env=environment,
    )


def test_help_and_typos_load_no_library() -> None:
    programs = dict.fromkeys(COMMANDS, ("distilllens.__main__", "main"))
    del programs["evaluate"]  # which calls itself evaluate.py
    programs |= {"": ("train", "main"), " ": ("evaluate", "main")}
    done = python("-c", LOOK.format(programs=programs))
    assert done.returncode == 0, done.stderr


def test_no_library_speaks_before_an_error() -> None:
    done = python("-m", "distilllens", "report", "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    first, *others = done.stderr.splitlines()
    assert first.startswith("error[DL-CONFIG]: ") and "nowhere" in first
    assert [line[:7] for line in others] == ["  fix: "]
