"""The tables of docs/scaling.md: ``python -m benchmarks.memory --table``.

Nothing is measured and nothing is read but the DeepSpeed files: shapes are those of the models'
public config.json, and `distilllens.training.memory` does the rest, for a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from distilllens.config import load_config
from distilllens.layers import build_layer_pairs
from distilllens.models import num_blocks, vocab_rows
from distilllens.objective import DistillationObjective
from distilllens.training.memory import (
    RunCounts,
    at_stage,
    count_run,
    estimate_memory,
    longest_batch,
)
from distilllens.training.setup import Plan, load_deepspeed_config

GPUS = (1, 4, 8, 32)
CARDS = (24, 40, 80)
FITS = 0.9
"""Share of a card that an estimate may take."""
CUDA = torch.device("cuda")


def _llama(width: int, inner: int, blocks: int, heads: int, groups: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=32000,
        tie_word_embeddings=False,
    )


def _qwen(
    width: int, inner: int, blocks: int, heads: int, groups: int, vocab: int, *, tied: bool
) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "GPT-2 124M": GPT2Config(),
    "GPT-2 355M": GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    "GPT-2 1.5B": GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    "TinyLlama 1.1B": _llama(2048, 5632, 22, 32, 4),
    "Llama-2 7B": _llama(4096, 11008, 32, 32, 32),
    "Llama-2 13B": _llama(5120, 13824, 40, 40, 40),
    "Qwen2.5 1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5 7B": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A teacher and a student of the tables."""

    teacher: str
    student: str
    lora: bool = False

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"{self.teacher} → {self.student}" + (", LoRA r 8" if self.lora else "")


PAIRS = (
    Pair(teacher="GPT-2 1.5B", student="GPT-2 124M"),
    Pair(teacher="GPT-2 1.5B", student="GPT-2 355M"),
    Pair(teacher="Llama-2 7B", student="TinyLlama 1.1B"),
    Pair(teacher="Llama-2 13B", student="TinyLlama 1.1B"),
    Pair(teacher="Qwen2.5 7B", student="Qwen2.5 1.5B"),
    Pair(teacher="Llama-2 13B", student="Llama-2 7B", lora=True),
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a pair, the quicker ones first in `WAYS`."""

    stage: int
    checkpointing: bool = False
    records: int = 4
    cached: bool = False
    sharded: bool = False
    offload: bool = False
    """The optimizer in main memory."""

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        more = [f"zero{self.stage}" + ("_offload" if self.offload else "")]
        more += ["ckpt"] if self.checkpointing else []
        more += [f"batch {self.records}"] if self.records != 4 else []
        more += ["cache"] if self.cached else []
        more += ["sharded"] if self.sharded else []
        return " + ".join(more)


WAYS = (
    Way(stage=1),
    Way(stage=2),
    Way(stage=2, checkpointing=True),
    Way(stage=3, checkpointing=True),
    Way(stage=2, checkpointing=True, records=1),
    Way(stage=3, checkpointing=True, records=1),
    Way(stage=2, checkpointing=True, cached=True),
    Way(stage=3, checkpointing=True, cached=True),
    Way(stage=3, checkpointing=True, records=1, cached=True),
    Way(stage=2, checkpointing=True, cached=True, offload=True),
    Way(stage=2, checkpointing=True, records=1, cached=True, offload=True),
)


def build_plan(pair: Pair, way: Way) -> Plan:
    """Returns the plan of `distill_lens` with five layer pairs and 512 tokens, in bf16."""
    flags = ["--model.student", pair.student, "--model.teacher", pair.teacher]
    file = "zero2_offload_bf16" if way.offload else "zero2_bf16"
    flags += ["--deepspeed", f"configs/deepspeed/{file}.json"]
    flags += ["--optim.micro_batch_size", str(way.records)]
    flags += ["--model.gradient_checkpointing", str(way.checkpointing).lower()]
    flags += ["--model.student_lora.r", "8"] if pair.lora else []
    flags += ["--model.teacher_cache", "rows"] if way.cached else []
    flags += ["--model.teacher_placement", "sharded"] if way.sharded else []
    config = load_config(flags)
    deepspeed, dtype = load_deepspeed_config(config)
    teacher, student = SHAPES[pair.teacher], SHAPES[pair.student]
    pairs = build_layer_pairs(num_blocks(teacher), num_blocks(student), count=5)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    plan = Plan(
        config=config,
        deepspeed=deepspeed,
        dtype=dtype,
        teacher_dtype=dtype,
        student_config=student,
        teacher_config=teacher,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words),
        pairs=pairs,
        objective=DistillationObjective(config.objective, pairs),
        vocab_size=min(vocab_rows(teacher), vocab_rows(student)),
        notes=[],
    )
    return at_stage(plan, way.stage)


class Estimates:
    """Estimates by pair and way; models are counted once for all stages and numbers of GPUs."""

    def __init__(self) -> None:
        self._counts: dict[Any, RunCounts] = {}

    def parts(self, pair: Pair, way: Way, gpus: int) -> dict[str, float]:
        """Returns GB by purpose on each GPU."""
        plan = build_plan(pair, way)
        key = (pair, dataclasses.replace(way, stage=0))
        if key not in self._counts:
            self._counts[key] = count_run(plan, longest_batch(plan), CUDA)
        return estimate_memory(plan, gpus, counts=self._counts[key], device=CUDA).device

    def total(self, pair: Pair, way: Way, gpus: int) -> float:
        """Returns GB on each GPU."""
        return sum(self.parts(pair, way, gpus).values())


def print_scaling() -> None:
    """Prints the tables as Markdown."""
    estimates = Estimates()
    tables = (_purposes, _stages, _teachers, _recommended)
    for lines in (table(estimates) for table in tables):
        print("\n".join(lines), end="\n\n")


def _purposes(estimates: Estimates) -> Iterator[str]:
    rows = {pair.name: estimates.parts(pair, Way(stage=1), 1) for pair in PAIRS}
    heads = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    yield "GB on one GPU, ZeRO 1, by purpose:\n"
    yield _row("", *heads, "total")
    yield _row("---", *["---"] * (len(heads) + 1))
    for name, parts in rows.items():
        figures = [f"{parts[head]:.1f}" if head in parts else "" for head in heads]
        yield _row(name, *figures, f"{sum(parts.values()):.1f}")


def _stages(estimates: Estimates) -> Iterator[str]:
    yield "GB on each GPU, without / with gradient checkpointing:\n"
    yield _row("", "ZeRO", *(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS))
    yield _row("---", *["---"] * (len(GPUS) + 1))
    for pair in PAIRS:
        for stage in (1, 2, 3):
            ways = (Way(stage=stage), Way(stage=stage, checkpointing=True))
            cells = [[f"{estimates.total(pair, way, gpus):.1f}" for way in ways] for gpus in GPUS]
            yield _row(pair.name if stage == 1 else "", str(stage), *map(" / ".join, cells))


def _teachers(estimates: Estimates) -> Iterator[str]:
    yield "GB on each GPU, ZeRO 2, gradient checkpointing, by where teacher and optimizer are:\n"
    yield _row("", "", *(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS))
    yield _row("---", *["---"] * (len(GPUS) + 1))
    ways = {
        "teacher whole": Way(stage=2, checkpointing=True),
        "teacher sharded": Way(stage=2, checkpointing=True, sharded=True),
        "teacher cached": Way(stage=2, checkpointing=True, cached=True),
        "teacher cached, optimizer offloaded": Way(
            stage=2, checkpointing=True, cached=True, offload=True
        ),
    }
    for pair in PAIRS:
        for number, (label, way) in enumerate(ways.items()):
            cells = [f"{estimates.total(pair, way, gpus):.1f}" for gpus in GPUS]
            yield _row("" if number else pair.name, label, *cells)


def _recommended(estimates: Estimates) -> Iterator[str]:
    yield f"The first way that takes at most {FITS:.0%} of a card, and its GB:\n"
    yield _row("", "card", *(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS))
    yield _row("---", *["---"] * (len(GPUS) + 1))
    for pair in PAIRS:
        for card in CARDS:
            cells = [_first_fit(estimates, pair, gpus, card) for gpus in GPUS]
            yield _row(pair.name if card == CARDS[0] else "", f"{card} GB", *cells)


def _first_fit(estimates: Estimates, pair: Pair, gpus: int, card: int) -> str:
    for way in WAYS:
        if (total := estimates.total(pair, way, gpus)) <= FITS * card:
            return f"{way.name} ({total:.0f})"
    return "none"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
