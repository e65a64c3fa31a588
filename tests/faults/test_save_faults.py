"""A save that dies or fails, wherever: the newest good state is a committed one and goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm
import pytest
import torch
from conftest import Workspace, write_records
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from distilllens.checkpoint import load_state
from distilllens.config import load_config
from distilllens.errors import ConfigError, StorageError
from distilllens.runs import create_run_folder
from distilllens.runtime import distributed
from distilllens.runtime.faults import POINTS, VARIABLE, InjectedFault
from distilllens.runtime.manifest import find_damage, newest_good_state
from distilllens.session import build_trainer
from distilllens.trainer import Trainer
from distilllens.training.resume import find_state

SWEEP = [point for point in POINTS if point.startswith(("save.", "delete."))]
COMMITTED = ("save.after_rename", "save.after_commit", "save.end")
"""Points of a save at which its state counts; those of the deletions come later still."""


@dataclass
class SavedRun:
    """A run after step 3, with the states of steps 1 and 2 on disk."""

    trainer: Trainer
    aside: Path
    """Copies: states/ with steps 1 and 2, and step-3."""
    weights: list[torch.Tensor]
    """One of the student's weights after 0, 1, 2 and 3 steps."""

    @property
    def states(self) -> Path:
        return self.trainer.folder.state

    def weight(self) -> torch.Tensor:
        return self.trainer.module.student.get_parameter("transformer.h.1.mlp.c_fc.weight").clone()

    def load(self, state: Path) -> None:
        trainer = self.trainer
        trainer.state, _ = load_state(trainer.engine, state, trainer.device, seed=10)

    def reset(self) -> None:
        """Puts everything back to after step 3, before its save."""
        shutil.rmtree(self.states)
        shutil.copytree(self.aside / "states", self.states)
        self.load(self.aside / "step-3")


@pytest.fixture(scope="module")
def saved_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[SavedRun]:
    workspace = Workspace(tmp_path_factory.mktemp("saves"))
    for name in ("teacher", "student"):
        tiny_gpt2(n_embd=24, n_head=2).save_pretrained(workspace.root / name)
        tiny_tokenizer.save_pretrained(workspace.root / name)
    write_records(workspace.root / "data/toy/raw.jsonl", 60)
    arguments = workspace.flags()
    config = load_config(arguments)
    device = distributed.initialize()
    folder = create_run_folder(config.run.output_dir)
    with build_trainer(config, folder, device, arguments) as trainer:
        run = SavedRun(trainer, workspace.root / "aside", [])
        run.weights.append(run.weight())
        for batches in trainer.epoch():
            trainer.train_step(batches)
            run.weights.append(run.weight())
            if trainer.state.step == 3:
                shutil.copytree(run.states, run.aside / "states")
            trainer.save()
            if trainer.state.step == 3:
                break
        shutil.copytree(run.states / "step-3", run.aside / "step-3")
        yield run


@pytest.fixture
def run(saved_run: SavedRun) -> SavedRun:
    saved_run.reset()
    return saved_run


def killed(work: Callable[[], object]) -> bool:
    """Does ``work`` in a copy of this process; whether SIGKILL ended it.

    The copy has one thread only, so what DeepSpeed waits for in its process group of one is left
    out there.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            deepspeed.comm.barrier = deepspeed.comm.all_reduce = lambda *_, **__: None
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_save_rotates_and_goes_on_as_it_was(run: SavedRun) -> None:
    run.trainer.save()
    assert {path.name for path in run.states.iterdir()} == {"step-2", "step-3"}
    assert find_damage(run.states / "step-3") == ""
    for step in (2, 3):
        run.load(run.states / f"step-{step}")
        assert run.trainer.state.step == step and torch.equal(run.weight(), run.weights[step])
    assert not torch.equal(run.weights[2], run.weights[3])


@pytest.mark.parametrize("action", ["KILL", "RAISE", "ENOSPC"])
@pytest.mark.parametrize("point", SWEEP)
def test_fault_in_a_save(
    run: SavedRun, point: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = 3 if point in COMMITTED or point.startswith("delete.") else 2
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"{point}={action}")
        if action == "KILL":
            assert killed(run.trainer.save)
        elif action == "RAISE":
            with pytest.raises(InjectedFault, match=point):
                run.trainer.save()
        else:
            with pytest.raises(StorageError, match="no space left: could not write") as caught:
                run.trainer.save()
            assert caught.value.exit_code == 6
            assert caught.value.kept == f"last good: {run.states}/step-{newest}"
    good, damaged = newest_good_state(run.states)
    assert good == run.states / f"step-{newest}" and not damaged
    found = find_state(run.trainer.folder, "auto")
    assert found == good
    assert not list(run.states.glob(".*")), "leftovers are cleaned away at the next start"
    run.load(found)
    assert run.trainer.state.step == newest
    assert torch.equal(run.weight(), run.weights[newest])


def test_what_a_dead_deletion_left_goes_with_the_next(run: SavedRun) -> None:
    (run.states / "step-1/manifest.json").unlink()
    run.trainer.save()
    assert {path.name for path in run.states.iterdir()} == {"step-2", "step-3"}


def test_the_source_of_a_resume_stays(run: SavedRun) -> None:
    run.trainer.keeper.resumed_from = run.states / "step-1"
    try:
        run.trainer.save()
    finally:
        run.trainer.keeper.resumed_from = None
    assert {path.name for path in run.states.iterdir()} == {"step-1", "step-2", "step-3"}


def test_a_committed_state_is_never_written_again(run: SavedRun) -> None:
    run.trainer.save()
    stamps = {path: path.stat().st_mtime_ns for path in run.states.rglob("*")}
    run.trainer.save()
    assert {path: path.stat().st_mtime_ns for path in run.states.rglob("*")} == stamps


def test_parts_that_do_not_come_back_are_missed(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, state = run.trainer.engine, run.states / "step-2"
    load = engine.load_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_checkpoint", lambda *_, **__: (None, None))
        with pytest.raises(Exception, match="holds no DeepSpeed state"):
            run.load(state)

    def forgets_optimizer(*arguments: object, **options: object) -> object:
        done = load(*arguments, **options)
        engine.optimizer.optimizer.state.clear()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_checkpoint", forgets_optimizer)
        with pytest.raises(Exception, match="parameters got no optimizer state back"):
            run.load(state)

    def forgets_step(*arguments: object, **options: object) -> object:
        done = load(*arguments, **options)
        engine.global_steps = 1
        return done

    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_checkpoint", forgets_step)
        with pytest.raises(Exception, match="DeepSpeed is at step 1, the counters at 2"):
            run.load(state)


def test_deepspeeds_files_are_never_run_as_code(run: SavedRun) -> None:
    """Even in a folder whose manifest fits: that one may come from a stranger."""
    canary = run.aside / "canary"

    class Hostile:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return os.mkdir, (canary,)

    state = run.states / "step-2"
    (file,) = (state / "deepspeed").glob("mp_rank_*")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "more": Hostile()}, file)
    with pytest.raises(Exception, match="cannot be loaded"):
        run.load(state)
    assert not canary.exists()


@pytest.mark.parametrize(("processes", "everywhere"), [(1, True), (2, False)])
def test_an_error_of_an_evaluation_may_be_one_processs_own(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch, processes: int, everywhere: bool
) -> None:
    """Else no other rank than the first would tell what its prompts led to."""

    def fail(_: object) -> None:
        raise ConfigError("prompt 3 has 999 tokens")

    monkeypatch.setattr(Trainer, "evaluate", fail)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    with pytest.raises(ConfigError) as caught:
        run.trainer._evaluate_saved()
    assert caught.value.everywhere == everywhere
