"""The lens loss, forward and backward, in several ways: ``python -m benchmarks.loss --help``.

Every variant starts from the same leaves, one padded tensor of hidden rows per lens layer and the
student's head, and ends with the gradients of all of them. Before anything is timed, each
variant's loss and gradients are held against a dense float32 computation of one layer at a time;
that run is also their warm-up. ``--growth`` times `fused` alone over eight sizes.

    published           all positions, all layers' logits at once (`benchmarks.published`)
    gathered            response rows first, then the same dense mathematics and autograd
    fused               what training does: `distilllens.fused`, all layers in one call
    fused-frozen-head   the same without a gradient of the student's head
    liger               LigerFusedLinearJSDLoss of liger-kernel on the gathered rows (jsd only)
    floor               only the matrix products of `fused`, by the same routines
    floor-frozen-head   only those of `fused-frozen-head`

Shapes: ``P`` positions (batch × padded length), ``N`` response rows of one layer, ``n`` rows of a
chunk, ``K`` layer pairs, ``D`` student width, ``E`` teacher width, ``V`` vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.growth import add_growth_options, check_growth_options, save_growth
from benchmarks.harness import (
    Baseline,
    Parser,
    Result,
    Variant,
    add_common_options,
    append_csv,
    environment,
    measure,
    positive_int,
    prepare_process,
    print_results,
    result_rows,
    run_command,
)
from benchmarks.loss_variants import (
    FROZEN,
    SHAPES,
    Case,
    build_case,
    build_floor,
    build_losses,
    differentiate,
    fused_loss,
    gathered_loss,
    with_frozen_head,
)
from distilllens.divergence import DIVERGENCES
from distilllens.errors import ConfigError, NumericsError

VARIANTS = (
    *("published", "gathered", "fused", f"fused{FROZEN}", "liger", "floor", f"floor{FROZEN}"),
)
BASELINES = (
    Baseline(column="published_over_this", title="× faster", default="published", speedup=True),
    Baseline(
        column="this_over_floor",
        title="× floor",
        default="floor",
        special={f"fused{FROZEN}": f"floor{FROZEN}", f"floor{FROZEN}": f"floor{FROZEN}"},
    ),
)
GROWTH = {
    "rows": (1, 2, 3, 4, 5, 6, 7, 8),
    "layers": (1, 2, 3, 4, 5, 6, 8, 10),
    "vocab": (1, 2, 3, 4, 5, 6, 7, 8),
}
"""Multiples of --batch; numbers of layers; eighths of the shape's vocabulary."""
QUANTITIES = {"rows": "response rows per layer", "layers": "lens layers", "vocab": "vocabulary"}


# --- The check before the clock runs ----------------------------------------------------------


def reference(case: Case) -> tuple[float, list[Tensor]]:
    """Computes loss and gradients densely in float32, one layer at a time to spare memory.

    Its own gradient is 7e-5 from that of float64 (GPT-2's widths), the fused loss's 1e-5.
    """
    layers = len(case.student_hidden_KPD)
    head_VD = case.student_head_VD.detach().float().requires_grad_()
    one = replace(case, student_head_VD=head_VD, teacher_head_VE=case.teacher_head_VE.float())
    total, gradients = 0.0, []
    head_gradient = torch.zeros_like(head_VD)
    for student_PD, teacher_PE in zip(
        case.student_hidden_KPD, case.teacher_hidden_KPE, strict=True
    ):
        layer = replace(
            one,
            student_hidden_KPD=(student_PD.detach().float().requires_grad_(),),
            teacher_hidden_KPE=(teacher_PE.float(),),
        )
        loss, (hidden, head) = differentiate(gathered_loss, layer)
        total += float(loss) / layers
        gradients.append(hidden / layers)
        head_gradient += head / layers
    return total, [*gradients, head_gradient]


def deviation(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the L2 norm of the difference of all tensors, relative to the expected ones'."""
    gaps = [(a.float() - b).norm() for a, b in zip(gradients, expected, strict=True)]
    return float(torch.stack(gaps).norm() / torch.stack([b.norm() for b in expected]).norm())


def check_equal(
    losses: Mapping[str, tuple[Callable[[Case], Tensor], Case]], case: Case, console: Console
) -> None:
    """Runs each loss once, prints how far it is from `reference`, and refuses a wrong one.

    `published` may differ: by its epsilon, and at 16 bits, as `gathered` and `liger`, by logits
    that are rounded to 16 bits.

    Raises:
        NumericsError: A loss that should be equal is not.
    """
    console.print("check: dense float32 reference, layer by layer")
    expected_loss, expected = reference(case)
    layers, sixteen_bit = len(case.student_hidden_KPD), case.student_head_VD.dtype != torch.float32
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("variant", "loss differs by", "rows' gradient by", "head's gradient by"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    wrong = []
    for name, (loss, its_case) in losses.items():
        console.print(f"check: {name}")
        value, gradients = differentiate(loss, its_case)
        gap = float(value) - expected_loss
        gaps = [deviation(gradients[:layers], expected[:layers])]
        if len(gradients) > layers:
            gaps.append(deviation(gradients[layers:], expected[layers:]))
        table.add_row(name, f"{gap:+.1e}", *(f"{relative:.1e}" for relative in gaps))
        exact = name.startswith("fused") or (name != "published" and not sixteen_bit)
        allowed = 2e-2 if sixteen_bit else 1e-3
        # "not <=" also refuses NaN
        if exact and not (abs(gap) <= 1e-4 * expected_loss and max(gaps) <= allowed):
            wrong.append(name)
    console.print(f"the reference: {expected_loss:.6f} nats", highlight=False)
    console.print(table)
    if wrong:
        raise NumericsError(
            f"{', '.join(wrong)}: loss or gradients differ from the reference",
            why="what computes something else is not worth timing",
        )


# --- The two measurements ---------------------------------------------------------------------


def timed(name: str, loss: Callable[[Case], Tensor], case: Case) -> Variant:
    """Returns a variant that computes loss and gradients and drops them."""

    def run() -> None:
        differentiate(loss, case)

    return Variant(name=name, run=run)


def run(
    variants: Sequence[Variant], arguments: argparse.Namespace, case: Case, console: Console
) -> list[Result]:
    """Measures as the options say, on the case's device."""
    return measure(
        variants,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        device=case.student_head_VD.device,
        console=console,
    )


def case_columns(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Returns the CSV columns of options and case."""
    options = ("shape", "share", "dtype", "seed", "warmup", "rounds")
    chosen = {name: getattr(arguments, name) for name in options}
    benchmark = "loss" if arguments.growth is None else f"loss growth {arguments.growth}"
    return {"benchmark": benchmark, **chosen, **case.parameters()}


def describe(arguments: argparse.Namespace, case: Case) -> str:
    """Returns the table's title."""
    columns = case.parameters()
    return (
        f"{case.kind}, forward and backward: {arguments.shape}, {arguments.dtype}, "
        f"{columns['layers']} layers, {columns['rows']:,} response rows of "
        f"{len(case.mask_P):,} positions each, threads: {torch.get_num_threads()}"
    )


def compare_variants(
    arguments: argparse.Namespace, case: Case, machine: dict[str, Any], console: Console
) -> list[dict[str, Any]]:
    """Checks, times and prints the chosen variants; returns their CSV rows."""
    losses, skipped = build_losses(arguments, case)
    check_equal(losses, case, console)
    variants = [timed(name, loss, its_case) for name, (loss, its_case) in losses.items()]
    floors = [build_floor(each) for each in (case, with_frozen_head(case))]
    variants += [floor for floor in floors if floor.name in arguments.variants]
    results = run(variants, arguments, case, console)
    print_results(
        console, results, title=describe(arguments, case), baselines=BASELINES, skipped=skipped
    )
    parameters = {**machine, **case_columns(arguments, case)}
    return result_rows(results, parameters=parameters, baselines=BASELINES)


def measure_growth(
    arguments: argparse.Namespace, largest: Case, machine: dict[str, Any], console: Console
) -> list[dict[str, Any]]:
    """Times `fused_loss` over eight values of one quantity; returns their CSV rows."""
    cases = {}
    for value in GROWTH[arguments.growth]:
        case = cut(largest, arguments.growth, value, batch=arguments.batch)
        columns = case.parameters()
        cases[f"{arguments.growth} {columns[arguments.growth]:,}"] = case
    variants = [timed(name, fused_loss, case) for name, case in cases.items()]
    results = run(variants, arguments, largest, console)
    print_results(console, results, title=describe(arguments, largest))
    if arguments.plot is not None:
        values = [case.parameters()[arguments.growth] for case in cases.values()]
        save_growth(arguments.plot, QUANTITIES[arguments.growth], values, results, console)
    rows = []
    for result, case in zip(results, cases.values(), strict=True):
        parameters = {**machine, **case_columns(arguments, case)}
        rows += result_rows([result], parameters=parameters, baselines=BASELINES)
    return rows


def cut(case: Case, quantity: str, value: int, *, batch: int) -> Case:
    """Returns the case with less of one quantity; heads and teacher's rows are views."""
    layers, positions = len(case.student_hidden_KPD), len(case.mask_P)
    vocab = len(case.student_head_VD)
    if quantity == "rows":
        positions = positions // case.batch * batch * value
        batch *= value
    elif quantity == "layers":
        layers = value
    else:
        vocab = vocab * value // 8
    return replace(
        case,
        student_hidden_KPD=tuple(
            hidden_PD.detach()[:positions].requires_grad_()
            for hidden_PD in case.student_hidden_KPD[:layers]
        ),
        teacher_hidden_KPE=tuple(
            hidden_PE[:positions] for hidden_PE in case.teacher_hidden_KPE[:layers]
        ),
        student_head_VD=case.student_head_VD.detach()[:vocab].requires_grad_(),
        teacher_head_VE=case.teacher_head_VE[:vocab],
        mask_P=case.mask_P[:positions],
        index_N=case.mask_P[:positions].nonzero().squeeze(1),
        batch=batch,
    )


# --- The command ------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(prog="python -m benchmarks.loss", description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="gpt2", help="widths of both models, vocabulary")
    add("--kind", choices=list(DIVERGENCES), default="jsd", help="divergence")
    add("--beta", type=float, default=0.5, help="jsd: weight of the teacher, in (0, 1)")
    add("--layers", type=positive_int, default=5, help="lens layers")
    add("--batch", type=positive_int, default=1, help="sequences")
    add("--length", type=positive_int, default=512, help="tokens of a padded sequence")
    add("--share", type=float, default=0.25, help="of the positions that are response tokens")
    add("--chunk_rows", type=positive_int, help="rows projected at a time; None: by memory budget")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which to run")
    add("--liger_eager", action="store_true", help="run liger without torch.compile")
    add_growth_options(parser, list(GROWTH))
    add_common_options(parser, rounds=5, warmup=0)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share <= 1 or not 0 < arguments.beta < 1:
        raise ConfigError("--share must be in (0, 1], --beta in (0, 1)")
    check_growth_options(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        ConfigError: Wrong usage, or a CSV file of another benchmark.
        NumericsError: A variant computes something else than the reference.
        StorageError: The CSV file cannot be written.
    """
    arguments = parse(argv)
    device = prepare_process(arguments)
    console = Console()
    machine = environment(device)
    console.print("making inputs")
    sizes = argparse.Namespace(**vars(arguments))
    if arguments.growth == "rows":
        sizes.batch *= max(GROWTH["rows"])
    if arguments.growth == "layers":
        sizes.layers = max(GROWTH["layers"])
    case = build_case(sizes, device)
    benchmark = compare_variants if arguments.growth is None else measure_growth
    rows = benchmark(arguments, case, machine, console)
    if arguments.csv is not None:
        append_csv(arguments.csv, rows)


if __name__ == "__main__":
    run_command(main)
