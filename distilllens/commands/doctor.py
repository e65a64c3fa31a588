"""What a run would find on this machine, line by line.

Each line has a verdict: ``ok``, ``note`` (works, but worth knowing) or ``problem``, and says what
to do. The whole is what a bug report needs, without secrets. Nothing is changed, and nothing
outside the machine is asked unless ``--online`` says so.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from numerize.numerize import numerize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distilllens.errors import ConfigError
from distilllens.runs import RunFolder, git_commit, read_status, shown_variables, versions
from distilllens.runtime.faults import ACTIONS, POINTS, VARIABLE
from distilllens.runtime.lock import holder
from distilllens.runtime.manifest import find_damage, saved_states
from distilllens.runtime.signals import SLURM_END, slurm_seconds_left

Verdict = Literal["ok", "note", "problem"]
COLORS: dict[Verdict, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}

LOW_DISK, FULL_DISK = 10e9, 1e9
"""Bytes free below which a disk is a note, or a problem: two states of a small student."""
LOW_MEMORY = 4e9
"""Bytes available below which memory is a note."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub."""
MODEL_ON_HUB = "openai-community/gpt2"
"""What ``--online`` asks the hub for."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    verdict: Verdict = "ok"
    fix: str = ""
    """What to do; only where the verdict is not ok."""


def list_fault_points(console: Console) -> None:
    """Prints where faults can be set, and which."""
    for name, description in POINTS.items():
        console.print(f"{name:24s}{description}", soft_wrap=True, markup=False)
    console.print(
        f"{VARIABLE}=POINT[@STEP][#RANK]=ACTION[,…]; actions: {', '.join(ACTIONS)}",
        soft_wrap=True,
        markup=False,
    )


def examine(run: Path | None = None, *, online: bool = False) -> Iterator[Finding]:
    """Yields everything found, in the order of the report.

    Args:
        run: A run's folder to look at too.
        online: Whether the hub may be asked.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        *(check_software, check_devices, check_distributed, check_threads, check_memory),
        *(check_disk, check_environment, lambda: check_hub(online=online)),
        *(check_data, check_models, check_runs),
    ]
    for check in checks:
        yield from check()
    if run is not None:
        yield from check_run(RunFolder(run))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints a table on a terminal, and one line for each finding elsewhere."""
    if console.is_terminal:
        table = Table("", "what", "found", title="distilllens doctor", title_justify="left")
        for finding in findings:
            verdict = f"[{COLORS[finding.verdict]}]{finding.verdict}[/]"
            fix = f"\n[bold]→ {escape(finding.fix)}[/]" if finding.fix else ""
            table.add_row(verdict, finding.topic, escape(finding.text) + fix)
        console.print(table)
    else:
        for finding in findings:
            fix = f" → {finding.fix}" if finding.fix else ""
            line = f"{finding.verdict:8s}{finding.topic:14s}{finding.text}{fix}"
            console.print(line, soft_wrap=True, markup=False)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in COLORS}
    told = f"ok: {counts['ok']}, notes: {counts['note']}, problems: {counts['problem']}"
    console.print(told, markup=False)


# --- The machine --------------------------------------------------------------------------------


def check_software() -> Iterator[Finding]:
    """Python, this project, the libraries."""
    found = versions()
    yield Finding(topic="python", text=f"{found.pop('python')} on {platform.platform()}")
    own = found.pop("distilllens")
    yield Finding(topic="distilllens", text=f"{own}, commit {git_commit()}")
    missing = [name for name, version in found.items() if version == "not installed"]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if missing:
        fix = f"pip install -r requirements.txt (missing: {', '.join(missing)})"
        yield Finding(topic="libraries", text=text, verdict="problem", fix=fix)
    else:
        yield Finding(topic="libraries", text=text)
    if "deepspeed" not in missing:
        # Training takes torch's own optimizer and none of DeepSpeed's compiled operators; those of
        # a DeepSpeed file with offloading are compiled when first needed.
        tools = {tool: shutil.which(tool) is not None for tool in ("g++", "ninja")}
        absent = [tool for tool, there in tools.items() if not there]
        text = "the project's configs need none compiled; offloading to the CPU compiles cpu_adam"
        text += f" ({', '.join(absent)} missing for that)" if absent else " (g++, ninja found)"
        yield Finding(topic="deepspeed ops", text=text)


def check_devices() -> Iterator[Finding]:
    """The build of torch and the GPUs that it sees."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        yield Finding(
            topic=f"GPU {index}",
            text=f"{properties.name}, compute capability {capability}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )
    if count:
        yield Finding(topic="torch build", text=f"{build}, {count} GPUs")
    elif torch.version.cuda:
        yield Finding(
            topic="torch build",
            text=f"{build}, but no GPU is seen",
            verdict="note",
            fix="check nvidia-smi, the driver, and CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(
            topic="torch build",
            text=f"{build}: trains on the CPU",
            verdict="note",
            fix="for a GPU install the CUDA build of the same version (README.md)",
        )


def check_distributed() -> Iterator[Finding]:
    """What processes talk through."""
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(f"{name} {'there' if there else 'missing'}" for name, there in found.items())
    needed = ["gloo", *(["nccl"] if torch.cuda.is_available() else [])]
    if absent := [name for name in needed if not found[name]]:
        fix = f"install a torch built with {' and '.join(absent)}"
        yield Finding(topic="back ends", text=text, verdict="problem", fix=fix)
    else:
        yield Finding(topic="back ends", text=text)


def check_threads() -> Iterator[Finding]:
    """Threads against cores: too many, or threads that spin while they wait, cost a lot."""
    cores = _usable_cores()
    threads, omp = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "not set")
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    text = f"{threads} of torch, {cores:.4g} cores usable of {os.cpu_count()}; "
    text += f"OMP_NUM_THREADS {omp}, OMP_WAIT_POLICY {policy}"
    if threads > cores:
        fix = f"OMP_NUM_THREADS={max(1, int(cores))}, shared out over the processes"
        yield Finding(topic="threads", text=text, verdict="note", fix=fix)
    else:
        yield Finding(topic="threads", text=text)


def _usable_cores() -> float:
    """Returns the cores that this process may use: by affinity and by the container's share."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def check_memory() -> Iterator[Finding]:
    """Main memory, the container's limit on it, and the space that processes share."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        kilobytes = {name: rest.split()[0] for name, _, rest in (x.partition(":") for x in lines)}
        free, total = (1024 * int(kilobytes[name]) for name in ("MemAvailable", "MemTotal"))
        text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available"
        if limit := _memory_limit():
            text += f", this container is limited to {limit / 1e9:.1f} GB"
            free = min(free, limit)
        low = free < LOW_MEMORY
        yield Finding(
            topic="memory",
            text=text,
            verdict="note" if low else "ok",
            fix="--dry_run tells what a run needs" if low else "",
        )


def _memory_limit() -> int | None:
    try:
        text = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def check_disk() -> Iterator[Finding]:
    """The working folder: space, and the right to write."""
    yield _disk_finding("disk", Path.cwd())


def _disk_finding(topic: str, folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    text = f"{folder}: {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if not os.access(folder, os.W_OK):
        fix = "change its rights, or give --run.output_dir elsewhere"
        return Finding(topic=topic, text=f"{text}, not writable", verdict="problem", fix=fix)
    if usage.free < LOW_DISK:
        verdict: Verdict = "problem" if usage.free < FULL_DISK else "note"
        return Finding(topic=topic, text=text, verdict=verdict, fix="free some space")
    return Finding(topic=topic, text=text)


def check_environment() -> Iterator[Finding]:
    """The variables that can change a run, secrets left out; Slurm's end time."""
    shown = shown_variables(os.environ)
    text = " ".join(f"{name}={value}" for name, value in shown.items())
    yield Finding(topic="environment", text=text or "nothing set that matters")
    try:
        left = slurm_seconds_left()
    except ConfigError as error:
        yield Finding(topic="slurm", text=error.what, verdict="problem", fix=error.fix)
        return
    if left != float("inf"):
        low = left <= 0
        yield Finding(
            topic="slurm",
            text=f"{SLURM_END}: a run saves and ends in {max(left, 0) / 60:.0f} minutes",
            verdict="note" if low else "ok",
            fix="unset it if this is no longer that job" if low else "",
        )


def check_hub(*, online: bool) -> Iterator[Finding]:
    """Whether models and data can be fetched by name."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline:
        yield Finding(topic="hub", text="offline by HF_HUB_OFFLINE: models and data from folders")
        return
    if not online:
        yield Finding(topic="hub", text="not asked (--online asks)")
        return
    from huggingface_hub import HfApi  # half a second that the other lines need not wait for

    try:
        HfApi().model_info(MODEL_ON_HUB, timeout=HUB_TIMEOUT)
    except Exception as error:  # transport errors are httpx's or httpx2's, by the hub's version
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        fix = "give folders instead of names, or check the connection and the proxy"
        yield Finding(topic="hub", text=f"not reached: {reason}", verdict="note", fix=fix)
    else:
        yield Finding(topic="hub", text="reached")


# --- What is here -------------------------------------------------------------------------------


def check_data() -> Iterator[Finding]:
    """The sets in data/, with their numbers of records."""
    names = ("raw.jsonl", "valid.jsonl", "11_/valid.jsonl")
    sets = sorted(path for path in Path("data").glob("*") if path.is_dir())
    found = False
    for folder in sets:
        for file in (folder / name for name in names):
            if file.is_file():
                found = True
                yield _data_finding(file)
    if not found:
        yield Finding(
            topic="data",
            text="no set in data/",
            verdict="note",
            fix="python -m distilllens prepare --download, or data/README.md; the quickstart makes "
            "its own",
        )


def _data_finding(file: Path) -> Finding:
    try:
        with file.open("rb") as lines:
            records = sum(1 for line in lines if line.strip())
    except OSError as error:
        text, fix = f"{file}: {error.strerror}", "check its rights"
        return Finding(topic="data", text=text, verdict="problem", fix=fix)
    if records == 0:
        fix = "fetch or make it anew"
        return Finding(topic="data", text=f"{file}: empty", verdict="problem", fix=fix)
    return Finding(topic="data", text=f"{file}: {records:,} lines")


def check_models() -> Iterator[Finding]:
    """The model folders in checkpoints/."""
    folders = sorted(file.parent for file in Path("checkpoints").glob("*/config.json"))
    for folder in folders:
        weights = list(folder.glob("*.safetensors"))
        if weights:
            size = numerize(sum(file.stat().st_size for file in weights))
            yield Finding(topic="model", text=f"{folder}: {_model_type(folder)}, {size} bytes")
        else:
            yield Finding(
                topic="model",
                text=f"{folder}: no safetensors",
                verdict="note",
                fix="convert its weights to safetensors; others are not read",
            )
    if not folders:
        fix = "put Hugging Face folders there (checkpoints/README.md), or run the quickstart"
        yield Finding(topic="model", text="none in checkpoints/", verdict="note", fix=fix)


def _model_type(folder: Path) -> str:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(content["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "config.json not readable"


def check_runs() -> Iterator[Finding]:
    """The runs in results/train/: how many are finished, and every one that is not."""
    files = sorted(Path("results/train").rglob("status.json"))
    folders = [RunFolder(file.parent) for file in files]
    states = [read_status(folder)["state"] for folder in folders]
    text = f"{len(folders)} in results/train/, {states.count('finished')} finished"
    yield Finding(topic="runs", text=text)
    for folder, state in zip(folders, states, strict=True):
        if state != "finished":
            yield _run_finding(folder)


def check_run(folder: RunFolder) -> Iterator[Finding]:
    """One run: how it stands, its disk, and its saved states, every byte of them."""
    if not folder.root.is_dir():
        text, fix = f"{folder.root}: no such folder", "check the path"
        yield Finding(topic="run", text=text, verdict="problem", fix=fix)
        return
    yield _run_finding(folder)
    yield _disk_finding("run's disk", folder.root)
    states = saved_states(folder.state)
    for state in states:
        if damage := find_damage(state):
            fix = "the run goes on from the one before; delete this one"
            yield Finding(topic="checkpoint", text=damage, verdict="problem", fix=fix)
        else:
            yield Finding(topic="checkpoint", text=f"{state}: whole, every file verified")
    if not states:
        yield Finding(topic="checkpoint", text="no state is saved: the run would start anew")


def _run_finding(folder: RunFolder) -> Finding:
    status = read_status(folder)
    try:
        owner = holder(folder.lock)
    except OSError as error:
        return Finding(
            topic="run",
            text=f"{folder.lock}: {error.strerror}",
            verdict="problem",
            fix="check the rights of the folder",
        )
    if not status and owner is None:
        text, fix = f"{folder.root} holds no run", "check the path"
        return Finding(topic="run", text=text, verdict="problem", fix=fix)
    text = f"{folder.root}: {status.get('state', 'starting')}, step {status.get('step', 0)}"
    if status.get("code"):
        reason = str(status.get("error", "")).partition("\n")[0]
        text += f", exit code {status['code']}" + (f" ({reason})" if reason else "")
    if owner is not None:
        return Finding(topic="run", text=f"{text}, in use by {owner}")
    command = status.get("resume_command", "")
    if status["state"] == "running":
        text += ", but no process holds its lock: it ended without a word"
    if status["state"] in ("running", "stopped"):
        return Finding(topic="run", text=text, verdict="note", fix=f"go on with: {command}")
    if status["state"] == "finished":
        return Finding(topic="run", text=text)
    return Finding(topic="run", text=text, verdict="note", fix=f"see {folder.log}")
