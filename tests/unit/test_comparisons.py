"""Methods against a baseline, from samples.jsonl files with figures worked out by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from distilllens.errors import DataError
from distilllens.report.comparison.files import build_scoreboard
from distilllens.report.comparison.methods import MetricComparison, compare_methods
from distilllens.report.comparison.tables import comparisons_csv, comparisons_markdown
from distilllens.report.scores.load import choose_baseline, collect_scores, group_methods

Samples = list[dict[str, object]]


def samples_of(rouge: Sequence[float], *, prompt: str = "prompt") -> Samples:
    """Lines of samples.jsonl; an exact match is one of Rouge-L 1."""
    return [
        {
            "index": index,
            "prompt": f"{prompt} {index}",
            "answer": "text",
            "rougeL": float(value),
            "exact_match": float(value) == 1,
            "num_tokens": 10 * index,
        }
        for index, value in enumerate(rouge)
    ]


def write_cell(root: Path, cell: str, samples: Samples, **metrics: float) -> Path:
    """Writes METHOD/seedN/SET with the means that evaluate.py writes, or those given."""
    folder = root / cell
    folder.mkdir(parents=True)
    content = {
        "metrics": {
            "rougeL": 100 * float(np.mean([s["rougeL"] for s in samples])),
            "exact_match": 100 * float(np.mean([s["exact_match"] for s in samples])),
            "mean_tokens": float(np.mean([s["num_tokens"] for s in samples])),
            "num": len(samples),
        }
        | metrics,
        "set": folder.name,
        "seed": int(folder.parent.name.removeprefix("seed")),
        "name": cell.split("/")[0],
        "config": {"max_prompt_length": 256, "eval": {}},
    }
    (folder / "results.json").write_text(json.dumps(content))
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text)
    return folder


def compare(
    root: Path, *, sets: Sequence[str] = ("dolly",), metrics: Sequence[str] = ("rougeL",),
    baseline: str | None = None,
) -> tuple[list[MetricComparison], list[str]]:  # fmt: skip
    methods = group_methods(collect_scores([root]))
    chosen = choose_baseline(methods, baseline)
    assert chosen is not None
    return compare_methods(methods, sets=sets, metrics=metrics, baseline=chosen)


def scores(n: int, *, mean: float, seed: int) -> list[float]:
    """Scores around a mean, never 0 or 1."""
    values: list[float] = np.random.default_rng(seed).uniform(mean - 0.05, mean + 0.05, n).tolist()
    return values


def test_prompts_are_resampled_not_answers(tmp_path: Path) -> None:
    write_cell(tmp_path, "a/seed10/dolly", samples_of([0.0, 0.4, 0.8]))
    write_cell(tmp_path, "a/seed20/dolly", samples_of([0.2, 0.6, 0.4]))
    (content,), notes = compare(tmp_path)
    assert notes == []
    sampled = content.means["a"]["dolly"]
    # Means over seeds: 10, 50, 60. Mean 40; (900 + 100 + 400) / 3² = 155.6.
    assert sampled.resampled.mean == pytest.approx(40.0)
    assert sampled.resampled.variance == pytest.approx(1400 / 9)
    assert (sampled.num_prompts, sampled.num_seeds) == (3, 2)
    thirds = np.array([10.0, 50.0, 60.0])
    possible = {round(sum(c) / 3, 6) for c in np.stack(np.meshgrid(*[thirds] * 3)).reshape(3, -1).T}
    assert {round(float(draw), 6) for draw in sampled.resampled.draws_R} == possible


def test_both_spreads_and_the_verdicts_by_hand(tmp_path: Path) -> None:
    for seed, gain in ((10, 0.03), (20, 0.05)):
        base = scores(200, mean=0.4, seed=seed)
        write_cell(tmp_path, f"sft/seed{seed}/dolly", samples_of(base))
        write_cell(tmp_path, f"up/seed{seed}/dolly", samples_of([v + gain for v in base]))
        shuffled = scores(200, mean=0.4, seed=seed + 1)
        write_cell(tmp_path, f"same/seed{seed}/dolly", samples_of(shuffled))
    (content,), _ = compare(tmp_path)
    assert content.baseline == "sft"
    same, up = content.comparisons["dolly"]
    assert (up.method, up.num_prompts, up.num_seeds, up.num_methods) == ("up", 200, (2, 2), 2)
    # Every prompt gains 4 on average: no draw says otherwise.
    assert up.bootstrap.mean == pytest.approx(4.0)
    assert up.bootstrap.interval == pytest.approx((4.0, 4.0))
    assert (up.bootstrap.p, up.p_holm) == pytest.approx((2 / 10_001, 4 / 10_001))
    # The seeds gain 3 and 5, and two seeds show nothing: 4 ± 12.7062 · 1.
    assert up.seed_interval == pytest.approx((4 - 12.7062, 4 + 12.7062), abs=1e-3)
    assert up.verdict("rougeL") == "under the noise of the seeds"
    assert same.verdict("rougeL") == "under the noise"
    warning = content.warning()
    assert warning is not None and "same" in warning and "up +4.00" in warning
    assert "n = 200 prompts" in warning
    # Its interval leaves 0 out: the reason must stand beside it.
    assert "up +4.00 (+4.00 to +4.00, under the noise of the seeds)" in warning


@pytest.mark.parametrize(
    ("metric", "gain", "verdict"),
    [("rougeL", 0.1, "better"), ("rougeL", -0.1, "worse"), ("loss", -0.1, "better"),
     ("loss", 0.1, "worse"), ("unheard_of", 0.1, "larger")],
)  # fmt: skip
def test_better_depends_on_the_metric(
    tmp_path: Path, metric: str, gain: float, verdict: str
) -> None:
    for name, shift in (("sft", 0.0), ("m", gain)):
        samples = samples_of([v + shift for v in scores(50, mean=0.4, seed=len(name))])
        for sample in samples:
            sample[metric] = sample["rougeL"]
        mean = float(np.mean([float(str(sample["rougeL"])) for sample in samples]))
        write_cell(tmp_path, f"{name}/seed10/dolly", samples, **{metric: 100 * mean})
    (content,), _ = compare(tmp_path, metrics=[metric])
    (row,) = content.comparisons["dolly"]
    assert row.verdict(metric) == f"{verdict} (seeds not tested)"
    assert row.seed_interval is None
    assert content.warning() is None


def test_many_comparisons_are_corrected(tmp_path: Path) -> None:
    """A difference that stands out alone is noise among twelve."""
    rng = np.random.default_rng(1)
    base = scores(100, mean=0.4, seed=1)
    write_cell(tmp_path, "sft/seed10/dolly", samples_of(base))
    noise = rng.normal(scale=0.05, size=100)
    noise += 0.012 - noise.mean()  # 2.4 standard errors: p about 0.016
    write_cell(
        tmp_path, "m00/seed10/dolly", samples_of([v + d for v, d in zip(base, noise, strict=True)])
    )
    (alone,), _ = compare(tmp_path)
    assert alone.comparisons["dolly"][0].verdict("rougeL").startswith("better")
    for number in range(1, 12):
        other = rng.normal(scale=0.05, size=100)
        other -= other.mean()
        values = [v + d for v, d in zip(base, other, strict=True)]
        write_cell(tmp_path, f"m{number:02}/seed10/dolly", samples_of(values))
    (among,), _ = compare(tmp_path)
    first = among.comparisons["dolly"][0]
    assert first.verdict("rougeL") == "under the noise of 12 comparisons"
    assert first.p_holm == pytest.approx(12 * first.bootstrap.p)
    # Its own figures are the same beside others.
    assert first.bootstrap.p == alone.comparisons["dolly"][0].bootstrap.p


def test_average_counts_every_set_the_same(tmp_path: Path) -> None:
    for name, shift in (("sft", 0.0), ("m", 0.1)):
        for test_set, n, mean in (("dolly", 100, 0.2), ("vicuna", 20, 0.6)):
            values = [v + shift for v in scores(n, mean=mean, seed=n)]
            write_cell(tmp_path, f"{name}/seed10/{test_set}", samples_of(values))
    (content,), _ = compare(tmp_path, sets=("dolly", "vicuna"))
    assert content.columns == ("dolly", "vicuna", "average")
    parts = [content.means["sft"][name].resampled.mean for name in ("dolly", "vicuna")]
    average = content.means["sft"]["average"]
    assert average.resampled.mean == pytest.approx(sum(parts) / 2)
    assert average.num_prompts == 120
    (row,) = content.comparisons["average"]
    assert row.bootstrap.mean == pytest.approx(10.0)


def test_a_set_of_one_method_takes_nobodys_average(tmp_path: Path) -> None:
    for name, shift in (("sft", 0.0), ("m", 0.0)):
        for test_set, n in (("dolly", 100), ("vicuna", 20)):
            values = [v + shift for v in scores(n, mean=0.4, seed=n + len(name))]
            write_cell(tmp_path, f"{name}/seed10/{test_set}", samples_of(values))
    write_cell(tmp_path, "m/seed10/own", samples_of(scores(30, mean=0.9, seed=3)))
    board = build_scoreboard(group_methods(collect_scores([tmp_path])))
    content = board.comparisons[0]
    (row,) = content.comparisons["average"]
    assert (row.method, row.num_prompts) == ("m", 120)
    m = content.means["m"]
    parts = [m[name].resampled.mean for name in ("dolly", "vicuna")]
    assert m["average"].resampled.mean == pytest.approx(sum(parts) / 2)
    table = board.tables[0]
    cells = [table_row.average for table_row in table.rows]
    assert [cell is not None and cell.mean for cell in cells] == pytest.approx(
        [m["average"].resampled.mean, content.means["sft"]["average"].resampled.mean]
    )
    told = "average is over dolly, vicuna, which all compared methods were scored on; without own"
    assert any(told in note for note in board.notes)
    assert told in board.files()["scores.md"].decode()


def test_the_warning_is_of_the_last_column_that_has_comparisons(tmp_path: Path) -> None:
    for name, test_set in (("sft", "dolly"), ("m", "dolly"), ("m", "own")):
        values = scores(50, mean=0.4, seed=len(name))
        write_cell(tmp_path, f"{name}/seed10/{test_set}", samples_of(values))
    (content,), _ = compare(tmp_path, sets=("dolly", "own"))
    warning = content.warning()
    assert warning is not None and "Rouge-L, dolly: no difference to sft" in warning


def test_a_long_warning_names_the_first_few(tmp_path: Path) -> None:
    for number in range(9):
        values = scores(50, mean=0.4, seed=number)
        write_cell(tmp_path, f"m{number}/seed10/dolly", samples_of(values))
    (content,), _ = compare(tmp_path)
    warning = content.warning()
    assert warning is not None and "m6 " in warning and "m7 " not in warning
    assert " and 2 more; n = 50 prompts" in warning


def test_a_teacher_has_a_mean_but_is_not_compared(tmp_path: Path) -> None:
    for name in ("sft/ce", "given/big", "kd/fkl"):
        write_cell(tmp_path, f"{name}/seed10/dolly", samples_of([0.1, 0.2, 0.4]))
    (content,), _ = compare(tmp_path)
    assert len(content.means) == 3
    assert [row.method for row in content.comparisons["dolly"]] == ["kd"]


# --- What cannot be compared --------------------------------------------------------------------


def test_other_prompts_are_told_and_not_compared(tmp_path: Path) -> None:
    write_cell(tmp_path, "sft/seed10/dolly", samples_of([0.1, 0.2, 0.4]))
    write_cell(tmp_path, "fewer/seed10/dolly", samples_of([0.1, 0.2]))
    write_cell(tmp_path, "other/seed10/dolly", samples_of([0.1, 0.2, 0.4], prompt="other"))
    (content,), notes = compare(tmp_path)
    assert content.comparisons["dolly"] == []
    assert set(content.means) == {"sft", "fewer", "other"}
    assert notes == [
        "dolly: fewer and sft were not asked the same prompts (2 of 2 and 3 are in both by index "
        "and text), so they are not compared on it",
        "dolly: other and sft were not asked the same prompts (0 of 3 and 3 are in both by index "
        "and text), so they are not compared on it",
    ]


def test_missing_or_unlike_samples_leave_a_method_out(tmp_path: Path) -> None:
    write_cell(tmp_path, "sft/seed10/dolly", samples_of([0.1, 0.2]))
    gone = write_cell(tmp_path, "gone/seed10/dolly", samples_of([0.1, 0.2]))
    (gone / "samples.jsonl").unlink()
    write_cell(tmp_path, "mixed/seed10/dolly", samples_of([0.1, 0.2]))
    write_cell(tmp_path, "mixed/seed20/dolly", samples_of([0.1, 0.2], prompt="other"))
    edited = write_cell(tmp_path, "edited/seed10/dolly", samples_of([0.1, 0.2]), rougeL=16.0)
    (content,), notes = compare(tmp_path)
    assert content.comparisons["dolly"] == []
    assert [label for label, means in content.means.items() if means] == ["sft"]
    assert notes == [
        "edited on dolly: no statistics over prompts of rougeL: "
        f"{edited / 'results.json'} says 16, the mean over its samples.jsonl is 0.15",
        f"gone on dolly: no {gone / 'samples.jsonl'}, so no statistics over prompts",
        f"mixed on dolly: other prompts in {tmp_path}/mixed/seed20/dolly/samples.jsonl than with "
        "the first seed",
    ]


def test_metrics_that_are_no_mean_over_prompts_are_left_out(tmp_path: Path) -> None:
    for name in ("sft", "m"):
        samples = samples_of([0.1, 0.2, 0.3])
        samples[0]["similarity"] = 0.5  # of one answer only
        more = {"distinct_1": 3.0, "similarity": 0.5}
        write_cell(tmp_path, f"{name}/seed10/dolly", samples, **more)
    found, notes = compare(tmp_path, metrics=["mean_tokens", "distinct_1", "similarity"])
    assert [content.metric for content in found] == ["mean_tokens"]
    assert found[0].means["m"]["dolly"].resampled.mean == pytest.approx(10.0)  # 0, 10, 20
    assert len(notes) == 4 and all("not every line" in note for note in notes)


def test_counts_of_prompts_are_resampled_as_counts(tmp_path: Path) -> None:
    samples = samples_of([0.1] * 8)
    for index, sample in enumerate(samples):
        sample["truncated"] = index < 3
    write_cell(tmp_path, "sft/seed10/dolly", samples, truncated=3, truncated_percent=37.5)
    count, percent = compare(tmp_path, metrics=["truncated", "truncated_percent"])[0]
    assert count.means["sft"]["dolly"].resampled.mean == pytest.approx(3)
    assert percent.means["sft"]["dolly"].resampled.mean == pytest.approx(37.5)


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    write_cell(tmp_path, "sft/seed10/dolly", samples_of([0.1]))
    assert compare(tmp_path)[0] == []


def test_broken_samples_are_named_by_line(tmp_path: Path) -> None:
    folder = write_cell(tmp_path, "sft/seed10/dolly", samples_of([0.1, 0.2]))
    with (folder / "samples.jsonl").open("a") as file:
        file.write("\n[1]\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:4: not a sample"):
        compare(tmp_path)


def test_trainings_and_samplings_are_not_paired(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_cell(tmp_path, f"m/seed{seed}/seed10/dolly", samples_of(scores(50, mean=0.6, seed=3)))
        write_cell(tmp_path, f"sft/seed{seed}/dolly", samples_of(scores(50, mean=0.4, seed=4)))
    (content,), _ = compare(tmp_path)
    (row,) = content.comparisons["dolly"]
    assert row.seed_differences == ()
    assert row.verdict("rougeL") == "better (seeds not tested)"


# --- Files --------------------------------------------------------------------------------------


def test_files_tell_all_numbers(tmp_path: Path) -> None:
    for name, shift in (("sft", 0.0), ("m|1", 0.1)):
        for seed in (10, 20, 30):
            values = [v + shift for v in scores(40, mean=0.4, seed=seed + len(name))]
            write_cell(tmp_path, f"{name}/seed{seed}/dolly", samples_of(values))
    found, _ = compare(tmp_path, metrics=["rougeL", "exact_match"], baseline="sft")
    text = comparisons_markdown(found, ["a note"])
    assert "| method | answers per prompt | dolly (40) |" in text
    assert "### Rouge-L, dolly: difference to sft" in text
    (line,) = [row for row in text.splitlines() if row.startswith(r"| m\|1 | 40 | 3 | +10")]
    assert line.endswith("(n=3) | better |")
    assert "- a note" in text
    rows = list(csv.DictReader(io.StringIO(comparisons_csv(found))))
    (row,) = [r for r in rows if r["baseline"] and r["metric"] == "rougeL"]
    assert (row["method"], row["prompts"], row["answers_per_prompt"], row["seeds_n"]) == (
        "m|1",
        "40",
        "3",
        "3",
    )
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    means = [r for r in rows if not r["baseline"]]
    assert len(means) == 4 and all(r["p"] == "" for r in means)
    again, _ = compare(tmp_path, metrics=["rougeL", "exact_match"], baseline="sft")
    assert comparisons_csv(again) == comparisons_csv(found)
