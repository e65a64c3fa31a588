"""Process group, rank and the few reductions that the loop needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distilllens.errors import DistributedError, UserError
from distilllens.runtime import libraries  # noqa: F401  (first: it settles DeepSpeed's accelerator)

Result = TypeVar("Result")

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)
_timeout = TIMEOUT


def initialize(timeout: timedelta = TIMEOUT) -> torch.device:
    """Joins the process group that torchrun describes, or makes one of this process alone.

    Args:
        timeout: A process that waits longer than this for another one gives up.

    Returns:
        The device of this process: its GPU if there is one, else the CPU.

    Raises:
        DistributedError: The group cannot be joined.
    """
    global _timeout
    _timeout = timeout
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        _skip_shared_memory_build()
    if not dist.is_initialized():
        import deepspeed  # two seconds that --help need not pay

        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, verbose=False
            )
        except (RuntimeError, ValueError) as error:
            raise _cannot_join(error) from None
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_patiently(patience: timedelta) -> None:
    """Joins torchrun's process group on CPUs, of processes that rarely meet.

    Who never comes is waited for `TIMEOUT`, who has come and is slow ``patience``. A process that
    dies breaks its connections, which ends any wait.

    Raises:
        DistributedError: The group cannot be joined.
    """
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise _cannot_join(error) from None
    dist.distributed_c10d._set_pg_timeout(patience)


def _cannot_join(error: Exception) -> DistributedError:
    place = {name: os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", *ADDRESS)}
    return DistributedError(
        "rank {RANK} of {WORLD_SIZE} could not join at {MASTER_ADDR}:{MASTER_PORT}".format(**place),
        why=str(error).partition("\n")[0],
        fix="check that all processes started, the address can be reached and the port is free",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling a C++ extension for minutes before the first CPU step."""
    import deepspeed

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False


def rank() -> int:
    """Returns this process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def environment_world_size() -> int:
    """Returns the number of processes that torchrun started, also before they met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Returns how many processes torchrun, or DeepSpeed's launcher, started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def max_over_hosts(number: int) -> int:
    """Returns the largest of a number of each process, without waiting for a GPU."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_host_group())
    return int(largest)


@cache
def _host_group() -> dist.ProcessGroup | None:
    """Returns a group that reduces on CPUs; None: the default one does. All processes call it."""
    if dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=_timeout)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def min_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the smallest value of all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def sum_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Adds a few Python numbers over all processes, in float64."""
    if world_size() == 1:
        return [float(n) for n in numbers]
    return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def together(work: Callable[[], Result]) -> list[Result]:
    """Does ``work`` on every process; returns the results of all, by rank.

    Where it fails on one process it fails on all, so that none waits for one that has left.
    ``work`` itself must not communicate.

    Raises:
        DistributedError: Another process has left, or its error is none of `errors`.
        Exception: This process's own error, else that of the first process that failed.
    """
    if world_size() == 1:
        return [work()]
    result: Result | None = None
    own_error: Exception | None = None
    try:
        result = work()
    except Exception as error:
        own_error = error
    outcomes: list[Any] = [None] * world_size()
    try:
        portable = own_error
        if portable is not None and not isinstance(portable, UserError):
            portable = own_failure(portable)
        dist.all_gather_object(outcomes, (result, portable))
    except RuntimeError as error:
        raise own_error or another_has_left(error) from None
    if own_error is not None:
        raise own_error
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def own_failure(error: Exception) -> DistributedError:
    """Returns what the others learn of an error of this process that nothing expected."""
    return DistributedError(
        f"rank {rank()} failed: {error!r}",
        fix=f"its traceback is in the run's log{f'-rank{rank()}' if rank() else ''}.txt",
    )


def another_has_left(error: Exception) -> DistributedError:
    """Returns what a user should read of a connection that another process broke, or let wait."""
    return DistributedError(
        "another process has left, or did not come within run.timeout",
        why=str(error).partition("\n")[0],
        fix="the first cause is in the run's log.txt or log-rank*.txt, or in the launcher's words "
        "(a process that was killed leaves none); the same command goes on",
    )


def is_broken_connection(error: Exception) -> bool:
    """Whether a collective failed for what another process did."""
    known = isinstance(error, dist.DistError) or "gloo" in str(error)
    return world_size() > 1 and isinstance(error, RuntimeError) and known


def on_main(work: Callable[[], Result]) -> Result | None:
    """Does ``work`` on the first process; all get its result, or its error."""
    return together(lambda: work() if is_main() else None)[0]


def shutdown() -> None:
    """Leaves the process group; a group of one is kept for the next run in this process."""
    if world_size() > 1:
        _host_group.cache_clear()
        dist.destroy_process_group()
