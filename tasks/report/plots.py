"""The report's pictures. Deterministic: no dates, no software versions, a fixed backend and fixed sizes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from tasks.report.adaptation_plots import Curve, name_of
from tasks.shared.operations.text import printable

GREY = "#9aa3ad"
INK = "#2b3440"
ACCENT = "#2f6fde"
_LEGEND_AT_MOST = 20
_MARKS_AT_MOST = 150
_LONGEST_NAME = 60  # characters
_ADAPTERS = {  # an adapter has one colour in all pictures
    "source": INK,
    "bn": "#e08a1e",
    "tent": "#c8324b",
    "pseudo_label": "#8c5a3c",
    "shot_im": "#d678b8",
    "t3a": "#2a9d5c",
    "tsd": ACCENT,
    "lame": "#8d5fd3",
    "rotta": "#17a2b0",
    "roid": "#a3a51c",
}
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the software's name and version, and close it."""
    with warnings.catch_warnings():
        # The font's own box stands for a character that it lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def plain(name: str) -> str:
    """Text from the data as matplotlib shows it letter by letter: never a formula, one line, and not too long."""
    text = printable(name)
    text = text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"
    return text.replace("$", r"\$")


def _panels(rows: int, columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, Any]:
    figure: Figure = plt.figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def training(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """A row for each encoder: its loss, then the method's own label-free numbers, over the steps.

    Args:
        curves: Encoder to what it logged: name to (step, value).
    """
    width = max(len(found) for found in curves.values())
    with plt.rc_context(_STYLE):
        figure, axes = _panels(len(curves), width, (max(6.0, 2.9 * width), 2.2 * len(curves)))
        for row, (encoder, found) in zip(axes, curves.items(), strict=True):
            last = max(1, *(step for points in found.values() for step, _ in points))
            for axis in row[len(found) :]:
                axis.set_visible(False)
            for axis, (name, points) in zip(row, found.items(), strict=False):
                look = {"color": ACCENT if name == "loss" else INK, "linewidth": 1.4}
                axis.plot(*zip(*points, strict=True), marker="." if len(points) == 1 else "", **look)
                axis.set_title(plain(f"{encoder}: {name.replace('_', ' ')}"))
                axis.set_xlabel("step")
                axis.set_xlim(-0.02 * last, 1.02 * last)
    return figure


def scores(encoders: Sequence[str], values: Mapping[str, Sequence[float | None]], baselines: int) -> Figure:
    """A panel for each score with a bar for each encoder; baselines are grey.

    Args:
        encoders: Names, baselines first.
        values: Title of a score to its value for each encoder, None where it was not measured.
        baselines: How many of the encoders are baselines.
    """
    places = np.arange(len(encoders))[::-1]
    with plt.rc_context(_STYLE):
        size = (max(4.0, 1.75 * len(values)), 0.9 + 0.32 * len(encoders))
        figure, axes = _panels(1, len(values), size, sharey=True)
        for axis, (name, numbers) in zip(axes[0], values.items(), strict=True):
            measured = [index for index, value in enumerate(numbers) if value is not None]
            widths = [float(numbers[index] or 0) for index in measured]
            colours = [GREY if index < baselines else ACCENT for index in measured]
            axis.barh(places[measured], widths, color=colours, height=0.68)
            for place, value in zip(places[measured], widths, strict=True):
                axis.annotate(f" {value:.3f}", (max(value, 0), place), va="center", fontsize=8)
            axis.set_title(plain(name))
            axis.set_xlim(right=max([*widths, 1e-9]) * 1.3)
            axis.grid(axis="y", visible=False)
            axis.set_yticks(places, [plain(encoder) for encoder in encoders])
            axis.xaxis.set_major_locator(plt.MaxNLocator(3))
    return figure


class Panel(NamedTuple):
    """Curves of one score.

    Attributes:
        title: The score.
        label: Of the horizontal axis.
        lines: Encoder to (x, value, standard deviation), x ascending.
    """

    title: str
    label: str
    lines: Mapping[str, Sequence[tuple[int, float, float]]]


def evaluation(panels: Sequence[Panel], encoders: Sequence[str], baselines: int) -> Figure:
    """A panel for each score with a line for each encoder; baselines, the first of them, are grey and dashed."""
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    shades = [matplotlib.colormaps["Greys"](0.75 - 0.3 * index / max(1, baselines - 1)) for index in range(baselines)]
    shades += palette(len(encoders) - baselines)
    marks = "so^Dv<>P"
    with plt.rc_context(_STYLE):
        figure, axes = _panels(down, across, (max(5.0, 3.0 * across), 0.5 + 2.6 * down))
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            drawn = []
            for index, encoder in enumerate(encoders):
                x, mean, std = np.array(panel.lines.get(encoder) or np.empty((0, 3))).T
                look = {"color": shades[index], "linestyle": "--" if index < baselines else "-", "linewidth": 1.5}
                drawn += axis.plot(x, mean, marker=marks[index % len(marks)], markersize=4, **look)
                axis.fill_between(x, mean - std, mean + std, color=shades[index], alpha=0.12, linewidth=0)
            ticks = sorted({point[0] for points in panel.lines.values() for point in points})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.margins(x=0.12)
            axis.set_title(plain(panel.title))
            axis.set_xlabel(panel.label)
        _legend_below(figure, drawn, encoders, columns=8)
    return figure


def how_many(rows: Sequence[Mapping[str, float]], k: int) -> Figure:
    """What speaks for each number of clusters.

    Args:
        rows: `k`, `silhouette`, `stability` and `score`, by rising k.
        k: The number that was chosen.
    """
    tried = [row["k"] for row in rows]
    with plt.rc_context(_STYLE):
        figure, axes = _panels(1, 1, (7.0, 2.8))
        for name, colour in (("silhouette", GREY), ("stability", INK), ("score", ACCENT)):
            axes[0, 0].plot(tried, [row[name] for row in rows], color=colour, label=name, linewidth=1.5)
        axes[0, 0].axvline(k, color=ACCENT, linewidth=0.8, linestyle="--")
        axes[0, 0].set_xscale("log")
        axes[0, 0].set_xlabel("clusters k")
        axes[0, 0].set_title(f"How many clusters: {k}")
        axes[0, 0].legend()
    return figure


def embedding_map(
    points: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str], clusters: NDArray[np.int64], k: int
) -> Figure:
    """The map twice: coloured by class, where there are labels, and by cluster.

    Args:
        points: (N, 2).
        labels: (N,) class; points of unknown class, -1, are grey.
        classes: Names.
        clusters: (N,) cluster of each point; points of none, -1, are grey.
        k: Number of clusters.
    """
    labelled = bool((labels >= 0).any())
    with plt.rc_context(_STYLE):
        figure, axes = _panels(1, 1 + labelled, (11.4 if labelled else 6.0, 4.4))
        if labelled:
            _scatter(axes[0, 0], points, labels, [str(name) for name in classes], "classes")
        _scatter(axes[0, -1], points, clusters, [f"cluster {index}" for index in range(k)], "clusters")
        for cluster in np.unique(clusters[clusters >= 0]):
            x, y = np.median(points[clusters == cluster], axis=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axes[0, -1].text(x, y, str(cluster), ha="center", va="center", fontsize=8, weight="bold", bbox=box)
    return figure


def _scatter(
    axis: Axes, points: NDArray[np.float32], groups: NDArray[np.int64], names: Sequence[str], title: str
) -> None:
    colours = palette(len(names))
    unknown = groups < 0
    axis.scatter(points[unknown, 0], points[unknown, 1], s=5, color="#d5d9de", linewidths=0)
    # One call with all points, in their own order: drawn group by group, the last would cover the first.
    shades = [colours[group] for group in groups[~unknown]]
    axis.scatter(points[~unknown, 0], points[~unknown, 1], s=9, c=shades, linewidths=0, alpha=0.85)
    axis.set_title(title)
    axis.set(xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)
    if len(names) <= _LEGEND_AT_MOST:
        handles = [axis.scatter([], [], s=22, color=colour) for colour in colours]
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis.legend(handles, [plain(name) for name in names], fontsize=8, handletextpad=0.1, labelspacing=0.5, **place)


def palette(count: int) -> list[Any]:
    """Colours that differ: matplotlib's own up to 20, then hues at the golden angle in three brightnesses."""
    if count <= 20:
        return [matplotlib.colormaps["tab10" if count <= 10 else "tab20"](index) for index in range(count)]
    hues = (np.arange(count) * 0.61803398875) % 1
    shades = np.array([0.9, 0.7, 0.5])[np.arange(count) % 3]
    return list(matplotlib.colors.hsv_to_rgb(np.stack([hues, np.full(count, 0.75), shades], axis=1)))


def stream(curve: Curve) -> Figure:
    """A value of every adapter along one or more streams, in percent.

    Guarded adapters are dashed; thin vertical lines stand where the shift changes.
    """
    names = list(dict.fromkeys(name for part in curve.segments for name, _ in part.lines))
    others = iter(palette(len(names)))
    colours = {name: _ADAPTERS.get(name) or next(others) for name in names}
    lines = dict.fromkeys(who for part in curve.segments for who in part.lines)
    with plt.rc_context(_STYLE):
        figure, axes = _panels(1, 1, (11.4, 3.9 if len(curve.segments) > 1 else 3.3))
        axis = axes[0, 0]
        drawn = []
        for who in lines:
            points: list[tuple[float, float]] = []
            for part in curve.segments:
                points += [(np.nan, np.nan)] if part.begins or who not in part.lines else []
                points += [(seen, value * 100) for seen, value in part.lines.get(who, [])]
            x, y = np.array(points).T
            width = 2.2 if who[0] == "source" else 1.3
            # Markers where batches are few, since a segment of one batch is no line.
            marks = "." if len(points) <= _MARKS_AT_MOST else ""
            look = {"marker": marks, "markersize": 5, "linestyle": "--" if who[1] else "-", "linewidth": width}
            drawn += axis.plot(x, y, color=colours[who[0]], zorder=3 if who[0] == "source" else 2, **look)
        last = max(seen for part in curve.segments for found in part.lines.values() for seen, _ in found)
        stops = [*[part.start for part in curve.segments[1:]], last]
        for part, stop in zip(curve.segments, stops, strict=True):
            if part.start:
                axis.axvline(part.start, color=GREY, linewidth=0.6)
            look = {"annotation_clip": False, "rotation": 35, "fontsize": 8}
            middle = ((part.start + stop) / 2, 1.02)
            axis.annotate(plain(part.title), middle, xycoords=("data", "axes fraction"), **look)
        axis.set_xlim(0, last * 1.005)
        axis.set_ylim(0, 100 if curve.label != "error" else None)
        axis.set_xlabel("images seen")
        axis.set_ylabel(f"{curve.label}, percent")
        axis.grid(axis="x", visible=False)
        _legend_below(figure, drawn, [name_of(who) for who in lines], columns=7)
    return figure


def _legend_below(figure: Figure, lines: Sequence[Line2D], names: Sequence[str], *, columns: int) -> None:
    """A legend of lines and their names: matplotlib's own labels of lines are left out if they begin with `_`."""
    figure.legend(lines, [plain(name) for name in names], loc="outside lower center", ncols=min(len(names), columns))
