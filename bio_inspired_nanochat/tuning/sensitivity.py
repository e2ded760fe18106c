"""Which knobs matter: one at a time, and by Morris screening, all candidates under the same seeds.

Source of the screening: Morris 1991, with the mean of absolute elementary effects mu* of Campolongo et al. 2007.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.common import pick_device, say, stable_hash, table, this_rank, write_atomic
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.census import Census
from bio_inspired_nanochat.tuning.config import SensitivityConfig
from bio_inspired_nanochat.tuning.evolver import FREE, measure
from bio_inspired_nanochat.tuning.space import Space
from bio_inspired_nanochat.tuning.workers import Evaluator

LEVELS = 4  # of the Morris grid
JUMP = LEVELS / (2 * (LEVELS - 1))  # length of a step on it, the one with which all levels are met equally often
UNASKED = frozenset(("top", "census_steps", "workers", "stack"))  # further flags that may differ when measuring goes on
SILENT = 1e-9  # a change of fitness that is rounding


def morris_points(axes: int, trajectories: int, seed: int) -> np.ndarray:
    """Points [trajectories, axes + 1, axes] on the grid; neighbours differ by JUMP along one axis, and each axis has its turn once."""
    random = np.random.default_rng(seed)
    found = np.empty((trajectories, axes + 1, axes))
    low = np.arange(LEVELS // 2) / (LEVELS - 1)  # from where a step up stays inside
    for one in found:
        up = random.integers(2, size=axes)
        one[0] = random.choice(low, size=axes) + JUMP * (1 - up)
        for step, axis in enumerate(random.permutation(axes), 1):
            one[step] = one[step - 1]
            one[step, axis] += JUMP * (2 * up[axis] - 1)
    return found


def elementary_effects(points: np.ndarray, values: np.ndarray) -> list[list[float]]:
    """Per axis its elementary effects (change of value over change of u), from points [r, k + 1, k] and values [r, k + 1]."""
    effects: list[list[float]] = [[] for _ in range(points.shape[2])]
    for path, found in zip(points, values, strict=True):
        for step in range(1, len(path)):
            moved = path[step] - path[step - 1]
            axis = int(np.abs(moved).argmax())
            if math.isfinite(effect := (found[step] - found[step - 1]) / moved[axis]):
                effects[axis].append(float(effect))
    return effects


def one_at_a_time(space: Space, points: int) -> list[tuple[int, list[float]]]:
    """(axis, point) with one axis moved to evenly spread places, all others at the start."""
    start, found = space.start(), []
    for axis in range(len(start)):
        for place in np.linspace(0.05, 0.95, points) if points > 1 else [0.95] if points else []:
            found.append((axis, [*start[:axis], float(place), *start[axis + 1 :]]))
    return found


def sensitivity(config: SensitivityConfig, space: Space, evaluator: Evaluator, folder: Path) -> dict[str, Any]:
    """Measure and rank; writes `sensitivity.json` and returns the record of the script's last line.

    Ranked by the mean of the two measures, each as a share of its largest. A knob that changes nothing at all, or that the census finds
    inert, is rejected. `over_noise` is the largest one-at-a-time effect over its standard error between seeds.
    """
    inert = _census(config, space) if config.census_steps else {}
    moved = one_at_a_time(space, config.points)
    paths = morris_points(len(space.axes), config.trajectories, config.seed)
    points = [point for _, point in moved] + [list(map(float, point)) for path in paths for point in path]
    seeds = [stable_hash(config.seed, "sensitivity", i) for i in range(config.seeds)]
    say(f"{len(points)} candidates under {config.seeds} seeds each, {len(space.axes)} knobs")
    each = _measured(config, space, evaluator, points, seeds, folder / "measured.jsonl")
    means = [statistics.fmean(row) for row in each]
    effects = elementary_effects(paths, np.reshape(means[len(moved) :], paths.shape[:2]))
    rows = []
    for axis, name in enumerate(space.names):
        tried = [i for i, (moved_axis, _) in enumerate(moved) if moved_axis == axis]
        rows.append(_row(name, [each[i] for i in tried], effects[axis], inert.get(name)))
    for measure_name in ("range", "mu_star"):
        top = max((row[measure_name] for row in rows if row[measure_name] is not None), default=0.0) or 1.0
        for row in rows:
            row["score"] += 0.0 if row[measure_name] is None else row[measure_name] / top / 2
    rows.sort(key=lambda row: (row["rejected"] is not None, -row["score"]))
    ranking = [row["name"] for row in rows if row["rejected"] is None]
    record = {"ranking": ranking, "top": ranking[: config.top], "rejected": {r["name"]: r["rejected"] for r in rows if r["rejected"]}}
    record |= {
        "diverged": sum(not math.isfinite(value) for value in means),
        "candidates": len(points),
        "seeds": config.seeds,
        "knobs": rows,
    }
    columns = ("name", "range", "over_noise", "mu_star", "sigma", "score", "rejected")
    table(columns, [tuple(row[name] for name in columns) for row in rows])
    write_atomic(folder / "sensitivity.json", json.dumps(record, indent=1) + "\n")
    return record | {"run_dir": str(folder)}


def _measured(
    config: SensitivityConfig, space: Space, evaluator: Evaluator, points: Sequence[Sequence[float]], seeds: Sequence[int], path: Path
) -> list[list[float]]:
    """Fitness [candidate][seed], measured by as many as are trained as one; each portion is written to `path` at once.

    With --resume=1 what is there already is taken over. Raises UserError when it was measured under other settings.
    """
    asked = {name: value for name, value in to_dict(config).items() if name not in FREE | UNASKED} | {"searched": space.names}
    head = json.dumps(asked, sort_keys=True)
    lines = (path.read_text(encoding="utf-8").splitlines() if config.resume and path.exists() else []) or [head]
    if lines[0] != head:
        raise UserError(f"resume=1: {path} was measured with other flags: give the same ones, or another --run_dir")
    each = [[math.inf if value is None else float(value) for value in json.loads(line)] for line in lines[1:] if line.endswith("]")]
    write_atomic(path, "\n".join(lines[: len(each) + 1]) + "\n")
    portion = max(1, config.stack // config.seeds * max(1, config.workers, this_rank().world) - 1)  # the start is trained in every one
    while len(each) < len(points):
        say(f"{len(each)} of {len(points)} candidates are measured")
        part = [space.config(point) for point in points[len(each) : len(each) + portion]]
        found, _ = measure(config, evaluator, space.base, part, seeds, config.device)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([value if math.isfinite(value) else None for value in row]) + "\n" for row in found)
        each += found
    return each


def _row(name: str, moved: Sequence[Sequence[float]], effects: Sequence[float], inert: str | None) -> dict[str, Any]:
    """What was found of one knob. moved: per one-at-a-time place the fitness per seed."""
    finite = [row for row in moved if all(map(math.isfinite, row))]
    means = [0.0, *(statistics.fmean(row) for row in finite)]  # the start's own fitness is 0
    noise = [abs(statistics.fmean(row)) / max(statistics.stdev(row) / len(row) ** 0.5, 1e-12) for row in finite if len(row) > 1]
    changes = [abs(value) for row in finite for value in row] + [abs(effect) for effect in effects]
    silent = bool(changes) and max(changes) < SILENT
    return {
        "name": name,
        "range": max(means) - min(means) if finite else None,
        "over_noise": max(noise, default=None),
        "mu_star": statistics.fmean(map(abs, effects)) if effects else None,
        "sigma": statistics.stdev(effects) if len(effects) > 1 else None,
        "score": 0.0,
        "rejected": inert or ("changes nothing here" if silent else None),
    }


def _census(config: SensitivityConfig, space: Space) -> dict[str, str]:
    """The knobs that change nothing in a trained model, with what the census says of them."""
    census = Census(config.census_steps, pick_device(config.device))
    return {name: found.fault for name in space.names if (found := census.measure(name)).fault}
