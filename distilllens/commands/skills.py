"""What the quickstart starts from: the skills data, a tiny teacher and a tiny student.

Both models are random GPT-2s with the skills' own tokenizer. The quickstart first trains the
teacher, and the student a little, as the students of the paper are pretrained models too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from distilllens.data.skills.kinds import KINDS
from distilllens.data.skills.records import SkillSet

POSITIONS = 256
"""Longest prompt and answer in tokens."""
INITIALIZER_RANGE = 0.05
"""Standard deviation of the random weights. GPT-2's 0.02 suits widths of 768 and more."""


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Size of a tiny GPT-2."""

    layers: int
    width: int
    heads: int


TEACHER_SHAPE = TinyShape(layers=6, width=192, heads=4)
"""About 3.0 million weights with the skills' vocabulary. In like CPU time (270 to 300 s) it came to
Rouge-L 82, a width of 256 to 78."""
STUDENT_SHAPE = TinyShape(layers=3, width=128, heads=4)
"""About 0.8 million weights."""

TINY_MODELS = {"skills-teacher-init": TEACHER_SHAPE, "skills-student-init": STUDENT_SHAPE}
"""Folder name → size."""


def kinds_table(skills: SkillSet) -> Table:
    """Returns a table of the kinds of tasks: counts of each part and one example."""
    parts = {"train": skills.train, "dev": skills.dev, "test": skills.test}
    counts = {name: Counter(row["topic"] for row in rows) for name, rows in parts.items()}
    examples = {row["topic"]: row for rows in parts.values() for row in rows}
    table = Table(title="Skills: kinds of tasks", show_footer=True)
    table.add_column("kind", footer="all")
    for name, rows in parts.items():
        table.add_column(name, justify="right", footer=f"{len(rows):,}")
    table.add_column("example", overflow="fold")
    for topic in KINDS:
        numbers = [f"{count[topic]:,}" for count in counts.values()]
        row = examples.get(topic)
        table.add_row(topic, *numbers, escape(_one_line(row)) if row else "")
    return table


def _one_line(row: dict[str, str]) -> str:
    question = f"{row['instruction']} [{row['input']}]" if row["input"] else row["instruction"]
    return f"{question} → {row['output']}"


def build_tiny_models(
    folder: str | Path, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[Path]:
    """Writes a random teacher and a random student as Hugging Face model folders.

    Args:
        folder: Parent of the two folders, which are overwritten.
        tokenizer: Saved with both models; its length is their vocabulary.
        seed: Seed of the weights. The global random state is left as it was.

    Returns:
        The folders, teacher first.
    """
    folders = []
    for name, shape in TINY_MODELS.items():
        model_folder = Path(folder) / name
        model = build_tiny_gpt2(shape, tokenizer=tokenizer, seed=seed)
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
        folders.append(model_folder)
    return folders


def build_tiny_gpt2(
    shape: TinyShape, *, tokenizer: PreTrainedTokenizerBase, seed: int
) -> GPT2LMHeadModel:
    """Returns a GPT-2 with random weights, no dropout, in float32 and evaluation mode."""
    ends = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INITIALIZER_RANGE,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(**ends)
    return model.eval()
