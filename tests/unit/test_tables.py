"""Score tables against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distilllens.errors import ConfigError, DataError
from distilllens.evaluation.cells.metrics_table import LABELS
from distilllens.report.comparison.files import build_scoreboard
from distilllens.report.comparison.paper import SAMPLING_SEEDS, STUDENTS, build_paper_table
from distilllens.report.comparison.warnings import comparison_warnings
from distilllens.report.scores.load import (
    Method,
    choose_baseline,
    chosen_metrics,
    collect_scores,
    group_methods,
    prompt_counts,
)
from distilllens.report.scores.metrics import metric_of
from distilllens.report.scores.table import ScoreTable, build_table, to_csv, to_rich
from distilllens.report.tables import Marks, mark_column, to_latex, to_markdown


def write_result(
    folder: Path,
    *,
    rouge: float,
    name: str = "kd/fkl",
    exact: float = 0.0,
    num: int = 10,
    settings: dict[str, object] | None = None,
    records: str = "abc",
    checkpoint: str = "best",
    more: dict[str, float] | None = None,
    identity: dict[str, str] | None = None,
    similarity: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes METHOD/seedN/SET/results.json as evaluate.py does."""
    folder.mkdir(parents=True)
    seed = int(folder.parent.name.removeprefix("seed"))
    content = {
        "metrics": {"rougeL": rouge, "exact_match": exact, "num": num, "truncated": 0}
        | (more or {}),
        "set": folder.name,
        "seed": seed,
        "name": name,
        "checkpoint": checkpoint,
        "identity": {"records": records} | (identity or {}),
        "similarity": {} if similarity is None else {"model": similarity},
        "dtype": dtype,
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
    assert lines[0] == "| method | n | dolly (10) | vicuna (10) | average |"
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
    assert [row["prompts"] for row in rows] == ["10", "", "10"]


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


def test_models_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    for seed, weights, model in ((10, "aaa", "mini"), (20, "bbb", "large")):
        write_result(
            tmp_path / f"a/seed{seed}/dolly",
            rouge=1.0,
            name="a",
            identity={"weights and tokenizer": weights, "backend": "hf"},
            similarity=model,
            more={"similarity": 50.0},
        )
    # Two trainings have different weights, as they should.
    for seed, weights in ((1, "ccc"), (2, "ddd")):
        write_result(
            tmp_path / f"b/seed{seed}/seed10/dolly",
            rouge=1.0,
            name="b",
            identity={"weights and tokenizer": weights, "backend": "vllm"},
            dtype="bfloat16",
            similarity="unused",
        )
    assert comparison_warnings(group_methods(collect_scores([tmp_path]))) == [
        "a: its seeds are of 2 different models, so their mean is of none of them: "
        f"{tmp_path}/a/seed10/dolly/results.json, {tmp_path}/a/seed20/dolly/results.json",
        "the model of the sentence similarity differs: large (a); mini (a)",
        "the back end of the generation differs: hf (a); vllm (b)",
        "the precision of the weights differs: bfloat16 (b); float32 (a)",
    ]


def test_token_metrics_of_different_teachers_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        more = {"teacher_entropy": 1.0}
        write_result(tmp_path / f"{name}/seed10/dolly", rouge=1.0, name=name, more=more)
        measured = tmp_path / name / "token_metrics/dolly.json"
        measured.parent.mkdir()
        measured.write_text(json.dumps({"identity": {"teacher": f"t{name}"}}))
    assert comparison_warnings(group_methods(collect_scores([tmp_path]))) == [
        "the teacher of the token metrics differs: ta (a); tb (b)"
    ]


def test_a_teacher_that_was_trained_here_does_not_compete(tmp_path: Path) -> None:
    for name, rouge in (("big/sft/ce", 50.0), ("small/kd/fkl", 20.0)):
        write_result(tmp_path / name / "seed10/dolly", rouge=rouge, name=name)
    teacher = (tmp_path / "big/sft/ce").resolve()
    methods = group_methods(collect_scores([tmp_path]), teachers=[teacher])
    assert [method.is_given for method in methods] == [True, False]
    baseline = choose_baseline(methods, None)
    assert baseline is not None and baseline.label == "small/kd/fkl"
    # A folder that only begins alike is another one.
    others = group_methods(collect_scores([tmp_path]), teachers=[tmp_path / "big/sft/c"])
    assert not any(method.is_given for method in others)


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


# --- Best and second best -----------------------------------------------------------------------


def test_best_is_bold_and_second_underlined_by_hand(tmp_path: Path) -> None:
    figures = {"a": (20.0, 9.0), "b": (22.0, 7.0), "c": (22.004, 8.0), "given/t": (50.0, 50.0)}
    for name, (dolly, vicuna) in figures.items():
        write_result(tmp_path / name / "seed10/dolly", rouge=dolly, name=name[-1])
        write_result(tmp_path / name / "seed10/vicuna", rouge=vicuna, name=name[-1])
    table = table_of(tmp_path, sets=["dolly", "vicuna"])
    assert [row.label for row in table.rows] == ["a", "b", "c", "t"]
    # dolly: b and c are both printed 22.00; the teacher's 50 does not compete.
    # averages: 14.5, 14.5, 15.002.
    assert table.marks() == Marks(
        best=frozenset({(1, 2), (2, 2), (0, 3), (2, 4)}),
        second=frozenset({(0, 2), (2, 3), (0, 4), (1, 4)}),
    )
    markdown = to_markdown(table, marks=table.marks()).splitlines()
    assert markdown[2] == "| a | 1 | <u>20.00</u> | **9.00** | <u>14.50</u> |"
    assert markdown[5] == "| t | 1 | 50.00 | 50.00 | 50.00 |"
    latex = to_latex(table, marks=table.marks()).splitlines()
    assert latex[4] == r"a & 1 & \underline{20.00} & \textbf{9.00} & \underline{14.50} \\"


def test_where_less_is_better_the_smallest_is_bold() -> None:
    means = {0: 3.0, 2: 1.0, 3: float("nan"), 5: 2.0}
    marked = mark_column(means, 7, better="smaller")
    assert marked == Marks(best=frozenset({(2, 7)}), second=frozenset({(5, 7)}))
    assert mark_column({0: -1.0, 1: 2.0}, 2, better="larger").best == {(1, 2)}


def test_nothing_is_marked_without_a_choice() -> None:
    assert mark_column({0: 1.0}, 2, better="larger") == Marks()
    assert mark_column({0: 1.0, 1: 2.0}, 2, better=None) == Marks()
    assert mark_column({}, 2, better="larger") == Marks()
    # All alike: all first, nobody second.
    assert mark_column({0: 1.0, 1: 1.0}, 2, better="larger").second == frozenset()


# --- Metrics and baselines ----------------------------------------------------------------------


def test_a_metric_that_older_results_lack_is_a_dash(tmp_path: Path) -> None:
    write_result(tmp_path / "old/seed10/dolly", rouge=1.0, name="old")
    write_result(tmp_path / "new/seed10/dolly", rouge=1.0, name="new", more={"rep_4": 2.5})
    methods = group_methods(collect_scores([tmp_path / "old", tmp_path / "new"]))
    table = build_table(methods, metric="rep_4", sets=["dolly"])
    assert table.lines() == [["old", "0", "–"], ["new", "1", "2.50"]]
    assert table.title == "Repeated 4-grams (%)"
    assert chosen_metrics(methods, ["rep_4", "rougeL"]) == ["rougeL", "exact_match", "rep_4"]
    with pytest.raises(ConfigError, match=r"--metrics rep_3: .*did you mean rep_4"):
        chosen_metrics(methods, ["rep_3"])
    with pytest.raises(ConfigError, match="--metrics num"):
        chosen_metrics(methods, ["num"])


def test_what_is_measured_once_per_set_has_no_spread_of_seeds(tmp_path: Path) -> None:
    for seed in (10, 20, 30):
        write_result(tmp_path / f"one/seed{seed}/dolly", rouge=1.0, name="one", more={"ece": 7.0})
    for training, ece in ((1, 4.0), (2, 8.0)):
        for seed in (10, 20, 30):
            folder = tmp_path / f"two/seed{training}/seed{seed}/dolly"
            write_result(folder, rouge=1.0, name="two", more={"ece": ece})
    table = build_table(group_methods(collect_scores([tmp_path])), metric="ece")
    assert table.lines() == [["one", "1", "7.00"], ["two", "2", "6.00 ± 2.83"]]
    assert [row.unit for row in table.rows] == ["training seeds"] * 2
    assert table.marks().best == {(1, 2)}  # a smaller error is better


def test_every_metric_of_evaluate_has_a_title_and_a_direction() -> None:
    neither = {"mean_tokens", "mean_words", "entropy", "teacher_entropy", "entropy_gap"}
    for name in set(LABELS) - {"num"} | {"rougeL", "ex_acc_err_se"}:
        metric = metric_of(name)
        assert metric.title != name
        assert (metric.better is None) == (name in neither), name
    assert {metric_of(n).better for n in ("nll", "perplexity", "kl_teacher_student")} == {"smaller"}
    assert metric_of("agreement").better == metric_of("top1").better == "larger"


def test_what_is_no_number_is_no_metric(tmp_path: Path) -> None:
    more: dict[str, Any] = {"by_length": {"1": 2.0}, "note": "text", "flag": True, "missing": None}
    write_result(tmp_path / "m/seed10/dolly", rouge=1.0, more=more)
    (score,) = collect_scores([tmp_path])
    assert set(score.metrics) == {"rougeL", "exact_match", "num", "truncated"}


def test_default_baseline_is_the_fine_tuned_one(tmp_path: Path) -> None:
    for name in ("given/big", "kd/fkl", "sft/ce"):
        write_result(tmp_path / name / "seed10/dolly", rouge=1.0, name=name)
    methods = group_methods(collect_scores([tmp_path]))

    def chosen(methods: list[Method], label: str | None = None) -> str:
        found = choose_baseline(methods, label)
        assert found is not None
        return found.label

    assert [method.label for method in methods] == ["given/big", "kd/fkl", "sft/ce"]
    assert chosen(methods) == "sft/ce"
    assert chosen(methods[:2]) == "kd/fkl"  # the teacher is no baseline unless it is asked for
    assert chosen(methods, "given/big") == "given/big"
    assert choose_baseline(methods[:1], None) is None
    with pytest.raises(ConfigError, match=r"--baseline kd/rkl: .*did you mean kd/fkl"):
        choose_baseline(methods, "kd/rkl")


# --- Beside the paper ---------------------------------------------------------------------------


def test_the_papers_averages_are_those_of_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/reproduce.md").read_text()
    columns = ["SFT", "KD", "SeqKD", "RKL", "FKL+RKL", "JSD", "AKL", "DistillLens"]
    for student in STUDENTS:
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {student.model.name} |")]
        written = [float(cell) for cell in line.strip("|").split("|")[1:]]
        by_name = dict(student.averages.values())
        assert [by_name[name] for name in columns] == written[:-1]
        assert student.teacher_average == written[-1]


NOT_KNOWN = "training not known: no distilllens.json beside the weights that tells it"
PROTOCOL: dict[str, object] = {
    "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 6,
    "max_new_tokens": 256,
}  # fmt: skip
NUMBERS = {"dolly": 500, "self_inst": 242, "vicuna": 80, "sinst": 1694, "uinst": 10_000}


def write_protocol(folder: Path, *, rouge: float, checkpoint: Path) -> None:
    """Writes an evaluation just like the paper's."""
    for seed in SAMPLING_SEEDS:
        for test_set, num in NUMBERS.items():
            write_result(
                folder / f"seed{seed}" / test_set,
                rouge=rouge,
                name="/".join(folder.parts[-2:]),
                num=num,
                settings=dict(PROTOCOL),
                checkpoint=str(checkpoint),
            )


def test_an_evaluation_like_the_papers_stands_beside_it(tmp_path: Path) -> None:
    base, teacher = tmp_path / "base", tmp_path / "teacher"
    for model, layers, width in ((base, 12, 768), (teacher, 48, 1600)):
        model.mkdir()
        config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width}
        (model / "config.json").write_text(json.dumps(config))
    root = tmp_path / "eval_main/gpt2-base"
    write_protocol(root / "kd/rkl", rouge=17.0, checkpoint=base)
    write_protocol(root / "distill_lens/rkl", rouge=21.0, checkpoint=base)
    write_protocol(root / "given/teacher-gpt2-1.5B", rouge=23.0, checkpoint=teacher)
    write_protocol(root / "kd/tvd", rouge=21.0, checkpoint=base)  # the paper has none
    table = build_paper_table(group_methods(collect_scores([tmp_path])))
    assert [line[1:] for line in table.lines()] == [
        ["GPT-2 base: DistillLens", "21.12", "21.00 ± 0.00", "5", "1"],
        ["GPT-2 base: teacher", "23.52", "23.00 ± 0.00", "5", "2"],
        ["GPT-2 base: RKL", "17.56", "17.00 ± 0.00", "5", "1"],
    ]
    assert table.differences == [NOT_KNOWN, "how the teacher was trained is not compared"]


def test_a_page_can_hold_the_paper_table_however_much_differs(tmp_path: Path) -> None:
    """Every cell is short; what differs stands below in paragraphs, each thing once."""
    for kind in ("fkl", "rkl"):
        folder = tmp_path / "eval_main/gpt2-base/kd" / kind
        for seed in (1, 2):
            write_result(folder / f"seed{seed}/dolly", rouge=1.0, name=f"kd/{kind}")
    board = build_scoreboard(group_methods(collect_scores([tmp_path])))
    text = board.files()["scores.tex"].decode()
    tabular, below = text[text.index("% Beside") :].split(r"\end{tabular}")
    assert r"\begin{tabular}{llrrrl}" in tabular
    rows = tabular.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(rows) == 2 and all(len(cell) < 30 for row in rows for cell in row.split(" & "))
    assert [row.split(" & ")[-1] for row in rows] == [r"1--10 \\"] * 2
    items = [line for line in below.splitlines() if line.startswith(r"\item ")]
    assert len(items) == len(board.paper.differences) == len(set(items)) == 10
    assert r"\item top\_p: not recorded for 1.0" in items
    assert below.strip().startswith(r"\begin{enumerate}")
    markdown = board.files()["scores.md"].decode()
    assert (
        "| method | row of the paper | paper | ours | n | what differs |\n| --- | --- | ---: |"
        in markdown
    )
    assert f"\n{len(items)}. {NOT_KNOWN}\n" in markdown


def test_all_that_differs_from_the_paper_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 10, "hidden_size": 576}')
    folder = tmp_path / "eval_main/TinyLlama-1.1B/sft/ce"
    settings: dict[str, object] = PROTOCOL | {"temperature": 0.5, "no_repeat_ngram_size": 0}
    del settings["top_k"]
    for training in (1, 2):
        for test_set, num in (("dolly", 20), ("vicuna", 80), ("own", 5)):
            write_result(
                folder / f"seed{training}/seed10" / test_set,
                rouge={"dolly": 10.0, "vicuna": 20.0, "own": 90.0}[test_set],
                num=num,
                settings=settings,
                checkpoint=str(model),
            )
    (row,) = build_paper_table(group_methods(collect_scores([tmp_path]))).rows
    assert (row.paper_name, row.paper_average) == ("TinyLlama: SFT", 24.16)
    assert row.ours is not None and row.ours.mean == 15.0  # the set of our own does not enter
    assert row.differences == (
        "2 of 5 sets, without self_inst, sinst, uinst",
        "dolly: 20 of 500 prompts",
        "sampling seeds 10 for 10 20 30 40 50",
        "2 training seeds for one",
        "temperature: 0.5 for 1.0",
        "top_k: not recorded for 0",
        "no_repeat_ngram_size: 0 for 6",
        "another model: 10 blocks of width 576, TinyLlama has 22 of 2048",
        NOT_KNOWN,
    )
    (model / "config.json").unlink()
    (row,) = build_paper_table(group_methods(collect_scores([tmp_path]))).rows
    assert row.differences[-2] == f"model not checked: {model}/config.json is not here"


def test_other_students_are_not_set_beside_the_paper(tmp_path: Path) -> None:
    write_result(tmp_path / "eval_main/skills/sft/ce/seed10/dolly", rouge=1.0)
    assert build_paper_table(group_methods(collect_scores([tmp_path]))).rows == ()
