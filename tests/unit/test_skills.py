"""The generator of the skills data, its files, its tokenizer and the tiny models."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distilllens.cli.skills import skills_main
from distilllens.commands.skills import build_tiny_models
from distilllens.data.prompts import alpaca_prompt
from distilllens.data.skills.kinds import KINDS, Task
from distilllens.data.skills.records import (
    copies_phrase,
    generate_skills,
    train_skill_tokenizer,
    write_skills,
)
from distilllens.errors import DataError

Row = dict[str, str]


def prompts(rows: list[Row]) -> list[str]:
    return [alpaca_prompt(row["instruction"], row["input"]) for row in rows]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generate_skills(seed=5, train=4000, dev=0, test=0).train


def test_parts_have_their_sizes_and_share_no_prompt() -> None:
    skills = generate_skills(seed=0, train=5000, dev=300, test=400)
    parts = (skills.train, skills.dev, skills.test)
    assert [len(part) for part in parts] == [5000, 300, 400]
    every = [prompt for part in parts for prompt in prompts(part)]
    assert len(set(every)) == 5700


def test_test_set_does_not_depend_on_the_training_size() -> None:
    small, large = (generate_skills(seed=4, train=n, dev=50, test=60) for n in (10, 900))
    assert small.test == large.test and small.dev == large.dev


def test_seed_decides_the_records() -> None:
    first, again = (generate_skills(seed=1, train=500, dev=5, test=5) for _ in range(2))
    assert first == again
    assert first.train != generate_skills(seed=2, train=500, dev=5, test=5).train


def test_kinds_have_equal_shares_in_every_part() -> None:
    skills = generate_skills(seed=0, train=8000, dev=200, test=240)
    assert len(KINDS) >= 14
    for part in (skills.train, skills.dev, skills.test):
        counts = Counter(row["topic"] for row in part)
        assert set(counts) == set(KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_records_have_the_fields_of_the_format_and_graded_answers(rows: list[Row]) -> None:
    assert all(list(row) == ["topic", "instruction", "input", "output"] for row in rows)
    lengths = [len(row["output"].split()) for row in rows]
    assert min(lengths) == 1 and max(lengths) <= 25
    assert sum(length >= 4 for length in lengths) > len(rows) / 3
    with_input = sum(bool(row["input"]) for row in rows)
    assert 0.2 < with_input / len(rows) < 0.8


def test_each_kind_asks_in_several_ways(rows: list[Row]) -> None:
    openings: dict[str, set[str]] = {}
    for row in rows:
        openings.setdefault(row["topic"], set()).add(" ".join(row["instruction"].split()[:2]))
    assert min(len(ways) for ways in openings.values()) >= 2, openings


def test_too_many_records_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "distilllens.data.skills.records.KINDS", {"only": lambda rng: Task("a", "", "b")}
    )
    assert len(generate_skills(seed=0, train=1, dev=0, test=0).train) == 1
    with pytest.raises(DataError, match="1 different prompts, 3 too few"):
        generate_skills(seed=0, train=4, dev=0, test=0)
    with pytest.raises(DataError, match="train=-1"):
        generate_skills(seed=0, train=-1, dev=0, test=0)


@pytest.mark.parametrize(
    ("prompt", "answer", "copies"),
    [
        ("one two three four five six", "two three four five six", True),
        ("one two three four five six", "two three four five seven", False),
        ("x", "a b c d e a b c d e", True),
        ("one two three", "four five", False),
        ("", "a", False),
    ],
)
def test_copies_phrase(prompt: str, answer: str, copies: bool) -> None:
    assert copies_phrase(Task(prompt, "", answer)) is copies


def test_no_answer_is_forbidden_by_the_evaluation(rows: list[Row]) -> None:
    """Generation bans every sixth token that would repeat six tokens in a row."""
    tokenizer = train_skill_tokenizer(rows)
    for row, prompt in zip(rows, prompts(rows), strict=True):
        prompt_ids, answer_ids = tokenizer(prompt).input_ids, tokenizer(row["output"]).input_ids
        ids = [*prompt_ids, *answer_ids, tokenizer.eos_token_id]
        grams = [tuple(ids[i : i + 6]) for i in range(len(ids) - 5)]
        answered = grams[max(len(prompt_ids) - 5, 0) :]
        assert len(set(answered)) == len(answered) and not set(answered) & set(
            grams[: len(grams) - len(answered)]
        ), row


def test_files_are_dev_then_train_and_test_with_prompt(tmp_path: Path) -> None:
    skills = write_skills(tmp_path / "made" / "here", seed=3, train=60, dev=20, test=30)
    raw, valid = (
        [json.loads(line) for line in (tmp_path / "made" / "here" / name).open(encoding="utf-8")]
        for name in ("raw.jsonl", "valid.jsonl")
    )
    assert raw == [*skills.dev, *skills.train]
    assert [row.pop("prompt") for row in valid] == prompts(skills.test)
    assert valid == skills.test


def test_files_are_the_same_everywhere(tmp_path: Path) -> None:
    """Published figures name a seed: other records from it would make them wrong."""
    write_skills(tmp_path, seed=0, train=1000, dev=20, test=20)
    digest = hashlib.sha256((tmp_path / "raw.jsonl").read_bytes()).hexdigest()
    assert digest[:16] == "5b8109a6cf422ca7"


def test_tokenizer_is_exact_short_and_deterministic(rows: list[Row], tmp_path: Path) -> None:
    tokenizer = train_skill_tokenizer(rows)
    assert len(tokenizer) <= 2048
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    again = train_skill_tokenizer(rows)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for row in rows:
        assert tokenizer.decode(tokenizer(row["output"]).input_ids) == row["output"]
    lengths = [
        len(tokenizer(prompt + row["output"]).input_ids) + 1
        for prompt, row in zip(prompts(rows), rows, strict=True)
    ]
    assert max(lengths) <= 64
    # The template's sentences: two tokens without an input, three with one.
    assert len(tokenizer(alpaca_prompt("cat")).input_ids) == 3
    assert len(tokenizer(alpaca_prompt("cat", "dog")).input_ids) == 5
    # A word is one token, the same at the start of an answer as within it.
    assert tokenizer("banana, banana").input_ids[::2] == tokenizer("banana").input_ids * 2


def test_tiny_models_load_in_plain_transformers(rows: list[Row], tmp_path: Path) -> None:
    tokenizer = train_skill_tokenizer(rows)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    teacher_folder, student_folder = build_tiny_models(tmp_path, tokenizer=tokenizer, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert teacher_folder == tmp_path / "skills-teacher-init"
    assert student_folder == tmp_path / "skills-student-init"
    assert (teacher_folder / "model.safetensors").is_file()
    for folder, shape in ((teacher_folder, (6, 192)), (student_folder, (3, 128))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.n_layer, model.config.n_embd) == shape
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        loaded = AutoTokenizer.from_pretrained(folder)
        text = alpaca_prompt(rows[0]["instruction"], rows[0]["input"]) + rows[0]["output"]
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.pad_token_id == tokenizer.pad_token_id
        # No dropout: training mode gives the same logits.
        ids = torch.tensor([tokenizer(text).input_ids])
        assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)


def test_equal_seeds_give_equal_weights(rows: list[Row], tmp_path: Path) -> None:
    tokenizer = train_skill_tokenizer(rows)
    folders = [
        build_tiny_models(tmp_path / name, tokenizer=tokenizer, seed=seed)[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]


def test_command_writes_data_and_models_and_shows_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sizes = ["--train", "300", "--dev", "25", "--test", "50"]
    data, models = tmp_path / "data", tmp_path / "checkpoints"
    assert skills_main(["--out", str(data), "--models", str(models), "--seed", "7", *sizes]) == 0
    assert len((data / "raw.jsonl").read_text(encoding="utf-8").splitlines()) == 325
    assert len((data / "valid.jsonl").read_text(encoding="utf-8").splitlines()) == 50
    assert (models / "skills-student-init" / "config.json").is_file()
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in KINDS)
