"""The memory estimate against measured runs: ``python -m benchmarks.memory --help``.

Each case trains in a process of its own: random models of GPT-2's structure, records of random
words that all reach the length. Measured is the highest resident memory from the start of the
process (VmHWM; on a GPU what PyTorch allocated, without the runtime), estimated is
`distilllens.training.memory` for the same batch. ``--table`` prints the tables of docs/scaling.md
instead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.harness import Parser, append_csv, environment, positive_int, run_command
from benchmarks.scaling import print_scaling
from distilllens.config import load_config
from distilllens.data.tokenize import record_lengths, response_rows
from distilllens.errors import ConfigError
from distilllens.runs import create_run_folder, write_json
from distilllens.runtime import distributed
from distilllens.runtime.libraries import quiet_libraries
from distilllens.session import build_trainer
from distilllens.training.memory import GIGA, MALLOC_VARIABLE, estimate_memory, longest_batch

SHAPES = {"gpt2": (12, 768, 12, 50257), "small": (4, 256, 4, 8192)}
"""Blocks, width, heads, vocabulary of student and teacher."""
MALLOC_EXACT = "1000000"
"""Blocks of 1 MB and more go back to the system when they are freed."""
EOS = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is measured."""

    stage: int
    precision: str
    approach: str
    records: int
    length: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """As it stands in tables and CSV rows."""
        batch = f"{self.records}x{self.length}" + ("-ckpt" if self.checkpointing else "")
        return f"zero{self.stage}-{self.precision}-{self.approach}-{batch}"

    def flags(self, folder: Path) -> list[str]:
        """Returns train.py's arguments."""
        teacher = () if self.approach == "sft" else ("--model.teacher", f"{folder}/teacher")
        return [
            *("--model.student", f"{folder}/student", *teacher),
            *("--data.path", f"{folder}/data", "--data.processed", f"{folder}/{self.length}"),
            *("--data.max_length", str(self.length), "--eval.dev_size", "0"),
            *("--data.max_prompt_length", str(self.length // 2), "--optim.epochs", "1000"),
            *("--optim.micro_batch_size", str(self.records), "--objective.lens.count", "3"),
            *("--objective.approach", self.approach),
            *("--model.gradient_checkpointing", str(self.checkpointing).lower()),
            *("--deepspeed", f"configs/deepspeed/zero{self.stage}_{self.precision}.json"),
            *("--run.output_dir", f"{folder}/run"),
        ]


CASES = {
    case.name: case
    for case in (
        Case(stage=0, precision="fp32", approach="distill_lens", records=4, length=256),
        Case(stage=1, precision="bf16", approach="distill_lens", records=4, length=256),
        Case(stage=2, precision="fp32", approach="sft", records=4, length=256),
        Case(stage=3, precision="bf16", approach="kd", records=2, length=512),
        Case(stage=3, precision="fp32", approach="sft", records=4, length=256),
        Case(stage=0, precision="fp32", approach="sft", records=4, length=256, checkpointing=True),
        Case(stage=1, precision="fp32", approach="kd", records=2, length=512, checkpointing=True),
        Case(
            stage=2,
            precision="bf16",
            approach="distill_lens",
            records=2,
            length=512,
            checkpointing=True,
        ),
    )
}


def build_files(folder: Path, shape: str, seed: int) -> None:
    """Writes both models, a tokenizer of as many words, and records that are longer than needed."""
    blocks, width, heads, vocab = SHAPES[shape]
    words = {EOS: 0} | {f"w{i}": i for i in range(1, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token=EOS)
    torch.manual_seed(seed)
    for role in ("student", "teacher"):
        config = GPT2Config(
            n_layer=blocks,
            n_embd=width,
            n_head=heads,
            vocab_size=vocab,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    generator = random.Random(seed)

    def text(count: int) -> str:
        return " ".join(f"w{generator.randrange(1, vocab)}" for _ in range(count))

    records = [{"instruction": text(60), "input": "", "output": text(600)} for _ in range(16)]
    (folder / "data").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data/raw.jsonl").write_text(lines, encoding="utf-8")


# --- In the measured process --------------------------------------------------------------------


def measure_here(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Trains in this process and returns GB, estimated and measured."""
    quiet_libraries()
    device = distributed.initialize()
    arguments = case.flags(folder)
    with (
        redirect_stdout(sys.stderr),
        build_trainer(
            load_config(arguments), create_run_folder(f"{folder}/run"), device, arguments
        ) as trainer,
    ):
        batches = trainer.loader.epoch(0)
        for _ in range(steps):
            trainer.train_step(next(batches))
            trainer.refuse_non_finite()
        batches.close()
        measured = _peak_bytes(device) / GIGA
        maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA
        plan, table = trainer.plan, trainer.data.train
    lengths, rows = record_lengths(table).tolist(), response_rows(table).tolist()
    batch = longest_batch(plan, lengths, rows)
    estimate = estimate_memory(plan, 1, batch=batch, device=device)
    parts = dict(estimate.device)
    if device.type == "cuda":
        del parts["runtime"]
    total = sum(parts.values())
    return {
        "estimate_gb": total,
        "measured_gb": measured,
        "ratio": total / measured,
        "maxrss_gb": maxrss,
        "moment": estimate.moment,
        "parts": parts,
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# --- The command --------------------------------------------------------------------------------


def measure_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a case in a process of its own; files are made anew and go afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_files(folder, arguments.shape, arguments.seed)
        result = folder / "result.json"
        command = [sys.executable, "-m", "benchmarks.memory", "--cases", case.name]
        command += ["--steps", str(arguments.steps), "--inside", str(folder)]
        variables = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        if arguments.malloc == "exact":
            variables[MALLOC_VARIABLE] = MALLOC_EXACT
        env = {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", MALLOC_VARIABLE)}
        done = subprocess.run(command, env=env | variables, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigError(f"{case.name} ended with {done.returncode}", why=done.stderr[-2000:])
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def print_case(console: Console, results: dict[str, dict[str, Any]], title: str) -> None:
    """Prints the table."""
    console.print(title, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    for head in ("estimate", "measured", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("most is needed at", no_wrap=True)
    for name, found in results.items():
        figures = (found["estimate_gb"], found["measured_gb"], found["ratio"])
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), found["moment"])
    console.print(table)


def build_parser() -> Parser:
    """Returns the command line."""
    parser = Parser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which to run")
    add("--shape", choices=list(SHAPES), default="gpt2", help="of both models")
    add("--steps", type=positive_int, default=3, help="optimizer steps of each")
    add(
        "--malloc",
        choices=("default", "exact"),
        default="default",
        help=f"{MALLOC_VARIABLE} off/on",
    )
    add("--threads", type=positive_int, default=1, help="CPU threads of PyTorch")
    add("--seed", type=int, default=10, help="of weights and words")
    add("--csv", type=Path, help="append the results to this file")
    add("--table", action="store_true", help="print the tables of docs/scaling.md; measure nothing")
    add("--inside", type=Path, help="for the benchmark itself: measure in this process")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures case by case, prints a table, and appends to the CSV file if one is named.

    Raises:
        UserError: Wrong usage, or a case that ends with an error.
    """
    arguments = build_parser().parse_args(argv)
    quiet_libraries()
    console = Console(soft_wrap=True, width=100)
    if arguments.table:
        print_scaling()
        return
    if arguments.inside is not None:
        found = measure_here(CASES[arguments.cases[0]], arguments.inside, arguments.steps)
        write_json(arguments.inside / "result.json", found)
        return
    machine = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results, rows = {}, []
    for name in arguments.cases:
        console.print(f"{name} …", highlight=False)
        results[name] = found = measure_case(CASES[name], arguments)
        options = {key: getattr(arguments, key) for key in ("shape", "steps", "malloc", "seed")}
        figures = found | {"parts": json.dumps(found["parts"])}
        rows.append({**machine, "benchmark": "memory", "case": name, **options, **figures})
    print_case(
        console,
        results,
        f"GB of one process; {arguments.shape}, {arguments.steps} steps, malloc {arguments.malloc}",
    )
    if arguments.csv is not None:
        append_csv(arguments.csv, rows)


if __name__ == "__main__":
    run_command(main)
