"""The report command on fabricated run and evaluation folders, with real tiny models inside."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from distilllens.cli.report import report_main
from distilllens.errors import ConfigError, DataError, StorageError
from distilllens.report.arguments import parse_report_arguments
from distilllens.report.command import _LivePage
from distilllens.report.html import Drawings
from distilllens.report.runs.record import find_runs, read_runs, report_folder
from distilllens.report.scores.load import evaluation_folder
from distilllens.report.watch import Watched

ATTACK = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=run()>"


class Checkout:
    """A fabricated results tree: two students of one teacher, with scores of three methods."""

    def __init__(
        self,
        root: Path,
        tiny_gpt2: Callable[..., GPT2LMHeadModel],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.root = root
        self.data = root / "data/toy/valid.jsonl"
        for name, layers, seed in (("teacher", 4, 1), ("student", 2, 2)):
            tiny_gpt2(n_layer=layers, seed=seed).save_pretrained(root / "checkpoints" / name)
            tokenizer.save_pretrained(root / "checkpoints" / name)
        self.data.parent.mkdir(parents=True)
        rows = [
            {"instruction": "Sort: b a", "input": "", "output": "a b"},
            {"instruction": "Say yes.", "input": "", "output": ["yes", "Yes."]},
            {"instruction": "Say nothing.", "input": "", "output": " "},
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.lens_run = self.write_run("distill_lens/fkl", seed=3, teacher=True)
        self.sft_run = self.write_run("sft/sft", seed=4, teacher=False)
        for model in (self.lens_run, self.sft_run):
            tiny_gpt2(n_layer=2, seed=5).save_pretrained(model / "best")
            tokenizer.save_pretrained(model / "best")
        for name in ("distill_lens/fkl", "sft/sft"):
            for seed, value in ((10, 20.0), (20, 24.0)):
                self.write_scores(name, seed=seed, rouge=value)

    def write_run(self, name: str, *, seed: int, teacher: bool) -> Path:
        run = self.root / "results/train/toy" / name
        run.mkdir(parents=True)
        checkpoints = self.root / "checkpoints"
        approach = name.split("/")[0]
        teacher_line = f"  teacher: {checkpoints / 'teacher'}\n" if teacher else ""
        (run / "config.yaml").write_text(
            f"run:\n  output_dir: {run}\n  seed: {seed}\n"
            f"model:\n  student: {checkpoints / 'student'}\n{teacher_line}"
            f"data:\n  path: {self.data.parent}\n  max_length: 120\n  max_prompt_length: 100\n"
            f"objective:\n  approach: {approach}\n  divergence: fkl\n  kd_ratio: {float(teacher)}\n"
        )
        lines: list[dict[str, float]] = []
        for step in range(1, 101):
            line = {"step": step, "train/loss": 3 / step, "train/loss/ce": 3.0, "train/lr": 1e-4}
            if approach == "distill_lens":
                line |= {"train/loss/lens": 0.3, "train/lens/jsd/L01": 0.25}
            lines.append(line)
        lines.append({"step": 50, "eval/dev/loss": 2.5})
        lines.append({"step": 100, "eval/dev/loss": 2.75})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text + '{"step": 101, "train/lo')
        (run / "environment.json").write_text(json.dumps({"git_commit": "c0ffee" * 6 + "abcd"}))
        (run / "data.json").write_text(
            json.dumps({"fingerprint": "f00d" * 16, "source": {"a": 1}, "train": {"used": 1234}})
        )
        (run / "status.json").write_text(json.dumps({"state": "finished"}))
        if teacher:
            (run / "layers.json").write_text(json.dumps([{"teacher": 2, "student": 1}]))
        return run

    def write_scores(self, name: str, *, seed: int, rouge: float) -> None:
        template = "Preamble.\n\n### Instruction:\nTask {}\n\n### Response:\n"
        cell = self.root / "results/eval_main/toy" / name / f"seed{seed}/toy"
        cell.mkdir(parents=True)
        config = {"max_prompt_length": 100, "eval": {"temperature": 1.0}}
        result = {
            "metrics": {"rougeL": rouge, "exact_match": 1.0, "num": 12},
            "set": "toy",
            "seed": seed,
            "name": name,
            "config": config,
        }
        (cell / "results.json").write_text(json.dumps(result))
        samples = [
            {
                "index": index,
                "prompt": template.format(f"{index} {ATTACK}"),
                "references": [f"reference {index} {ATTACK}"],
                "answer": f"answer of {name} to {index} {ATTACK}",
                "num_tokens": 3,
                "truncated": index == 1,
                "rougeL": 0.5,
                "exact_match": False,
            }
            for index in range(12)
        ]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (cell / "samples.jsonl").write_text(text)


@pytest.fixture
def checkout(
    tmp_path: Path,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Checkout:
    return Checkout(tmp_path, tiny_gpt2, tiny_tokenizer)


class PageReader(HTMLParser):
    """Collects what a browser would do with the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action", "poster"):
                self.sources.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_whole_report(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_main([str(checkout.sft_run), str(checkout.lens_run), "--lens"]) == 0
    out = checkout.root / "results/train/toy/report"
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out / "report.html")
    assert "22.00 ± 2.83" in printed  # of 20 and 24
    assert "2.5000 at step 50" in printed
    # Markdown and CSV.
    # Equal means share the first place.
    assert "| sft/sft | 2 | **22.00 ± 2.83** |" in (out / "scores.md").read_text()
    cells = list(csv.DictReader((out / "scores.csv").open()))
    rouge = {row["method"]: row for row in cells if row["metric"] == "rougeL"}
    assert list(rouge) == ["sft/sft", "distill_lens/fkl"]  # the order of the runs
    assert float(rouge["sft/sft"]["sd"]) == pytest.approx(math.sqrt(8))
    # Figures on disk.
    names = {path.stem for path in out.glob("*.png")}
    assert names >= {
        "curve_train_loss",
        "curve_eval_dev_loss",
        "lens_layers_2_jsd",
        "scores_rougeL",
    }
    assert names >= {f"lens_map_{n}_{m}" for n in (1, 2) for m in ("before", "after", "entropy")}
    assert not list(out.glob(".*"))
    # The page.
    page = read_page(out / "report.html")
    assert "mean over the 1 framed cells" in page.text
    assert "the run was trained without it" in page.text  # sft borrows the teacher
    assert "f00df00df00d" in page.text and "c0ffeec0ffee" in page.text
    assert "train: 1,234 used" in page.text and "source: " not in page.text


def test_model_text_is_escaped_and_nothing_is_fetched(checkout: Checkout) -> None:
    report_main([str(checkout.lens_run), "--no_lens"])
    path = checkout.root / "results/train/toy/distill_lens/report/report.html"
    page = read_page(path)
    assert "script" not in page.tags
    assert page.handlers == []
    outside = [
        url for url in page.sources if not url.startswith(("data:image/svg+xml;base64,", "#"))
    ]
    assert outside == []
    content = path.read_text()
    assert "url(" not in content and "@import" not in content
    assert "&lt;script&gt;alert(" in content
    # Readers still see the text as the model wrote it, for the first ten prompts.
    assert f"answer of distill_lens/fkl to 9 {ATTACK}" in page.text
    assert f"reference 0 {ATTACK}" in page.text
    assert "to 10 " not in page.text and "Preamble" not in page.text
    assert "cut at the limit" in page.text


def test_pictures_are_whole(checkout: Checkout) -> None:
    report_main([str(checkout.lens_run), "--no_lens"])
    path = checkout.root / "results/train/toy/distill_lens/report/report.html"
    images = [url for url in read_page(path).sources if url.startswith("data:")]
    assert len(images) >= 8
    for url in images:
        root = ElementTree.fromstring(base64.b64decode(url.partition(",")[2]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    files = list(path.parent.glob("*.png"))
    assert len(files) == len(images) // 2  # one of the two themes
    for file in files:
        Image.open(file).verify()


def test_lens_map_numbers_on_disk(checkout: Checkout) -> None:
    out = checkout.root / "out"
    report_main([str(checkout.lens_run), "--lens", "--data", str(checkout.data), "--out", str(out)])
    rows = list(csv.DictReader((out / "lens_map_1.csv").open()))
    assert [(row["student_layer"], row["teacher_layer"]) for row in rows] == [
        (str(s), str(t)) for s in (1, 2) for t in (1, 2, 3, 4)
    ]
    before = np.array([float(row["jsd_before_nats"]) for row in rows])
    after = np.array([float(row["jsd_after_nats"]) for row in rows])
    assert (before > 0).all() and (before <= math.log(2)).all()
    assert not np.allclose(before, after, atol=1e-7)
    entropies = list(csv.DictReader((out / "lens_map_1_entropy.csv").open()))
    assert [row["model"] for row in entropies].count("teacher") == 4
    page = read_page(out / "report.html")
    # The third record has no answer.
    assert "of the first 2 usable records" in page.text


def test_report_without_lens_loads_no_model(checkout: Checkout) -> None:
    (checkout.lens_run / "best/model.safetensors").unlink()
    report_main([str(checkout.lens_run), "--no_lens"])
    with pytest.raises(ConfigError, match="best"):
        report_main([str(checkout.lens_run), "--lens"])


def test_maps_that_cannot_be_drawn_are_told(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_main([str(checkout.sft_run)]) == 0
    told = "sft: no lens map: the run has no teacher to compare with"
    assert told in capsys.readouterr().out
    page = read_page(checkout.root / "results/train/toy/sft/report/report.html")
    assert told in page.text and "Lens maps" not in page.text


def test_the_teachers_own_run_has_no_map(checkout: Checkout) -> None:
    out = checkout.root / "out"
    config = checkout.lens_run / "config.yaml"
    teacher = checkout.root / "checkpoints/teacher"
    config.write_text(config.read_text().replace(str(teacher), str(checkout.sft_run / "best")))
    report_main([str(checkout.sft_run), str(checkout.lens_run), "--lens", "--out", str(out)])
    assert "sft: no lens map: it is the teacher itself" in read_page(out / "report.html").text
    assert len(list(out.glob("lens_map_*_before.png"))) == 1


def test_explicit_evaluations_come_in_their_order(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    results = checkout.root / "results/eval_main/toy"
    folders = [str(results / "sft"), str(results / "distill_lens")]
    out = ["--out", str(checkout.root / "out"), "--no_lens"]
    report_main([str(checkout.lens_run), "--eval", *folders, *out])
    text = (checkout.root / "out/scores.md").read_text()
    assert text.index("sft/sft") < text.index("distill_lens/fkl")
    report_main([str(checkout.lens_run), "--eval", *reversed(folders), *out])
    text = (checkout.root / "out/scores.md").read_text()
    assert text.index("distill_lens/fkl") < text.index("sft/sft")


def test_score_files_compare_with_a_chosen_baseline(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = (checkout.root / "results/eval_main/toy").rglob("results.json")
    for number, cell in enumerate(sorted(cells)):  # distill_lens, distill_lens, sft, sft
        content = json.loads(cell.read_text())
        samples = cell.with_name("samples.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            line["rougeL"] = 0.6 if number < 2 else 0.5 + 0.001 * line["index"]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        content["metrics"] |= {"rougeL": 60.0 if number < 2 else 50.55, "mean_tokens": 3.0}
        cell.write_text(json.dumps(content))
    out = checkout.root / "out"
    runs = [str(checkout.lens_run), str(checkout.sft_run), "--no_lens", "--out", str(out)]
    report_main([*runs, "--metrics", "mean_tokens"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "comparisons.md: all differences are to sft/sft (--baseline LABEL chooses" in printed
    assert "Tokens per answer, toy: no difference to sft/sft can be told from noise" in printed
    # The fabricated exact matches do not fit their samples: told, not compared.
    assert "no statistics over prompts of exact_match" in printed
    rows = list(csv.DictReader((out / "comparisons.csv").open()))
    (row,) = [row for row in rows if row["baseline"] and row["metric"] == "rougeL"]
    assert (row["method"], row["prompts"], row["verdict"]) == ("distill_lens/fkl", "12", "better")
    assert float(row["value"]) == pytest.approx(60 - 50.55)
    latex = (out / "scores.tex").read_text()
    assert r"distill\_lens/fkl & 2 & \textbf{60.00 $\pm$ 0.00} \\" in latex
    assert r"sft/sft & 2 & \underline{50.55 $\pm$ 0.00} \\" in latex
    assert "### Tokens per answer" in (out / "scores.md").read_text()
    # Both before anything is drawn.
    with pytest.raises(ConfigError, match=r"--baseline sft: no such method \(did you mean sft/sft"):
        report_main([*runs, "--baseline", "sft"])
    with pytest.raises(ConfigError, match=r"--metrics rep_4: no results\.json has it"):
        report_main([*runs, "--metrics", "rep_4"])


def test_evaluations_of_a_sweeps_run_are_found(tmp_path: Path) -> None:
    run = tmp_path / "sweeps/toy/kd-fkl/lr0.001/seed10"
    run.mkdir(parents=True)
    assert evaluation_folder(run) is None
    (tmp_path / "sweeps/toy/sweep.json").write_text("{}")
    assert evaluation_folder(run) == tmp_path / "sweeps/toy/eval/kd-fkl/lr0.001/seed10"


def test_a_sweeps_run_with_a_teacher_has_a_report(checkout: Checkout) -> None:
    run = checkout.write_run("kd/fkl", seed=1, teacher=True)
    sweep = checkout.root / "results/sweeps/toy"
    seed = sweep / "kd/seed10"
    seed.parent.mkdir(parents=True)
    run.rename(seed)
    (sweep / "sweep.json").write_text("{}")
    (sweep / "kd/seed10.out").write_text("what the training printed")
    scores = sweep / "eval/kd/seed10"
    scores.parent.mkdir(parents=True)
    (checkout.root / "results/eval_main/toy/sft/sft").rename(scores)
    # As a shell's pattern gives it.
    assert report_main([*map(str, (sweep / "kd").glob("seed*")), "--no_lens"]) == 0
    text = read_page(sweep / "kd/report/report.html").text
    assert "22.00" in text
    assert f"left out, as no config.yaml is in it: {seed}.out" in text


def test_what_is_no_run_is_left_out_and_seeds_are_found(checkout: Checkout) -> None:
    approach = checkout.root / "results/train/toy/kd"
    for seed in (9, 10):
        checkout.write_run(f"kd/rkl/seed{seed}", seed=seed, teacher=True)
    checkout.write_run("kd/fkl", seed=1, teacher=True)
    found, notes = find_runs([approach / "fkl", approach / "rkl"], is_live=False)
    assert found == [approach / "fkl", approach / "rkl/seed9", approach / "rkl/seed10"]
    assert notes == []
    for _ in range(2):  # the second time report/ is there, too
        paths = [str(path) for path in sorted(approach.iterdir())]
        assert report_main([*paths, "--no_lens"]) == 0
    found, notes = find_runs(sorted(approach.iterdir()), is_live=True)
    assert len(found) == 3
    assert notes == [f"left out, as no config.yaml is in it: {approach / 'report'}"]
    # A run that is not there yet is waited for, but not reported.
    assert find_runs([approach / "jsd"], is_live=True) == ([approach / "jsd"], [])
    with pytest.raises(ConfigError, match="jsd: no such run folder"):
        find_runs([approach / "fkl", approach / "jsd"], is_live=False)


def test_watching_does_not_end_over_evaluations(checkout: Checkout) -> None:
    out = checkout.root / "out"
    run = [str(checkout.lens_run), "--watch", "0.2", "--out", str(out)]
    report_main([*run, "--metrics", "ece", "--baseline", "kd/rkl"])
    text = read_page(out / "report.html").text
    assert "--metrics ece: no scores have it yet" in text and "--baseline kd/rkl: not sc" in text
    assert "22.00" in text
    cell = checkout.root / "results/eval_main/toy/distill_lens/fkl/seed10/toy/results.json"
    cell.write_text("{")
    report_main(run)
    assert "results.json: not JSON" in read_page(out / "report.html").text
    arguments = parse_report_arguments(run)
    live = _LivePage(out, arguments)
    watched = Watched(
        runs=read_runs([checkout.lens_run]),
        waiting=(),
        drawings=Drawings(png=False),
        live_seconds=2.0,
    )
    live.write(watched)
    assert "results.json: not JSON" in read_page(out / "report.html").text


def test_a_teacher_trained_here_is_not_ranked(checkout: Checkout) -> None:
    config = checkout.lens_run / "config.yaml"
    teacher = checkout.root / "checkpoints/teacher"
    config.write_text(config.read_text().replace(str(teacher), str(checkout.sft_run / "best")))
    out = checkout.root / "out"
    report_main([str(checkout.lens_run), "--no_lens", "--out", str(out)])
    text = (out / "scores.md").read_text()
    assert "Not ranked, as given: sft/sft." in text and "**" not in text


def test_many_runs_have_lens_maps_only_when_asked_for(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [checkout.write_run(f"kd/m{n}", seed=n, teacher=True) for n in range(7)]
    report_main([*map(str, runs)])
    assert "no lens maps of 7 runs, more than 6: --lens draws them" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="best not found"):
        report_main([*map(str, runs), "--lens"])


def test_run_without_scores_or_metrics_still_reports(checkout: Checkout) -> None:
    run = checkout.write_run("kd/fkl", seed=1, teacher=True)
    (run / "metrics.jsonl").unlink()
    report_main([str(run), "--no_lens"])
    page = read_page(run.parent / "report/report.html")
    assert "kd/fkl: no scores, nothing at" in page.text
    assert "Training curves" not in page.text


def test_the_teachers_scores_and_samples_come_first(checkout: Checkout) -> None:
    """A teacher that was given is looked for beside the runs' evaluations, once for all runs."""
    checkout.write_scores("given/teacher", seed=10, rouge=50.0)
    out = checkout.root / "out"
    lens, kd = checkout.lens_run, checkout.write_run("kd/fkl", seed=1, teacher=True)
    report_main([str(lens), str(kd), "--no_lens", "--out", str(out)])
    rows = list(csv.DictReader((out / "scores.csv").open()))
    found = [row["method"] for row in rows if row["metric"] == "rougeL"]
    assert found == ["given/teacher", "distill_lens/fkl"]
    text = read_page(out / "report.html").text
    assert text.index("answer of given/teacher to 0") < text.index("answer of distill_lens/fkl to")
    assert text.count("· the teacher") == 10  # prompts


def test_options_that_differ_have_a_table(checkout: Checkout) -> None:
    out = checkout.root / "out"
    report_main([str(checkout.sft_run), str(checkout.lens_run), "--no_lens", "--out", str(out)])
    text = read_page(out / "report.html").text
    assert "objective.approachsftdistill_lens" in text
    assert "run.seed43" in text
    assert text.index("options that all runs share") < text.index("optim.lr_min")


def test_wrong_input_is_named(checkout: Checkout, tmp_path: Path) -> None:
    run = str(checkout.lens_run)
    with pytest.raises(ConfigError, match="nowhere: no such run folder"):
        report_main([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        report_main([str(tmp_path)])
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        report_main([run, "--eval", str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"no results\.json below"):
        report_main([run, "--eval", str(checkout.data.parent)])
    with pytest.raises(ConfigError, match="--data"):
        report_main([run, "--data", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(ConfigError, match="--prompts 0"):
        report_main([run, "--prompts", "0"])
    for seconds in ("0", "nan", "-1"):
        with pytest.raises(ConfigError, match="--watch"):
            report_main([run, "--watch", seconds])
    with pytest.raises(ConfigError, match="--bogus"):
        report_main([run, "--bogus"])
    with pytest.raises(ConfigError, match="--device"):
        report_main([run, "--device", "nonsense"])
    with pytest.raises(StorageError, match="cannot write"):
        report_main([run, "--no_lens", "--out", str(checkout.data / "below-a-file")])


def test_broken_metrics_line_is_named(checkout: Checkout) -> None:
    with (checkout.lens_run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:103: invalid JSON at column"):
        report_main([str(checkout.lens_run)])


def test_broken_sample_is_named(checkout: Checkout) -> None:
    cell = checkout.root / "results/eval_main/toy/distill_lens/fkl/seed10/toy"
    with (cell / "samples.jsonl").open("a") as file:
        file.write('{"index": 12}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:13: .*prompt"):
        report_main([str(checkout.lens_run), "--no_lens"])


def test_evaluations_are_looked_for_where_evaluate_puts_them() -> None:
    found = evaluation_folder(Path("/a/train/results/train/gpt2/kd/rkl"))
    assert found == Path("/a/train/results/eval_main/gpt2/kd/rkl")
    assert evaluation_folder(Path("/somewhere/else")) is None
    assert evaluation_folder(Path("/train/somewhere/else")) is None


def test_a_sweep_below_a_folder_called_train_is_a_sweep(tmp_path: Path) -> None:
    run = tmp_path / "results/train/checkout/results/sweeps/toy/kd/seed10"
    run.mkdir(parents=True)
    sweep = run.parents[1]
    (sweep / "sweep.json").write_text("{}")
    assert evaluation_folder(run) == sweep / "eval/kd/seed10"


def test_report_stands_beside_the_runs() -> None:
    kd, sft = Path("/r/train/gpt2/kd/rkl"), Path("/r/train/gpt2/sft/sft")
    assert report_folder([kd]) == Path("/r/train/gpt2/kd/report")
    assert report_folder([kd, sft]) == Path("/r/train/gpt2/report")
    assert report_folder([kd, Path("/other/run")]) == Path("results/report")
