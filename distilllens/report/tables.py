"""Tables of texts as Markdown, as LaTeX and on a screen, with the best cells marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from rich.table import Table

MISSING = "–"
Cells = frozenset[tuple[int, int]]
"""Cells (line, column) of a table's body, counted from 0."""


class TextTable(Protocol):
    """What can be written as Markdown, LaTeX and on a screen."""

    text_columns: ClassVar[tuple[int, ...]]
    """Columns of words, aligned left; the others are numbers, aligned right."""

    def header(self) -> list[str]:
        """Returns the column titles."""
        ...

    def lines(self) -> list[list[str]]:
        """Returns the formatted cells, a list per row, as long as the header."""
        ...


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Which cells stand out."""

    best: Cells = frozenset()
    """Bold."""
    second: Cells = frozenset()
    """Underlined."""

    def __or__(self, other: Marks) -> Marks:
        return Marks(best=self.best | other.best, second=self.second | other.second)


NO_MARKS = Marks()


def mark_column(
    means: Mapping[int, float], column: int, *, better: Literal["larger", "smaller"] | None
) -> Marks:
    """Returns the best and the second best cells of a column; all of those that are equal.

    Equal is what is printed alike, with two decimals. NaN is never marked. Nothing is, where there
    is nothing to choose: fewer than two values, or a metric of which neither way is better.

    Args:
        means: By line, of the rows that compete.
        column: Number of the column.
        better: Which way is better.
    """
    shown = {line: f"{mean:.2f}" for line, mean in means.items() if not math.isnan(mean)}
    if better is None or len(shown) < 2:
        return NO_MARKS
    ranked = sorted({float(text) for text in shown.values()}, reverse=better == "larger")
    places = [
        frozenset((line, column) for line, text in shown.items() if float(text) == value)
        for value in ranked[:2]
    ]
    return Marks(best=places[0], second=places[1] if len(places) > 1 else frozenset())


def to_markdown(table: TextTable, *, marks: Marks = NO_MARKS) -> str:
    """Returns the table as a GitHub Markdown table.

    Args:
        table: Header and lines.
        marks: Cells that stand out.
    """
    header = [_escape_markdown(cell) for cell in table.header()]
    body = _marked(table, marks, _escape_markdown, ("**{}**", "<u>{}</u>"))
    rule = ["---" if at in table.text_columns else "---:" for at in range(len(header))]
    lines = [header, rule, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _escape_markdown(cell: str) -> str:
    return cell.replace("|", "\\|")


def _marked(
    table: TextTable, marks: Marks, escape: Callable[[str], str], forms: tuple[str, str]
) -> list[list[str]]:
    """Returns the escaped cells of the body, the best and the second best in their forms."""
    body = [[escape(cell) for cell in line] for line in table.lines()]
    for cells, form in zip((marks.best, marks.second), forms, strict=True):
        for line, column in cells:
            body[line][column] = form.format(body[line][column])
    return body


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "Δ": r"$\Delta$", "†": r"$^\dagger$", "–": "--", "−": "$-$", "→": r"$\to$"}
)
"""How characters are written that LaTeX takes for commands, or that its fonts lack."""


def to_latex(table: TextTable, *, marks: Marks = NO_MARKS) -> str:
    """Returns the table as a LaTeX tabular (package booktabs).

    Args:
        table: Header and lines.
        marks: Cells that stand out.
    """
    header = [escape_latex(cell) for cell in table.header()]
    body = _marked(table, marks, escape_latex, (r"\textbf{{{}}}", r"\underline{{{}}}"))
    rows = [" & ".join(line) + r" \\" for line in (header, *body)]
    form = "".join("l" if at in table.text_columns else "r" for at in range(len(header)))
    top = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", rows[0], r"\midrule"]
    return "\n".join([*top, *rows[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape_latex(cell: str) -> str:
    """Returns a text as LaTeX sets it."""
    return cell.translate(LATEX)


def rich_table(table: TextTable, *, title: str) -> Table:
    """Returns any such table for a terminal."""
    shown = Table(title=title, title_justify="left")
    for position, name in enumerate(table.header()):
        is_text = position in table.text_columns
        shown.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for line in table.lines():
        shown.add_row(*line)
    return shown
