"""Prompts over the limit: their middle is cut, never their end, which is "### Response:".

What is left out is as little as possible of the middle of the input; where there is none, or it is
not enough, of the instruction. A mark stands in its place. The cuts fall between tokens of the
text and inside no character; the prompt that comes out is tokenised again, because pieces that
meet may merge into other tokens, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from transformers import PreTrainedTokenizerBase

from distilllens.data.encode import encode_prompts
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.records import Record
from distilllens.errors import ConfigError

MARK = "…"
"""Stands for what was left out, with a blank on each side where text stands there."""


@dataclass(frozen=True, kw_only=True)
class FittedRecords:
    """Records whose prompts are within a limit."""

    records: list[Record]
    """In their order; a prompt that was cut is the record's prompt from here on."""
    cut: frozenset[int]
    """Places in ``records`` of those that were cut."""
    num_dropped: int
    """Records that were left out."""
    longest: int
    """Tokens of the longest prompt; 0 where no record is left."""

    @property
    def num_long(self) -> int:
        """Records whose prompts were over the limit."""
        return len(self.cut) + self.num_dropped


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    limit: int,
    long_prompts: Literal["cut", "drop"],
) -> FittedRecords:
    """Makes all prompts fit; this is what training's dev evaluation and the final one share.

    Args:
        tokenizer: The model's.
        records: Of any length.
        limit: Longest prompt in tokens.
        long_prompts: What becomes of longer ones.

    Raises:
        ConfigError: A prompt cannot be cut so far: the template alone is over the limit.
    """
    lengths = _count_tokens(tokenizer, [record.prompt for record in records])
    fitted: list[Record] = []
    cut: list[int] = []
    for record, length in zip(records, lengths, strict=True):
        if length > limit:
            if long_prompts == "drop":
                continue
            cut.append(len(fitted))
            record = cut_record(tokenizer, record, limit)
        fitted.append(record)
    cut_lengths = _count_tokens(tokenizer, [fitted[place].prompt for place in cut])
    return FittedRecords(
        records=fitted,
        cut=frozenset(cut),
        num_dropped=len(records) - len(fitted),
        longest=max([*(n for n in lengths if n <= limit), *cut_lengths], default=0),
    )


def cut_record(tokenizer: PreTrainedTokenizerBase, record: Record, limit: int) -> Record:
    """Returns a record whose prompt has at most ``limit`` tokens; one that fits stays as it is.

    Raises:
        ConfigError: The template alone is over the limit.
    """
    if _count_tokens(tokenizer, [record.prompt])[0] <= limit:
        return record
    length = 0
    if record.input:
        whole = record
        record, length = _cut_middle(
            tokenizer, record.input, lambda text: replace(whole, input=text), limit
        )
    if length > limit or not record.input:
        rest = record
        record, length = _cut_middle(
            tokenizer, record.instruction, lambda text: replace(rest, instruction=text), limit
        )
    if length > limit:
        template = alpaca_prompt(MARK, MARK if record.input else "")
        (needed,) = _count_tokens(tokenizer, [template])
        raise ConfigError(
            f"max_prompt_length={limit} leaves no room for an instruction",
            why=f"the template around it takes {needed} tokens, and is never cut",
            fix=f"raise it (in training: data.max_prompt_length) to {needed} at least, or leave "
            "such prompts out: --eval.long_prompts drop",
        )
    return record


def _cut_middle(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    insert: Callable[[str], Record],
    limit: int,
) -> tuple[Record, int]:
    """Leaves out as much of a text's middle as must be, all of it at most.

    Args:
        tokenizer: The model's.
        text: The part of a record to cut.
        insert: Makes the record with another text in its place.
        limit: Longest prompt in tokens.

    Returns:
        The record, and the tokens of its prompt, over the limit if nothing of the text is left.
    """
    ends = _piece_ends(tokenizer, text)

    def cut_to(kept: int) -> tuple[Record, int]:
        record = insert(_without_middle(text, ends, kept))
        return record, _count_tokens(tokenizer, [record.prompt])[0]

    best = cut_to(0)
    fits, too_many = 0, len(ends)
    while too_many - fits > 1:  # what fits has been counted, whatever merges do in between
        kept = (fits + too_many) // 2
        candidate = cut_to(kept)
        if candidate[1] <= limit:
            fits, best = kept, candidate
        else:
            too_many = kept
    return best


def _without_middle(text: str, ends: Sequence[int], kept: int) -> str:
    """Keeps the first and the last pieces, ``kept`` in all; one more at the head if odd."""
    tail = kept // 2
    head = kept - tail
    before = text[: ends[head - 1]].rstrip() if head else ""
    after = text[ends[len(ends) - tail - 1] :].lstrip() if tail else ""
    return " ".join(part for part in (before, MARK, after) if part)


def _piece_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the characters at which the text's tokens end; where they are unknown, all."""
    if not tokenizer.is_fast or not text:
        return list(range(1, len(text) + 1))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(accumulate((end for _, end in offsets["offset_mapping"]), max))


def _count_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in encode_prompts(tokenizer, prompts)]
