"""Figures that show what is in metrics.jsonl."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.lines import Line2D
from PIL import Image

from distilllens.config import TrainConfig
from distilllens.layers import LayerPair
from distilllens.report.plots import (
    Panel,
    curve_panels,
    layer_panels,
    running_mean,
    score_panel,
)
from distilllens.report.runs.curves import Curve
from distilllens.report.runs.groups import RunGroup
from distilllens.report.runs.metrics_file import MetricsLine
from distilllens.report.runs.record import RunRecord
from distilllens.report.scores.table import Row, ScoreTable, Summary
from distilllens.report.style import DARK, LIGHT, THEMES, add_legend, figure_png, figure_svg


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


def group_of(lines: Sequence[MetricsLine], label: str = "run") -> RunGroup:
    return RunGroup(label=label, runs=(run_of(lines, label),))


def points(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def names(panels: Sequence[tuple[Curve, Panel]]) -> list[str]:
    return [panel.name for _, panel in panels]


def test_no_metrics_no_panels() -> None:
    assert curve_panels([group_of([])]) == []
    assert layer_panels([group_of([])]) == []


def test_panels_are_those_with_data() -> None:
    kd = group_of([{"step": 1, "train/loss": 2.0, "train/loss/kd": 1.0, "train/lr": 1e-3}], "kd")
    lens = group_of([{"step": 1, "train/loss": 2.0, "train/lens/jsd/L02": 0.5}], "lens")
    assert names(curve_panels([kd, lens])) == [
        "curve_train_loss",
        "curve_train_loss_kd",
        "curve_train_lr",
    ]
    assert [panel.name for panel in layer_panels([kd, lens])] == ["lens_layers_2_jsd"]


def test_unknown_metrics_have_panels_too() -> None:
    line = {"step": 1, "epoch": 0.5, "time": 9.0, "train/new term": 1.0, "perf/x": 2.0, "note": "x"}
    panels = curve_panels([group_of([line])])
    assert names(panels) == ["curve_perf_x", "curve_train_new_term"]
    assert panels[1][1].draw(LIGHT).axes[0].get_title(loc="left") == "train/new term"


def test_curve_shows_values_labels_and_units() -> None:
    lines = [{"step": step, "train/loss": 4.0 / step} for step in range(1, 9)]
    groups = [group_of(lines, "first run"), group_of([{"step": 5, "train/loss": 1.0}], "second")]
    figure = curve_panels(groups)[0][1].draw(LIGHT)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "nats per response token"
    first, second = axes.lines
    assert points(first) == [[s, 4.0 / s] for s in range(1, 9)]
    assert second.get_marker() == "o"  # a single point has no line to be seen by
    # The page has one legend for all; a file of its own gets one below the axes.
    assert not figure.legends
    height = figure.get_figheight()
    add_legend(figure, LIGHT)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first run", "second"]
    assert figure.get_figheight() > height


@pytest.mark.parametrize(("last", "scale"), [(0.2, "linear"), (0.05, "log"), (-0.05, "linear")])
def test_axis_is_logarithmic_over_more_than_a_factor_of_ten(last: float, scale: str) -> None:
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": last}]
    axes = curve_panels([group_of(lines)])[0][1].draw(LIGHT).axes[0]
    assert axes.get_yscale() == scale
    assert ("log scale" in axes.get_ylabel()) == (scale == "log")


def test_many_runs_look_different_from_each_other() -> None:
    groups = [group_of([{"step": s, "train/loss": 1.0} for s in (1, 2)], str(n)) for n in range(28)]
    axes = curve_panels(groups)[0][1].draw(LIGHT).axes[0]
    looks = {(line.get_color(), str(vars(line)["_dash_pattern"])) for line in axes.lines}
    assert len(axes.lines) == len(looks) == 28


def test_a_value_that_is_not_finite_is_a_cross_at_the_foot() -> None:
    values = {1: 1.0, 2: math.nan, 3: math.inf, 4: 2.0}
    lines = [{"step": step, "train/loss": value} for step, value in values.items()]
    axes = curve_panels([group_of(lines)])[0][1].draw(LIGHT).axes[0]
    line, crosses = axes.lines
    assert crosses.get_marker() == "x" and list(np.asarray(crosses.get_xdata())) == [2, 3]
    assert [y for _, y in points(line) if y == y] == [1.0, 2.0]


def test_seeds_are_a_mean_in_a_band() -> None:
    """Steps 1 and 2 of two seeds; only the second seed came to step 3."""
    runs = (
        run_of([{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}]),
        run_of([{"step": step, "train/loss": 4.0} for step in (1, 2, 3)]),
    )
    group = RunGroup(label="method", runs=runs)
    series = group.series("train/loss")
    assert series.steps.tolist() == [1, 2, 3]
    assert series.mean.tolist() == [2.5, 3.0, 4.0]
    assert series.low.tolist() == [1.0, 2.0, 4.0] and series.high.tolist() == [4.0, 4.0, 4.0]
    axes = curve_panels([group])[0][1].draw(LIGHT).axes[0]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert {(1.0, 1.0), (1.0, 4.0), (2.0, 2.0)} <= {(x, y) for x, y in np.asarray(corners).tolist()}


def test_layers_are_a_heatmap_deep_ones_above() -> None:
    lines = [
        {"step": 10, "train/lens/jsd/L10": 0.1, "train/lens/jsd/L02": 0.4, "train/lens/x": 0.0},
        {"step": 20, "train/lens/jsd/L10": 0.05},
        {"step": 40, "train/lens/jsd/L10": 0.0, "train/lens/jsd/L02": math.nan},
    ]
    pairs = (LayerPair(teacher=8, student=2), LayerPair(teacher=40, student=10))
    run = dataclasses.replace(run_of(lines), pairs=pairs)
    (panel,) = layer_panels([RunGroup(label="run", runs=(run,))])
    axes, _ = panel.draw(LIGHT).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["8→2", "40→10"]
    (mesh,) = axes.collections
    assert isinstance(mesh, QuadMesh)
    array = mesh.get_array()
    assert array is not None
    shown = np.ma.filled(array, np.nan)
    np.testing.assert_array_equal(shown, [[0.4, np.nan, np.nan], [0.1, 0.05, 0.0]])
    # Cells end half way to the next step: 10 | 20 | 40.
    assert np.asarray(mesh.get_coordinates())[0, :, 0].tolist() == [5.0, 15.0, 30.0, 50.0]
    assert mesh.get_clim() == (0.0, 0.4)


def test_the_weights_of_pairs_that_join_are_a_heatmap_of_their_own() -> None:
    line = {"step": 1, "train/lens_coeff": 0.5, "train/lens/jsd/L01": 0.1}
    line |= {"train/lens_coeff/deepest_first/L01": 0.0, "train/lens_coeff/deepest_first/L02": 1.0}
    group = group_of([line])
    shown = [panel.caption for panel in layer_panels([group])]
    assert shown == [
        "Lens divergence (jsd) by layer, deep ones above.",
        "Weight of the lens (deepest_first) by layer, deep ones above.",
    ]
    assert [curve.title for curve, _ in curve_panels([group])] == ["Weight of the lens term"]


def test_heatmaps_of_one_kind_share_their_colours() -> None:
    groups = [group_of([{"step": 1, "train/lens/jsd/L01": v}], str(v)) for v in (0.1, 0.3)]
    groups.append(group_of([{"step": 1, "train/hidden/mse/L01": 7.0}], "other kind"))
    limits = [panel.draw(LIGHT).axes[0].collections[0].get_clim() for panel in layer_panels(groups)]
    assert limits == [(0.0, 0.3), (0.0, 0.3), (0.0, 7.0)]


def test_a_panel_tells_whether_its_values_changed() -> None:
    lines = [{"step": 1, "train/loss": 1.0, "train/lr": 1.0, "train/lens/jsd/L01": 0.1}]
    more = [*lines, {"step": 2, "train/loss": 1.0, "train/lens/jsd/L01": 0.1}]

    def contents(of: Sequence[MetricsLine]) -> list[str]:
        curves = [panel.content for _, panel in curve_panels([group_of(of)])]
        return curves + [panel.content for panel in layer_panels([group_of(of)])]

    before, after = contents(lines), contents(more)
    assert contents(lines) == before
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_figures_are_png_in_both_themes_and_leave_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    lines = [{"step": s, "train/loss": float("nan") if s == 50 else 1.0} for s in range(200)]
    ((_, panel),) = curve_panels([group_of(lines)])
    images = [figure_png(panel.draw(theme)) for theme in THEMES]
    for image, theme in zip(images, THEMES, strict=True):
        corner = Image.open(io.BytesIO(image)).convert("RGB").getpixel((1, 1))
        assert corner == tuple(int(theme.surface[i : i + 2], 16) for i in (1, 3, 5))
    assert images[0] == figure_png(panel.draw(LIGHT))
    assert figure_svg(panel.draw(LIGHT)) == figure_svg(panel.draw(LIGHT))
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


def test_names_may_have_dollars_and_underscores() -> None:
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]
    groups = [group_of(lines, "a$^b$"), group_of(lines, "_hidden"), group_of(lines, r"$\frac$")]
    figure = curve_panels(groups)[0][1].draw(LIGHT)
    add_legend(figure, LIGHT)
    svg = figure_svg(figure).decode()  # a formula that is none would end it
    assert "a$^b$" in svg and r"$\frac$" in svg
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert shown == ["a$^b$", "_hidden", r"$\frac$"]
    cell = Summary(values=(20.0, 24.0))
    row = Row(label=r"$\frac$", cells={"dolly": cell}, average=cell, unit="sampling seeds")
    panel = score_panel(ScoreTable(metric="rougeL", sets=("dolly",), rows=(row,)))
    assert panel is not None and r"$\frac$" in figure_svg(panel.draw(LIGHT)).decode()


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
