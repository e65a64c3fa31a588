"""The sweep command: real processes; most with scripts that stand in for train.py and evaluate.py.

The stand-ins write the files that a sweep reads, with known figures, and need no models.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PROJECT, Workspace

from distilllens.cli.sweep import sweep_main
from distilllens.errors import ConfigError
from distilllens.sweep import cells

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
from distilllens.config import dump_config, load_config

config = load_config(sys.argv[1:])
folder, name, seed = Path(config.run.output_dir), config.run.name, config.run.seed
folder.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write(f"train {name} {config.optim.lr:g} {seed} {os.environ['OMP_NUM_THREADS']}\\n")
(folder / "config.yaml").write_text(dump_config(config))
machine = {"world_size": int(os.environ.get("WORLD_SIZE", "1"))}
(folder / "environment.json").write_text(json.dumps({"machine": machine}))

def end(state, code, error=""):
    status = {"state": state, "code": code, "best_metric": 100 * config.optim.lr, "best_step": 4}
    (folder / "status.json").write_text(json.dumps(status))
    print("step 4/4  loss 1.0")
    print(error)
    Path(os.environ["DISTILLLENS_CODE_FILE"]).write_text(str(code)) if code else None
    sys.exit(min(code, 1))  # as torchrun does, which knows no codes but 1

if name == "broken":
    end("failed", 5, "error[DL-NUMERICS]: the loss is NaN at step 3\\n  fix: a lower --optim.lr")
if Path("hang").exists() and name == "b" and seed == 10:
    signal.signal(signal.SIGTERM, lambda *_: end("stopped", 143))
    signal.signal(signal.SIGINT, lambda *_: end("stopped", 130))
    Path("hanging").touch()
    time.sleep(60)
lines = [
    {"step": 2, "perf/step_s": 3.0, "perf/response_tokens_per_s": 10.0, "train/loss": 1.0},
    {"step": 4, "perf/step_s": 6.0, "perf/response_tokens_per_s": 40.0, "train/loss": 1.0},
    {"step": 4, "eval/dev/loss": 2.5, "eval/dev/rougeL": 7.0, "perf/eval_s": 12.0},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "best").mkdir(exist_ok=True)
(folder / "best" / "config.json").write_text(f"{name} {seed} {config.optim.lr}")
end("finished", 0)
"""
EVALUATE = """
import dataclasses, json, sys
from pathlib import Path
from distilllens.config import load_evaluate_config
from distilllens.evaluation.cells.provenance import checkpoint_fingerprint, identity

config = load_evaluate_config(sys.argv[1:])
method, seed = config.name, int(Path(config.output_dir).name.removeprefix("seed"))
with open("calls.txt", "a") as calls:
    calls.write(f"evaluate {config.checkpoint}{' anew' if config.overwrite else ''}\\n")
rouge = {("a", 10): 10.0, ("a", 20): 12.0, ("b", 10): 13.0, ("b", 20): 17.0}[method, seed]
for draw, offset in zip(config.eval.seeds, (-1.0, 1.0)):
    folder = Path(config.output_dir) / f"seed{draw}" / "toy"
    folder.mkdir(parents=True, exist_ok=config.overwrite)
    known = identity(config, checkpoint=checkpoint_fingerprint(config.checkpoint), records=[])
    (folder / "results.json").write_text(json.dumps({
        "metrics": {"rougeL": rouge + offset, "exact_match": 0.0, "num": 3},
        "set": "toy", "seed": draw, "name": method, "config": dataclasses.asdict(config),
        "identity": known, "counts": {"records": min(config.limit or 20, 20)},
    }))
    samples = [  # all alike but for the prompts: whatever is drawn has the same mean
        {"index": index, "prompt": f"prompt {index}", "rougeL": (rouge + offset) / 100,
         "exact_match": False} for index in range(3)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\\n" for s in samples))
"""


class Place:
    """A folder with a sweep file and the stand-ins, in which sweeps run."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "results/sweeps/toy"
        (root / "train.py").write_text(TRAIN)
        (root / "evaluate.py").write_text(EVALUATE)
        (root / "base.yaml").write_text("eval: {metric: loss}\n")
        self.content: dict[str, Any] = {
            "configs": ["base.yaml"],
            "set": {"optim.max_steps": 4, "objective.approach": "sft"},
            "methods": {"a": {}, "b": {"set": {"objective.kd_ratio": 0.5}}},
            "seeds": [10, 20],
            "evaluate": {"set": {"sets": ["toy"], "eval.seeds": [1, 2]}},
        }

    def run(self, *flags: str, **changes: Any) -> int:
        """Runs the sweep with changes of its file."""
        (self.root / "toy.yaml").write_text(yaml.safe_dump(self.content | changes, sort_keys=False))
        return sweep_main(["toy.yaml", *flags])

    def calls(self) -> list[str]:
        """Returns what was started since the last time, without the number of threads."""
        file = self.root / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [re.sub(r"(train .*) \d+$", r"\1", line) for line in lines]

    def table(self) -> dict[str, Any]:
        content = json.loads((self.out / "sweep.json").read_text())
        return content["methods"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return Place(tmp_path)


def test_all_cells_run_once_and_the_table_has_the_figures_worked_out_by_hand(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run() == 0
    assert place.calls() == [
        *("train a 0.0002 10", "train b 0.0002 10", "train a 0.0002 20", "train b 0.0002 20"),
        *(f"evaluate results/sweeps/toy/{m}/seed{s}/best" for m in "ab" for s in (10, 20)),
    ]
    table = place.table()
    assert table["a"]["by_seed"] == {"10": 10.0, "20": 12.0}
    assert (table["b"]["mean"], table["b"]["n"]) == (15.0, 2)
    assert table["b"]["sd"] == pytest.approx(math.sqrt(8))  # (4 + 4) / 1
    difference = table["b"]["difference"]  # 3 and 5
    assert (difference["mean"], difference["standard_error"]) == (4.0, pytest.approx(1.0))
    assert difference["interval"] == pytest.approx([4 - 12.7062, 4 + 12.7062], abs=1e-4)
    assert difference["verdict"] == "under the noise"
    # Prompt by prompt: b is 4 above a on each, but by 3 and 5 with the two seeds.
    rows = list(csv.DictReader((place.out / "comparisons.csv").open()))
    (row,) = [row for row in rows if row["baseline"] and row["metric"] == "rougeL"]
    assert (row["method"], row["baseline"], row["prompts"]) == ("b", "a", "3")
    assert [float(row[key]) for key in ("value", "low", "high")] == pytest.approx([4.0] * 3)
    assert float(row["seeds_high"]) == pytest.approx(4 + 12.7062, abs=1e-4)
    assert row["verdict"] == "under the noise of the seeds"
    assert "comparisons.md" in (place.out / "sweep.md").read_text()
    # 2 steps of 3 s and 2 of 6 s, and 12 s of dev evaluation; 6 · 10 + 12 · 40 tokens in 18 s.
    run = table["a"]["runs"]["10"]
    assert run["minutes"] == pytest.approx(0.5)
    assert run["tokens_per_s"] == pytest.approx(30.0)
    assert (run["dev_loss"], run["best_metric"]) == (2.5, pytest.approx(0.02))
    text = (place.out / "sweep.md").read_text()
    assert "| b | 2 | **15.00 ± 2.83** | +4.00 ± 1.41 | 1.00 | -8.71 to +16.71 |" in text
    assert r"\textbf{15.00 $\pm$ 2.83}" in (place.out / "sweep.tex").read_text()
    row = list(csv.DictReader((place.out / "sweep.csv").open()))[1]
    assert [row[key] for key in ("metric", "method", "set", "mean")] == [
        "rougeL",
        "b",
        "toy",
        "15.0",
    ]
    assert (place.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "4 trainings (2 methods × 2 seeds), 0 of them finished" in capsys.readouterr().out
    assert place.run() == 0
    assert place.calls() == []


def test_the_table_needs_the_folders_alone(place: Place) -> None:
    place.run()
    before = {path.name: path.read_bytes() for path in place.out.glob("sweep.*")}
    for name in ("train.py", "evaluate.py", "base.yaml"):
        (place.root / name).unlink()
    for path in place.out.glob("sweep.*"):
        path.unlink()
    moved = place.root / "elsewhere"
    shutil.move(place.out, moved)
    place.calls()
    assert place.run("--table_only", "--output_dir", str(moved)) == 0
    after = {path.name: path.read_bytes() for path in moved.glob("sweep.*")}
    assert after == {name: content for name, content in before.items() if name != "sweep.lock"}
    assert place.calls() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_handed_on_and_the_same_command_goes_on(
    place: Place, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "hang").touch()

    def stop() -> None:
        while not (place.root / "hanging").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=stop)
    watcher.start()
    assert place.run(evaluate=None) == code
    watcher.join()
    assert place.calls() == ["train a 0.0002 10", "train b 0.0002 10"]
    stopped = json.loads((place.out / "b/seed10/status.json").read_text())
    assert stopped["state"] == "stopped"  # the process had time to say so
    output = capsys.readouterr()
    assert "stopped; the same command goes on" in output.err
    assert "seeds without a finished training: 10, 20" in output.out  # there is a table already
    (place.root / "hang").unlink()
    finished = place.out / "a/seed10"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert place.run(evaluate=None) == 0
    assert place.calls() == ["train b 0.0002 10", "train a 0.0002 20", "train b 0.0002 20"]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_failing_method_is_told_and_the_others_finish(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"broken": {}, **place.content["methods"]}
    assert place.run(methods=methods, baseline="a") == 5
    output = capsys.readouterr()
    assert (
        "broken seed 10 failed with code 5; log: results/sweeps/toy/broken/seed10.out" in output.err
    )
    assert "error[DL-NUMERICS]: the loss is NaN at step 3\n  fix: a lower --optim.lr" in output.err
    assert place.table()["b"]["mean"] == 15.0
    assert place.table()["broken"]["n"] == 0
    assert sum("broken" in call for call in place.calls()) == 2
    # Only what failed is tried again.
    assert place.run("--fail_fast", methods=methods, baseline="a") == 5
    assert place.calls() == ["train broken 0.0002 10"]


def test_the_best_learning_rate_of_the_dev_set_alone_is_scored(place: Place) -> None:
    # The stand-in's dev loss is 100 × lr: the smallest wins.
    assert place.run(lr=[1.0e-3, 5.0e-4]) == 0
    calls = place.calls()
    assert len([call for call in calls if call.startswith("train")]) == 8
    scored = [call for call in calls if call.startswith("evaluate")]
    assert scored[0] == "evaluate results/sweeps/toy/a/lr0.0005/seed10/best"
    assert len(scored) == 4 and all("lr0.0005" in call for call in scored)
    assert place.table()["b"]["lr"] == 5e-4
    assert "a: lr 0.0005, the best of 2 on the dev set" in (place.out / "sweep.md").read_text()


def test_cells_of_another_training_are_refused_before_anything_starts(place: Place) -> None:
    place.run(evaluate=None)
    place.calls()
    with pytest.raises(ConfigError, match=r"4 of 4 cells hold another training.*a/seed10: "
        r"optim\.max_steps 4 → 5") as refused:  # fmt: skip
        place.run("--optim.max_steps", "5", evaluate=None)
    assert "--output_dir" in refused.value.fix
    assert place.calls() == []
    # How a training is watched does not count.
    assert place.run("--tracking.log_every", "3", evaluate=None) == 0


def test_scores_of_other_weights_or_in_part_do_not_count(place: Place) -> None:
    place.run()
    (place.out / "b/seed10/best/config.json").write_text("others")
    shutil.rmtree(place.out / "eval/b/seed20/seed2")
    assert place.run("--table_only") == 0
    text = (place.out / "sweep.md").read_text()
    assert "b seed 10: results/sweeps/toy/eval/b/seed10 holds scores of other weights" in text
    assert "b seed 20: scored in part only (1 of 2)" in text
    assert place.table()["b"]["mean"] is None


def test_scores_of_other_settings_do_not_count_and_are_scored_anew_on_request(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(seeds=[10]) == 0
    place.calls()
    flags = place.content["evaluate"]["set"]
    changed = {"evaluate": {"set": flags | {"eval.temperature": 0.5}}, "seeds": [10]}
    with pytest.raises(ConfigError) as refused:
        place.run(**changed)
    assert "2 of 2 cells hold scores of another evaluation" in refused.value.what
    assert "eval/a/seed10: eval.temperature: 1.0 there, 0.5 now" in refused.value.what
    assert "--overwrite_scores" in refused.value.fix and place.calls() == []
    assert place.run("--table_only", **changed) == 0
    assert "a seed 10: scored with other settings (eval.temperature: 1.0 there, 0.5 now" in (
        (place.out / "sweep.md").read_text()
    )
    assert [place.table()[name]["n"] for name in "ab"] == [0, 0]
    capsys.readouterr()
    assert place.run("--dry_run", "--overwrite_scores", **changed) == 0
    assert all("--overwrite=true" in line for line in capsys.readouterr().out.splitlines()[2:])
    assert place.run("--overwrite_scores", **changed) == 0
    assert sum("evaluate" in call and call.endswith("anew") for call in place.calls()) == 2
    assert [place.table()[name]["n"] for name in "ab"] == [1, 1]
    assert place.run("--overwrite_scores", **changed) == 0
    assert place.calls() == []  # what is scored with these settings stays


def test_without_an_evaluation_methods_are_compared_on_the_dev_set(place: Place) -> None:
    assert place.run(evaluate=None, methods={"a": {}, "b": {"set": {"optim.lr": 1e-4}}},
        allow_unequal=["optim.lr"]) == 0  # fmt: skip
    table = place.table()
    assert table["b"]["difference"]["mean"] == pytest.approx(-0.01)
    assert table["b"]["difference"]["verdict"] == "better"  # a smaller loss
    text = (place.out / "sweep.md").read_text()
    assert "| b † |" in text and "not an equal budget: optim.lr 0.0002, but b 0.0001" in text


def test_flags_change_how_a_sweep_is_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("--dry_run", "--processes", "3", "--output_dir", "elsewhere") == 0
    commands = capsys.readouterr().out.splitlines()
    assert all("--nproc_per_node 3" in line and "elsewhere/" in line for line in commands)
    with pytest.raises(ConfigError, match="--parallel 0 must be ≥ 1"):
        place.run("--parallel", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has 1 GPUs") as refused:
        place.run("--processes", "4")
    assert "4 times the --optim.accumulation" in str(refused.value.fix)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    with pytest.raises(ConfigError, match="4 trainings at the same time × 2 processes") as refused:
        place.run("--parallel", "4", "--processes", "2")
    assert refused.value.fix == "--parallel 3"
    assert place.calls() == []


def test_dry_run_prints_every_command_and_starts_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("--dry_run", "--optim.lr", "0.5", processes=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert (
        "torch.distributed.run --standalone --nproc_per_node 2 --shutdown_timeout 600 train.py"
        in lines[0]
    )
    assert lines[0].endswith("--run.output_dir=results/sweeps/toy/a/seed10 --optim.lr 0.5")
    assert place.calls() == [] and not place.out.exists()


def test_jobs_beside_each_other_share_the_cores(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert place.run(parallel=3, evaluate=None) == 0
    lines = (place.root / "calls.txt").read_text().splitlines()
    assert {line.split()[-1] for line in lines if line.startswith("train")} == {"2"}


def flags_of(workspace: Workspace) -> dict[str, Any]:
    """Returns the workspace's flags as a sweep file has them."""
    flags = workspace.flags("--eval.every", "4", "--optim.max_steps", "12")
    pairs = {flag: yaml.safe_load(text) for flag, text in zip(flags[::2], flags[1::2], strict=True)}
    del pairs["--run.output_dir"]
    pairs |= {"--data.max_length": 120, "--data.max_prompt_length": 100}
    return {flag.removeprefix("--"): value for flag, value in pairs.items()}


@pytest.mark.long
def test_real_trainings_are_stopped_resumed_and_scored(workspace: Workspace) -> None:
    sweep, out = workspace.root / "tiny.yaml", workspace.root / "sweep"
    scoring = {"data_dir": f"{workspace.root}/data", "sets": ["toy"], "eval.seeds": [1]}
    content: dict[str, Any] = {
        "output_dir": str(out),
        "set": flags_of(workspace) | {"optim.lr": 1e-3},
        "methods": {
            "sft": {"set": {"objective.approach": "sft"}},
            "kd": {"set": {"objective.approach": "kd"}},
        },
        "seeds": [10, 20],
        "evaluate": {"set": scoring | {"eval.max_new_tokens": 4, "max_prompt_length": 100}},
    }
    sweep.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "distilllens", "sweep", str(sweep)]
    metrics = out / "kd/seed10/metrics.jsonl"
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
    assert first.returncode == 143
    assert json.loads((out / "kd/seed10/status.json").read_text())["state"] == "stopped"
    finished = out / "sft/seed10"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12
    methods = json.loads((out / "sweep.json").read_text())["methods"]
    assert [methods[name]["n"] for name in ("sft", "kd")] == [2, 2]
    assert methods["kd"]["runs"]["10"]["minutes"] > 0
    assert methods["kd"]["runs"]["10"]["dev_loss"] > 0
    assert methods["kd"]["difference"]["verdict"] in ("better", "worse", "under the noise")
    # What changes no answer starts nothing.
    scores = {path: path.stat().st_mtime_ns for path in (out / "eval").rglob("results.json")}
    content["evaluate"]["set"] |= {"eval.batch_size": 2, "limit": "all"}
    sweep.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "started" not in done.stdout, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in scores} == scores and len(scores) == 4
    # Answers of another kind are refused, and two processes are another global batch.
    changed = ["--processes", "2", "--dry_run"]
    done = subprocess.run([*command, *changed], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "4 of 4 cells hold another training" in done.stderr
    content["evaluate"]["set"]["eval.max_new_tokens"] = 5
    sweep.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "eval.max_new_tokens: 4 there, 5 now" in done.stderr
