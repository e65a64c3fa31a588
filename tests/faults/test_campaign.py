"""The kill campaign: the same command, killed again and again, ends as if nothing had been.

`bash scripts/test.sh --faults` runs it whole. CAMPAIGN_SEED sets what is drawn: the signals, the
moments, the points of `faults` that are made to last longer (the clock draws along).
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import PROJECT, Workspace, add_dropout
from test_resume import numbers, own_environment

from distilllens.runs import RunFolder, newest_state, read_status
from distilllens.runtime.faults import POINTS, VARIABLE
from distilllens.runtime.lock import holder
from distilllens.runtime.manifest import clean_leftovers, newest_good_state

SEED = "CAMPAIGN_SEED"
WORKER = Path(__file__).with_name("campaign_worker.py")
LAST_STEP = 30
FLAGS = (
    *("--optim.max_steps", str(LAST_STEP), "--eval.every", "2", "--tracking.log_every", "1"),
    *("--eval.batch_size", "2", "--eval.max_new_tokens", "8", "--data.max_prompt_length", "110"),
)
"""5 epochs of 6 steps; 15 evaluations of 6 batches, each with a save."""
METRICS = ("loss", "rougeL")
PHASES = ("start", "loading", "training", "evaluation", "models", "state", "old state")
SIGNALS = {signal.SIGKILL: 5, signal.SIGTERM: 4, signal.SIGINT: 1}
"""Each with its weight in the draw."""
WIDENED = [name for name in POINTS if not name.startswith(("export.", "step.loss"))]
BEGUN = re.compile(r"^(resuming from )?step \d", re.MULTILINE)
"""In the log of a process whose loading is done."""
PLAIN_EACH = 8
"""One start in so many is of `python train.py`, the others of forked processes."""
PATIENCE = 300.0
"""Seconds after which something hangs."""


# --- Processes ----------------------------------------------------------------------------------


class Child:
    """A training process, by a descriptor that never means another one.

    Args:
        pid: Of the leader of a session of its own.
        code: Waits for the end and returns the exit code, below zero for a signal.
    """

    def __init__(self, pid: int, code: Callable[[], int]) -> None:
        self.pid, self.code, self._descriptor = pid, code, os.pidfd_open(pid)

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._descriptor, number)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Waits so long at most."""
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def freeze(self) -> bool:
        """Stops it between two instructions; returns whether it was still there."""
        self.send(signal.SIGSTOP)
        while not self.has_ended(0.0005):
            if proc_stat(self.pid)[0] == "T":
                return True
        return False

    def end(self) -> int:
        """Waits for the end of it, and of all that it started; returns the exit code."""
        assert self.has_ended(PATIENCE), f"{self.pid} hangs"
        os.close(self._descriptor)
        code = self.code()
        patience = time.monotonic() + 10  # a `git describe` under way may end by itself
        while left := session_members(self.pid):
            assert time.monotonic() < patience, f"left behind: {left}"
            time.sleep(0.01)
        return code


def proc_stat(pid: int) -> list[str]:
    """Returns what the kernel says after a process's name: state, parent, group, session, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def session_members(leader: int) -> list[int]:
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            state, _, _, session, *_ = proc_stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            found.append(pid)
    return found


def start_plain(argv: list[str], variables: dict[str, str], output: Path) -> Child:
    """Starts `python train.py`."""
    with output.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *argv],
            env={**own_environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Child(child.pid, child.wait)


Start = Callable[[list[str], dict[str, str], Path], Child]


@pytest.fixture
def start_forked() -> Iterator[Start]:
    """Starts the same without its imports."""
    with subprocess.Popen(
        [sys.executable, str(WORKER)],
        env={**own_environment(), "PYTHONPATH": str(PROJECT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as worker:
        requests, answers = worker.stdin, worker.stdout
        assert requests and answers

        def start(argv: list[str], variables: dict[str, str], output: Path) -> Child:
            wish = {"argv": argv, "variables": variables, "output": str(output)}
            requests.write(json.dumps(wish) + "\n")
            requests.flush()
            return Child(int(answers.readline()), lambda: int(answers.readline()))

        try:
            yield start
        finally:
            requests.close()
            worker.kill()


# --- One kill -----------------------------------------------------------------------------------


def phase(run: RunFolder, said: str) -> str:
    """Tells what a frozen process is doing, by its files and by what it wrote to log.txt."""
    if "loading weights" not in said:
        return "start"
    if not BEGUN.search(said):
        return "loading"
    drafts = [path.name for folder in (run.root, run.state) for path in folder.glob(".*-*")]
    if any(name.startswith((".tmp-best", ".tmp-latest", ".old-")) for name in drafts):
        return "models"
    if any(name.startswith(".tmp-step-") for name in drafts):
        return "old state" if any(name.endswith("-deleted") for name in drafts) else "state"
    last = said.rstrip().rpartition("\n")[2]
    if last.startswith("evaluating"):
        return "evaluation"
    if last.startswith("best/"):
        return "models"
    evaluated = re.match(r"step (\d+)/\d+  dev/", last)
    if evaluated and not (run.state / f"step-{evaluated[1]}").exists():
        return "state"
    return "training"


@dataclass
class Report:
    """What was done and seen."""

    seed: int
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and signal."""
    plain: int = 0
    """Kills of `python train.py`; the others are of forked processes."""
    runs: int = 0
    starts: int = 0
    resumed: int = 0
    locks: int = 0
    """Taken over from a killed process."""
    leftovers: int = 0
    fallbacks: int = 0
    too_late: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    def table(self) -> str:
        """Returns the kills by phase and signal, and the counts below."""
        names = [number.name for number in SIGNALS]
        rows = [["landed in", *names, "all"]]
        for place in PHASES:
            counts = [self.kills[place, name] for name in names]
            rows.append([place, *map(str, [*counts, sum(counts)])])
        sums = [sum(self.kills[place, name] for place in PHASES) for name in names]
        rows.append(["all", *map(str, [*sums, self.killed])])
        lines = [f"{row[0]:<12}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
        minutes = (time.monotonic() - self.began) / 60
        lines += [
            f"{self.starts} starts, {self.killed} killed ({self.plain} of `python train.py`), "
            f"{self.too_late} kills came too late, {self.runs} runs ended bit-equal",
            f"{self.resumed} resumed from a saved state, {self.fallbacks} of them fell back; "
            f"{self.locks} locks taken over, {self.leftovers} leftovers cleaned",
            f"{minutes:.1f} minutes, {SEED}={self.seed}",
        ]
        return "\n".join(lines)


class Target:
    """A run that is killed, and the undisturbed one that it must come to equal."""

    def __init__(self, workspace: Workspace, metric: str, out: str) -> None:
        self.flags = workspace.flags(*FLAGS, "--eval.metric", metric, out=out)
        self.run = RunFolder(workspace.root / out)
        self.output = workspace.root / f"{out}.txt"
        self.said_before = 0

    def start(self, start: Start, variables: dict[str, str]) -> Child:
        log = self.run.log
        self.said_before = log.stat().st_size if log.is_file() else 0
        self.output.unlink(missing_ok=True)
        return start(self.flags, variables, self.output)

    def said(self) -> str:
        """Returns what log.txt has from the process that runs now."""
        log = self.run.log
        content = log.read_bytes() if log.is_file() else b""
        return content[self.said_before :].decode(errors="ignore")

    def wait_until_it_trains(self, child: Child) -> None:
        """Also returns at the process's end."""
        patience = time.monotonic() + PATIENCE
        while not BEGUN.search(self.said()) and not child.has_ended(0.002):
            assert time.monotonic() < patience, "it never began"

    def newest_step(self) -> int:
        state = newest_state(self.run)
        return 0 if state is None else int(state.name.removeprefix("step-"))


def kill_once(target: Target, child: Child, report: Report, number: signal.Signals) -> str | None:
    """Kills a process now and looks at what it did and left; None if it came to its end before."""
    before = target.newest_step()
    where = phase(target.run, target.said()) if child.freeze() else None
    if where is not None:
        child.send(number)
        child.send(signal.SIGCONT)
    code = child.end()
    told = target.output.read_text()
    told_of = f"{number.name} in {where}, exit code {code}, {report.seed=}:\n{told}"
    if code == 0 or read_status(target.run).get("state") == "finished":
        return None
    assert where is not None, told_of
    step = target.newest_step()
    if number is signal.SIGKILL:
        assert code == -number, told_of
    elif where == "start":  # before anybody listens the system's own ways hold
        assert code in (-number, 128 + number), told_of
    else:
        assert code == 128 + number, told_of
        assert f"{number.name}: saved step {step}" in told, told_of
        assert "resume with: python train.py " in told and "Traceback" not in told, told_of
        status = read_status(target.run)
        assert (status["state"], status["code"]) == ("stopped", code), told_of
        assert (status["step"], Path(status["last_checkpoint"]).name) == (step, f"step-{step}")
    assert step >= before, told_of
    report.kills[where, number.name] += 1
    print(f"{target.run.root.name}: {number.name} in {where}, newest state {step}", flush=True)
    return where


def count_what_it_said(target: Target, before: int, report: Report) -> None:
    """Counts what a start did about the death before it; it must go on from the newest state."""
    said, told = target.said(), target.output.read_text()
    resumed = re.findall(r"^resuming from step (\d+)$", said, re.MULTILINE)
    assert resumed in ([], [str(before)]), f"not from step {before}: {resumed}"
    assert resumed or not before or "step " not in re.sub("(?s).*loading weights", "", said)
    report.resumed += len(resumed)
    report.locks += said.count("lock taken over")
    report.leftovers += told.count("left by a process that died")
    report.fallbacks += told.count("going on from")


def check_equal(run: RunFolder, straight: RunFolder) -> None:
    """A run that was killed ended as one that was not, and nothing of the kills is left."""
    assert numbers(run.root) == numbers(straight.root)
    for name in ("latest/model.safetensors", "best/model.safetensors"):
        assert (run.root / name).read_bytes() == (straight.root / name).read_bytes(), name
    status = read_status(run)
    assert (status["state"], status["exit"], status["code"]) == ("finished", "done", 0)
    assert status["step"] == LAST_STEP and "error" not in status
    assert run.log.read_text().count("done: ") == 1
    assert newest_good_state(run.state) == (run.state / f"step-{LAST_STEP}", {})
    assert holder(run.lock) is None
    assert {path.name for path in run.root.iterdir()} == {p.name for p in straight.root.iterdir()}
    unknown = [path for path in run.state.iterdir() if not re.fullmatch(r"step-\d+", path.name)]
    assert not unknown and not list(run.root.rglob(".*"))


# --- The campaign -------------------------------------------------------------------------------


def run_straight(workspace: Workspace, metric: str, start: Start) -> tuple[RunFolder, float]:
    """Returns an undisturbed run, and its seconds from the first step to the last save."""
    target = Target(workspace, metric, f"straight-{metric}-{start.__name__}")
    child = target.start(start, {})
    target.wait_until_it_trains(child)
    began = time.time()
    assert child.end() == 0, target.output.read_text()
    return target.run, float(read_status(target.run)["time"]) - began


def draw_faults(generator: random.Random) -> dict[str, str]:
    """Half of the time makes three points last, so that kills land in short works too."""
    if generator.random() < 0.5:
        return {}
    return {VARIABLE: ",".join(f"{p}=SLEEP:0.2" for p in generator.sample(WIDENED, 3))}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """When there were enough kills."""

    kills: int
    plain: int = 0
    """Of `python train.py`."""
    spread: int = 0
    """Each in training, in evaluation, and in writing or deleting."""

    def is_met(self, report: Report) -> bool:
        """Whether there were."""
        landed = Counter(place for place, _ in report.kills.elements())
        writing = landed["models"] + landed["state"] + landed["old state"]
        least = min(landed["training"], landed["evaluation"], writing)
        enough = report.killed >= self.kills and report.plain >= self.plain
        return enough and least >= self.spread


def kill_until_it_ends(
    target: Target,
    seconds: float,
    report: Report,
    generator: random.Random,
    *,
    goal: Goal,
    start_forked: Start,
) -> None:
    """Starts and kills until a kill comes too late, or there were enough; then to the end."""
    while not goal.is_met(report):
        before = target.newest_step()
        is_plain = goal.plain > 0 and report.starts % PLAIN_EACH == PLAIN_EACH - 1
        child = target.start(start_plain if is_plain else start_forked, draw_faults(generator))
        report.starts += 1
        if is_plain or generator.random() < 0.9:
            target.wait_until_it_trains(child)
            left = seconds * (1 - before / LAST_STEP)
            child.has_ended(generator.uniform(0.0, left + seconds / LAST_STEP))
        else:
            child.has_ended(generator.uniform(0.0, 0.5))
        (number,) = generator.choices(list(SIGNALS), list(SIGNALS.values()))
        where = kill_once(target, child, report, number)
        count_what_it_said(target, before, report)
        if where is None:
            report.too_late += 1
            return
        report.plain += is_plain
    before = target.newest_step()
    child = target.start(start_forked, {})
    report.starts += 1
    assert child.end() == 0, target.output.read_text()
    count_what_it_said(target, before, report)


def campaign(
    workspace: Workspace,
    start_forked: Start,
    *,
    metrics: tuple[str, ...],
    goal: Goal,
) -> Report:
    """Kills runs, one after the other, so many times; every one must end as an undisturbed one.

    Args:
        workspace: Of the runs.
        start_forked: Starts most of them.
        metrics: What chooses best/; one undisturbed run of each is made, then they take turns.
        goal: How long it goes on.
    """
    report = Report(seed=int(os.environ.get(SEED, random.SystemRandom().randrange(10**6))))
    print(f"{SEED}={report.seed}")
    generator = random.Random(report.seed)
    add_dropout(workspace)
    straight = {metric: run_straight(workspace, metric, start_forked) for metric in metrics}
    if goal.plain:  # forked and plain processes compute the same
        for metric in metrics:
            check_equal(run_straight(workspace, metric, start_plain)[0], straight[metric][0])
    while not goal.is_met(report):
        metric = metrics[report.runs % len(metrics)]
        target = Target(workspace, metric, f"run-{report.runs}")
        kill_until_it_ends(
            target,
            straight[metric][1],
            report,
            generator,
            goal=goal,
            start_forked=start_forked,
        )
        check_equal(target.run, straight[metric][0])
        report.runs += 1
    return report


def test_a_kill_while_a_small_file_is_replaced_leaves_nothing_for_good(tmp_path: Path) -> None:
    program = """
import os, pathlib, signal, sys
from distilllens import runs
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runs.write_json(pathlib.Path(sys.argv[1], "status.json"), {})
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=PROJECT)
    assert done.returncode == -signal.SIGKILL
    (draft,) = tmp_path.iterdir()
    assert clean_leftovers(tmp_path) == [f"{draft} is removed"]
    assert not list(tmp_path.iterdir())


def test_a_short_campaign(workspace: Workspace, start_forked: Start) -> None:
    """Some kills in every test run."""
    report = campaign(workspace, start_forked, metrics=("rougeL",), goal=Goal(kills=4))
    assert report.killed == 4 and report.fallbacks == 0, report.table()


@pytest.mark.long
def test_the_campaign(
    workspace: Workspace, start_forked: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = Goal(kills=60, plain=6, spread=5)
    report = campaign(workspace, start_forked, metrics=METRICS, goal=goal)
    with capsys.disabled():
        print(f"\n{report.table()}", file=sys.stderr)
    assert goal.is_met(report) and report.fallbacks == 0
