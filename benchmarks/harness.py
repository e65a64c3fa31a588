"""Measures variants of one computation side by side: time, CPU time and peak extra memory.

A benchmark makes a list of `Variant`, gives it to `measure`, prints the results with
`print_results` and appends them to a CSV file with `append_csv`. The variants run in turn
(A B C A B C …), so a machine that slows down or a neighbour that wakes up hits all of them.

    results = measure([Variant(name="a", run=f), Variant(name="b", run=g)], rounds=3, warmup=1,
                      device=device, console=console)
    print_results(console, results, baselines=[Baseline(column="a_over_this", title="× faster than
                  a", default="a", speedup=True)])

Units: seconds; MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from distilllens.data.progress import PLAIN_INTERVAL
from distilllens.errors import EXIT_OK, ConfigError, StorageError, UserError
from distilllens.runs import git_commit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MB = 1e6
NOT_MEASURED = "n/a"
ANNOUNCED_S = 1.0
"""A repetition that is expected to take longer than this is announced on a line of its own."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the computation.

    Args:
        name: As it stands in tables and CSV rows.
        run: Does one repetition. What it returns it should also free: leftovers of one repetition
            count as the level before the next.
        setup: Runs before each repetition, outside of the measurement.
        teardown: Runs after each repetition, outside of the measurement.
    """

    name: str
    run: Callable[[], None]
    setup: Callable[[], None] | None = None
    teardown: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured repetition."""

    wall_s: float
    cpu_s: float
    """Of this process, all threads: steadier than wall time where others use the machine too."""
    extra_mb: float | None
    """Peak memory above the level just before the call; None where it cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All measured repetitions of one variant."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def wall_s(self) -> float:
        """Median wall time."""
        return statistics.median(sample.wall_s for sample in self.samples)

    @property
    def wall_min_s(self) -> float:
        """Shortest wall time."""
        return min(sample.wall_s for sample in self.samples)

    @property
    def wall_max_s(self) -> float:
        """Longest wall time."""
        return max(sample.wall_s for sample in self.samples)

    @property
    def cpu_s(self) -> float:
        """Median CPU time."""
        return statistics.median(sample.cpu_s for sample in self.samples)

    @property
    def extra_mb(self) -> float | None:
        """Median peak extra memory; None where it cannot be measured."""
        values = [sample.extra_mb for sample in self.samples if sample.extra_mb is not None]
        return statistics.median(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A column of ratios between medians of wall time.

    Args:
        column: Its name in CSV files.
        title: Its head in the table.
        default: The variant that the others are compared with.
        special: Variants that are compared with another one than ``default``.
        speedup: baseline / variant (how many times faster) instead of variant / baseline.
    """

    column: str
    title: str
    default: str
    special: Mapping[str, str] = field(default_factory=dict)
    speedup: bool = False

    def ratio(self, result: Result, results: Sequence[Result]) -> float | None:
        """Returns the ratio for one result, or None if its baseline was not measured."""
        name = self.special.get(result.name, self.default)
        base = next((other for other in results if other.name == name), None)
        if base is None:
            return None
        return base.wall_s / result.wall_s if self.speedup else result.wall_s / base.wall_s


# --- Measuring --------------------------------------------------------------------------------


def measure(
    variants: Sequence[Variant],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    console: Console,
) -> list[Result]:
    """Runs all variants in turn, ``warmup`` rounds unmeasured and ``rounds`` measured.

    Args:
        variants: With different names.
        rounds: Measured repetitions of each variant (≥ 1).
        warmup: Repetitions of each variant before them (≥ 0).
        device: Where the work is done; CUDA is synchronised around each repetition.
        console: Shows the phase and the time left, in plain lines between repetitions: a live
            display's thread would take CPU time from what is measured.

    Returns:
        One result per variant, in their order.
    """
    assert len({variant.name for variant in variants}) == len(variants), "names must differ"
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
    latest: dict[str, float] = {}
    last_line = -PLAIN_INTERVAL
    for turn in range(warmup + rounds):
        phase = f"warm-up {turn + 1}" if turn < warmup else f"round {turn + 1 - warmup}"
        of = warmup if turn < warmup else rounds
        for position, variant in enumerate(variants):
            expected = latest.get(variant.name, ANNOUNCED_S)
            if expected >= ANNOUNCED_S or time.monotonic() - last_line > PLAIN_INTERVAL:
                left = _time_left(variants, position, warmup + rounds - turn, latest)
                console.print(f"{phase} of {of}: {variant.name}{left}", highlight=False)
                last_line = time.monotonic()
            sample = _measure_once(variant, device)
            latest[variant.name] = sample.wall_s
            if turn >= warmup:
                samples[variant.name].append(sample)
    return [Result(name=name, samples=tuple(values)) for name, values in samples.items()]


def _time_left(
    variants: Sequence[Variant], position: int, turns: int, latest: Mapping[str, float]
) -> str:
    """Returns the time for what remains, counting from ``position`` in the first of ``turns``."""
    if len(latest) < len(variants):
        return ""
    here = sum(latest[variant.name] for variant in variants[position:])
    return f", about {here + (turns - 1) * sum(latest.values()):,.0f} s left"


def _measure_once(variant: Variant, device: torch.device) -> Sample:
    if variant.setup is not None:
        variant.setup()
    gc.collect()
    base_mb = _reset_peak_mb(device)
    _synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    variant.run()
    _synchronize(device)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    extra_mb = None if base_mb is None else max(0.0, _peak_mb(device) - base_mb)
    if variant.teardown is not None:
        variant.teardown()
    return Sample(wall_s=wall_s, cpu_s=cpu_s, extra_mb=extra_mb)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_mb(device: torch.device) -> float | None:
    """Resets the high-water mark; returns the level in MB, or None if there is no such mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MB
    if device.type != "cpu" or not _trim_heap():
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _peak_mb(device)


def _trim_heap() -> bool:
    """Gives freed memory back to the system; else the next peak would hide in it.

    Returns:
        False where the C library cannot (not glibc).
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def _peak_mb(device: torch.device) -> float:
    """Returns the high-water mark since the last reset: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / MB


# --- Showing and keeping ----------------------------------------------------------------------


def print_results(
    console: Console,
    results: Sequence[Result],
    *,
    title: str,
    baselines: Sequence[Baseline] = (),
    more: Mapping[str, Mapping[str, float]] | None = None,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Prints one table; times are medians, in ms if all are below a second.

    Args:
        console: Where to.
        results: In the order of the rows.
        title: Stands above the table.
        baselines: Columns of ratios.
        more: Further columns by their heads: a value for each variant's name.
        skipped: Variants that were not run, and why.
    """
    more = more or {}
    unit, scale = ("s", 1.0) if max(r.wall_max_s for r in results) >= 1 else ("ms", 1e3)
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    ratio_heads = [base.title for base in baselines]
    heads = [f"wall {unit}", "min to max", *ratio_heads, f"CPU {unit}", "extra MB"]
    for head in [*heads, *more]:
        table.add_column(head, justify="right", no_wrap=True)
    for result in results:
        ratios = [base.ratio(result, results) for base in baselines]
        table.add_row(
            result.name,
            _figures(result.wall_s * scale),
            f"{_figures(result.wall_min_s * scale)} to {_figures(result.wall_max_s * scale)}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            _figures(result.cpu_s * scale),
            NOT_MEASURED if result.extra_mb is None else f"{result.extra_mb:,.0f}",
            *(f"{column[result.name]:,.1f}" for column in more.values()),
        )
    console.print(table)
    for name, reason in (skipped or {}).items():
        console.print(f"{name}: not run, {reason}", highlight=False)


def _figures(value: float) -> str:
    """Three significant figures, never with an exponent from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def result_rows(
    results: Sequence[Result],
    *,
    parameters: Mapping[str, Any],
    baselines: Sequence[Baseline] = (),
    more: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Returns one CSV row per result: parameters, medians and ratios; empty where not measured."""
    return [
        {
            **parameters,
            "variant": result.name,
            "wall_s": result.wall_s,
            "wall_min_s": result.wall_min_s,
            "wall_max_s": result.wall_max_s,
            "cpu_s": result.cpu_s,
            "extra_mb": result.extra_mb,
            **{base.column: base.ratio(result, results) for base in baselines},
            **{column: values[result.name] for column, values in (more or {}).items()},
        }
        for result in results
    ]


def environment(device: torch.device) -> dict[str, Any]:
    """Returns date, machine and versions, the columns that each CSV row begins with.

    Take it before measuring: the load average should be that of the others.
    """
    commit = git_commit()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "torch": torch.__version__,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file, with a head line if the file is new.

    Raises:
        ConfigError: The file holds other columns.
        StorageError: It cannot be written.
    """
    columns = list(rows[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            head = next(csv.reader(file), None)
            if head not in (None, columns):
                raise ConfigError(
                    f"{path} holds columns of another benchmark or version",
                    fix="choose another --csv, or move that file away",
                    kept="the file is untouched",
                )
            writer = csv.DictWriter(file, columns)
            if head is None:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise StorageError(f"{path} cannot be written", why=str(error)) from None


# --- Commands ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Shows defaults in the help; wrong usage is a ConfigError."""

    def __init__(self, *, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises what `run_command` shows."""
        raise ConfigError(message, fix=f"{self.prog} --help")


def add_common_options(parser: Parser, *, rounds: int, warmup: int) -> None:
    """Adds the options that all benchmarks share; the numbers are their defaults."""
    add = parser.add_argument
    add("--rounds", type=positive_int, default=rounds, help="measured repetitions of each variant")
    add("--warmup", type=natural_int, default=warmup, help="repetitions of each before them")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and hidden rows")
    add("--device", default="cpu", help="cpu or cuda[:number]")
    add("--threads", type=positive_int, default=1, help="CPU threads of PyTorch")
    add("--seed", type=int, default=10, help="of all random numbers")
    add("--csv", type=Path, help="append the results to this file")


def positive_int(text: str) -> int:
    """Parses an int ≥ 1 for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def natural_int(text: str) -> int:
    """Parses an int ≥ 0 for argparse."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def prepare_process(arguments: argparse.Namespace) -> torch.device:
    """Applies ``--threads`` and ``--device``; returns the device.

    Raises:
        ConfigError: PyTorch does not know the device, or it is not there.
    """
    torch.set_num_threads(arguments.threads)
    try:
        return torch.empty(0, device=arguments.device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise ConfigError(
            f"--device {arguments.device} is not usable",
            why=str(error).partition("\n")[0],
            fix="--device cpu",
        ) from None


def run_command(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Runs a benchmark's main function with the process's arguments and exits."""
    try:
        main(None)
    except UserError as error:
        print(error.format(), file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(EXIT_OK)
