"""The embedded data set: thousands of small tasks with checkable answers, made from a seed.

It stands in where no downloaded data are at hand: a model of three million weights learns most of
it in some minutes on a CPU, one of a million does not, so that a teacher has something to give.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distilllens.data.prompts import alpaca_prompt
from distilllens.data.skills.kinds import KINDS, Task
from distilllens.errors import DataError

MAX_MISSES = 400
"""Draws in a row without a new prompt after which a kind counts as exhausted."""

EOS_TOKEN = "<|endoftext|>"

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SkillSet:
    """Three lists of records (topic, instruction, input, output) that share no prompt."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def generate_skills(*, seed: int, train: int, dev: int, test: int) -> SkillSet:
    """Draws the data set; equal arguments give equal records.

    Every kind of task has the same share of each part, except that small kinds run out of
    prompts in large data sets and the others fill their place.

    Args:
        seed: Seed of all draws.
        train: Number of training records.
        dev: Number of dev records.
        test: Number of test records.

    Raises:
        DataError: A number is negative, or there are not that many different prompts.
    """
    if min(train, dev, test) < 0:
        raise DataError(f"sizes of the skills data must be ≥ 0, got {train=}, {dev=}, {test=}")
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    parts = [_draw(rng, seen, size) for size in (test, dev, train)]
    return SkillSet(test=parts[0], dev=parts[1], train=parts[2])


def _draw(rng: random.Random, seen: set[tuple[str, str]], size: int) -> list[Row]:
    """Draws `size` records with prompts that are not in `seen`, and adds them to it."""
    rows: list[Row] = []
    exhausted: set[str] = set()
    for topic in cycle(KINDS):
        if len(rows) == size:
            break
        if len(exhausted) == len(KINDS):
            raise DataError(
                f"the skills have only {len(seen)} different prompts, {size - len(rows)} too few",
                fix="ask for smaller parts with --train, --dev, --test",
            )
        if topic in exhausted:
            continue
        for _ in range(MAX_MISSES):
            task = KINDS[topic](rng)
            key = (task.instruction, task.input)
            if key not in seen and not copies_phrase(task):
                break
        else:
            exhausted.add(topic)
            continue
        seen.add(key)
        rows.append(
            {
                "topic": topic,
                "instruction": task.instruction,
                "input": task.input,
                "output": task.output,
            }
        )
    rng.shuffle(rows)
    return rows


def copies_phrase(task: Task, length: int = 5) -> bool:
    """Tells whether an answer repeats `length` words or marks in a row of itself or its prompt.

    The evaluation forbids to generate any six tokens twice, prompt included, so a model could
    not give such an answer. Five words here for six tokens there, as a word may be two tokens.
    """
    prompt, answer = (
        re.findall(r"\w+|[^\w\s]", text)
        for text in (f"{task.instruction}\n{task.input}", task.output)
    )
    words = prompt + answer
    phrases = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    first_answered = max(len(prompt) - length + 1, 0)
    return any(phrases[i] in phrases[:i] for i in range(first_answered, len(phrases)))


def write_skills(
    folder: str | Path, *, seed: int = 0, train: int = 20000, dev: int = 200, test: int = 240
) -> SkillSet:
    """Writes `raw.jsonl` (dev records first, then train) and `valid.jsonl` (test).

    Args:
        folder: Where the two files go; made if it is not there.
        seed: Seed of the data.
        train: Number of training records.
        dev: Number of dev records, to be given to the training as `eval.dev_size`.
        test: Number of test records.

    Returns:
        What was written.
    """
    skills = generate_skills(seed=seed, train=train, dev=dev, test=test)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "raw.jsonl", [*skills.dev, *skills.train])
    test_rows = [
        row | {"prompt": alpaca_prompt(row["instruction"], row["input"])} for row in skills.test
    ]
    _write_jsonl(folder / "valid.jsonl", test_rows)
    return skills


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Writes beside `path`, then renames: a killed run leaves no half file under that name."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def train_skill_tokenizer(
    records: Sequence[Row], *, vocab_size: int = 2048
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on prompts and answers; equal records give an equal tokenizer.

    The fixed sentences of the prompt template are one token each, so a prompt is about as long
    as its instruction. Each text starts as if a space stood before it, so that a word is the same
    token at the head of an answer as within it.

    Args:
        records: Records with instruction, input and output.
        vocab_size: Largest number of tokens (≥ 300), all told; fewer where the words run out.

    Returns:
        A tokenizer with `<|endoftext|>` as its end, start and padding.
    """
    assert vocab_size >= 300, vocab_size  # 256 bytes and the template's pieces
    template = [AddedToken(text, normalized=False) for text in _template_pieces()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(template),
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    texts = (record[name] for record in records for name in ("instruction", "input", "output"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(template)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        bos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _template_pieces() -> list[str]:
    """Cuts the fixed sentences out of the prompt template, with and without an input."""
    instruction, context = "\0", "\1"
    pieces = re.split("[\0\1]", alpaca_prompt(instruction, context))
    pieces += re.split("[\0]", alpaca_prompt(instruction))
    return sorted({piece for piece in pieces if piece}, key=len, reverse=True)
