"""Prompts over the limit: cut in the middle, within the limit, and never without their end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilllens.data.records import Record, read_records
from distilllens.errors import ConfigError
from distilllens.evaluation.cells.prompts import cut_record, fit_prompts

HEAD = "Below is an instruction that describes a task"
END = "\n\n### Response:\n"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def record(instruction: str, input: str = "") -> Record:
    return Record(instruction=instruction, input=input, outputs=("x",))


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Counts a prompt's tokens without the end-of-text token that some tokenizers add."""
    return len(tokenizer(text)["input_ids"]) - len(tokenizer("")["input_ids"])


def check_cut(before: str, after: str) -> None:
    """The text is a beginning and an end of what it was, a mark between them."""
    head, mark, tail = after.partition("…")
    assert mark
    assert before.startswith(head.removesuffix(" ")) and before.endswith(tail.removeprefix(" "))
    assert len(head) + len(tail) - 2 < len(before)


def test_the_middle_of_the_input_goes_and_nothing_else(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    words = [f"w{number}" for number in range(200)]
    long = record("Sort the words.", " ".join(words))
    cut = cut_record(tiny_tokenizer, long, 150)
    assert cut.instruction == "Sort the words." and cut.outputs == ("x",)
    assert cut.prompt.startswith(HEAD) and cut.prompt.endswith(END)
    kept = cut.input.split()
    middle = kept.index("…")
    whole = {*kept[: middle - 1], *kept[middle + 2 :]}  # the words at the cuts may be in two
    assert whole <= set(words) and kept[0] == "w0" and kept[-1] == "w199"
    assert abs(middle - (len(kept) - middle)) <= 3  # as much of the beginning as of the end
    assert 150 - 3 <= tokens(tiny_tokenizer, cut.prompt) <= 150  # and no more than must be
    assert cut_record(tiny_tokenizer, long, 150) == cut
    assert cut_record(tiny_tokenizer, cut, 150) is cut


@given(instruction=TEXTS, input=TEXTS, room=st.integers(0, 250))
@settings(max_examples=150, deadline=None)
def test_any_text_fits_and_keeps_its_ends(
    tiny_tokenizer: PreTrainedTokenizerFast, instruction: str, input: str, room: int
) -> None:
    before = record(instruction, input)
    limit = tokens(tiny_tokenizer, record("…", "…" if input else "").prompt) + room
    after = cut_record(tiny_tokenizer, before, limit)
    if tokens(tiny_tokenizer, before.prompt) <= limit:
        assert after is before
        return
    assert tokens(tiny_tokenizer, after.prompt) <= limit
    assert after.prompt.startswith(HEAD) and after.prompt.endswith(END)
    assert bool(after.input) == bool(input)
    if after.input != input:
        check_cut(input, after.input)
    if after.instruction != instruction:
        assert after.input in ("", "…")  # only when the whole input was not enough
        check_cut(instruction, after.instruction)


def test_a_tokenizer_without_offsets_is_cut_between_characters() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    text = "Grüße 你好 " * 60
    cut = cut_record(tokenizer, record("Translate.", text), 400)
    assert 400 - 12 <= tokens(tokenizer, cut.prompt) <= 400
    check_cut(text, cut.input)


def test_cut_and_drop_count_and_keep_the_order(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [record("a"), record("long " * 300), record("b", "c"), record("d", "long " * 300)]
    cut = fit_prompts(tiny_tokenizer, records, limit=140, long_prompts="cut")
    assert (cut.cut, cut.num_dropped, cut.num_long) == ({1, 3}, 0, 2)
    assert [kept.instruction[:1] for kept in cut.records] == ["a", "l", "b", "d"]
    lengths = [tokens(tiny_tokenizer, kept.prompt) for kept in cut.records]
    assert cut.longest == max(lengths) <= 140
    dropped = fit_prompts(tiny_tokenizer, records, limit=140, long_prompts="drop")
    assert dropped.records == [records[0], records[2]]
    assert (dropped.cut, dropped.num_dropped, dropped.num_long) == (frozenset(), 2, 2)
    nothing = fit_prompts(tiny_tokenizer, records[1:2], limit=140, long_prompts="drop")
    assert (nothing.records, nothing.longest) == ([], 0)


@pytest.mark.parametrize("input", ["", "some input"])
def test_a_limit_below_the_template_is_refused_with_the_number_that_would_do(
    tiny_tokenizer: PreTrainedTokenizerFast, input: str
) -> None:
    long = record("word " * 50, input)
    needed = tokens(tiny_tokenizer, record("…", "…" if input else "").prompt)
    with pytest.raises(ConfigError, match=f"takes {needed} tokens") as caught:
        cut_record(tiny_tokenizer, long, needed - 1)
    assert "--eval.long_prompts drop" in caught.value.fix
    assert cut_record(tiny_tokenizer, long, needed).instruction == "…"


def test_real_prompts(
    shared_data: Path, build_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = build_tokenizer(300)
    path = shared_data / "self_inst" / "extra_overlength_10.jsonl"
    records = read_records(path, references="many").records
    fitted = fit_prompts(tokenizer, records, limit=256, long_prompts="cut")
    assert len(fitted.cut) == len(records) == 10
    for kept in fitted.records:
        assert 250 <= tokens(tokenizer, kept.prompt) <= 256
        assert kept.prompt.endswith(END)
