"""One pass over the same records by several training steps: ``python -m benchmarks.step --help``.

Models have random weights and GPT-2's structure; records, tokenizer and so the lengths are real.

    published    fixed padding to --max_length, whole models with all hidden states, the published
                 loss on every position (`benchmarks.published`), PyTorch's default AdamW
    ours         `distilllens.trainer`: fused loss, batches of similar length, DeepSpeed
    ours-mixed   the same in random order (data.group_by_length false)
    ours-packed  the same in random order, records packed into rows
    ours-kd      ours without the lens
    ours-cached  ours with the teacher's rows read from a cache, which is made before the clock runs

Each repetition builds its trainer and makes one step before the clock starts. ``--growth`` times
`ours` alone over sizes of one kind.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.growth import add_growth_options, check_growth_options, save_growth
from benchmarks.harness import (
    DTYPES,
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
from benchmarks.published import published_divergence
from distilllens.commands.cache_teacher import cache_teacher
from distilllens.config import load_config
from distilllens.data.collate import Batch, collate
from distilllens.data.tokenize import response_rows
from distilllens.errors import ConfigError
from distilllens.models import load_tokenizer
from distilllens.runs import create_run_folder
from distilllens.runtime import distributed
from distilllens.runtime.libraries import quiet_libraries
from distilllens.runtime.signals import StopRequest
from distilllens.session import build_trainer
from distilllens.trainer import Trainer
from distilllens.training.setup import Plan, load_data, plan_run

SHAPES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
    "tiny": (6, 48, 2),
}
"""Blocks, width, heads."""
FLAGS = {
    "ours": (),
    "ours-mixed": ("--data.group_by_length", "false"),
    "ours-packed": ("--data.group_by_length", "false", "--data.packing", "true"),
    "ours-kd": ("--objective.approach", "kd"),
    "ours-cached": ("--model.teacher_cache",),  # and the folder
}
VARIANTS = ("published", *FLAGS)
BASELINES = (
    Baseline(column="published_over_this", title="× faster", default="published", speedup=True),
    Baseline(column="this_over_kd", title="× kd", default="ours-kd"),
)
GROWTH = {
    "micro_batch": (1, 2, 3, 4, 6, 8),
    "layers": (1, 2, 3, 4, 5),
    "depth": (1, 2, 3, 4),
    "vocab": (4, 5, 6, 7, 8, 10, 12),
}
"""Records of a step (--records is the pass of the largest); layer pairs; quarters of both models'
blocks; quarters of --vocab."""
QUANTITIES = {
    "micro_batch": "records of a step",
    "layers": "layer pairs",
    "depth": "quarters of both models' blocks",
    "vocab": "vocabulary",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Models and data on disk, and the sizes that all variants share."""

    arguments: argparse.Namespace
    folder: Path
    layers: int
    micro_batch: int
    records: int
    vocab: int
    depth: int

    def flags(self, *more: str) -> list[str]:
        """Returns train.py's arguments."""
        options, stage = self.arguments, 1 if self.arguments.dtype == "bfloat16" else 0
        precision = "bf16" if options.dtype == "bfloat16" else "fp32"
        return [
            *("--model.student", f"{self.folder}/student"),
            *("--model.teacher", f"{self.folder}/teacher"),
            *("--data.path", str(options.data), "--data.processed", f"{self.folder}/tokens"),
            *("--data.train_size", str(self.records), "--data.max_length"),
            *(str(options.max_length), "--data.max_prompt_length", str(options.max_length // 2)),
            *("--eval.dev_size", "0", "--optim.epochs", "1000"),
            *("--optim.micro_batch_size", str(self.micro_batch), "--run.seed", str(options.seed)),
            *("--objective.lens.count", str(self.layers)),
            *("--deepspeed", f"configs/deepspeed/zero{stage}_{precision}.json"),
            *more,
        ]

    def response_tokens(self) -> int:
        """Returns the response tokens of one pass over the records."""
        return int(response_rows(load_data(plan_run(load_config(self.flags()))).train).sum())

    def parameters(self) -> dict[str, Any]:
        """Returns the CSV columns that describe the case."""
        options = ("teacher", "student", "dtype", "max_length", "seed", "warmup", "rounds")
        growth = self.arguments.growth
        return {
            "benchmark": "step" if growth is None else f"step growth {growth}",
            **{name: getattr(self.arguments, name) for name in options},
            **{name: getattr(self, name) for name in ("layers", "micro_batch", "records", "vocab")},
            "depth": self.depth,
        }


def build_case(arguments: argparse.Namespace, folder: Path, value: int = 0) -> Case:
    """Writes random models; ``value`` is the size that ``--growth`` changes.

    Raises:
        ConfigError: A vocabulary below the tokenizer's.
    """
    sizes = {"micro_batch": arguments.micro_batch_size, "layers": arguments.layers, "depth": 4}
    sizes["vocab"], sizes["records"] = arguments.vocab, arguments.records
    if arguments.growth == "vocab":
        sizes["vocab"] = arguments.vocab * value // 4
    elif arguments.growth is not None:
        sizes[arguments.growth] = value
    if arguments.growth == "micro_batch":  # as many steps for each
        sizes["records"] = arguments.records * value // max(GROWTH["micro_batch"])
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    if sizes["vocab"] < len(tokenizer):
        raise ConfigError(f"--vocab {sizes['vocab']} is below the tokenizer's {len(tokenizer)}")
    for role in ("teacher", "student"):
        blocks, width, heads = SHAPES[getattr(arguments, role)]
        torch.manual_seed(arguments.seed)
        config = GPT2Config(
            n_layer=blocks * sizes["depth"] // 4,
            n_embd=width,
            n_head=heads,
            vocab_size=sizes["vocab"],
        )
        model: Any = GPT2LMHeadModel(config)
        model.to(DTYPES[arguments.dtype]).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return Case(arguments=arguments, folder=folder, **sizes)


# --- The published step -------------------------------------------------------------------------


class PublishedStep:
    """The published way through a step; see the module's text.

    Args:
        plan: For layer pairs, tokenizer and lengths.
        records: Tokenised, as columns of a table's rows.
        device: Of both models.
    """

    def __init__(self, plan: Plan, records: Sequence[Any], device: torch.device) -> None:
        self.plan, self.records, self.device = plan, records, device
        model = plan.config.model
        assert model.teacher is not None
        self.teacher = self._load(model.teacher).eval().requires_grad_(False)
        self.student = self._load(model.student).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=plan.config.optim.lr)

    def _load(self, folder: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.plan.dtype)
        return model.to(self.device)

    def run_epoch(self) -> None:
        """Trains on all records once."""
        size = self.plan.config.optim.micro_batch_size
        for start in range(0, len(self.records) // size * size, size):
            self.step(self.records[start : start + size])

    def step(self, records: Sequence[Any]) -> None:
        """Does one optimizer step."""
        batch = self._pad(collate(records, pad_id=self.plan.tokenizer.eos_token_id))
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True, use_cache=False)
        student = self.student(**inputs, output_hidden_states=True, use_cache=False)
        mask_P = (batch.labels_BT[:, 1:] != -100).flatten()
        pairs = self.plan.pairs
        lens = published_divergence(
            "jsd",
            teacher_logits=self._logits(
                self.teacher, teacher.hidden_states, [pair.teacher for pair in pairs]
            ),
            student_logits=self._logits(
                self.student, student.hidden_states, [pair.student for pair in pairs]
            ),
            mask=mask_P,
        )
        final = published_divergence(
            "rkl",
            teacher_logits=teacher.logits[:, :-1].flatten(0, 1),
            student_logits=student.logits[:, :-1].flatten(0, 1),
            mask=mask_P,
        )
        del teacher, student
        (final + lens).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _pad(self, batch: Batch) -> Batch:
        missing = self.plan.config.data.max_length - batch.input_ids_BT.shape[1]
        fills = {"input_ids_BT": 0, "attention_mask_BT": 0, "labels_BT": -100}
        padded = {n: pad(getattr(batch, n), (0, missing), value=v) for n, v in fills.items()}
        return Batch(**{**vars(batch), **padded}).to(self.device)

    @staticmethod
    def _logits(
        model: PreTrainedModel, hidden_states: Sequence[Tensor], layers: Sequence[int]
    ) -> Tensor:
        rows_KPD = torch.stack([hidden_states[layer][:, :-1].flatten(0, 1) for layer in layers])
        return model.get_output_embeddings()(rows_KPD)


# --- Variants -----------------------------------------------------------------------------------


def published_variant(case: Case, device: torch.device) -> Variant:
    """Returns the published step over all records."""
    built: list[PublishedStep] = []

    def setup() -> None:
        plan = plan_run(load_config(case.flags()))
        records = list(load_data(plan).train)
        built.append(PublishedStep(plan, records, device))
        built[0].step(records[: plan.config.optim.micro_batch_size])

    def teardown() -> None:
        built.clear()
        free(device)

    return Variant(
        name="published", setup=setup, run=lambda: built[0].run_epoch(), teardown=teardown
    )


def trainer_variant(name: str, case: Case, device: torch.device, *flags: str) -> Variant:
    """Returns the project's own step over all records."""
    built: list[Trainer] = []
    stack = ExitStack()

    def setup() -> None:
        arguments = case.flags(*flags, "--run.output_dir", f"{case.folder}/run")
        folder = create_run_folder(f"{case.folder}/run")
        with redirect_stdout(StringIO()):  # what a run tells of itself, each time
            trainer = stack.enter_context(
                build_trainer(load_config(arguments), folder, device, arguments)
            )
        trainer.train_step(next(trainer.loader.epoch(0)))
        built.append(trainer)

    def run() -> None:
        for batches in built[0].loader.epoch(1):
            built[0].train_step(batches)
        built[0].refuse_non_finite()

    def teardown() -> None:
        stack.close()
        built.clear()
        free(device)

    return Variant(name=name, setup=setup, run=run, teardown=teardown)


def free(device: torch.device) -> None:
    """Frees what models and engines left; engines refer to themselves in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def build_variants(case: Case, device: torch.device, names: Sequence[str]) -> list[Variant]:
    """Returns the chosen variants; makes the teacher's cache if one of them reads it."""
    variants = []
    for name in names:
        if name == "published":
            variants.append(published_variant(case, device))
            continue
        flags = list(FLAGS[name])
        if name == "ours-cached":
            flags.append(f"{case.folder}/rows")
            cache_teacher(load_config(case.flags(*flags)), device, StopRequest(resume_command=""))
            free(device)
        variants.append(trainer_variant(name, case, device, *flags))
    return variants


# --- The command --------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Returns the command line."""
    parser = Parser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/dolly"), help="folder with raw.jsonl")
    add("--tokenizer", type=Path, default=Path("checkpoints/gpt2-base"), help="its folder")
    add("--teacher", choices=list(SHAPES), default="gpt2-medium", help="shape of the teacher")
    add("--student", choices=list(SHAPES), default="gpt2", help="shape of the student")
    add("--vocab", type=positive_int, default=50257, help="rows of both LM heads")
    add("--layers", type=positive_int, default=5, help="layer pairs of the lens")
    add("--records", type=positive_int, default=24, help="training records of one repetition")
    add("--micro_batch_size", type=positive_int, default=2, help="records of a step")
    add("--max_length", type=positive_int, default=512, help="tokens; prompts get half of it")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to run")
    add_growth_options(parser, list(GROWTH))
    add_common_options(parser, rounds=2, warmup=0)
    return parser


def compare_variants(
    arguments: argparse.Namespace, scratch: Path, device: torch.device, console: Console
) -> list[dict[str, Any]]:
    """Times the chosen variants over the same records and prints the table."""
    case = build_case(arguments, scratch)
    variants = build_variants(case, device, arguments.variants)
    results = run(variants, arguments, device, console)
    tokens = case.response_tokens()
    more = {r.name: tokens / r.wall_s for r in results}
    print_results(
        console,
        results,
        title=f"one pass over {arguments.records} records with {tokens:,} response tokens: "
        f"{arguments.teacher} → {arguments.student}, {arguments.layers} layer pairs, batches of "
        f"{arguments.micro_batch_size}, {arguments.dtype}, threads: {torch.get_num_threads()}",
        baselines=BASELINES,
        more={"tokens/s": more},
    )
    columns = {"tokens_per_s": more}
    parameters = {**case.parameters(), "response_tokens": tokens}
    return result_rows(results, parameters=parameters, baselines=BASELINES, more=columns)


def measure_growth(
    arguments: argparse.Namespace, scratch: Path, device: torch.device, console: Console
) -> list[dict[str, Any]]:
    """Times `ours` over sizes of one quantity; the records are the same for all."""
    quantity = arguments.growth
    cases = {
        f"{quantity} {value}": build_case(arguments, scratch / str(value), value)
        for value in GROWTH[quantity]
    }
    variants = [trainer_variant(name, case, device) for name, case in cases.items()]
    results = run(variants, arguments, device, console)
    print_results(console, results, title=f"ours over {QUANTITIES[quantity]}")
    if arguments.plot is not None:
        values = [getattr(case, quantity) for case in cases.values()]
        save_growth(arguments.plot, QUANTITIES[quantity], values, results, console)
    rows = []
    for result, case in zip(results, cases.values(), strict=True):
        parameters = {**case.parameters(), "response_tokens": case.response_tokens()}
        rows += result_rows([result], parameters=parameters)
    return rows


def run(
    variants: Sequence[Variant],
    arguments: argparse.Namespace,
    device: torch.device,
    console: Console,
) -> list[Result]:
    """Measures as the options say."""
    rounds, warmup = arguments.rounds, arguments.warmup
    return measure(variants, rounds=rounds, warmup=warmup, device=device, console=console)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and appends to the CSV file if one is named.

    Raises:
        UserError: Wrong usage, or files that are missing.
    """
    arguments = build_parser().parse_args(argv)
    check_growth_options(arguments)
    quiet_libraries()
    prepare_process(arguments)
    device = distributed.initialize()
    if device.type != torch.device(arguments.device).type:
        raise ConfigError(f"--device {arguments.device}, but training here runs on {device.type}")
    console = Console(soft_wrap=True)
    machine = environment(device)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.growth:
            rows = measure_growth(arguments, Path(scratch), device, console)
        else:
            rows = compare_variants(arguments, Path(scratch), device, console)
    if arguments.csv is not None:
        append_csv(arguments.csv, [{**machine, **row} for row in rows])


if __name__ == "__main__":
    run_command(main)
