"""The folder of a run: what is written where, and the record of how it was made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distilllens import __version__
from distilllens.errors import ConfigError, StorageError

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "peft",
    "tokenizers",
    "numpy",
    "safetensors",
    "rouge-score",
    "rapidfuzz",
)


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in one run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; ``--config`` with it repeats the run."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, commit, machine, command."""
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        """Fingerprint and counts of the data."""
        return self.root / "data.json"

    @property
    def layers(self) -> Path:
        """Layer pairs of the lens."""
        return self.root / "layers.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; the truth about the run."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the screen showed, and tracebacks."""
        return self.root / "log.txt"

    @property
    def status(self) -> Path:
        """State, exit code and last step, as JSON."""
        return self.root / "status.json"

    @property
    def latest(self) -> Path:
        """The student as of the last evaluation, a Hugging Face folder."""
        return self.root / "latest"

    @property
    def best(self) -> Path:
        """The student with the best dev metric, a Hugging Face folder."""
        return self.root / "best"

    @property
    def state(self) -> Path:
        """What a later process needs to go on."""
        return self.root / "state"


def create_run_folder(path: str) -> RunFolder:
    """Makes a run's folder.

    Raises:
        StorageError: It cannot be made or written to.
    """
    folder = RunFolder(Path(path))
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        probe = folder.root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise StorageError(
            f"run.output_dir={path} cannot be written",
            why=str(error),
            fix="choose another --run.output_dir",
        ) from None
    return folder


def is_finished(folder: RunFolder) -> bool:
    """Whether a run came to its end in this folder."""
    return _state(folder) == "finished"


def _state(folder: RunFolder) -> str | None:
    if not folder.status.is_file():
        return None
    return str(json.loads(folder.status.read_text(encoding="utf-8")).get("state", "unknown"))


def check_unused(folder: RunFolder) -> None:
    """Refuses a folder that holds a run already.

    Raises:
        ConfigError: It does; the message names the choices.
    """
    state = _state(folder)
    if state is None:
        return
    raise ConfigError(
        f"{folder.root} holds a run already (state: {state})",
        fix="choose another --run.output_dir, or remove that folder",
        kept="everything in it is untouched",
    )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old or the new file, never a half of one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def write_status(
    folder: RunFolder, *, state: str, code: int | None, step: int, **more: Any
) -> None:
    """Writes status.json; launch scripts return the code that stands there."""
    content = {"state": state, "code": code, "step": step, "time": time.time(), **more}
    write_json(folder.status, content)


def environment_record(argv: list[str] | None = None) -> dict[str, Any]:
    """Returns versions, git commit, machine and command; nothing of the process's variables."""
    command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "gpus": gpus,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": torch.get_num_threads(),
        },
        "command": shlex.join(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this project and the libraries that shape a result."""
    found = {"python": platform.python_version(), "distilllens": __version__}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """Returns the commit of the source tree, with ``-dirty`` if files differ, or ``unknown``."""
    root = Path(__file__).resolve().parent.parent
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
