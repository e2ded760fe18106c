"""The plots of a matrix: differences with their intervals, and loss curves of the anchors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.study.statistics import Paired
from bio_inspired_nanochat.study.views import Curve

COLOURS = {"lower": "#2b8a5a", "higher": "#c0392b"}
GREY = "#8a8a8a"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}
MOST_CURVES = 8


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _styled() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def draw_differences(rows: Sequence[tuple[str, Paired]], title: str, path: Path) -> None:
    """One line per comparison: the differences of all seeds as dots, their mean and its bootstrap interval. Green and red: decided by the rule."""
    rows = [(name, one) for name, one in rows if one.mean is not None]
    if not rows:
        return
    with _styled():
        figure, (axes,) = _figure(8.0, 0.8 + 0.24 * len(rows), 1)
        for y, (_, one) in enumerate(reversed(rows)):
            colour = COLOURS.get(one.verdict, GREY)
            axes.scatter(one.differences, [y] * len(one.differences), s=8, color=colour, alpha=0.45)
            if one.low is not None:
                axes.plot([one.low, one.high], [y, y], color=colour, lw=2)
            axes.plot([one.mean], [y], "D", color=colour, ms=4)
        axes.axvline(0.0, color="black", lw=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set(title=title, xlabel="difference of validation loss, nats (left: better)")
        figure.savefig(path)


def draw_curves(curves: Mapping[tuple[int, str, int], Curve], depth: int, names: Sequence[str], title: str, path: Path) -> None:
    """Validation loss of some conditions, mean over seeds, against tokens and, where times are known, against seconds of training.

    Conditions that are the same runs are one line, which has the name of the first.
    """
    found = {name: [curve for (at, one, _), curve in curves.items() if (at, one) == (depth, name)] for name in names}
    lines: dict[tuple[Curve, ...], str] = {}
    for name, own in found.items():
        if own:
            lines.setdefault(tuple(own), name)
    if len(lines) > MOST_CURVES:
        title += f", the first {MOST_CURVES} of {len(lines)} models"
        lines = dict(itertools.islice(lines.items(), MOST_CURVES))
    labels = {"tokens": "tokens", "seconds": "seconds of training"}
    # no time is known of runs that shared their device
    views = [view for view in labels if any(len(getattr(curve, view)) > 1 for own in lines for curve in own)]
    if not views:
        return
    with _styled():
        figure, panels = _figure(5.0 * len(views), 4.0, len(views))
        for axes, view in zip(panels, views, strict=True):
            for every, name in lines.items():
                own = [curve for curve in every if len(getattr(curve, view)) > 1]
                if not own:
                    continue
                length = min(len(curve.loss) for curve in own)
                spent = np.mean([getattr(curve, view)[:length] for curve in own], axis=0)
                axes.plot(spent, np.mean([curve.loss[:length] for curve in own], axis=0), label=name, lw=1.4)
            axes.set(xlabel=labels[view], ylabel="validation loss, nats", xscale="log")
        panels[0].legend(fontsize=8)
        figure.suptitle(title)
        figure.savefig(path)
