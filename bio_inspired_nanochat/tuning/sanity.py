"""Whether the tool works, and whether the objective is worth searching."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.common import say, stable_hash, table
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.config.knobs import kinds_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.config import OptimizeConfig, SanityConfig
from bio_inspired_nanochat.tuning.evolver import optimize
from bio_inspired_nanochat.tuning.space import Space
from bio_inspired_nanochat.tuning.strategy import make_strategy
from bio_inspired_nanochat.tuning.workers import Evaluator

TOLERANCE = 1e-8
DIMENSIONS = 5
MOST_EVALUATIONS = 20000
# Settings that must be worse, of which the first that is searched counts. A memory that writes an eighth as strongly and has lost two thirds
# after 20 tokens lies less than one and a half first step sizes of a search from where it begins; attention that forgets within tokens, at
# the bounds, is for searches without fast weights.
BAD = ({"hebb_rate": 0.25, "rho_elig": 0.95}, {"barrier_strength": 4.0, "lambda_loge": -4.0})


def sphere(u: np.ndarray) -> float:
    """Sum of squares with its minimum of 0 at u = 0.3, inside the unit cube."""
    return float(((u - 0.3) ** 2).sum())


def rosenbrock(u: np.ndarray) -> float:
    """Rosenbrock's valley on [-2, 2]^n, with its minimum of 0 at x = 1."""
    x = 4 * u - 2
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def minimise(function: Callable[[np.ndarray], float], seed: int) -> tuple[float, int]:
    """Least value that the strategy finds, and how many it asked for, at most MOST_EVALUATIONS."""
    strategy, least = make_strategy([0.6] * DIMENSIONS, 0.2, 10, seed), float("inf")
    while least > TOLERANCE and strategy.countevals < MOST_EVALUATIONS:
        points = strategy.ask()
        values = [function(np.asarray(point)) for point in points]
        strategy.tell(points, values)
        least = min(least, *values)
    return least, strategy.countevals


def sanity(config: SanityConfig, space: Space, evaluator: Evaluator, folder: Path) -> dict[str, Any]:
    """Known functions, two generations of the real objective in `folder`/smoke, and the readiness gate; returns the script's last line."""
    known = {function.__name__: minimise(function, config.seed) for function in (sphere, rosenbrock)}
    for name, (least, count) in known.items():
        say(f"{name}: {least:.1e} after {count} evaluations, tolerance {TOLERANCE:g}")
        if least > TOLERANCE:
            raise RuntimeError(f"CMA-ES has not found the minimum of {name}: {least:.1e} after {count} evaluations")
    gate = readiness(config, space, evaluator)
    smoke = _smoke(config, space, evaluator, folder / "smoke")
    record: dict[str, Any] = {name: {"least": least, "evaluations": count} for name, (least, count) in known.items()}
    return record | gate | {"smoke": smoke}


def readiness(config: SanityConfig, space: Space, evaluator: Evaluator) -> dict[str, Any]:
    """The gate: the objective's own values for the start and for a bad setting, under the same seeds.

    signal: difference of the means; noise: standard deviation over seeds within a setting, pooled over both. `ready` when the bad one is
    worse by `gate_sds` of it. Raises UserError when no knob of a known bad value is searched.
    """
    known = [{name: value for name, value in bad.items() if name in space.names} for bad in BAD]
    bad: dict[str, Any] = next(filter(None, known), {})
    if not bad:
        names = ", ".join(name for bad in BAD for name in bad)
        raise UserError(f"the readiness gate knows a bad value of {names} alone, and none is searched: add one to --knobs")
    seeds = [stable_hash(config.seed, "gate", i) for i in range(config.gate_seeds)]
    scores = evaluator([space.base, dataclasses.replace(space.base, **bad)], seeds)
    name = {"recall": "answer_loss", "lm": "lm_final", "composite": "answer_loss"}[config.objective]
    good, worse = ([getattr(score, name) for score in row] for row in scores)
    means, sds = np.mean([good, worse], axis=1), np.std([good, worse], axis=1, ddof=1)
    signal, noise = float(means[1] - means[0]), float((sds**2).mean() ** 0.5)
    rows = [(label, float(mean), float(sd)) for label, mean, sd in zip(("start", "bad"), means, sds, strict=True)]
    table(("setting", f"{name} (nats)", "sd over seeds"), rows)
    ready = bool(0 < signal >= config.gate_sds * noise)  # NaN is not ready
    say(
        f"signal {signal:.4g}, noise {noise:.4g}: {'ready' if ready else 'not ready: train longer (--steps) or on more rows (--eval_rows)'}"
    )
    found = {"ready": ready, "signal": signal, "noise": noise, "sds": signal / noise if noise else None}
    return found | {"good": good, "bad": worse, "bad_setting": bad}


def _smoke(config: SanityConfig, space: Space, evaluator: Evaluator, folder: Path) -> dict[str, Any]:
    """Two generations of the real objective, and how far apart their candidates lie, beside what seeds leave uncertain."""
    for path in folder.glob("*") if folder.is_dir() else ():
        path.unlink()
    folder.mkdir(exist_ok=True)
    shared = {name: getattr(config, name) for name in kinds_of(OptimizeConfig) if hasattr(config, name)}
    run = OptimizeConfig(**shared, generations=2, reevaluate=0)
    found = optimize(run, space, evaluator, folder)
    assert to_dict(run)["generations"] == found["generation"] == 2, found["stop_reason"]
    record = {name: found[name] for name in ("stop_reason", "generation", "best_fitness", "evaluations", "diverged", "seconds")}
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()]
    record |= spread([one["each"] for line in lines for one in line["candidates"] if None not in one["each"]])
    if record["error"]:
        say(f"candidates differ by {record['between']:.3g} (sd), each with an error of {record['error']:.3g} between seeds")
    return record


def spread(each: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Of candidates' fitness per seed: `between`, the standard deviation of their means, and `error`, the standard error of a mean.

    What a search can exploit is the first where it is larger than the second. None where there are too few candidates or seeds.
    """
    if len(each) < 2:
        return {"between": None, "error": None}
    fitness = np.asarray(each)
    error = float((fitness.var(axis=1, ddof=1).mean() / fitness.shape[1]) ** 0.5) if fitness.shape[1] > 1 else None
    return {"between": float(fitness.mean(axis=1).std(ddof=1)), "error": error}
