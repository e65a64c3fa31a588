"""Instruction records from JSON lines, read strictly: a broken line is named, never guessed at."""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from distilllens.data.prompts import alpaca_prompt
from distilllens.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
KEPT_BYTES = 10_000
"""Of a broken line: a file without line ends is one line."""
JSON_KINDS = {
    "dict": "an object",
    "list": "an array",
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "a boolean",
    "NoneType": "null",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One instruction with its input (may be empty) and at least one reference answer."""

    instruction: str
    input: str
    outputs: tuple[str, ...]
    topic: str = ""
    truncated: bool = False
    """The answer ended by length, not by itself: no end-of-text token belongs after it."""

    @property
    def prompt(self) -> str:
        """The Alpaca prompt of this record."""
        return alpaca_prompt(self.instruction, self.input)


@dataclass(frozen=True, kw_only=True)
class BrokenLine:
    """A line that is no record: its number from 1, what is wrong, and its head as it stands."""

    number: int
    problem: str
    head: bytes


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """The records of one file.

    ``num_lines`` counts the lines that are not blank, so it is ``len(records) + num_skipped``;
    ``broken`` are the skipped lines, in order; ``sha256`` is that of the file's bytes.
    """

    path: Path
    records: list[Record]
    num_lines: int
    sha256: str
    broken: tuple[BrokenLine, ...] = ()

    @property
    def num_skipped(self) -> int:
        """Number of broken lines that were left out."""
        return len(self.broken)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with each broken line, with file and line number."""
        return tuple(f"{self.path}:{line.number}: {line.problem}" for line in self.broken)

    def quarantine(self) -> str:
        """Returns the broken lines as JSON lines {line, problem, text}, to be kept and mended.

        Bytes that are not UTF-8 stand there as ``\\xff``; of a line, the first 10,000 bytes.
        """
        entries = (
            {
                "line": line.number,
                "problem": line.problem,
                "text": line.head.decode("utf-8", errors="backslashreplace"),
            }
            for line in self.broken
        )
        return "".join(f"{json.dumps(entry)}\n" for entry in entries)


class BrokenLineError(ValueError):
    """What is wrong with one line, without the file's name and the line's number."""


def read_records(
    path: str | Path,
    *,
    bad_lines: Literal["error", "skip"] = "error",
    references: Literal["single", "many"] = "single",
) -> RecordFile:
    """Reads JSON Lines with the fields instruction, output, optionally input, topic and truncated.

    A ``prompt`` field and any other field is ignored: the prompt is made by the template. A UTF-8
    byte-order mark, CRLF line ends, blank lines and a missing last line end are accepted.

    Args:
        path: The file.
        bad_lines: ``error`` stops at broken lines; ``skip`` leaves them out and counts them.
        references: ``single``: ``output`` is a string; ``many``: a string or a list of strings.

    Raises:
        DataError: No such file, an empty file, a broken line (``FILE:LINE: …``), no usable record.
    """
    path = Path(path)
    records: list[Record] = []
    broken: list[BrokenLine] = []
    digest = hashlib.sha256()
    for number, line in _numbered_lines(path, digest):
        try:
            records.append(_parse_record(line, references))
        except BrokenLineError as error:
            head = line[:KEPT_BYTES]
            broken.append(BrokenLine(number=number, problem=str(error), head=head))
    file = RecordFile(
        path=path,
        records=records,
        num_lines=len(records) + len(broken),
        sha256=digest.hexdigest(),
        broken=tuple(broken),
    )
    if broken and bad_lines == "error":
        more = f" (and {len(broken) - 1} more broken lines)" if len(broken) > 1 else ""
        raise DataError(
            file.problems[0] + more,
            why="each line must be a JSON object in UTF-8 with the strings instruction and output",
            fix="mend the line, or leave broken lines out with bad_lines skip",
        )
    if not records:
        raise DataError(
            f"{path}: 0 usable records in {len(broken)} lines",
            why=file.problems[0] if broken else "every line is blank",
        )
    return file


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, the same as ``RecordFile.sha256``.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with _open(Path(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(Path(path), error) from None


def _open(path: Path) -> BufferedReader:
    """Opens a file for reading; a pipe would wait for ever, and /dev/zero never ends.

    Raises:
        OSError: It cannot be opened, or is no file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    return path.open("rb")


def _numbered_lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, counted from 1, and feeds every byte to ``digest``."""
    try:
        with _open(path) as file:
            # Binary lines end at \n only: text mode would also split inside strings at U+2028.
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if number == 1:
                    line = line.removeprefix(UTF8_BOM)
                line = line.rstrip(b"\r\n")
                if line.strip(b" \t\r"):
                    yield number, line
            if file.tell() == 0:
                raise DataError(f"{path}: the file is empty (0 bytes)")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"{path}: no such file",
            fix="put a JSONL file there, or fetch the published sets with prepare --download",
        )
    return DataError(f"{path}: cannot be read: {error.strerror}")


def _parse_record(line: bytes, references: Literal["single", "many"]) -> Record:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenLineError(
            f"invalid UTF-8 at byte {error.start + 1} (0x{line[error.start]:02x})"
        ) from None
    try:
        content = json.loads(text, object_pairs_hook=_unique_fields)
    except json.JSONDecodeError as error:
        raise BrokenLineError(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise BrokenLineError("invalid JSON: nested too deeply") from None
    except BrokenLineError:
        raise
    except ValueError as error:  # an integer of more than 4300 digits
        raise BrokenLineError(f"invalid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BrokenLineError(f"expected a JSON object, got {_kind(content)}")
    return Record(
        instruction=_text_field(content, "instruction"),
        input=_optional_field(content, "input"),
        outputs=_outputs_field(content, references),
        topic=_optional_field(content, "topic"),
        truncated=_flag_field(content, "truncated"),
    )


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise BrokenLineError(f"field {doubled!r} occurs twice")
    return fields


def _text_field(content: dict[str, Any], name: str) -> str:
    if name not in content:
        # As literals: a name may hold anything, also half a surrogate pair or an escape sequence.
        present = ", ".join(map(ascii, sorted(content))) or "none"
        raise BrokenLineError(f"field {name!r} is missing (fields: {present:.200})")
    return _checked_text(content[name], name)


def _optional_field(content: dict[str, Any], name: str) -> str:
    """The published sets write null for a topic they do not have."""
    return "" if content.get(name) is None else _checked_text(content[name], name)


def _flag_field(content: dict[str, Any], name: str) -> bool:
    value = content.get(name)
    if not isinstance(value, bool | None):
        raise BrokenLineError(f"field {name!r} must be a boolean, got {_kind(value)}")
    return bool(value)


def _outputs_field(
    content: dict[str, Any], references: Literal["single", "many"]
) -> tuple[str, ...]:
    value = content.get("output")
    if references == "single" or not isinstance(value, list):
        return (_text_field(content, "output"),)
    if not value:
        raise BrokenLineError("field 'output' is an empty list; one reference is needed")
    return tuple(_checked_text(item, f"output[{i}]") for i, item in enumerate(value))


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BrokenLineError(f"field {name!r} must be a string, got {_kind(value)}")
    # A NUL ends the text in C code; a lone surrogate (half of a pair) has no UTF-8 at all.
    if "\0" in value:
        raise BrokenLineError(f"field {name!r} holds a NUL at character {value.index(chr(0)) + 1}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenLineError(
            f"field {name!r} holds the lone surrogate U+{ord(value[error.start]):04X} "
            f"at character {error.start + 1}"
        ) from None
    return value


def _kind(value: Any) -> str:
    return JSON_KINDS[type(value).__name__]
