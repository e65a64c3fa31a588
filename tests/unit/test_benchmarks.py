"""The evaluation sets by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilllens.data.benchmarks import BENCHMARKS, available_benchmarks, load_benchmark
from distilllens.errors import ConfigError, DataError


def put(folder: Path, relative: str, count: int, output: object = "o") -> None:
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"i{n}", "input": "", "output": output} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_named_sets_and_free_sets(tmp_path: Path) -> None:
    put(tmp_path, "sinst/11_/valid.jsonl", 3, ["o", "p"])
    put(tmp_path, "skills/valid.jsonl", 2)
    assert [r.outputs for r in load_benchmark("sinst", data_dir=tmp_path)] == [("o", "p")] * 3
    assert [r.instruction for r in load_benchmark("skills", data_dir=tmp_path)] == ["i0", "i1"]
    assert available_benchmarks(tmp_path) == ["sinst", "skills"]


def test_limit_is_the_protocols_unless_given(tmp_path: Path) -> None:
    put(tmp_path, "uinst/11_/valid.jsonl", 10_003)
    put(tmp_path, "dolly/valid.jsonl", 5)
    assert len(load_benchmark("uinst", data_dir=tmp_path)) == 10_000
    assert load_benchmark("uinst", data_dir=tmp_path)[-1].instruction == "i9999"
    assert len(load_benchmark("uinst", data_dir=tmp_path, limit=7)) == 7
    assert len(load_benchmark("uinst", data_dir=tmp_path, limit="all")) == 10_003
    assert len(load_benchmark("uinst", data_dir=tmp_path, limit=10_001)) == 10_001
    assert len(load_benchmark("dolly", data_dir=tmp_path)) == 5
    assert len(load_benchmark("dolly", data_dir=tmp_path, limit="all")) == 5
    assert len(load_benchmark("dolly", data_dir=tmp_path, limit=99)) == 5
    with pytest.raises(ConfigError, match="limit=0"):
        load_benchmark("dolly", data_dir=tmp_path, limit=0)


def test_unknown_set_names_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "dolly/valid.jsonl", 1)
    put(tmp_path, "skills/valid.jsonl", 1)
    with pytest.raises(DataError) as caught:
        load_benchmark("dolyl", data_dir=tmp_path)
    assert "dolyl" in caught.value.what
    assert caught.value.why.endswith("dolly, skills")


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", "a\0b", "x" * 300, ".hidden"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no plain name"):
        load_benchmark(name, data_dir=tmp_path)


def test_bad_lines(tmp_path: Path) -> None:
    put(tmp_path, "dolly/valid.jsonl", 2)
    path = tmp_path / "dolly" / "valid.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(DataError, match=r"valid\.jsonl:3: invalid JSON at column 2"):
        load_benchmark("dolly", data_dir=tmp_path)
    assert len(load_benchmark("dolly", data_dir=tmp_path, bad_lines="skip")) == 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_sets(shared_data: Path, name: str) -> None:
    counts = {"dolly": 500, "self_inst": 162, "vicuna": 60, "sinst": 1494, "uinst": 60}
    assert len(load_benchmark(name, data_dir=shared_data)) == counts[name]
