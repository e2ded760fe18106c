"""A run's log folder as one record, small enough for a page: curves, leaderboard, expert map, samples.

A run of fifty thousand steps has as many points as its logs have lines; curves are thinned to `POINTS`, the newest one always kept.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.neuroviz.rundir import METRICS, MetricsTail
from bio_inspired_nanochat.synaptic import GAINS
from bio_inspired_nanochat.training.metrics import SCALARS

POINTS = 400
QUIET = 600.0  # seconds without a new line after which a run without an end is called silent
LEARNED = {"gains": "", "time_constants": "tokens"}  # with their units
SHOWN_FLAGS = ("depth", "n_embd", "max_seq_len", "synapses", "syn_preset", "num_experts", "splitmerge_every", "num_iterations", "seed")


class RunFolder:
    """The log folder of a run that may still be running. Not thread-safe."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tail = MetricsTail(folder)

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Everything in the log by now, or all lines of one kind. Raises UserError for a damaged log."""
        self._tail.poll()
        return [line for line in self._tail.lines if kind is None or line["kind"] == kind]

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that the log names and that still exists."""
        for line in reversed(self.lines()):
            named = line.get("path") if line["kind"] == "save" else line.get("checkpoint") if line["kind"] == "end" else None
            if named and Path(named).exists():
                return Path(named)
        return None

    def summary(self, points: int = POINTS) -> dict[str, Any]:
        """The record of a page. message: what keeps it empty, or None. Raises UserError for a damaged log."""
        lines = self.lines()
        record: dict[str, Any] = {"name": self.folder.resolve().name, "state": "empty", "step": 0, "charts": [], "sources": {}}
        record |= {"experts": [], "samples": [], "flags": self._flags(), "message": None, "val_bpb": None}
        if not lines:
            record["message"] = f"{self.folder} has no {METRICS} with records yet: give the log folder of a run, or wait for its first step"
            return record
        record["state"], record["step"] = self._state(lines), max(line["step"] for line in lines)
        record["sources"] = {name: _thin(rows, points) for name, rows in _rows(lines).items()}
        record["charts"] = _charts(record["sources"])
        looks = [line for line in lines if line["kind"] == "vitals"]
        if looks:
            record["experts"] = sorted(looks[-1]["experts"], key=lambda row: -(row["contribution"] or 0.0))
        samples = [line for line in lines if line["kind"] == "sample"]
        record["samples"] = [{"step": line["step"], "texts": line["texts"]} for line in samples[-3:]]
        evals = [line["val_bpb"] for line in lines if line["kind"] == "eval"]
        record["val_bpb"] = evals[-1] if evals else None
        if not looks:
            record["message"] = "no look at synapses or experts yet: vanilla models have none, others get the first one after step 1"
        return record

    def _state(self, lines: list[dict[str, Any]]) -> str:
        if lines[-1]["kind"] == "end":
            return f"stopped by {lines[-1]['stopped']}" if lines[-1].get("stopped") else "finished"
        try:
            quiet = time.time() - (self.folder / METRICS).stat().st_mtime
        except OSError:
            return "gone"
        return "running" if quiet < QUIET else f"silent for {quiet / 60:.0f} minutes"

    def _flags(self) -> dict[str, Any]:
        try:
            held = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: held[name] for name in SHOWN_FLAGS if isinstance(held, dict) and name in held}


def _rows(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, float | None]]]:
    """Per source of curves one flat row per line: step and a value per tag."""
    rows: dict[str, list[dict[str, float | None]]] = {"step": [], "eval": [], "vitals": [], "consolidate": []}
    for line in lines:
        step = {"step": line["step"]}
        if line["kind"] == "step":
            rows["step"].append(step | {f"train/{name}": value for name, value in line.items() if isinstance(value, (int, float))})
        elif line["kind"] == "eval":
            rows["eval"].append(step | {"val/bpb": line["val_bpb"], "val/loss": line["val_loss"]})
        elif line["kind"] == "consolidate":
            rows["consolidate"].append(step | {"sleep/change": line["change"]})
        elif line["kind"] == "vitals":
            layers = {f"{tag}/layer{layer}": value for tag, held in line["layers"].items() for layer, value in enumerate(held)}
            rows["vitals"].append(step | line["values"] | layers | _constants(line))
    return {name: held for name, held in rows.items() if held}


def _constants(line: dict[str, Any]) -> dict[str, float | None]:
    """Mean time constants and output gains per layer."""
    found = {}
    for layer, values in enumerate(line["constants"]):
        for name, heads in values.items():
            kind = "gains" if name in GAINS else "time_constants" if name.startswith("tau_") else None
            if kind is not None and None not in heads:
                found[f"{kind}/{name}/layer{layer}"] = sum(heads) / len(heads)
    return found


def _thin(rows: list[dict[str, float | None]], points: int) -> dict[str, Any]:
    """At most `points` rows, evenly chosen with the first and the last, as columns: steps x and values by tag."""
    if len(rows) > points:
        rows = [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)]
    tags = dict.fromkeys(tag for row in rows for tag in row if tag != "step")
    columns = {tag: [_short(row.get(tag)) for row in rows] for tag in tags}
    return {"x": [row["step"] for row in rows], "y": {tag: values for tag, values in columns.items() if any(v is not None for v in values)}}


def _charts(sources: dict[str, Any]) -> list[dict[str, Any]]:
    """What to draw: a chart per tag of the metrics list, with the curves of its layers."""
    charts = []
    for name, source in sources.items():
        for metric in SCALARS:
            own = [tag for tag in source["y"] if tag == metric.tag or (metric.layers and tag.startswith(f"{metric.tag}/layer"))]
            if own:
                charts.append(
                    {"tag": metric.tag, "unit": metric.unit, "about": metric.meaning, "group": metric.group, "source": name, "tags": own}
                )
        for kind, unit in LEARNED.items():
            for constant in dict.fromkeys(tag.rsplit("/", 1)[0] for tag in source["y"] if tag.startswith(f"{kind}/")):
                own = [tag for tag in source["y"] if tag.startswith(f"{constant}/")]
                about = f"learned {kind.replace('_', ' ')[:-1]}, mean over the heads of a layer"
                charts.append({"tag": constant, "unit": unit, "about": about, "group": "learned", "source": name, "tags": own})
    return charts


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
