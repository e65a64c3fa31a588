"""The Alpaca prompt, against the text written out by hand and the published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens.data.prompts import alpaca_prompt


def test_without_input() -> None:
    assert alpaca_prompt("Name a fig.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a fig.\n\n### Response:\n"
    )


def test_with_input() -> None:
    assert alpaca_prompt("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


@given(st.text(), st.text(min_size=1))
def test_texts_go_in_verbatim(instruction: str, context: str) -> None:
    prompt = alpaca_prompt(instruction, context)
    assert f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Resp" in prompt


def test_braces_are_no_placeholders() -> None:
    assert "{input} {0} {{}}" in alpaca_prompt("{input} {0} {{}}", "x")


@pytest.mark.parametrize("name", ["dolly", "self_inst", "vicuna", "sinst/11_", "uinst/11_"])
def test_equals_the_prompt_field_of_published_files(shared_data: Path, name: str) -> None:
    rows = [
        json.loads(line)
        for line in (shared_data / name / "valid.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    assert len(rows) > 50
    assert [alpaca_prompt(r["instruction"], r["input"]) for r in rows] == [
        r["prompt"] for r in rows
    ]
