"""The folder of a run: what is written where, its status, and the record of how it was made."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distilllens import __version__
from distilllens.errors import ConfigError, DataError, StorageError, UserError
from distilllens.runtime.manifest import DRAFT, saved_states

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
RECORDED_VARIABLES = (
    *("CUDA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "DS_", "DEEPSPEED", "DISTILLLENS_"),
    *("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SLURM_", "WANDB_", "PYTHONHASHSEED"),
)
"""What the names of environment variables begin with that can change a run or its speed."""

HIDDEN = "[redacted]"
SECRET_ENDINGS = (
    *("key", "keys", "token", "secret", "secrets", "password", "passwords", "passwd"),
    *("passphrase", "credential", "credentials"),
)
"""Of a word of a name: ``HF_TOKEN``, ``--hub.apikey``; not ``max_new_tokens``."""
SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|wandb_v\d_\w{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
"""Keys of the Hugging Face hub, OpenAI, GitHub, GitLab, Slack, AWS, Google, Weights & Biases; web
tokens. All with a known beginning: a bare run of hex digits may be a commit."""
URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)")
SHORTEST_SECRET = 8
"""Values of secret variables that are shorter are not searched for in texts: they are words."""

FACTS_FILE = "distilllens.json"
"""Beside exported weights: how they were trained, from which their model card is written."""


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
        """Fingerprint, origin and counts of the data."""
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

    def rank_log(self, rank: int) -> Path:
        """Tracebacks of one process; those of the first are in `log`."""
        return self.root / f"log-rank{rank}.txt" if rank else self.log

    def bad_batch(self, step: int, rank: int) -> Path:
        """What a process trained on in a step with a loss or gradient that was not finite."""
        return self.root / f"non-finite-step-{step}-rank-{rank}.json"

    @property
    def last_word(self) -> Path:
        """Made by the process that tells how the run ended, the first of those that fail."""
        return self.root / "last.word"

    @property
    def status(self) -> Path:
        """How the run is or ended, as JSON; see `write_status`."""
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """Held by the run that writes here; empty when it is done."""
        return self.root / "run.lock"

    @property
    def save_now(self) -> Path:
        """Made by a user who wants a save; removed once that is done."""
        return self.root / "save.now"

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
        ConfigError: Something in it is a symbolic link, through which a run would write elsewhere.
    """
    folder = RunFolder(Path(path))
    try:
        links = [p for p in folder.root.iterdir() if p.is_symlink()] if folder.root.is_dir() else []
        if links:
            raise ConfigError(
                f"{links[0]} is a symbolic link to {os.readlink(links[0])}",
                why="a run replaces and deletes what lies in its folder",
                fix="remove the link, or choose another --run.output_dir",
                kept="nothing was written",
            )
        folder.root.mkdir(parents=True, exist_ok=True)
        probe = folder.root / f"{DRAFT}probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # of a shared folder: pids of two machines can be the same
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(
            f"run.output_dir={path} cannot be written",
            why=str(error),
            fix="choose another --run.output_dir",
        ) from None
    return folder


def is_finished(folder: RunFolder) -> bool:
    """Whether a run came to its end in this folder."""
    return read_status(folder).get("state") == "finished"


def read_status(folder: RunFolder) -> dict[str, Any]:
    """Returns what status.json says: nothing where there is none, else at least ``state``."""
    if not folder.status.is_file():
        return {}
    try:
        content = json.loads(folder.status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        return {"state": "unknown"}
    return {"state": "unknown", **content}


def check_unused(folder: RunFolder) -> None:
    """Refuses a folder that holds a run already.

    Raises:
        ConfigError: It does; the message names the choices.
    """
    status = read_status(folder)
    if not status:
        return
    raise ConfigError(
        f"{folder.root} holds a run already (state: {status['state']})",
        fix="choose another --run.output_dir, or remove that folder",
        kept="everything in it is untouched",
    )


def read_json(path: Path, default: Any) -> Any:
    """Returns what a run has recorded in a JSON file; ``default`` where there is no such file.

    Raises:
        DataError: It is not JSON, or of another type than ``default``.
    """
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", fix="remove the file") from None
    if not isinstance(content, type(default)):
        wanted = "a list" if isinstance(default, list) else "a JSON object"
        raise DataError(f"{path}: expected {wanted}, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `replace_text` does."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new one, never a half of one."""
    draft = path.with_name(f"{DRAFT}{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without its content
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_status(
    folder: RunFolder,
    *,
    state: str,
    code: int | None,
    step: int,
    exit: str | None = None,
    resume_command: str | None = None,
    **more: Any,
) -> None:
    """Writes status.json; launch scripts return the code that stands there.

    Args:
        folder: Of the run.
        state: running, finished, stopped (by request, and saved) or failed.
        code: Exit code, None while it runs.
        step: Last optimizer step that was saved, or was the last of all.
        exit: How it ended: ``done`` or an error's label; None while it runs.
        resume_command: What goes on from here; None: as it stands in the file.
        more: Further keys.
    """
    if resume_command is None:
        resume_command = read_status(folder).get("resume_command", "")
    last = newest_state(folder)
    content = {
        "state": state,
        "exit": exit,
        "code": code,
        "step": step,
        "last_checkpoint": None if last is None else str(last),
        "resume_command": resume_command,
        "time": time.time(),
        **more,
    }
    write_json(folder.status, content)


def newest_state(folder: RunFolder) -> Path | None:
    """Returns the committed training state of the latest step, or None; it is not verified."""
    states = saved_states(folder.state)
    return states[-1] if states else None


def environment_record(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns versions, git commit, machine, command and variables that matter, without secrets."""
    import torch  # late: commands write shown_command before they load it

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
        "command": shown_command(command),
        "environment": shown_variables(os.environ),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# --- Secrets ------------------------------------------------------------------------------------


def is_secret_name(name: str) -> bool:
    """Whether a variable, flag or key of this name holds a secret."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return any(word.endswith(SECRET_ENDINGS) for word in words)


def redact(text: str) -> str:
    """Returns a text without what looks like a key, and without the environment's secrets."""
    for name, value in os.environ.items():
        is_path = value.startswith(("/", "~", "."))
        if is_secret_name(name) and len(value) >= SHORTEST_SECRET and not is_path:
            text = text.replace(value, HIDDEN)
    return URL_PASSWORD.sub(rf"\1{HIDDEN}", SECRET_SHAPES.sub(HIDDEN, text))


def shown_command(arguments: Sequence[str]) -> str:
    """Returns a command as it may be shown: the values of secret flags are left out."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        is_secret = flag.startswith("-") and is_secret_name(flag)
        if hide_next and not argument.startswith("--"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{flag}={HIDDEN}" if is_secret and equals else redact(argument))
        hide_next = is_secret and not equals
    return shlex.join(shown)


def shown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that matter to a run, sorted, secret ones without their values."""
    return {
        name: HIDDEN if is_secret_name(name) else redact(value)
        for name, value in sorted(environment.items())
        if name.startswith(RECORDED_VARIABLES)
    }


# --- Versions -----------------------------------------------------------------------------------


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
