"""metrics.jsonl as it is found in the wild, and as it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distilllens.errors import DataError
from distilllens.report.runs.metrics_file import MetricsFile, read_metrics


def write_lines(path: Path, *lines: object, tail: bytes = b"") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode() + tail)
    return path


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    whole = {"step": 10, "train/loss": 1.5}
    line = json.dumps({"step": 20, "train/loss": 1.25, "note": "é"}).encode()
    for end in range(1, len(line)):
        path = write_lines(tmp_path / "metrics.jsonl", whole, tail=line[:end])
        assert read_metrics(path) == [whole], end


def test_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"step": 1}, tail=b'{"step": 2}')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1,', r"m\.jsonl:2: invalid JSON at column \d+"),
        (b"[1]", r"m\.jsonl:2: expected a JSON object, got list"),
        (b'{"train/loss": 1}', r"m\.jsonl:2: step=None"),
        (b'{"step": "7"}', r"m\.jsonl:2: step='7'"),
        (b'{"step": 7, "train/loss": "x"}', r"m\.jsonl:2: train/loss='x' is not a number"),
        (b'{"step": 7, "n": "\xff"}', r"m\.jsonl:2: invalid UTF-8 at byte 19"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=message):
        read_metrics(path)


def test_malformed_last_line_with_newline_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        read_metrics(path)


def test_steps_logged_twice_count_once_and_the_later_wins(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl",
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 2.0},
        {"step": 20, "eval/dev/loss": 5.0},
        {"step": 20, "train/loss": 3.0},
    )
    assert read_metrics(path) == [
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 3.0},
        {"step": 20, "eval/dev/loss": 5.0},
    ]


def test_null_is_left_out_and_nan_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": NaN, "train/lr": null, "perf/x": Infinity}\n')
    (line,) = read_metrics(path)
    assert list(line) == ["step", "train/loss", "perf/x"]
    assert line["train/loss"] != line["train/loss"] and line["perf/x"] == float("inf")


def test_no_file_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    """Byte by byte: what was read is, at each moment, what a reader of the whole file finds."""
    path = tmp_path / "m.jsonl"
    content = write_lines(path, *({"step": s, "train/loss": 1 / s} for s in (1, 2, 3))).read_bytes()
    path.write_bytes(b"")
    metrics = MetricsFile(path)
    for end in range(len(content)):
        append(path, content[end : end + 1])
        assert metrics.update()
        assert metrics.lines == read_metrics(path), end
    assert not metrics.update()
    before = metrics.bytes_read
    append(path, b'{"step": 4}\n')
    assert metrics.update()
    assert metrics.bytes_read - before == len(b'{"step": 4}\n')
    assert [line["step"] for line in metrics.lines] == [1, 2, 3, 4]


def test_a_file_that_appears_later(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.update()
    assert metrics.lines == []
    write_lines(metrics.path, {"step": 1})
    assert metrics.update()
    assert metrics.lines == [{"step": 1}]


def test_lines_that_a_resumed_run_took_back_are_forgotten(tmp_path: Path) -> None:
    """Cut to step 10 and written further than before, between two looks, as `trim_metrics` does."""
    path = write_lines(tmp_path / "m.jsonl", *({"step": s, "x": 1} for s in (10, 20, 30)))
    metrics = MetricsFile(path)
    metrics.update()
    os.truncate(path, len(b'{"step": 10, "x": 1}\n'))
    append(path, b"".join(b'{"step": %d, "x": 2}\n' % s for s in (15, 25, 35, 45)))
    assert metrics.update()
    assert [(line["step"], line["x"]) for line in metrics.lines] == [
        (10, 1), (15, 2), (25, 2), (35, 2), (45, 2)
    ]  # fmt: skip


def test_a_broken_line_is_met_again_until_it_is_mended(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"step": 1})
    metrics = MetricsFile(path)
    metrics.update()
    append(path, b"half a li\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"m\.jsonl:2: invalid JSON"):
            metrics.update()
    assert metrics.lines == [{"step": 1}]
    write_lines(path, {"step": 1}, {"step": 2})
    assert metrics.update()
    assert metrics.lines == [{"step": 1}, {"step": 2}]
