"""The study's figures. The same results give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from clip_m2df.files import whole_file
from study.results import (
    CLEAN,
    REFERENCE,
    Cell,
    Record,
    accuracy,
    if_measured,
    knobs,
    level,
    measured,
    metric,
    shots,
)

DPI = 110
# Okabe and Ito's, which colour-blind people can tell apart, without the yellow, too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Taken with the next round of colours.
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX"
# What the knobs are shares of.
KNOBS = {
    "overlap": "distinctness taken away (%)",
    "outliers": "outliers among support videos (%)",
    "noise": "deviation of the grain (% of the range)",
}
# The rows whose learning curves are shown, where there are such.
LEARNING = (REFERENCE, "without PPS", "without distillation", "CLIP-FSAR")
SHARES_SHOWN = {"view_agreement": "both views agree (%)", "pps_accuracy": "PPS finds the class (%)"}
STYLE: list[str | dict[str, Any]] = [
    "default",
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9},
]


def draw(records: Sequence[Record], folder: Path) -> list[str]:
    """Draw what there are results for, of the part ``main``.

    Args:
        records: of the study.
        folder: where the files go.

    Returns:
        The files' names, ``results_<knob>.png``, ``results_views.png`` and ``results_curves.png``.
    """
    records = [record for record in records if (record.part, record.purpose) == ("main", "measure")]
    if not records:
        return []
    drawings: dict[str, Callable[[], Figure | None]] = {
        f"results_{knob}.png": lambda knob=knob: accuracy_against(records, knob)  # type: ignore[misc]
        for knob in knobs(records)
    }
    drawings["results_views.png"] = lambda: views_and_prompts(records)
    drawings["results_curves.png"] = lambda: learning_curves(records)
    names = []
    with matplotlib.style.context(STYLE, after_reset=True):
        for name, drawing in drawings.items():
            figure = drawing()
            if figure is not None:
                _save(figure, folder / name)
                names.append(name)
    return names


def accuracy_against(records: Sequence[Record], knob: str) -> Figure | None:
    """Accuracy against a knob's levels, a line a method with its 95 % interval; None without results."""
    tests = [CLEAN, *knobs(records)[knob]]
    # As many as have the knob at all, so that a method has one look in all panels.
    rows = list(dict.fromkeys(record.row for record in records if any(test in record.tests for test in tests[1:])))
    figure, panels = _panels(records, below=_label(knob), left="accuracy (%)")
    lines: dict[str, Any] = {}
    for axes, family, n_shot in panels:
        for row, look in zip(rows, _looks(rows), strict=True):
            cell = Cell("main", family, n_shot, row)
            points = {test: e for test in tests if (e := if_measured(accuracy, records, cell, test)) is not None}
            if points.keys() - {CLEAN}:
                x = [100 * level(test) for test in points]
                middle = np.array([100 * e.mean for e in points.values()])
                reach = np.array([100 * e.interval for e in points.values()])
                axes.fill_between(x, middle - reach, middle + reach, color=look["color"], alpha=0.15, linewidth=0)
                (lines[row],) = axes.plot(x, middle, **look)
    return _with_legend(figure, lines)


def views_and_prompts(records: Sequence[Record]) -> Figure | None:
    """How often the method's views agree and PPS is right, against each knob; None without results."""
    by_knob = knobs(records)
    if not by_knob:
        return None
    cells = list(dict.fromkeys(record.cell._replace(row=REFERENCE) for record in records))
    families = list(dict.fromkeys(cell.family for cell in cells))
    figure = Figure((2.6 * len(by_knob) + 1.9, 2.3 * len(SHARES_SHOWN)), layout="constrained")
    grid = figure.subplots(len(SHARES_SHOWN), len(by_knob), sharex="col", sharey="row", squeeze=False)
    lines: dict[str, Any] = {}
    for i, (name, label) in enumerate(SHARES_SHOWN.items()):
        grid[i][0].set_ylabel(label)
        for j, (knob, tests) in enumerate(by_knob.items()):
            grid[-1][j].set_xlabel(_label(knob))
            for cell in cells:
                points = {
                    test: s[0]
                    for test in (CLEAN, *tests)
                    if (s := if_measured(metric, records, cell, test, name)) is not None
                }
                if points.keys() - {CLEAN}:
                    look = {
                        "color": COLOURS[families.index(cell.family) % len(COLOURS)],
                        "linestyle": DASHES[0 if cell.n_shot == 1 else 1],
                        "marker": MARKERS[0 if cell.n_shot == 1 else 1],
                        "markersize": 4,
                    }
                    x = [100 * level(test) for test in points]
                    (line,) = grid[i][j].plot(x, [100 * s for s in points.values()], **look)
                    lines[f"{cell.family}, {shots(cell.n_shot)}"] = line
    for axes in grid.flat:
        axes.grid(alpha=0.25)
    return _with_legend(figure, lines)


def learning_curves(records: Sequence[Record]) -> Figure | None:
    """Accuracy on val against episodes, a mean over the seeds and their range; None without results."""
    figure, panels = _panels(records, below="training episodes", left="accuracy on val (%)")
    lines: dict[str, Any] = {}
    for axes, family, n_shot in panels:
        for row, look in zip(LEARNING, _looks(LEARNING), strict=True):
            runs = measured(records, Cell("main", family, n_shot, row)).values()
            curves = [{point.episodes: 100 * point.accuracy for point in run.curve} for run in runs if run.curve]
            # Where all seeds have a validation.
            x = sorted(set.intersection(*map(set, curves))) if curves else []
            if x:
                values = np.array([[curve[episodes] for episodes in x] for curve in curves])
                axes.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
                (lines[row],) = axes.plot(x, values.mean(0), **{**look, "marker": ""})
    return _with_legend(figure, lines)


def _panels(records: Sequence[Record], below: str, left: str) -> tuple[Figure, list[tuple[Axes, str, int]]]:
    """A row of axes a family, a column a number of shots."""
    families = list(dict.fromkeys(record.family for record in records))
    columns = sorted({record.n_shot for record in records})
    figure = Figure((3.1 * len(columns) + 1.9, 2.4 * len(families) + 0.2), layout="constrained")
    grid = figure.subplots(len(families), len(columns), sharex=True, sharey="row", squeeze=False)
    panels = []
    for i, family in enumerate(families):
        grid[i][0].set_ylabel(left)
        for j, n_shot in enumerate(columns):
            grid[i][j].set_title(f"{family}, {shots(n_shot)}")
            grid[i][j].grid(alpha=0.25)
            if i == len(families) - 1:
                grid[i][j].set_xlabel(below)
            panels.append((grid[i][j], family, n_shot))
    return figure, panels


def _looks(rows: Sequence[str]) -> list[dict[str, Any]]:
    """A line's look each; the full method's is the most visible."""
    looks = []
    for i, row in enumerate(rows):
        round_, place = divmod(i, len(COLOURS))
        look = {"color": COLOURS[place], "linestyle": DASHES[round_ % len(DASHES)], "marker": MARKERS[place]}
        full = row == REFERENCE
        looks.append(look | {"markersize": 4, "linewidth": 2.2 if full else 1.2, "zorder": 3 if full else 2})
    return looks


def _with_legend(figure: Figure, lines: dict[str, Any]) -> Figure | None:
    if not lines:
        return None
    figure.legend(list(lines.values()), list(lines), loc="outside right center", frameon=False, fontsize=8)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, and without the name of what drew it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    picture = Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    with whole_file(path, "picture") as draft:
        picture.save(draft, format="png", optimize=True)


def _label(knob: str) -> str:
    return KNOBS.get(knob, f"{knob} (%)")
