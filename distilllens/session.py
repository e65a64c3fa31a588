"""One training session from configuration to exit code: folder, resume, status, errors."""

from __future__ import annotations

import dataclasses
import errno
import faulthandler
import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from distilllens.config import TrainConfig, dump_config, parse_wall_time
from distilllens.data.tokenize import PreparedData
from distilllens.errors import (
    EXIT_OK,
    DistributedError,
    UserError,
    as_user_error,
    is_first_here,
    leave_code,
)
from distilllens.publish.export import storage_error
from distilllens.runs import (
    RunFolder,
    check_unused,
    create_run_folder,
    environment_record,
    is_finished,
    newest_state,
    redact,
    replace_text,
    shown_command,
    write_json,
    write_status,
)
from distilllens.runtime import distributed
from distilllens.runtime.faults import check_faults
from distilllens.runtime.libraries import quiet_libraries
from distilllens.runtime.lock import locked
from distilllens.runtime.nodes import check_shared
from distilllens.runtime.signals import Stopped, StopRequest
from distilllens.runtime.watchdog import watching
from distilllens.student import Teacher
from distilllens.tracking import Tracker, trim_metrics
from distilllens.trainer import Trainer
from distilllens.training.layer_choice import (
    measure_pairs,
    pair_records,
    pair_tables,
    restore_pairs,
)
from distilllens.training.loss_scale import check_float16_runs
from distilllens.training.preview import check_room, describe_plan, dry_run
from distilllens.training.resume import (
    check_same_config,
    find_state,
    saved_tracker_id,
    set_later_aside,
)
from distilllens.training.setup import (
    Plan,
    StepCount,
    build_module,
    build_teacher,
    count_steps,
    load_data,
    plan_run,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a file system that is full, or has become read-only."""


def train(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Trains, or tells what a training would do, and returns the exit code.

    Args:
        config: Of the run.
        arguments: It was read from, for the record and the command that goes on.
    """
    folder = None  # until it is known to be ours to write into
    with ExitStack() as held:  # the lock goes after the last word in status.json
        try:
            quiet_libraries()
            if config.dry_run:
                dry_run(config)
                return EXIT_OK
            check_faults()
            timeout = parse_wall_time(config.run.timeout, "run.timeout")
            device = distributed.initialize(timedelta(seconds=timeout))
            claimed = create_run_folder(config.run.output_dir)
            note = held.enter_context(locked(claimed.lock))
            check_shared(claimed.root)
            resumed, changes = claim_folder(config, claimed)
            distributed.barrier()  # the others must not find what the first process writes now
            folder = claimed
            run_id = secrets.token_hex(4) if resumed is None else saved_tracker_id(resumed)
            with build_trainer(config, folder, device, arguments, run_id, resumed) as trainer:
                for line in filter(None, (note, changes)):
                    trainer.tracker.say(line)
                _train(trainer, folder, resumed)
        except KeyboardInterrupt:  # before anything listened to signals
            stopped = Stopped("SIGINT: stopped before the start", code=130)
            return _end(folder, stopped, debug=config.debug)
        except Exception as error:
            return _end(folder, error, debug=config.debug)
    distributed.shutdown()
    return EXIT_OK


def claim_folder(config: TrainConfig, folder: RunFolder) -> tuple[Path | None, str]:
    """Decides where a run begins; the folder's lock must be held.

    Returns:
        The state to go on from, None for a fresh start; and a line on options that differ from
        that state's, where ``run.allow_changes`` allows it.

    Raises:
        ConfigError: It holds a finished run; with ``run.resume=never``, any run. (One that ended
            before it saved anything has nothing to lose and starts anew.)
        CheckpointError: No state where one is asked for, or one of other options.
    """
    if config.run.resume == "never" or is_finished(folder):
        check_unused(folder)
    resumed = find_state(folder, config.run.resume)
    if distributed.is_main():
        folder.last_word.unlink(missing_ok=True)
    changes = ""
    if resumed is not None:
        changes = check_same_config(resumed, config)
        distributed.on_main(partial(set_later_aside, folder, resumed))
    return resumed, changes and f"saved → now, allowed by run.allow_changes:{changes}"


def resume_command(arguments: Sequence[str]) -> str:
    """Returns what the user types to go on, without secrets."""
    start = ["python"]
    if (everywhere := distributed.world_size()) > 1:
        here = distributed.local_world_size()
        start = ["torchrun", "--nproc_per_node", str(here)]
        if everywhere > here:
            start += ["--nnodes", str(everywhere // here), "--node_rank", "NODE_RANK"]
            start += ["--master_addr", os.environ["MASTER_ADDR"]]
    return shown_command([*start, "train.py", *_without_resume(arguments)])


def _without_resume(arguments: Sequence[str]) -> list[str]:
    """Leaves out what ``run.resume`` was: going on is what it does by itself, with ``auto``."""
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if not skips and not argument.startswith("--run.resume="):
            skips = argument == "--run.resume"
            kept += [] if skips else [argument]
        else:
            skips = False
    return kept


def _train(trainer: Trainer, folder: RunFolder, resumed: Path | None) -> None:
    """Trains in ``folder``, from the start or from a saved state."""
    if resumed is not None:
        trainer.resume(resumed)
    if distributed.is_main():
        trim_metrics(folder.metrics, trainer.state.step, trainer.state.evaluated_step)
    trainer.fit()
    trainer.tracker.say(f"done: {trainer.state.step} steps; the best model is {folder.best}")
    if distributed.is_main():
        write_status(
            folder,
            state="finished",
            exit="done",
            code=EXIT_OK,
            step=trainer.state.step,
            best_step=trainer.state.best_step,
            best_metric=trainer.state.best_metric,
        )


@contextmanager
def build_trainer(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    arguments: Sequence[str],
    run_id: str = "",
    resumed: Path | None = None,
) -> Iterator[Trainer]:
    """Builds everything a run needs and records what it is; yields a trainer at step 0.

    Args:
        config: Of the run.
        folder: Claimed.
        device: Of this process.
        arguments: Of the command line, for the record and the command that goes on.
        run_id: Of the run at the tracker.
        resumed: The state that the run will go on from: measured layer pairs come from there.

    Raises:
        UserError: Whatever of models, data and options is missing or does not fit.
    """
    command = resume_command(arguments)
    stop = StopRequest(config.run.max_wall_time, command, folder.save_now)
    if distributed.is_main():
        ended = Stopped("SIGINT twice", code=130)
        stop.before_abort = partial(_write_end_status, folder, ended, ended.exit_code)
    with stop.listening(), _watched(config, folder, stop):
        torch.manual_seed(config.run.seed + distributed.rank())
        plan = plan_run(config)
        if plan.dtype == torch.float16:
            check_float16_runs()
        if plan.pairs_are_open and resumed is not None:
            plan = restore_pairs(plan, resumed)
        data = _wait_for_data(plan, stop)
        steps = count_steps(config, len(data.train), distributed.world_size())
        distributed.on_main(lambda: _record(folder, config, plan, data, arguments, command))
        with _tracker(config, folder, steps, run_id) as tracker:
            for line in distributed.on_main(lambda: check_room(plan, data, folder)) or ():
                tracker.say(line)
            for content in describe_plan(plan, data, steps):
                tracker.say(content)
            tracker.say("loading weights …")
            stop.alive()
            teacher, head = build_teacher(plan, data, device)
            stop.alive()
            module = build_module(plan, data, device, head)
            stop.alive()
            if plan.pairs_are_open:
                assert isinstance(teacher, Teacher)
                plan = measure_pairs(plan, teacher, module, data, tracker.console, stop)
                for table in pair_tables(plan):
                    tracker.say(table)
                if distributed.is_main():
                    write_json(folder.layers, pair_records(plan))
                stop.alive()
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


def _watched(
    config: TrainConfig, folder: RunFolder, stop: StopRequest
) -> AbstractContextManager[None]:
    """Ends this process with exit code 7 where the processes of a run have lost one another."""
    if distributed.world_size() == 1:
        return nullcontext()
    limit = config.run.timeout

    def give_up() -> None:
        rank = distributed.rank()
        with suppress(OSError), folder.rank_log(rank).open("a", encoding="utf-8") as log:
            faulthandler.dump_traceback(log)  # where each thread is: what hangs, or waits for whom
        error = DistributedError(
            f"rank {rank} made no step within run.timeout={limit}",
            why="this process hangs, or waits for one that does",
            fix="log.txt and log-rank*.txt of the run say where each is; the same command goes on",
        )
        os._exit(_end(folder, error, debug=False))

    return watching(parse_wall_time(limit, "run.timeout"), lambda: stop.last_asked, give_up)


def _wait_for_data(plan: Plan, stop: StopRequest) -> PreparedData:
    try:
        return load_data(plan)
    except RuntimeError:  # the process that tokenises has left,
        stop.poll("waiting for tokenised data")  # as this one should have, by the same signal
        raise


def _tracker(config: TrainConfig, folder: RunFolder, steps: StepCount, run_id: str) -> Tracker:
    return Tracker(
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
        run_id=run_id,
    )


def _record(
    folder: RunFolder,
    config: TrainConfig,
    plan: Plan,
    data: PreparedData,
    arguments: Sequence[str],
    command: str,
) -> None:
    """Writes what the run is, before it starts."""
    replace_text(folder.config, redact(dump_config(config)))
    write_json(folder.environment, environment_record(list(arguments)))
    made_of = {"fingerprint": data.fingerprint, "source": data.source}
    write_json(folder.data, {**made_of, **data.stats})
    if plan.pairs and not plan.pairs_are_open:
        write_json(folder.layers, pair_records(plan))
    step = _step(newest_state(folder))
    write_status(folder, state="running", code=None, step=step, resume_command=command)


def _step(state: Path | None) -> int:
    return 0 if state is None else int(state.name.removeprefix("step-"))


def _end(folder: RunFolder | None, error: Exception, *, debug: bool) -> int:
    """Tells the user, writes status.json and the traceback, and returns the exit code.

    Where several processes fail, the first to come here tells how the run ended; what the others
    then meet is a consequence, and goes to their logs alone.
    """
    told = _told(error, folder)
    message, code = redact(told.format()), told.exit_code
    rank = int(os.environ.get("RANK", "0"))  # the process group may not stand yet
    if debug:
        traceback.print_exception(error)
    claimed = folder if folder is not None and folder.root.is_dir() else None
    if told.everywhere:  # all meet it alike: one of each machine tells it
        speaks, writes = is_first_here(), rank == 0
        if writes and claimed is not None:
            _takes_last_word(claimed)  # what others may yet meet is a consequence
    else:
        speaks = writes = claimed is None or _takes_last_word(claimed)
    if speaks:
        print(f"rank {rank}: {message}" if rank else message, file=sys.stderr, flush=True)
    if claimed is not None:
        for write in (
            partial(_write_end_status, claimed, told, code) if writes else None,
            partial(_log_end, claimed.rank_log(rank), message, error),
        ):
            try:
                if write is not None:
                    write()
            except OSError as failure:  # a full disk is what ended the run, perhaps
                place = failure.filename or claimed.root
                print(f"  also: {place}: {failure}", file=sys.stderr)
    return leave_code(code)


def _log_end(path: Path, message: str, error: Exception) -> None:
    with path.open("a", encoding="utf-8") as log:
        log.write(f"{message}\n{redact(''.join(traceback.format_exception(error)))}\n")


def _told(error: Exception, folder: RunFolder | None) -> UserError:
    """Returns what a user should read of any error."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return storage_error(error, Path(error.filename or (folder.root if folder else ".")))
    if distributed.is_broken_connection(error):
        return distributed.another_has_left(error)
    if distributed.world_size() > 1 and not isinstance(error, UserError):
        return distributed.own_failure(error)
    return as_user_error(error, "--debug shows the traceback; log.txt of the run holds it")


def _takes_last_word(folder: RunFolder) -> bool:
    """Whether this process is the first of a run's to end by an error."""
    try:
        os.close(os.open(folder.last_word, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # a full disk: better told twice than never
        return True
    return True


def _write_end_status(folder: RunFolder, error: UserError, code: int) -> None:
    write_status(
        folder,
        state="stopped" if isinstance(error, Stopped) else "failed",
        exit=error.label,
        code=code,
        step=_step(newest_state(folder)),
        error=redact(error.format()),
    )
