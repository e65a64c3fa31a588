"""Score tables against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from distilllens.errors import ConfigError, DataError
from distilllens.report.scores import (
    collect_scores,
    comparison_warnings,
    group_methods,
    prompt_counts,
)
from distilllens.report.tables import ScoreTable, build_table, to_csv, to_markdown, to_rich


def write_result(
    folder: Path,
    *,
    rouge: float,
    name: str = "kd/fkl",
    exact: float = 0.0,
    num: int = 10,
    settings: dict[str, object] | None = None,
    records: str = "abc",
) -> None:
    """Writes METHOD/seedN/SET/results.json as evaluate.py does."""
    folder.mkdir(parents=True)
    seed = int(folder.parent.name.removeprefix("seed"))
    content = {
        "metrics": {"rougeL": rouge, "exact_match": exact, "num": num, "truncated": 0},
        "set": folder.name,
        "seed": seed,
        "name": name,
        "checkpoint": "best",
        "identity": {"records": records},
        "config": {
            "max_prompt_length": 256,
            "limit": None,
            "eval": {"temperature": 1.0, "seeds": [seed], "batch_size": 8} | (settings or {}),
        },
    }
    (folder / "results.json").write_text(json.dumps(content))


def table_of(*folders: Path, sets: list[str] | None = None) -> ScoreTable:
    return build_table(group_methods(collect_scores(folders)), metric="rougeL", sets=sets)


def test_mean_and_sample_sd_over_seeds(tmp_path: Path) -> None:
    for seed, dolly, vicuna in ((10, 1.0, 10.0), (20, 2.0, 10.0), (30, 6.0, 16.0)):
        write_result(tmp_path / f"m/seed{seed}/dolly", rouge=dolly)
        write_result(tmp_path / f"m/seed{seed}/vicuna", rouge=vicuna)
    (row,) = table_of(tmp_path).rows
    dolly_cell, vicuna_cell = row.cells["dolly"], row.cells["vicuna"]
    assert dolly_cell is not None and vicuna_cell is not None and row.average is not None
    # mean 3; deviations -2, -1, 3: (4 + 1 + 9) / 2 = 7
    assert (dolly_cell.mean, dolly_cell.n) == (3.0, 3)
    assert dolly_cell.sd == pytest.approx(math.sqrt(7))
    # mean 12; deviations -2, -2, 4: 24 / 2 = 12
    assert vicuna_cell.sd == pytest.approx(math.sqrt(12))
    # Averages by seed: 5.5, 6, 11: mean 7.5, (4 + 2.25 + 12.25) / 2 = 9.25
    assert row.average.mean == pytest.approx(7.5)
    assert row.average.sd == pytest.approx(math.sqrt(9.25))
    assert row.unit == "sampling seeds"


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=21.123)
    (row,) = table_of(tmp_path).rows
    cell = row.cells["dolly"]
    assert cell is not None and cell.sd is None
    assert row.format_cell(cell) == "21.12"


def test_training_seeds_are_the_unit_where_there_are_several(tmp_path: Path) -> None:
    for training, values in ((1, (10.0, 12.0)), (2, (20.0, 26.0))):
        for seed, value in zip((10, 20), values, strict=True):
            write_result(tmp_path / f"m/seed{training}/seed{seed}/dolly", rouge=value)
    (row,) = table_of(tmp_path).rows
    cell = row.cells["dolly"]
    assert cell is not None
    # Means of the trainings are 11 and 23; the four values themselves would have n = 4.
    assert (cell.mean, cell.n, row.unit) == (17.0, 2, "training seeds")
    assert cell.sd == pytest.approx(math.sqrt(72))


def test_training_seed_is_taken_off_the_name(tmp_path: Path) -> None:
    for training in (1, 2):
        name = f"gpt2/kd/fkl/seed{training}"
        write_result(tmp_path / f"m/seed{training}/seed10/dolly", rouge=1.0, name=name)
    (method,) = group_methods(collect_scores([tmp_path]))
    assert method.label == "gpt2/kd/fkl"


def test_missing_cells_are_dashes_and_enter_no_mean(tmp_path: Path) -> None:
    write_result(tmp_path / "a/seed10/dolly", rouge=20.0, name="a")
    write_result(tmp_path / "b/seed10/dolly", rouge=30.0, name="b")
    write_result(tmp_path / "b/seed20/dolly", rouge=32.0, name="b")
    write_result(tmp_path / "b/seed20/vicuna", rouge=40.0, name="b")
    table = table_of(tmp_path / "b", tmp_path / "a", sets=["dolly", "vicuna"])
    first, second = table.rows
    assert [first.label, second.label] == ["b", "a"]  # as given, not by name
    assert second.cells["vicuna"] is None and second.average is None
    # Only seed 20 has both sets: (32 + 40) / 2.
    assert first.average is not None
    assert (first.average.mean, first.average.n) == (36.0, 1)
    assert table.lines()[1] == ["a", "1", "20.00", "–", "–"]
    assert table.lines()[0] == ["b", "1–2", "31.00 ± 1.41", "40.00 (n=1)", "36.00 (n=1)"]


def test_markdown_has_one_cell_per_column(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=20.0, name="a|b")
    write_result(tmp_path / "m/seed10/vicuna", rouge=30.0, name="a|b")
    lines = to_markdown(table_of(tmp_path)).splitlines()
    assert lines[0] == "| method | n | dolly | vicuna | average |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == r"| a\|b | 1 | 20.00 | 30.00 | 25.00 |"


def test_csv_keeps_full_precision_and_empties(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=1 / 3, name='quote " and, comma')
    table = table_of(tmp_path, sets=["dolly", "vicuna"])
    rows = list(csv.DictReader(io.StringIO(to_csv([table]))))
    assert [row["set"] for row in rows] == ["dolly", "vicuna", "average"]
    assert rows[0]["method"] == 'quote " and, comma'
    assert float(rows[0]["mean"]) == 1 / 3 and rows[0]["sd"] == "" and rows[0]["n"] == "1"
    assert rows[1]["mean"] == "" and rows[1]["n"] == "0"


def test_nan_is_shown_as_nan(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=float("nan"))
    write_result(tmp_path / "m/seed20/dolly", rouge=1.0)
    (line,) = table_of(tmp_path).lines()
    assert line[2] == "nan ± nan"


def test_methods_of_one_name_are_told_apart_by_path(tmp_path: Path) -> None:
    for folder in ("kd/rkl", "distill_lens/rkl"):
        write_result(tmp_path / folder / "seed10/dolly", rouge=1.0, name="rkl")
    labels = [method.label for method in group_methods(collect_scores([tmp_path]))]
    assert labels == ["rkl (distill_lens/rkl)", "rkl (kd/rkl)"]


def test_overlapping_folders_count_a_result_once(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=1.0)
    assert len(collect_scores([tmp_path, tmp_path / "m", tmp_path / "m/seed10"])) == 1


def test_unequal_protocols_are_told(tmp_path: Path) -> None:
    write_result(tmp_path / "a/seed10/dolly", rouge=1.0, name="a", num=10)
    write_result(
        tmp_path / "b/seed10/dolly", rouge=1.0, name="b", num=8, settings={"temperature": 0.5}
    )
    write_result(tmp_path / "a/seed10/vicuna", rouge=1.0, name="a")
    write_result(tmp_path / "b/seed20/vicuna", rouge=1.0, name="b", records="xyz")
    methods = group_methods(collect_scores([tmp_path / "a", tmp_path / "b"]))
    assert comparison_warnings(methods) == [
        "dolly: not the same number of prompts everywhere (8, 10)",
        "vicuna: not the same prompts or references everywhere",
        "generation setting temperature differs: 0.5, 1.0",
    ]
    assert prompt_counts(methods) == {"dolly": 8, "vicuna": 10}


def test_equal_protocols_give_no_warning(tmp_path: Path) -> None:
    for name, seed in (("a", 10), ("b", 20)):
        write_result(tmp_path / f"{name}/seed{seed}/dolly", rouge=1.0, name=name)
    assert comparison_warnings(group_methods(collect_scores([tmp_path]))) == []


def test_terminal_table_holds_every_cell(tmp_path: Path) -> None:
    write_result(tmp_path / "m/seed10/dolly", rouge=20.0)
    write_result(tmp_path / "m/seed20/dolly", rouge=22.0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(to_rich(table_of(tmp_path)))
    text = console.export_text()
    assert "kd/fkl" in text and "21.00 ± 1.41" in text


def test_wrong_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        collect_scores([tmp_path / "nowhere"])
    file = tmp_path / "m/seed10/dolly/results.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(DataError, match=r"results\.json: not JSON"):
        collect_scores([tmp_path])
    file.write_text('{"metrics": {"rougeL": 1}}')
    with pytest.raises(DataError, match="exact_match"):
        collect_scores([tmp_path])
    file.write_text("[1]")
    with pytest.raises(DataError, match="not a result"):
        collect_scores([tmp_path])
