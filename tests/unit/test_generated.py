"""Generated answers among the training records: their order, what is not among them, their end."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from distilllens.config import DataConfig
from distilllens.data.generated import merge_answers
from distilllens.data.records import Record, read_records
from distilllens.data.tokenize import prepare_dataset, prepared_folder
from distilllens.errors import DataError


def record(instruction: str, output: str) -> Record:
    return Record(instruction=instruction, input="", outputs=(output,))


GOLD = [record("a", "gold a"), record("b", "gold b"), record("a", "gold a2"), record("c", "gold c")]


def outputs(records: list[Record]) -> list[str]:
    return [record.outputs[0] for record in records]


def test_answers_stand_behind_their_records() -> None:
    """Two of the first, none of the second, one of the third, which asks the same as the first."""
    answers = [record("a", "1"), record("c", "2"), record("c", "3")]
    assert outputs(merge_answers(GOLD, answers, keep_gold=False)) == ["1", "2", "3"]
    both = ["gold a", "1", "gold b", "gold a2", "gold c", "2", "3"]
    assert outputs(merge_answers(GOLD, answers, keep_gold=True)) == both
    assert merge_answers(GOLD, [], keep_gold=True) == GOLD


@pytest.mark.parametrize("instruction", ["d", "b"])
def test_answers_to_other_records_are_refused(instruction: str) -> None:
    """To a held-out record, say; or out of order."""
    answers = [record("c", "1"), record(instruction, "2")]
    with pytest.raises(DataError, match="1 generated answers are to no training record"):
        merge_answers(GOLD, answers, keep_gold=False)


def test_tokens_of_answers_lie_apart() -> None:
    folders = [
        prepared_folder(
            DataConfig(path="data/dolly", generated=generated, keep_gold=gold), "gpt2", "0123456789"
        )
        for generated, gold in ((None, False), ("data/generated/xl", False), ("xl", True))
    ]
    names = ("full", "generated-xl", "generated-xl-and-gold")
    assert folders == [Path(f"processed_data/dolly/{name}/gpt2-01234567") for name in names]


def test_a_truncated_record_has_no_end(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = ['{"instruction": "a", "output": "one"', '{"instruction": "b", "output": "two"']
    text = f'{lines[0]}, "truncated": true}}\n{lines[1]}, "truncated": null}}\n'
    (tmp_path / "raw.jsonl").write_text(text)
    assert [r.truncated for r in read_records(tmp_path / "raw.jsonl").records] == [True, False]
    data = DataConfig(path=str(tmp_path), processed=str(tmp_path / "tokens"))
    train = prepare_dataset(data=data, dev_size=0, tokenizer=tiny_tokenizer, family="gpt2").train
    eos = tiny_tokenizer.eos_token_id
    one, two = (tiny_tokenizer(word)["input_ids"] for word in ("one", "two"))
    assert train["response_ids"][:] == [one, [*two, eos]]


def test_truncated_must_be_a_boolean(tmp_path: Path) -> None:
    file = tmp_path / "raw.jsonl"
    file.write_text('{"instruction": "a", "output": "one", "truncated": "no"}\n')
    with pytest.raises(DataError, match="field 'truncated' must be a boolean, got a string"):
        read_records(file)
