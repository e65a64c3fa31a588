"""Strict JSONL: what loads, and what every kind of broken file says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilllens.data.records import Record, file_sha256, read_records
from distilllens.errors import DataError

GOOD = b'{"instruction": "Sort.", "input": "b a", "output": "a b"}'
SORT = Record(instruction="Sort.", input="b a", outputs=("a b",))


def write(folder: Path, content: bytes, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def message_of(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    return caught.value.what


# --- what loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        GOOD + b"\n" + GOOD + b"\n",
        GOOD + b"\n" + GOOD,
        GOOD + b"\r\n" + GOOD + b"\r\n",
        b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n",
        b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD,
        b"\n" + GOOD + b"\n \t\n" + GOOD + b"\n\n",
    ],
    ids=["plain", "no final newline", "CRLF", "BOM", "BOM CRLF no newline", "blank lines"],
)
def test_harmless_variants_load_alike(tmp_path: Path, content: bytes) -> None:
    file = read_records(write(tmp_path, content))
    assert file.records == [SORT, SORT]
    assert (file.num_lines, file.num_skipped) == (2, 0)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file_sha256(tmp_path / "train.jsonl") == file.sha256


def test_line_of_one_megabyte_loads(tmp_path: Path) -> None:
    long = json.dumps({"instruction": "x" * 1_000_000, "input": "", "output": "y"}).encode()
    file = read_records(write(tmp_path, GOOD + b"\n" + long + b"\n"))
    assert len(file.records[1].instruction) == 1_000_000


def test_line_separators_inside_strings_do_not_split(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\\u2028"
    line = f'{{"instruction": "{text}", "output": "y"}}'.encode()
    record = read_records(write(tmp_path, line)).records[0]
    assert record.instruction == "a\u2028b\u2029c\x85d\u2028"


def test_optional_fields_and_ignored_fields(tmp_path: Path) -> None:
    line = b'{"instruction": "i", "output": "o", "topic": null, "prompt": "not trusted", "n": 1}'
    record = read_records(write(tmp_path, line)).records[0]
    assert record == Record(instruction="i", input="", outputs=("o",), topic="")
    assert record.prompt.endswith("### Instruction:\ni\n\n### Response:\n")


def test_many_references(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"instruction": "i", "output": ["o", "p"]}\n' + GOOD)
    records = read_records(path, references="many").records
    assert [r.outputs for r in records] == [("o", "p"), ("a b",)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                name: st.text(
                    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
                )
                for name in ("instruction", "input", "output", "topic")
            }
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_whatever_json_writes_comes_back(
    tmp_path: Path, rows: list[dict[str, str]], ascii_only: bool
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    records = read_records(write(tmp_path, lines.encode("utf-8"))).records
    assert [(r.instruction, r.input, r.outputs[0], r.topic) for r in records] == [
        (r["instruction"], r["input"], r["output"], r["topic"]) for r in rows
    ]


def test_real_dolly(shared_data: Path) -> None:
    file = read_records(shared_data / "dolly" / "raw.jsonl")
    assert len(file.records) == file.num_lines == 12_135
    assert file.num_skipped == 0


# --- what does not ------------------------------------------------------------------------------

BROKEN = {
    "cut off": (b'{"instruction":', "invalid JSON at column 16"),
    "no quotes": (b'{"a": 1, bad: 2}', "invalid JSON at column 10"),
    "two objects": (GOOD + GOOD, f"invalid JSON at column {len(GOOD) + 1}"),
    "array": (b'["instruction", "output"]', "expected a JSON object, got an array"),
    "string": (b'"instruction"', "expected a JSON object, got a string"),
    "number": (b"12", "expected a JSON object, got a number"),
    "null": (b"null", "expected a JSON object, got null"),
    "raw NUL in a string": (b'{"instruction": "a\0b"}', "invalid JSON at column 19"),
    "raw NUL outside": (b"\0" + GOOD, "invalid JSON at column 1"),
    "escaped NUL": (
        b'{"instruction": "a\\u0000b", "output": "o"}',
        "field 'instruction' holds a NUL at character 2",
    ),
    "lone surrogate": (
        b'{"instruction": "i", "output": "ab\\ud83d"}',
        "field 'output' holds the lone surrogate U+D83D at character 3",
    ),
    "surrogate in bytes": (b'{"instruction": "\xed\xa0\x80"}', "invalid UTF-8 at byte 18 (0xed)"),
    "invalid UTF-8": (b'{"instruction": "caf\xe9"}', "invalid UTF-8 at byte 21 (0xe9)"),
    "missing field": (b'{"instruction": "i", "input": ""}', "field 'output' is missing"),
    "misspelt field": (b'{"instructions": "i", "output": "o"}', "field 'instruction' is missing"),
    "wrong type": (
        b'{"instruction": 7, "output": "o"}',
        "field 'instruction' must be a string, got a number",
    ),
    "wrong type of an optional field": (
        b'{"instruction": "i", "input": ["x"], "output": "o"}',
        "field 'input' must be a string, got an array",
    ),
    "null answer": (
        b'{"instruction": "i", "output": null}',
        "field 'output' must be a string, got null",
    ),
    "list where one is asked for": (
        b'{"instruction": "i", "output": ["o"]}',
        "field 'output' must be a string, got an array",
    ),
    "doubled field": (
        b'{"instruction": "i", "instruction": "j", "output": "o"}',
        "field 'instruction' occurs twice",
    ),
    "deep nesting": (b"[" * 200_000, "invalid JSON: nested too deeply"),
    "huge number": (b'{"n": ' + b"9" * 5000 + b"}", "invalid JSON: Exceeds the limit"),
    "second BOM": (b"\xef\xbb\xbf" + GOOD, "invalid JSON at column 1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_line_is_named_with_file_and_line(tmp_path: Path, kind: str) -> None:
    line, expected = BROKEN[kind]
    path = write(tmp_path, b"\n".join([GOOD, GOOD, GOOD, line, GOOD]))
    assert message_of(path).startswith(f"{path}:4: {expected}")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_line_is_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    line, expected = BROKEN[kind]
    path = write(tmp_path, b"\n".join([GOOD, line, GOOD]))
    file = read_records(path, bad_lines="skip")
    assert file.records == [SORT, SORT]
    assert (file.num_lines, file.num_skipped) == (3, 1)
    assert file.problems[0].startswith(f"{path}:2: {expected}")


def test_broken_lines_are_kept_for_mending(tmp_path: Path) -> None:
    """Numbers, reasons and text of all; bytes that are no text stand there as escapes."""
    lines = [line for line, _ in BROKEN.values()]
    file = read_records(write(tmp_path, b"\n".join([GOOD, *lines])), bad_lines="skip")
    kept = [json.loads(line) for line in file.quarantine().splitlines()]
    assert [entry["line"] for entry in kept] == list(range(2, len(BROKEN) + 2))
    for (kind, (line, told)), entry in zip(BROKEN.items(), kept, strict=True):
        assert entry["problem"].startswith(told)
        if kind == "invalid UTF-8":
            assert entry["text"] == '{"instruction": "caf\\xe9"}'
        elif kind != "surrogate in bytes":
            assert entry["text"] == line.decode()[:10_000]
    assert file.quarantine().isascii()  # so that any terminal and any tool can show it
    assert read_records(write(tmp_path, GOOD)).quarantine() == ""


def test_names_of_fields_are_shown_as_literals(tmp_path: Path) -> None:
    """Half a surrogate pair would stop the log's encoder, an escape sequence paint the screen."""
    path = write(tmp_path, b'{"\\ud83d": 1, "\\u001b[31m": 2, "\xc3\xa4": 3}')
    told = message_of(path)
    assert told.endswith(r"(fields: '\x1b[31m', '\xe4', '\ud83d')") and told.isprintable()


def test_column_of_the_contract(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + b"\n" + GOOD + b"\n" + GOOD + b"\n" + b'{"input": ""]\n')
    assert "train.jsonl:4: invalid JSON at column 13" in message_of(path)


def test_blank_lines_count_in_line_numbers(tmp_path: Path) -> None:
    assert f"{tmp_path / 'train.jsonl'}:3: " in message_of(write(tmp_path, GOOD + b"\n\n{"))


def test_further_broken_lines_are_counted(tmp_path: Path) -> None:
    assert message_of(write(tmp_path, b"{\n[]\n1\n")).endswith("(and 2 more broken lines)")


@pytest.mark.parametrize("references", [b"[]", b'["o", 1]', b'["o", ""', b"{}"])
def test_broken_reference_lists(tmp_path: Path, references: bytes) -> None:
    path = write(tmp_path, b'{"instruction": "i", "output": ' + references + b"}")
    assert f"{path}:1: " in message_of(path, references="many")


def test_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path, b"")
    assert message_of(path) == f"{path}: the file is empty (0 bytes)"


@pytest.mark.parametrize("content", [b"\n\n", b"\xef\xbb\xbf", b"\r\n"])
def test_only_blank_lines(tmp_path: Path, content: bytes) -> None:
    assert "0 usable records in 0 lines" in message_of(write(tmp_path, content))


def test_no_usable_record_left(tmp_path: Path) -> None:
    path = write(tmp_path, b"{\n[]\n")
    assert "0 usable records in 2 lines" in message_of(path, bad_lines="skip")


@pytest.mark.parametrize("read", [read_records, file_sha256])
def test_pipes_and_devices_are_not_waited_for(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="cannot be read: it is no file"):
            read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert message_of(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: no such file"
    assert "cannot be read" in message_of(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        file_sha256(tmp_path / "none.jsonl")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200
)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda b: b'{"output": "' + b + b'"}'))
def test_any_bytes_load_or_raise_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, GOOD + b"\n" + content)
    try:
        file = read_records(path)
    except DataError as error:
        assert str(path) in error.what
    else:
        assert len(file.records) == file.num_lines
