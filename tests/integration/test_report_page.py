"""The report's page in a real browser, and a page that renews itself while a run goes on."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright
from rich.console import Console

from distilllens.cli.report import report_main
from distilllens.report.html import Drawings
from distilllens.report.watch import Follower, Watched, watch_runs

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
START = time.time() + 86_400
"""Of the runs: a line of the past would make them silent."""
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on PATH"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def write_run(run: Path, *, steps: int, state: str = "running", coeff: float = 1.0) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "model:\n  teacher: teacher\nobjective:\n  approach: distill_lens\n  kd_ratio: 1.0\n"
        f"  lens:\n    coeff: {coeff}\noptim:\n  max_steps: 400\n"
    )
    pairs = [{"teacher": 2 * layer, "student": layer} for layer in (1, 2)]
    (run / "layers.json").write_text(json.dumps(pairs))
    for step in range(10, steps + 1, 10):
        log(run, step)
    set_state(run, state)
    return run


def log(run: Path, step: int) -> None:
    line = {
        "step": step,
        "epoch": step / 100,
        "time": START + step,
        "train/loss": math.nan if step == 50 else 3 / step,
        "train/loss/kd": 2 / step,
        "train/lens/jsd/L01": 0.3,
        "train/lens/jsd/L02": 0.2,
        "train/lr": 1e-4,
        "perf/response_tokens_per_s": 900.0,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def set_state(run: Path, state: str) -> None:
    (run / "status.json").write_text(json.dumps({"state": state}))


def open_page(browser: Browser, file: Path, *, width: int, scheme: str) -> tuple[Page, list[str]]:
    """Opens a page; the list holds whatever it says on the console, and what it asks for."""
    dark = scheme == "dark"
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
    )
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    own = file.as_uri()
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((own, "data:")) else said.append(asked.url),
    )
    page.goto(own)
    return page, said


@pytest.fixture(scope="module")
def report_of_ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ten")
    runs = [write_run(root / f"a-run-with-a-long-name-{n}", steps=60, coeff=n) for n in range(10)]
    report_main([*(str(run) for run in runs), "--no_lens", "--out", str(root / "out")])
    return root / "out/report.html"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_and_keeps_to_the_window(
    browser: Browser, report_of_ten: Path, width: int, scheme: str
) -> None:
    page, said = open_page(browser, report_of_ten, width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") >= 4 + 10
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # What is wider than the window scrolls inside its own box.
    assert page.evaluate("document.querySelector('[aria-label=Runs]').scrollWidth") > min(
        width, 900
    )
    assert said == []
    surface = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, surface[4:-1].split(","))) < 384) == (scheme == "dark")
    page.close()


@needs_browser
def test_the_page_works_by_keyboard(browser: Browser, report_of_ten: Path) -> None:
    page, _ = open_page(browser, report_of_ten, width=1280, scheme="light")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim()"))
        if page.evaluate("document.activeElement.textContent").startswith("Runs one by one"):
            break
    assert {"Curves", "Options", "Legend"} <= reached
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('records').open")
    page.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120  # a loaded machine takes half of that to import the libraries
    while not condition():
        assert time.monotonic() < end, f"not within two minutes: {what}"
        time.sleep(0.1)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


PLACE = """({
    top: document.getElementById('options').getBoundingClientRect().top,
    y: scrollY,
    open: document.getElementById('common').open,
    sideways: document.querySelector('[aria-label=Runs]').scrollLeft,
})"""


def ask(page: Page, script: str) -> Any:
    """Runs a script in a page that has loaded, and again if the page renews itself meanwhile."""
    for _ in range(20):
        try:
            page.wait_for_load_state("load")
            return page.evaluate(script)
        except Error as error:
            if "context was destroyed" not in str(error):
                raise
    raise AssertionError("the page does not come to rest")


@needs_browser
def test_a_watched_page_renews_itself_and_keeps_the_readers_place(
    browser: Browser, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", steps=100)
    page_file = tmp_path / "out/report.html"
    arguments = [str(run), "--watch", "0.3", "--out", str(page_file.parent)]
    watching = threading.Thread(target=report_main, args=(arguments,))
    watching.start()
    try:
        wait_until(page_file.is_file, "a first page")
        page, said = open_page(browser, page_file, width=390, scheme="light")
        assert ask(page, "document.body.textContent.includes('100 / 400')")
        ask(page, "document.getElementById('common').open = true")
        ask(page, "document.querySelector('[aria-label=Runs]').scrollTo(40, 0)")
        ask(page, "document.getElementById('options').scrollIntoView({behavior: 'instant'})")
        before = ask(page, PLACE)
        assert before["y"] > 800 and before["sideways"] == 40 and before["open"]
        log(run, 110)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 120, "train/lo')  # the training is just writing it
        wait_until(lambda: ask(page, "document.body.textContent.includes('110 / 400')"), "step 110")
        after = ask(page, PLACE)
        assert after["top"] == pytest.approx(before["top"], abs=2)
        assert after["sideways"] == 40 and after["open"]
        assert said == []
        set_state(run, "finished")
        watching.join(30)
        assert not watching.is_alive()
        # The last page stays as it is.
        ended = "!document.body.textContent.includes('renews itself')"
        wait_until(lambda: ask(page, ended), "the last page")
        assert "<script" not in text_of(page_file) and "script-src" not in text_of(page_file)
        assert (page_file.parent / "curve_train_loss.png").is_file()
        page.close()
    finally:
        set_state(run, "finished")
        watching.join(30)


def test_runs_that_are_not_there_yet_are_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = write_run(tmp_path / "early", steps=20), tmp_path / "late"
    pages: list[Watched] = []
    settings = {"seconds": 0.05, "write": pages.append, "console": Console(width=200)}
    watching = threading.Thread(target=watch_runs, args=([early, late],), kwargs=settings)
    watching.start()
    try:
        wait_until(lambda: len(pages) == 1, "a page of the early run")
        assert [run.folder for run in pages[0].runs] == [early]
        assert [row.problem for row in pages[0].waiting] == ["no such folder yet"]
        set_state(early, "finished")
        late.mkdir()
        wait_until(lambda: pages[-1].waiting[0].problem == "no config.yaml in it yet", "the folder")
        write_run(tmp_path / "other", steps=30)
        shutil.copytree(tmp_path / "other", late, dirs_exist_ok=True)
        wait_until(lambda: len(pages[-1].runs) == 2, "the late run")
        assert not pages[-1].waiting and watching.is_alive()
    finally:
        set_state(late, "failed")
        watching.join(30)
    assert not watching.is_alive()
    told = capsys.readouterr().out
    assert f"waiting for {late}: no such folder yet" in told
    assert "running  step 20 / 400  train loss 0.15" in told


def test_a_look_that_finds_nothing_new_writes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    follower = Follower(run)
    assert follower.look() and not follower.look()
    (run / "metrics.jsonl").open("a").write("no JSON\n")
    assert follower.look() and "invalid JSON" in follower.problem
    assert follower.record is not None and follower.record.num_steps == 20  # the last good one
    assert not follower.look()
    text = (run / "metrics.jsonl").read_text().replace("no JSON\n", "")
    (run / "metrics.jsonl").write_text(text)
    log(run, 30)
    assert follower.look() and not follower.problem
    assert follower.record.num_steps == 30
    set_state(run, "stopped")
    assert follower.look() and follower.record.status == {"state": "stopped"}


def test_watching_takes_a_tenth_of_a_core_at_most(tmp_path: Path) -> None:
    """A page that takes 0.1 s of work is followed by a second without one, however much is new."""
    run = write_run(tmp_path / "run", steps=10)
    written: list[float] = []

    def write(watched: Watched) -> None:
        assert isinstance(watched.drawings, Drawings)
        written.append(time.monotonic())
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        if len(written) == 3:
            set_state(run, "finished")
        else:
            log(run, 10 * len(written) + 10)

    watch_runs([run], seconds=0.02, write=write, console=Console(quiet=True))
    gaps = [after - before for before, after in pairwise(written)]
    assert len(gaps) == 2 and min(gaps) >= 0.95


@pytest.mark.slow
def test_ctrl_c_leaves_a_page_that_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    command = [sys.executable, "-m", "distilllens", "report", str(run), "--watch", "0.3"]
    watching = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        # A shell's background job, as this test may be one, ignores Ctrl-C and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: "renews itself" in text_of(tmp_path / "report.html"), "a page")
        watching.send_signal(signal.SIGINT)
        _, told = watching.communicate(timeout=120)
    finally:
        watching.kill()
    assert watching.returncode == 130
    assert "interrupted" in told
    page = text_of(tmp_path / "report.html")
    assert "20 / 400" in page and "<script" not in page
