"""The benchmarks: what the harness measures is right, and every command runs on tiny shapes."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Workspace
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import harness, rouge
from benchmarks.harness import Baseline, Result, Sample, Variant, append_csv, measure
from benchmarks.loss import check_equal
from benchmarks.loss import main as loss_main
from benchmarks.loss_variants import Case, build_case, fused_loss
from benchmarks.published import PUBLISHED_KINDS, published_divergence
from distilllens.divergence import divergence
from distilllens.errors import ConfigError, NumericsError

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident-set mark of Linux")


def quiet() -> Console:
    return Console(file=io.StringIO())


def run_benchmark(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    # Not the process group of a test that ran in this process before.
    env = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    return subprocess.run(
        command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=120
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result(name: str, *walls: float, extra_mb: float | None = 1.0) -> Result:
    samples = [Sample(wall_s=wall, cpu_s=wall / 2, extra_mb=extra_mb) for wall in walls]
    return Result(name=name, samples=tuple(samples))


# --- The harness --------------------------------------------------------------------------------


def test_variants_run_in_turn_with_setup_and_teardown_around_each() -> None:
    calls: list[str] = []

    def variant(name: str) -> Variant:
        return Variant(
            name=name,
            run=lambda: calls.append(name),
            setup=lambda: calls.append("["),
            teardown=lambda: calls.append("]"),
        )

    results = measure([variant("A"), variant("B")], rounds=2, warmup=1, device=CPU, console=quiet())
    assert "".join(calls) == "[A][B]" * 3
    assert [(each.name, len(each.samples)) for each in results] == [("A", 2), ("B", 2)]


@on_linux
def test_peak_extra_memory_is_what_the_call_allocates_and_nothing_else() -> None:
    def one_block() -> None:
        torch.ones(50_000_000)  # 200 MB, its own mapping

    pins = []

    def many_blocks() -> None:  # 200 MB on the heap, and a pin on top that keeps it there
        _ = [bytearray(100_000) for _ in range(2_000)]
        pins.append(bytearray(100_000))

    kept = torch.ones(25_000_000)  # there before: does not count
    variants = [
        Variant(name="one", run=one_block),
        Variant(name="many", run=many_blocks),
        Variant(name="none", run=lambda: None),
        Variant(name="setup", run=lambda: None, setup=one_block),
    ]
    results = measure(variants, rounds=2, warmup=1, device=CPU, console=quiet())
    peaks = {each.name: each.extra_mb for each in results}
    assert kept[0] == 1
    assert peaks["one"] == pytest.approx(200, rel=0.15)
    assert peaks["many"] == pytest.approx(200, rel=0.15)
    assert peaks["none"] == pytest.approx(0, abs=2)
    assert peaks["setup"] == pytest.approx(0, abs=2)


def test_wall_time_counts_waiting_and_cpu_time_does_not() -> None:
    def work() -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    variants = [Variant(name="wait", run=lambda: time.sleep(0.1)), Variant(name="work", run=work)]
    waited, worked = measure(variants, rounds=1, warmup=0, device=CPU, console=quiet())
    assert waited.wall_s >= 0.1 > 0.05 > waited.cpu_s
    assert worked.cpu_s == pytest.approx(0.1, rel=0.2)
    assert worked.wall_s >= worked.cpu_s * 0.99


def test_medians_and_ratios() -> None:
    results = [result("slow", 9.0, 4.0, 8.0), result("fast", 2.0, 1.0), result("base", 2.0)]
    faster = Baseline(column="c", title="t", default="slow", speedup=True)
    times = Baseline(column="c", title="t", default="slow", special={"fast": "base"})
    assert [each.wall_s for each in results] == [8.0, 1.5, 2.0]
    assert (results[0].wall_min_s, results[0].wall_max_s, results[0].cpu_s) == (4.0, 9.0, 4.0)
    assert [faster.ratio(each, results) for each in results] == pytest.approx([1, 8 / 1.5, 4])
    assert [times.ratio(each, results) for each in results] == pytest.approx([1, 0.75, 0.25])
    assert times.ratio(results[1], results[:2]) is None


def test_memory_that_cannot_be_measured_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.sys, "platform", "darwin")
    variant = Variant(name="a", run=lambda: None)
    results = measure([variant], rounds=1, warmup=0, device=CPU, console=quiet())
    console = quiet()
    harness.print_results(console, results, title="t", skipped={"b": "not installed"})
    assert results[0].extra_mb is None
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "n/a" in shown and "b: not run, not installed" in shown


def test_csv_grows_and_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append_csv(path, [{"a": 1, "b": "x, y"}])
    append_csv(path, [{"a": 2, "b": None}, {"a": 3, "b": ""}])
    assert [row["a"] for row in read_csv(path)] == ["1", "2", "3"]
    assert read_csv(path)[0]["b"] == "x, y"
    with pytest.raises(ConfigError, match="columns of another"):
        append_csv(path, [{"a": 4, "c": 1}])
    assert len(read_csv(path)) == 3


# --- The published formula and the check --------------------------------------------------------


def random_logits(rows: int, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 2


@pytest.mark.parametrize("kind", PUBLISHED_KINDS)
def test_published_formula_is_the_divergence_up_to_its_epsilon(kind: str) -> None:
    vocab, beta = 1999, 0.3
    teacher, student = random_logits(7, vocab, 1), random_logits(7, vocab, 2).requires_grad_()
    mask = torch.ones(7, dtype=torch.bool)
    published = published_divergence(
        kind, teacher_logits=teacher, student_logits=student, mask=mask, beta=beta
    )
    exact = divergence(kind, teacher_logits_NV=teacher, student_logits_NV=student, beta=beta).mean()
    gap = float((exact - published).detach())
    # d/dε of −Σ m log(m + ε) at 0 is −V: the value is too low by V ε, a little less with curvature
    assert gap == (pytest.approx(vocab * 1e-8, rel=0.02) if kind == "jsd" else pytest.approx(0))
    (ours,) = torch.autograd.grad(exact, student)
    (theirs,) = torch.autograd.grad(published, student)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-9)


def test_published_mean_is_over_masked_positions_of_all_layers() -> None:
    teacher, student = random_logits(10, 33, 3), random_logits(10, 33, 4)
    mask = torch.tensor([True, False, False, True, True])
    value = published_divergence(
        "rkl",
        teacher_logits=teacher.unflatten(0, (2, 5)),
        student_logits=student.unflatten(0, (2, 5)),
        mask=mask,
    )
    rows = divergence("rkl", teacher_logits_NV=teacher, student_logits_NV=student)
    assert float(value) == pytest.approx(float(rows[mask.repeat(2)].mean()))


def tiny_case() -> Case:
    options = {"shape": "tiny", "layers": 2, "batch": 3, "length": 16, "dtype": "float32"}
    more = {"seed": 0, "share": 0.3, "kind": "jsd", "beta": 0.5, "chunk_rows": 4}
    return build_case(argparse.Namespace(**options, **more), CPU)


def test_check_refuses_a_wrong_loss_and_a_wrong_gradient() -> None:
    case = tiny_case()

    def wrong_gradient(case: Case) -> Tensor:
        loss = fused_loss(case)
        return loss * 1.01 - loss.detach() * 0.01

    check_equal({"fused": (fused_loss, case)}, case, quiet())
    with pytest.raises(NumericsError, match="fused: loss or gradients"):
        check_equal({"fused": (lambda c: fused_loss(c) * 1.001, case)}, case, quiet())
    with pytest.raises(NumericsError, match="fused: loss or gradients"):
        check_equal({"fused": (wrong_gradient, case)}, case, quiet())


# --- The commands -------------------------------------------------------------------------------

TINY = ("--shape", "tiny", "--length", "32", "--batch", "2", "--rounds", "2", "--share", "0.3")


def test_loss_command_compares_all_variants_and_appends_consistent_rows(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    flags = ("--layers", "3", "--beta", "0.3", "--liger_eager", "--csv", str(path))
    done = run_benchmark("loss", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in read_csv(path)}
    expected = "published gathered fused fused-frozen-head floor floor-frozen-head".split()
    assert [name for name in rows if name != "liger"] == expected
    assert "liger" in rows or "liger: not run" in done.stdout
    wall = {name: float(row["wall_s"]) for name, row in rows.items()}
    for name, row in rows.items():
        assert 0 < float(row["wall_min_s"]) <= wall[name] <= float(row["wall_max_s"])
        assert float(row["cpu_s"]) > 0
        assert float(row["published_over_this"]) == pytest.approx(wall["published"] / wall[name])
        floor = "floor-frozen-head" if name.endswith("-frozen-head") else "floor"
        assert float(row["this_over_floor"]) == pytest.approx(wall[name] / wall[floor])
        assert (row["rows"], row["layers"], row["vocab"]) == ("20", "3", "307")
        assert row["cpu"] and row["date"] and row["commit"] and int(row["threads"]) == 1
        assert row["dirty"] in ("True", "False") and float(row["load_1min"]) >= 0


def test_loss_command_in_bfloat16_with_another_divergence_names_what_cannot_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss_main([*TINY, "--kind", "tvd", "--dtype", "bfloat16"])
    shown = capsys.readouterr().out
    assert "published: not run" in shown and "liger: not run" in shown


@on_linux
def test_growth_command_writes_eight_sizes_and_a_plot(tmp_path: Path) -> None:
    path, plot = tmp_path / "growth.csv", tmp_path / "growth.png"
    flags = ("--growth", "rows", "--plot", str(plot), "--csv", str(path))
    loss_main([*TINY, *flags])
    rows = read_csv(path)
    assert [int(row["rows"]) for row in rows] == [20 * times for times in range(1, 9)]
    assert all(float(row["wall_s"]) > 0 and float(row["extra_mb"]) >= 0 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def step_flags(workspace: Workspace, *more: str) -> list[str]:
    return [
        *("--data", f"{workspace.root}/data/toy", "--tokenizer", f"{workspace.root}/student"),
        *("--teacher", "tiny", "--student", "tiny", "--vocab", "307", "--max_length", "512"),
        *("--layers", "2", "--records", "8", "--rounds", "1", *more),
    ]


def test_step_command_runs_every_variant_over_the_same_records(workspace: Workspace) -> None:
    file = workspace.root / "step.csv"
    done = run_benchmark("step", *step_flags(workspace, "--csv", str(file)))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["variant"]: row for row in read_csv(file)}
    names = ["published", "ours", "ours-mixed", "ours-packed", "ours-kd", "ours-cached"]
    assert list(rows) == names and all(name in done.stdout for name in names)
    published = float(rows["published"]["wall_s"])
    for row in rows.values():
        tokens, seconds = int(row["response_tokens"]), float(row["wall_s"])
        assert 8 <= tokens == int(rows["ours"]["response_tokens"])
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / seconds)
        assert float(row["published_over_this"]) == pytest.approx(published / seconds)


def test_step_growth_writes_its_sizes_and_a_plot(workspace: Workspace) -> None:
    file, plot = workspace.root / "growth.csv", workspace.root / "growth.svg"
    more = ("--growth", "layers", "--csv", str(file), "--plot", str(plot))
    done = run_benchmark("step", *step_flags(workspace, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["layers"] for row in read_csv(file)] == ["1", "2", "3", "4", "5"]
    assert plot.read_text(encoding="utf-8").startswith("<?xml")


def test_generation_command_counts_the_tokens_of_both_loops(
    tmp_path: Path,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_gpt2(n_positions=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    prompts, path = tmp_path / "valid.jsonl", tmp_path / "rows.csv"
    line = '{"instruction": "Sort the words: fig, pear.", "input": "", "output": ["a", "b"]}\n'
    prompts.write_text(line * 5, encoding="utf-8")
    files = ("--model", str(tmp_path / "model"), "--prompts", str(prompts), "--csv", str(path))
    sizes = ("--limit", "3", "--max_new_tokens", "6", "--batch_size", "2", "--rounds", "2")
    done = run_benchmark("generation", *files, *sizes, "--max_prompt_length", "200")
    assert done.returncode == 0, done.stderr
    plain, ours = read_csv(path)
    assert (plain["variant"], ours["variant"], plain["prompts"]) == ("plain", "distilllens", "3")
    for row in (plain, ours):
        assert 0 < float(row["tokens"]) <= 3 * 6
        speed = float(row["tokens"]) / float(row["wall_s"])
        assert float(row["tokens_per_s"]) == pytest.approx(speed)


def test_timed_answers_are_new_to_who_knows_the_references() -> None:
    texts = [f"text {number} of {number % 7} words" for number in range(60)]
    pairs = rouge.make_pairs(texts, limit=None, seed=3)
    timed = rouge.with_new_answers(pairs, 100)
    assert len(timed) == 100
    assert set(timed) <= set(pairs)
    assert not {answer for answer, _ in timed} & {reference for _, reference in timed}
    assert rouge.with_new_answers([("a", "a"), ("b", "a"), ("a", "c"), ("b", "c")], 9) == [
        *(("b", "a"), ("b", "c"))
    ]


def test_rouge_command_compares_all_pairs_and_counts_the_timed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = tmp_path / "valid.jsonl", tmp_path / "rows.csv"
    outputs = [["The cats are running home.", "Cats run."], "Sorted: fig, pear.", "Yes"]
    lines = [json.dumps({"instruction": "x", "output": output}) for output in outputs]
    data.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--data", str(data), "--timed", "5", "--rounds", "2", "--csv", str(path)]
    rouge.main(flags)
    rows = read_csv(path)
    assert [row["variant"] for row in rows] == ["rouge-score", "cold", "warm"]
    for row in rows:
        assert (row["texts"], row["equal_pairs"], row["timed_pairs"]) == ("4", "16", "5")
        speed = 5 / float(row["cpu_s"])
        assert float(row["pairs_per_cpu_s"]) == pytest.approx(speed)
    monkeypatch.setattr(rouge, "rouge_l", lambda answer, reference: 0.25)
    with pytest.raises(NumericsError, match=r"0\.25 is not rouge-score's"):
        rouge.main(flags)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--shape", "gpt3"), "invalid choice"),
        (("--plot", "a.png"), "--plot needs --growth"),
        (("--rounds", "0"), "0 is below 1"),
        (("--share", "1.5"), "--share must be"),
    ],
)
def test_wrong_usage_is_refused(flags: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        loss_main(flags)
