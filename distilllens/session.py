"""One training session from configuration to exit code: folder, resume, status, errors."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from numerize.numerize import numerize
from rich.console import Console, RenderableType

from distilllens import distributed
from distilllens.checkpoint import check_same_config, find_state, saved_states
from distilllens.config import TrainConfig, dump_config, load_config
from distilllens.data.collate import collate
from distilllens.data.tokenize import PreparedData
from distilllens.errors import EXIT_BUG, EXIT_OK, UserError, leave_code
from distilllens.layers import layer_table
from distilllens.libraries import quiet_libraries
from distilllens.memory import count_parameters, estimate_memory, memory_table
from distilllens.models import num_blocks
from distilllens.runs import (
    RunFolder,
    check_unused,
    create_run_folder,
    environment_record,
    is_finished,
    write_json,
    write_status,
)
from distilllens.setup import (
    Plan,
    StepCount,
    build_module,
    build_teacher,
    count_steps,
    load_data,
    plan_run,
)
from distilllens.signals import Stopped, StopRequest
from distilllens.tracking import Tracker
from distilllens.trainer import Trainer


def train_main(argv: Sequence[str] | None = None) -> int:
    """Trains as the arguments say and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = any(argument.startswith("--debug") for argument in arguments)
    folder = None  # until it is known to be ours to write into
    try:
        config = load_config(arguments)
        debug = config.debug
        quiet_libraries()
        if config.dry_run:
            dry_run(config)
            return EXIT_OK
        device = distributed.initialize()
        claimed, resumed = claim_folder(config)
        distributed.barrier()  # the others must not find what the first process writes now
        folder = claimed
        with build_trainer(config, folder, device, arguments) as trainer:
            _train(trainer, folder, resumed)
    except UserError as error:
        return _end(folder, error, debug=debug)
    except Exception as error:
        return _end(folder, error, debug=debug)
    distributed.shutdown()
    return EXIT_OK


def claim_folder(config: TrainConfig) -> tuple[RunFolder, Path | None]:
    """Returns the run's folder and the state to go on from, None for a fresh start.

    Raises:
        StorageError: The folder cannot be written.
        ConfigError: It holds a finished run; with ``run.resume=never``, any run. (One that ended
            before it saved anything has nothing to lose and starts anew.)
        CheckpointError: No state where one is asked for, or one of other options.
    """
    folder = create_run_folder(config.run.output_dir)
    resumed = find_state(folder, config.run.resume)
    if config.run.resume == "never" or is_finished(folder):
        check_unused(folder)
    if resumed is not None:
        check_same_config(resumed, config)
    return folder, resumed


def dry_run(config: TrainConfig) -> None:
    """Checks everything that can be checked without weights, and tells what would happen."""
    if not distributed.is_main():
        return
    console = Console()
    plan = plan_run(config)
    world_size = distributed.environment_world_size()
    data = load_data(plan)
    steps = count_steps(config, len(data.train), world_size)
    for content in describe_plan(plan, data, steps):
        console.print(content)
    sample = data.train[0]
    records = list(data.train.select(range(config.optim.micro_batch_size)))
    batch = collate(records, pad_id=plan.tokenizer.eos_token_id)
    size, length = batch.input_ids_BT.shape
    console.print(
        f"first micro-batch: {size} records padded to {length} tokens, "
        f"{batch.num_tokens} response tokens"
    )
    console.rule("first record")
    console.print(plan.tokenizer.decode(sample["prompt_ids"]), markup=False, highlight=False)
    console.print(plan.tokenizer.decode(sample["response_ids"]), markup=False, highlight=False)
    console.print(memory_table(estimate_memory(plan, world_size)))
    console.print("dry run: nothing was trained")


def describe_plan(plan: Plan, data: PreparedData, steps: StepCount) -> list[RenderableType]:
    """Returns what a user wants to see before a run starts: models, layer pairs, data, length."""
    config = plan.config
    lines: list[RenderableType] = [
        f"student {config.model.student} ({numerize(count_parameters(plan.student_config))} "
        f"parameters, {num_blocks(plan.student_config)} blocks, {plan.dtype})"
    ]
    if plan.teacher_config is not None:
        lines.append(
            f"teacher {config.model.teacher} "
            f"({numerize(count_parameters(plan.teacher_config))} parameters, "
            f"{num_blocks(plan.teacher_config)} blocks, {plan.teacher_dtype})"
            + (f", rows read from {cache}" if (cache := config.model.teacher_cache) else "")
        )
    lines += plan.notes
    if plan.pairs and plan.teacher_config is not None:
        table = layer_table(
            plan.pairs, num_blocks(plan.teacher_config), num_blocks(plan.student_config)
        )
        lines.append(table)
    lines.append(data.summary())
    lines.append(
        f"{config.objective.approach}: {steps.total_steps:,} steps of {steps.global_batch} "
        f"records, {steps.steps_per_epoch:,} steps an epoch, ZeRO stage {plan.zero_stage}"
    )
    return lines


def _train(trainer: Trainer, folder: RunFolder, resumed: Path | None) -> None:
    """Trains in ``folder``, from the start or from a saved state."""
    if resumed is not None:
        trainer.resume(resumed)
    if distributed.is_main():
        trim_metrics(folder.metrics, trainer.state.step)
    trainer.fit()
    trainer.tracker.say(f"done: {trainer.state.step} steps; the best model is {folder.best}")
    if distributed.is_main():
        write_status(
            folder,
            state="finished",
            code=EXIT_OK,
            step=trainer.state.step,
            best_step=trainer.state.best_step,
            best_metric=trainer.state.best_metric,
        )


@contextmanager
def build_trainer(
    config: TrainConfig, folder: RunFolder, device: torch.device, arguments: Sequence[str]
) -> Iterator[Trainer]:
    """Builds everything a run needs and records what it is; yields a trainer at step 0.

    Raises:
        UserError: Whatever of models, data and options is missing or does not fit.
    """
    stop = StopRequest(config.run.max_wall_time, shlex.join(["python", "train.py", *arguments]))
    torch.manual_seed(config.run.seed + distributed.rank())
    plan = plan_run(config)
    data = load_data(plan)
    steps = count_steps(config, len(data.train), distributed.world_size())
    if distributed.is_main():
        _record(folder, config, plan, data, arguments)
    with Tracker(
        folder.metrics,
        folder.log,
        active=distributed.is_main(),
        total_steps=steps.total_steps,
        wandb_mode=config.tracking.wandb,
        wandb_settings={
            "project": config.tracking.wandb_project,
            "name": config.run.name or str(folder.root),
            "dir": str(folder.root),
            "config": dataclasses.asdict(config),
        },
    ) as tracker:
        for content in describe_plan(plan, data, steps):
            tracker.say(content)
        tracker.say("loading weights …")
        teacher, head = build_teacher(plan, data, device)
        module = build_module(plan, data, device, head)
        with stop.listening():
            yield Trainer(
                plan,
                module=module,
                teacher=teacher,
                data=data,
                steps=steps,
                folder=folder,
                tracker=tracker,
                device=device,
                stop=stop,
            )


def _record(
    folder: RunFolder,
    config: TrainConfig,
    plan: Plan,
    data: PreparedData,
    arguments: Sequence[str],
) -> None:
    """Writes what the run is, before it starts."""
    folder.config.write_text(dump_config(config), encoding="utf-8")
    write_json(folder.environment, environment_record(list(arguments)))
    write_json(folder.data, {"fingerprint": data.fingerprint, **data.stats})
    if plan.pairs:
        write_json(folder.layers, [dataclasses.asdict(pair) for pair in plan.pairs])
    write_status(folder, state="running", code=None, step=0)


def trim_metrics(path: Path, step: int) -> None:
    """Removes lines of steps after ``step``, which a killed run wrote and this one does again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # half a line: the process died while writing it
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _end(folder: RunFolder | None, error: Exception, *, debug: bool) -> int:
    """Tells the user, writes status.json and the traceback, and returns the exit code."""
    if isinstance(error, UserError):
        code, message = error.exit_code, error.format()
    else:
        code = EXIT_BUG
        message = UserError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="--debug shows the traceback; log.txt of the run holds it",
        ).format()
    if distributed.is_main() and folder is not None and folder.root.is_dir():
        _write_end(folder, error, code, message)
    if debug:
        traceback.print_exception(error)
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)
    return leave_code(code)


def _write_end(folder: RunFolder, error: Exception, code: int, message: str) -> None:
    with folder.log.open("a", encoding="utf-8") as log:
        log.write(f"{message}\n{''.join(traceback.format_exception(error))}\n")
    states = saved_states(folder.state)
    step = int(states[-1].name.removeprefix("step-")) if states else 0
    state = "stopped" if isinstance(error, Stopped) else "failed"
    write_status(folder, state=state, code=code, step=step, error=message)
