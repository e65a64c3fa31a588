"""metrics.jsonl as it is found in the wild, and figures that show what is in it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from distilllens.config import TrainConfig
from distilllens.errors import DataError
from distilllens.report.plots import (
    CURVES,
    curve_panels,
    lens_layer_panels,
    plot_curve,
    running_mean,
    score_panel,
)
from distilllens.report.run_record import MetricsLine, RunRecord, read_metrics
from distilllens.report.style import DARK, LIGHT, THEMES, figure_png
from distilllens.report.tables import Row, ScoreTable, Summary


def run_of(lines: Sequence[MetricsLine], label: str = "run") -> RunRecord:
    return RunRecord(
        folder=Path(label),
        label=label,
        config=TrainConfig(),
        lines=tuple(lines),
        environment={},
        data={},
        status={},
        pairs=(),
    )


def write_lines(path: Path, *lines: object, tail: bytes = b"") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode() + tail)
    return path


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    whole = {"step": 10, "train/loss": 1.5}
    line = json.dumps({"step": 20, "train/loss": 1.25, "note": "é"}).encode()
    for end in range(1, len(line)):
        path = write_lines(tmp_path / "metrics.jsonl", whole, tail=line[:end])
        assert read_metrics(path) == [whole], end


def test_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"step": 1}, tail=b'{"step": 2}')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 1,', r"m\.jsonl:2: invalid JSON at column \d+"),
        (b"[1]", r"m\.jsonl:2: expected a JSON object, got list"),
        (b'{"train/loss": 1}', r"m\.jsonl:2: step=None"),
        (b'{"step": "7"}', r"m\.jsonl:2: step='7'"),
        (b'{"step": 7, "train/loss": "x"}', r"m\.jsonl:2: train/loss='x' is not a number"),
        (b'{"step": 7, "n": "\xff"}', r"m\.jsonl:2: invalid UTF-8 at byte 19"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=message):
        read_metrics(path)


def test_malformed_last_line_with_newline_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step"\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        read_metrics(path)


def test_steps_logged_twice_count_once_and_the_later_wins(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl",
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 2.0},
        {"step": 20, "eval/dev/loss": 5.0},
        {"step": 20, "train/loss": 3.0},
    )
    run = run_of(read_metrics(path))
    assert run.series("train/loss") == ([10, 20], [1.0, 3.0])
    assert run.series("eval/dev/loss") == ([20], [5.0])
    assert run.best_dev() == (20, 5.0)


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert curve_panels([run_of([])]) == []


def test_panels_are_those_with_data() -> None:
    kd = run_of([{"step": 1, "train/loss": 2.0, "train/loss/kd": 1.0, "train/lr": 1e-3}], "kd")
    lens = run_of([{"step": 1, "train/loss": 2.0, "train/lens/jsd/L02": 0.5}], "lens")
    names = [panel.name for panel in curve_panels([kd, lens])]
    assert names == ["curve_train_loss", "curve_train_loss_kd", "curve_train_lr"]
    assert len(lens_layer_panels([kd, lens])) == 1


def test_curve_shows_values_labels_and_units() -> None:
    lines = [{"step": step, "train/loss": 4.0 / step} for step in range(1, 11)]
    other = run_of([{"step": 5, "train/loss": 1.0}], "second run")
    figure = plot_curve([run_of(lines, "first run"), other], CURVES[0], theme=LIGHT)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "nats per response token"
    first, second = axes.lines
    expected = np.array([[s, 4.0 / s] for s in range(1, 11)])
    np.testing.assert_allclose(np.asarray(first.get_xydata()), expected)
    assert second.get_marker() == "o"  # a single point has no line to be seen by
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["first run", "second run"]


def test_lens_layers_are_ordered_by_number() -> None:
    line = {"step": 1, "train/lens/jsd/L10": 1.0, "train/lens/jsd/L02": 2.0, "train/lens/x": 0.0}
    (panel,) = lens_layer_panels([run_of([line])])
    legend = panel.draw(LIGHT).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["layer 2", "layer 10"]


def test_figures_are_png_in_both_themes_and_leave_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    lines = [{"step": s, "train/loss": float("nan") if s == 50 else 1.0} for s in range(200)]
    (panel,) = curve_panels([run_of(lines)])
    images = [figure_png(panel.draw(theme)) for theme in THEMES]
    for image, theme in zip(images, THEMES, strict=True):
        corner = Image.open(io.BytesIO(image)).convert("RGB").getpixel((1, 1))
        assert corner == tuple(int(theme.surface[i : i + 2], 16) for i in (1, 3, 5))
    assert images[0] == figure_png(panel.draw(LIGHT))
    assert images[0] != images[1]
    assert dict(matplotlib.rcParams) == before


def test_score_panel_spans_all_seeds() -> None:
    cell = Summary(values=(20.0, 24.0))
    rows = (
        Row(label="a", cells={"dolly": cell}, average=cell, unit="sampling seeds"),
        Row(label="b", cells={"dolly": None}, average=None, unit="sampling seeds"),
    )
    panel = score_panel(ScoreTable(metric="rougeL", sets=("dolly",), rows=rows))
    assert panel is not None
    axes = panel.draw(DARK).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a"]
    low, high = axes.get_xlim()
    assert low < 20.0 and high > 24.0
    assert score_panel(ScoreTable(metric="rougeL", sets=("dolly",), rows=rows[1:])) is None


def test_running_mean_by_hand() -> None:
    # 100 values: the window reaches 2 to each side.
    values = [float(v) for v in range(100)]
    smooth = running_mean(values)
    assert smooth[0] == pytest.approx((0 + 1 + 2) / 3)
    assert smooth[50] == pytest.approx(50.0)
    assert smooth[99] == pytest.approx((97 + 98 + 99) / 3)
    values[50] = float("nan")
    smooth = running_mean(values)
    assert np.isnan(smooth[50])
    assert smooth[51] == pytest.approx((49 + 51 + 52 + 53) / 4)
