"""Draw docs/results.png from docs/results.json, the figures of the table in README.md."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DATA = HERE / "results.json"
GREY, BLUE, LIGHT, PALE = "#777777", "#1f6fb2", "#8fbce0", "#c6dcef"


def quality(axes: Axes, data: dict[str, Any]) -> None:
    """A dot per seed and a bar between the seeds of a model; the band is what vanilla's seeds span."""
    rows = data["rows"]
    vanilla = rows[0]["losses"]
    axes.axvspan(min(vanilla), max(vanilla), color=GREY, alpha=0.15, lw=0)
    for place, row in enumerate(rows):
        colour = GREY if place == 0 else BLUE
        axes.plot([min(row["losses"]), max(row["losses"])], [place, place], color=colour, lw=5, alpha=0.3, solid_capstyle="round")
        axes.plot(row["losses"], [place] * len(row["losses"]), "o", color=colour, ms=6)
        mean = sum(row["losses"]) / len(row["losses"])
        less = "" if place == 0 else f"  ({mean - sum(vanilla) / len(vanilla):+.3f})".replace("-", "\N{MINUS SIGN}")
        axes.annotate(f"{mean:.4f}{less}", (max(row["losses"]), place), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.margins(y=0.1)
    axes.invert_yaxis()
    axes.set_xlim(2.52, 2.5735)
    axes.set_xlabel("validation loss, nats per token (a dot is a seed; less is better)")
    axes.set_title(f"Quality at equal tokens\n{data['setting']}", fontsize=8.5, loc="left")


def cost(axes: Axes, data: dict[str, Any]) -> None:
    """Bars of time and memory of a training step, as multiples of vanilla's."""
    for place, row in enumerate(data["rows"]):
        for shift, (kind, colour) in zip((-0.18, 0.18), (("time", LIGHT), ("memory", PALE)), strict=True):
            axes.barh(place + shift, row[kind], 0.32, color=colour)
            axes.annotate(kind, (0, place + shift), (5, 0), textcoords="offset points", va="center", fontsize=8)
            axes.annotate(f"{row[kind]:.3f}", (row[kind], place + shift), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=GREY, lw=1.5)
    axes.annotate("vanilla", (1, -0.47), (3, 0), textcoords="offset points", fontsize=8, color=GREY, va="bottom")
    axes.set_yticks(range(len(data["rows"])), [row["model"] for row in data["rows"]])
    axes.set_ylim(len(data["rows"]) - 0.5, -0.75)
    axes.set_xlim(0, 1.6)
    axes.set_xlabel("multiple of vanilla's training step (less is better)")
    axes.set_title(f"Cost of a training step\n{data['setting']}", fontsize=8.5, loc="left")


def draw(out: Path) -> None:
    """Write the picture; its metadata hold the digest of the data, so that a test can tell that it is theirs."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    mpl.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    quality(left, data["quality"])
    cost(right, data["cost"])
    figure.savefig(out, dpi=110, metadata={"Source": hashlib.sha256(DATA.read_bytes()).hexdigest()})


def main() -> None:
    """Read the command line, draw, say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results.png", help="the PNG file to write (default: %(default)s)")
    out = parser.parse_args().out
    if not out.parent.is_dir():
        parser.error(f"--out={out}: {out.parent} is no folder")
    draw(out)
    print(json.dumps({"out": str(out), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
