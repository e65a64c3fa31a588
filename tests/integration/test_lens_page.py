"""The lens command on tiny models, and its page in headless Chromium."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from distilllens.__main__ import main
from distilllens.cli.lens import lens_main
from distilllens.errors import ConfigError, DataError, StorageError
from distilllens.report.lens.statistics import STATISTICS
from distilllens.report.lens.study import Source, StudySettings, build_study

HOSTILE = ("</script>", "<img src=x onerror=hack()>", "\u202egnihton", "&amp;", "שלום")
"""Tokens of the test's tokenizer: markup, an order to write from right to left, Hebrew."""
ATTACK = "</script><script>window.hacked = 1</script><img src=http://evil.example/x.png>"


class Studio:
    """Tiny models on disk: a teacher of 6 blocks, a student of 3 before and after, and records."""

    def __init__(
        self,
        root: Path,
        tiny_gpt2: Callable[..., GPT2LMHeadModel],
        tiny_llama: Callable[..., LlamaForCausalLM],
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.root = root
        tokenizer.add_tokens(list(HOSTILE))
        models = {
            "teacher": tiny_llama(vocab=312, n_layer=6, n_positions=256, seed=1),
            "student": tiny_gpt2(vocab=305, n_layer=3, n_positions=256, seed=2),
            "before": tiny_gpt2(vocab=305, n_layer=3, n_positions=256, seed=3),
        }
        for name, model in models.items():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        rows = [
            {
                "instruction": f"Say it. {ATTACK}",
                "output": f"a\n{''.join(HOSTILE)} 😀 {'on ' * 20}",
            },
            {"instruction": "Sort: b a", "output": "The answer is apple"},
            {"instruction": "Say nothing.", "output": " "},
        ]
        self.data = root / "valid.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def options(self, **changes: str | None) -> list[str]:
        """Returns the command line of all three models; None leaves an option out."""
        values = {name: str(self.root / name) for name in ("teacher", "student", "before")}
        every = values | {"data": str(self.data), "out": str(self.root / "out")} | changes
        return [part for name, value in every.items() if value for part in (f"--{name}", value)]

    def settings(self, student: Source) -> StudySettings:
        """Returns settings for figures of the teacher and one student, without token maps."""
        return StudySettings(
            sources=(Source(role="teacher", path=str(self.root / "teacher")), student),
            pairs=(),
            data=self.data,
            prompts=2,
            tokens=512,
            show=0,
            show_tokens=1,
            answers="reference",
            own_prompts=(),
            own_responses=(),
            max_length=200,
            max_prompt_length=190,
            device="cpu",
            dtype=torch.float32,
            attention="auto",
        )

    def write_run(self) -> Path:
        """Writes the folder of a training run of these models."""
        run = self.root / "run"
        run.mkdir()
        (run / "config.yaml").write_text(
            f"run:\n  output_dir: {run}\n"
            f"model:\n  student: {self.root / 'before'}\n  teacher: {self.root / 'teacher'}\n"
            f"data:\n  path: {self.root}\n  max_length: 200\n  max_prompt_length: 190\n"
        )
        (run / "layers.json").write_text(json.dumps([{"teacher": 4, "student": 1}]))
        shutil.copytree(self.root / "student", run / "best")
        return run


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gpt2: Callable[..., GPT2LMHeadModel],
    tiny_llama: Callable[..., LlamaForCausalLM],
    build_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Studio:
    root = tmp_path_factory.mktemp("studio")
    return Studio(root, tiny_gpt2, tiny_llama, build_tokenizer())


@pytest.fixture(scope="module")
def report(studio: Studio) -> Path:
    """The report of all three models, with a prompt of one's own and the run's pair."""
    out = studio.root / "report"
    run = studio.write_run()
    options = ["--run", str(run), "--out", str(out), "--show", "2", "--show_tokens", "40"]
    assert main(["lens", *options, "--prompt", "Say yes."]) == 0
    return out


@pytest.fixture(scope="module")
def document(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((report / "lens.json").read_text())
    return content


# --- The command --------------------------------------------------------------------------------


def test_all_files_are_there(report: Path, document: dict[str, Any]) -> None:
    names = {path.name for path in report.iterdir()}
    assert names == {
        *("lens.html", "lens.json", "layers.csv", "divergence.csv", "tokens.csv", "figures"),
    }
    figures = {f"divergence_{when}" for when in ("before", "after", "change")}
    figures |= {f"layers_{statistic.key}" for statistic in STATISTICS}
    figures |= {"tokens_1", "tokens_2", "tokens_3"}
    assert {path.name for path in (report / "figures").iterdir()} == {
        f"{name}.{kind}" for name in figures for kind in ("png", "svg")
    }
    assert [model["layers"] for model in document["models"]] == [6, 3, 3]
    assert document["pairs"] == [[4, 1]]
    assert document["data"]["vocabulary"] == 305  # the teacher's 312 are padded
    assert document["data"]["records"] == 3 and document["data"]["left_out"] == 1
    assert [sample["answered_by"] for sample in document["samples"]] == [
        *("reference", "reference", "teacher"),
    ]


def test_no_folder_of_the_writer_is_told(studio: Studio, report: Path) -> None:
    for name in ("lens.html", "lens.json"):
        text = (report / name).read_text()
        assert str(studio.root) not in text and str(Path.home()) not in text
    page = (report / "lens.html").read_text()
    assert "by python -m distilllens lens --run run --out report --show 2" in page
    assert "<code>teacher</code>" in page and "of <code>valid.jsonl</code>" in page
    assert "<title>run and its teacher" in page


def test_csv_and_json_tell_the_same(report: Path, document: dict[str, Any]) -> None:
    layers = list(csv.DictReader((report / "layers.csv").open()))
    assert [(row["model"], row["layer"]) for row in layers] == [
        (model["role"], str(layer))
        for model in document["models"]
        for layer in range(1, model["layers"] + 1)
    ]
    student = [row for row in layers if row["model"] == "student"]
    told = document["models"][1]["statistics"]
    for name, column in (("entropy", "entropy_nats"), ("mean_rank", "mean_rank")):
        assert [float(row[column]) for row in student] == pytest.approx(told[name], rel=1e-6)
    cells = list(csv.DictReader((report / "divergence.csv").open()))
    assert float(cells[7]["jsd_after_nats"]) == pytest.approx(
        document["divergence"]["after"][1][1], rel=1e-6
    )
    tokens = list(csv.DictReader((report / "tokens.csv").open()))
    count = sum(len(sample["answer"]) for sample in document["samples"])
    assert len(tokens) == count * (6 + 3 + 3)
    line = tokens[len(document["samples"][0]["answer"]) * 2]  # teacher, layer 3, token 1
    assert (line["model"], line["layer"], line["position"]) == ("teacher", "3", "1")
    shown = document["samples"][0]["maps"][0]
    assert int(line["gold_rank"]) == shown["rank"][2][0]
    assert line["top2"] == document["tokens"][shown["top"][2][0][1]]


def test_teachers_own_greedy_answer_has_rank_1(document: dict[str, Any]) -> None:
    """What the teacher answered is what its last layer finds likeliest, token after token."""
    own = document["samples"][2]["maps"][0]
    assert set(own["rank"][-1]) == {1}
    assert [tops[0] for tops in own["top"][-1]] == document["samples"][2]["answer"]


def test_without_before_and_with_a_students_answers(studio: Studio) -> None:
    out = studio.root / "short"
    options = studio.options(before=None, out=str(out), answers="student", show="1", prompts="2")
    assert lens_main([*options, "--show_tokens", "5"]) == 0
    document = json.loads((out / "lens.json").read_text())
    assert [model["role"] for model in document["models"]] == ["teacher", "student"]
    assert document["divergence"]["before"] is None
    assert not (out / "figures/divergence_change.png").exists()
    assert set(document["samples"][0]["maps"][1]["rank"][-1]) == {1}
    header = (out / "divergence.csv").read_text().splitlines()[0]
    assert header == "student_layer,teacher_layer,jsd_nats"


def test_adapter_is_read_as_if_merged(studio: Studio) -> None:
    base = GPT2LMHeadModel.from_pretrained(studio.root / "before")
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
    )
    adapted: Any = get_peft_model(base, settings)
    adapted.save_pretrained(str(studio.root / "adapter"))
    merged = studio.root / "merged"
    shutil.copytree(studio.root / "before", merged)
    adapted.merge_and_unload().save_pretrained(merged)
    sources = [
        Source(role="student", path=str(studio.root / "before"), lora=str(studio.root / "adapter")),
        Source(role="student", path=str(merged)),
        Source(role="student", path=str(studio.root / "before")),
    ]
    lora, whole, plain = (
        build_study(studio.settings(source), Console(quiet=True)) for source in sources
    )
    np.testing.assert_allclose(lora.after.divergence_ST, whole.after.divergence_ST, atol=1e-6)
    for key, values in lora.models[1].statistics.items():
        np.testing.assert_allclose(values, whole.models[1].statistics[key], rtol=1e-4)
    assert np.abs(lora.after.divergence_ST - plain.after.divergence_ST).max() > 1e-4


def test_wrong_input_is_named(studio: Studio, tiny_gpt2: Callable[..., Any]) -> None:
    root = studio.root
    with pytest.raises(ConfigError, match="--teacher is missing"):
        lens_main(studio.options(teacher=None))
    with pytest.raises(ConfigError, match="--data is missing"):
        lens_main(studio.options(data=None))
    with pytest.raises(ConfigError, match="nowhere"):
        lens_main(studio.options(student=str(root / "nowhere")))
    with pytest.raises(DataError, match="no such file"):
        lens_main(studio.options(data=str(root / "nowhere.jsonl")))
    with pytest.raises(DataError, match="none of the first"):
        lens_main(studio.options(max_prompt_length="3"))
    for name in ("prompts", "tokens", "show_tokens", "max_length"):
        with pytest.raises(ConfigError, match=f"--{name} 0"):
            lens_main(studio.options(**{name: "0"}))
    with pytest.raises(ConfigError, match="--show -1"):
        lens_main(studio.options(show="-1"))
    with pytest.raises(ConfigError, match="--device"):
        lens_main(studio.options(device="nonsense"))
    with pytest.raises(ConfigError, match="--bogus"):
        lens_main(studio.options(bogus="1"))
    with pytest.raises(ConfigError, match=r"3 blocks, the student .* has 6"):
        lens_main(studio.options(student=str(root / "teacher")))
    with pytest.raises(StorageError, match="cannot write"):
        lens_main(studio.options(out=str(studio.data / "below-a-file")))
    with pytest.raises(ConfigError, match="no such run folder"):
        lens_main(["--run", str(root / "nowhere")])


def test_other_tokens_are_refused(
    studio: Studio, build_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    other = studio.root / "other"
    shutil.copytree(studio.root / "student", other)
    build_tokenizer(280).save_pretrained(other)
    with pytest.raises(ConfigError, match="teacher and student tokenizers differ"):
        lens_main(studio.options(student=str(other)))


def test_help_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        lens_main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for told in ("--prompts N", "(64)", "(512)", "(float32)", "results/lens/STUDENT", "lens.html"):
        assert told in text


# --- The page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium that is installed already."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(names)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with everything that it complained of or asked for."""

    def __init__(self, browser: Any, report: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = (report / "lens.html").as_uri()
        self.page.goto(self.address)

    def cell(self, model: int, layer: int, token: int) -> Any:
        place = f'td[data-layer="{layer}"][data-token="{token}"]'
        return self.page.locator(f'table[data-model="{model}"] {place}')

    def detail(self, model: int) -> list[list[str]]:
        """Returns token and probability of each of a model's five lines."""
        lines = self.page.locator(f'#detail [data-model="{model}"] .tops li').all()
        return [line.locator(".token, .share").all_text_contents() for line in lines]

    def detail_text(self) -> str:
        return str(self.page.locator("#detail").inner_text())


def visit_of(browser: Any, report: Path, **options: Any) -> Iterator[Visit]:
    visit = Visit(browser, report, **options)
    yield visit
    assert visit.complaints == []
    assert visit.requests == [visit.address]
    visit.context.close()


@pytest.fixture
def desk(chromium: Any, report: Path) -> Iterator[Visit]:
    yield from visit_of(chromium, report, viewport={"width": 1280, "height": 900})


@pytest.fixture
def phone(chromium: Any, report: Path) -> Iterator[Visit]:
    yield from visit_of(
        chromium, report, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
    )


def expected_top(
    document: dict[str, Any], sample: int, model: int, layer: int, token: int
) -> list[list[str]]:
    """Returns what lens.json says of a cell, as the page should write it."""
    shown = document["samples"][sample]["maps"][model]
    lines = []
    for place, units in zip(
        shown["top"][layer - 1][token - 1],
        shown["top_probability"][layer - 1][token - 1],
        strict=True,
    ):
        percent = 100 * units / document["probability_unit"]
        digits = 2 if percent < 10 else 1
        share = "<0.01%" if units == 0 else f"{percent:.{digits}f}%"
        lines.append([document["tokens"][place], "100%" if units == 10_000 else share])
    return lines


def test_hover_shows_the_numbers_of_the_json(desk: Visit, document: dict[str, Any]) -> None:
    desk.cell(0, 4, 3).hover()
    assert desk.detail(0) == expected_top(document, 0, 0, 4, 3)
    # The run pairs teacher block 4 with student block 1; depth alone would say 2.
    assert desk.detail(1) == expected_top(document, 0, 1, 1, 3)
    assert desk.detail(2) == expected_top(document, 0, 2, 1, 3)
    shown = document["samples"][0]["maps"][0]
    assert f"rank {shown['rank'][3][2]}" in desk.detail_text()
    assert f"entropy {shown['entropy'][3][2]:.2f} nats" in desk.detail_text()
    desk.cell(1, 3, 5).hover()
    assert desk.detail(1) == expected_top(document, 0, 1, 3, 5)
    assert desk.detail(0) == expected_top(document, 0, 0, 6, 5)


def test_keys_reach_and_walk_the_map(desk: Visit, document: dict[str, Any]) -> None:
    page = desk.page
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TD":
            break
    place = "[document.activeElement.dataset.layer, document.activeElement.dataset.token]"
    start = [int(value) for value in page.evaluate(place)]
    assert desk.detail(0) == expected_top(document, 0, 0, *start)
    page.keyboard.press("Control+Home")
    assert page.evaluate(place) == ["6", "1"]
    for key, layer, token in (
        ("ArrowRight", 6, 2),
        ("ArrowDown", 5, 2),
        ("ArrowDown", 4, 2),
        ("ArrowLeft", 4, 1),
        ("ArrowLeft", 4, 1),  # the edge holds
        ("ArrowUp", 5, 1),
        ("End", 5, 40),
    ):
        page.keyboard.press(key)
        assert page.evaluate(place) == [str(layer), str(token)]
        assert desk.detail(0) == expected_top(document, 0, 0, layer, token)
    focused = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused == "solid"
    inside = "e => { const r = e.getBoundingClientRect(), b = e.closest('.scroller')"
    inside += ".getBoundingClientRect(); return r.right <= b.right + 1 && r.left >= b.left }"
    assert desk.cell(0, 5, 40).evaluate(inside)
    assert "rank" in page.locator("#spoken").text_content()
    page.keyboard.press("Escape")
    assert desk.detail(0) == [] and "Point at a cell" in desk.detail_text()
    assert page.evaluate("document.activeElement.tagName") == "BODY"


def test_without_a_cell_nothing_covers_the_maps(desk: Visit, document: dict[str, Any]) -> None:
    """The panel lies over the maps only while it tells something, and does not flicker there."""
    page = desk.page
    page.keyboard.press("Escape")
    box = "document.getElementById('detail').getBoundingClientRect()"
    style = "getComputedStyle(document.getElementById('detail')).position"
    assert page.evaluate(style) == "static" and page.evaluate(f"{box}.height") < 80
    end = "document.getElementById('maps').getBoundingClientRect().bottom"
    assert page.evaluate(f"{box}.top >= {end}")
    page.set_viewport_size({"width": 1280, "height": 400})
    cell = desk.cell(0, 2, 2)
    cell.evaluate("e => scrollBy(0, e.getBoundingClientRect().bottom - innerHeight + 20)")
    place = cell.bounding_box()
    count = "window.turns = 0; new MutationObserver(() => { window.turns += 1; })"
    page.evaluate(f"{count}.observe(document.getElementById('detail'), {{attributes: true}})")
    for step in range(5, 10):  # the panel opens under the pointer
        page.mouse.move(place["x"] + step, place["y"] + 5)
        page.wait_for_timeout(50)
    under = f"document.elementFromPoint({place['x'] + 9}, {place['y'] + 5}).closest('#detail')"
    assert page.evaluate(f"[{under} !== null, window.turns]") == [True, 1]
    assert page.evaluate(style) == "sticky" and desk.detail(0) == expected_top(document, 0, 0, 2, 2)
    page.mouse.move(2, 2)
    assert page.evaluate(style) == "static"


def test_grid_has_roles_and_one_stop_each(desk: Visit) -> None:
    page = desk.page
    assert page.get_by_role("grid").count() == 3
    assert page.locator('td[tabindex="0"]').count() == 3
    assert page.get_by_role("gridcell").count() == 40 * (6 + 3 + 3)
    assert page.get_by_role("rowheader", name="6", exact=True).count() == 1
    unnamed = "[...document.querySelectorAll('button, select, input, [role=img], [role=grid]')]"
    unnamed += ".filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).length"
    assert page.evaluate(unnamed) == 0


def test_hostile_tokens_stay_text(desk: Visit, document: dict[str, Any]) -> None:
    page = desk.page
    headers = page.locator('table[data-model="0"] thead th').all_text_contents()[1:]
    assert headers == [document["tokens"][place] for place in document["samples"][0]["answer"]]
    shown = {"</script>", "<img·src=x·onerror=hack()>", "‹202E›gnihton", "&amp;", "שלום", "⏎"}
    assert shown <= set(headers)
    assert any(header.startswith("‹F0") for header in headers)  # a part of the emoji
    assert ATTACK in page.locator("#question").text_content()
    assert page.evaluate("[window.hacked, document.images.length]") == [None, 0]
    # Right-to-left text does not turn the order of the columns.
    edges = [desk.cell(0, 6, token).bounding_box()["x"] for token in range(1, 41)]
    assert edges == sorted(edges)


def test_toggles(desk: Visit, document: dict[str, Any]) -> None:
    page = desk.page
    count = page.locator("#maps table").count
    page.locator("label", has_text="Student before").click()
    assert count() == 2
    assert page.locator("#detail .columns > div").count() == 2
    page.locator("label", has_text="Student before").click()
    assert count() == 3
    classes = "[...document.querySelectorAll('td')].map(e => e.className.split(' ')[0]).join()"
    before = page.evaluate(classes)
    page.locator("label", has_text="Answer's rank").click()
    assert page.evaluate(classes) != before
    # Rank 1 is the sure end of the colours.
    ranks = document["samples"][0]["maps"][1]["rank"]
    hits = [(i + 1, j + 1) for i, row in enumerate(ranks) for j, r in enumerate(row) if r == 1]
    for layer, token in hits[:3]:
        assert "s39" in desk.cell(1, layer, token).get_attribute("class")
    beside = [table.bounding_box()["y"] for table in page.locator("figure.map").all()]
    assert len(set(beside)) == 1
    page.locator("label", has_text="Stacked").click()
    below = [table.bounding_box()["y"] for table in page.locator("figure.map").all()]
    assert below == sorted(set(below)) and len(below) == 3
    page.select_option("#sample", "1")
    headers = page.locator('table[data-model="0"] thead th').all_text_contents()[1:]
    assert headers == [document["tokens"][place] for place in document["samples"][1]["answer"]]
    page.get_by_role("button", name="Close the detail").wait_for(state="detached")


def test_charts_tell_the_numbers(desk: Visit, document: dict[str, Any]) -> None:
    page = desk.page
    change = page.locator('figure[data-key="change"]')
    assert change.locator("rect.frame").count() == 1
    holder = change.locator('[role="img"]')
    holder.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    after, before = (document["divergence"][when][1][2] for when in ("after", "before"))
    readout = change.locator(".readout").text_content()
    assert readout == f"student 2 × teacher 3: {after - before:+.4f} nats"
    curve = page.locator('figure[data-key="entropy"]')
    assert curve.locator("circle").count() == 6 + 3 + 3
    values = document["models"][0]["statistics"]["entropy"]
    assert f"Teacher 6/6: {values[5]:.3f}" in curve.locator(".readout").text_content()
    curve.locator('[role="img"]').focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert f"Teacher 4/6: {values[3]:.3f}" in curve.locator(".readout").text_content()


def test_phone_has_a_sheet_and_no_sideways_scrolling(
    phone: Visit, document: dict[str, Any]
) -> None:
    page = phone.page
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert page.evaluate(widths) == [360, 360]
    assert not page.locator("#detail").is_visible()
    phone.cell(1, 2, 2).tap()
    assert phone.detail(1) == expected_top(document, 0, 1, 2, 2)
    page.wait_for_timeout(700)  # the sheet rises, the page scrolls
    box = page.locator("#detail").bounding_box()
    assert box["x"] == 0 and box["width"] == 360 and box["y"] + box["height"] == 740
    cell = phone.cell(1, 2, 2).bounding_box()
    assert cell["y"] >= 0 and cell["y"] + cell["height"] <= box["y"]
    assert page.evaluate(widths) == [360, 360]
    scroller = page.locator(".scroller").first
    assert scroller.evaluate("e => e.scrollWidth > e.clientWidth")  # the map scrolls in its box
    scroller.evaluate("e => { e.scrollLeft = 200; }")
    page.wait_for_timeout(200)
    assert page.locator(".scroller").nth(2).evaluate("e => e.scrollLeft") == 200
    page.get_by_role("button", name="Close the detail").tap()
    assert not page.locator("#detail").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(chromium: Any, report: Path, scheme: str) -> None:
    visits = visit_of(chromium, report, color_scheme=scheme, reduced_motion="reduce")
    visit = next(visits)
    page = visit.page
    colour = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(244, 246, 249)", "dark": "rgb(14, 18, 24)"}
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate(colour) == colours[scheme]
    page.locator("#theme").click()
    assert page.evaluate(colour) == colours[other]
    assert page.locator("#theme").get_attribute("aria-pressed") == str(other == "dark").lower()
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.emulate_media(media="print")
    assert not page.locator(".toolbar").is_visible() and not page.locator("#detail").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert next(visits, None) is None
