"""Nothing in the tree runs what a file says; a report shows what a model wrote, as text alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distilllens.report.html import (
    FigureGroup,
    LensSection,
    Page,
    PageFigure,
    data_uri,
    render_page,
)
from distilllens.report.runs.differences import Differences
from distilllens.report.scores.samples import Answer, Sample, SampleSet
from distilllens.report.style import line_style

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("distilllens", "benchmarks", "scripts")
BUILTINS = {"eval", "exec", "__import__"}
UNPICKLERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads"),
    *("joblib.load", "shelve.open", "marshal.load", "marshal.loads", "pandas.read_pickle"),
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNSAFE_YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_VALUES = {("weights_only", False), ("shell", True), ("trust_remote_code", True)}
UNSAFE_VALUES |= {("allow_pickle", True), ("autoescape", False)}


def python_files(*folders: str) -> list[Path]:
    """Returns the project's own Python files below folders of the root, and its two commands."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*found, ROOT / "train.py", ROOT / "evaluate.py"]


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the name of every call that could run, or unpickle, foreign content."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            unsafe = names & (UNPICKLERS | SHELLS | UNSAFE_YAML)
            yield from ((node.lineno, name) for name in sorted(unsafe))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in BUILTINS | UNPICKLERS | SHELLS | UNSAFE_YAML:
            yield node.lineno, name
        if name == "torch.load" and "weights_only" not in given:
            yield node.lineno, "torch.load without weights_only"
        for argument, value in given.items():
            if isinstance(value, ast.Constant) and (argument, value.value) in UNSAFE_VALUES:
                yield node.lineno, f"{argument}={value.value!r}"


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "exec(text)",
        "pickle.load(file)",
        "pickle.loads(content)",
        "from pickle import loads",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "read(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "Environment(autoescape=False)",
    ],
)
def test_the_search_finds_each_danger(line: str) -> None:
    assert [number for number, _ in dangers(f"x = 1\n{line}\n")] == [2]


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "torch.load(path, weights_only=True)",
        "torch.compile(block)",
        "run(text, shell=False)",
        "load(name, trust_remote_code=config.trust_remote_code)",
        "'eval('",
    ],
)
def test_the_search_lets_harmless_lines_be(line: str) -> None:
    assert not list(dangers(line))


def test_the_product_runs_and_unpickles_nothing_foreign() -> None:
    files = python_files(*PRODUCT)
    assert len(files) > 60
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in files
        for line, what in dangers(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_tests_run_and_unpickle_only_their_own() -> None:
    """One sends its own arguments to a process; one shows that code in a folder can run at all."""
    found = {
        (path.name, what)
        for path in python_files("tests")
        for _, what in dangers(path.read_text(encoding="utf-8"))
    }
    assert found <= {
        ("test_row_kernel.py", "pickle.loads"),
        ("test_models.py", "trust_remote_code=True"),
    }


def test_scripts_evaluate_no_text() -> None:
    scripts = [path for path in ROOT.glob("scripts/**/*.sh") if path.is_file()]
    assert len(scripts) > 10
    word = re.compile(r"(?:^|[;&|({]|\bthen|\bdo)\s*(?:eval|source\s+<\()\s")
    fetched = re.compile(r"(?:curl|wget)[^\n]*\|\s*(?:ba|z|da)?sh\b")
    for script in scripts:
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), start=1):
            assert not word.search(line) and not fetched.search(line), f"{script}:{number}: {line}"


# --- The report's page --------------------------------------------------------------------------

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x.png onerror=alert(1)>',
    "</style><style>@import url(https://evil.example/x.css)</style>",
    "<!-- --><iframe src='//evil.example'></iframe>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "<a href='javascript:alert(1)'>here</a>",
    "</textarea></title><svg onload=alert(1)>",
)
ALLOWED_ADDRESS = re.compile(r"data:image/png;base64,|#")


class Reader(HTMLParser):
    """Collects a page's tags, attributes, styles and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.styles = ""
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open = tag
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.open == "style":
            self.styles += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.open = ""


def page_of(text: str) -> Page:
    """Returns a page on which every text that comes from a file is ``text``."""
    image = data_uri(b"png")
    figure = PageFigure(
        name=text,
        alt=text,
        caption=text,
        light=image,
        dark=image,
        width=1,
        height=1,
        light_png=b"png",
    )
    answer = Answer(
        index=0, prompt=text, references=(text,), text=text, rouge_l=0.5, truncated=True
    )
    sample = Sample(index=0, prompt=text, references=(text, text), answers=(answer,))
    lens = LensSection(
        label=text, caption=text, paired=text, num_pairs=1, maps=[figure], entropy=figure
    )
    samples = SampleSet(test_set=text, methods=(text,), seeds=(1,), samples=(sample,))
    return Page(
        title=text,
        subtitle=text,
        notes=[text],
        tables=[],
        prompt_counts={},
        score_figures=[figure],
        comparisons=[],
        curves=[FigureGroup(title=text, figures=[figure])],
        lens=[lens],
        progress_header=["run", "state"],
        progress=[[text, text]],
        run_styles=[line_style(0)],
        group_labels=[text, text],
        group_styles=[line_style(0), line_style(9)],
        differences=Differences(differing=[(text, [text, text])], common=[(text, text)]),
        teachers=[text],
        run_labels=[text],
        run_rows=[(text, [text])],
        samples=[samples],
        explanations=[text],
        footer=text,
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_page_shows_hostile_text_as_text(attack: str) -> None:
    harmless, page = Reader(render_page(page_of("plain"))), Reader(render_page(page_of(attack)))
    assert page.tags == harmless.tags and page.styles == harmless.styles
    assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
    assert page.text.count(attack) == harmless.text.count("plain") > 10
    assert "49" not in page.text


@pytest.mark.parametrize("attack", ("plain", *ATTACKS))
def test_a_page_loads_nothing_and_runs_nothing(attack: str) -> None:
    page = Reader(render_page(page_of(attack)))
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "srcset", "href", "data", "action", "poster", "background"):
            assert ALLOWED_ADDRESS.match(value), f"{name}={value[:80]}"
    assert "@import" not in page.styles and "url(" not in page.styles
    contents = [value for name, value in page.attributes if name == "content"]
    assert any("default-src 'none'" in value for value in contents)


def test_templates_escape_without_exception() -> None:
    templates = sorted((ROOT / "distilllens").rglob("*.html"))
    assert templates
    for template in templates:
        source = template.read_text(encoding="utf-8")
        if template.parent.name == "lens":  # all this package's own, but data, which is escaped
            for own in ("palettes|safe", "css|safe", "script|safe", "data|safe"):
                assert source.count(own) == 1
                source = source.replace(own, "")
        assert not re.search(r"\|\s*(safe|tojson)\b|autoescape|Markup", source), template
