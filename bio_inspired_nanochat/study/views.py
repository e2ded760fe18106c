"""Equal tokens, equal FLOPs, equal wall clock: the validation loss of two runs where they have spent the same, from their curves.

Between two evaluations the loss is linear in the logarithm of what was spent; nothing is extrapolated. Learning rates fall towards the
end of a run, so the run that is read before its own end is read at a higher learning rate than the one that has just ended, and looks
worse than a run planned for that budget would: where the difference matters, compare with an anchor that was trained to that budget
(`vanilla_flops`).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bio_inspired_nanochat.common.files import read_json_lines

VIEWS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Curve:
    """Validation loss in nats [E] at the evaluations of a run, and what had been spent by then: tokens, FLOPs, seconds of training
    (without evaluations and compiling; empty for a run that shared its device), [E] each and rising."""

    tokens: tuple[float, ...]
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]

    def end(self, view: str) -> float | None:
        """What had been spent at the last evaluation."""
        spent = getattr(self, view)
        return spent[-1] if spent else None

    def at(self, view: str, budget: float) -> float | None:
        """Loss where `budget` was spent; None before the first and after the last evaluation."""
        spent = getattr(self, view)
        if not spent or budget < spent[0] * (1 - 1e-9) or budget > spent[-1] * (1 + 1e-9):
            return None
        i = min(bisect.bisect_left(spent, budget), len(spent) - 1)
        if i == 0 or spent[i] <= budget:
            return self.loss[i]
        left, right = math.log(spent[i - 1]), math.log(spent[i])
        share = (math.log(budget) - left) / (right - left)
        return self.loss[i - 1] + share * (self.loss[i] - self.loss[i - 1])


def read_curve(metrics: Path, flops_per_token: float) -> Curve:
    """The curve of a run from its `metrics.jsonl`: evaluations, and times from the speeds between log lines. Damaged lines are skipped."""
    points: list[tuple[float, float, float]] = []
    laps: list[tuple[int, float, float]] = [(0, 0.0, 0.0)]  # step, tokens, seconds
    evaluations: list[tuple[int, float]] = []
    for event in read_json_lines(metrics):
        if event.get("kind") == "step" and event.get("tok_per_s"):
            step, tokens, (_, before, seconds) = event["step"], float(event["tokens"]), laps[-1]
            if tokens > before:
                laps.append((step, tokens, seconds + (tokens - before) / event["tok_per_s"]))
        elif event.get("kind") == "eval" and event.get("val_loss") is not None:
            evaluations.append((event["step"], event["val_loss"]))
    steps = [lap[0] for lap in laps]
    for step, loss in evaluations:
        i = min(max(1, bisect.bisect_left(steps, step)), len(laps) - 1)
        if i < 1:  # no line of the log to take a time from
            continue
        (s0, t0, c0), (s1, t1, c1) = laps[i - 1], laps[i]
        share = (step - s0) / (s1 - s0)
        points.append((t0 + share * (t1 - t0), c0 + share * (c1 - c0), loss))
    points = [point for i, point in enumerate(points) if point[0] > 0 and (i == 0 or point[0] > points[i - 1][0])]
    tokens = tuple(point[0] for point in points)
    return Curve(tokens, tuple(t * flops_per_token for t in tokens), tuple(p[1] for p in points), tuple(p[2] for p in points))


def meet(view: str, ours: Curve, theirs: Curve) -> tuple[float, float, float] | None:
    """(budget, our loss, their loss) where the shorter of two runs ends; None where one of them has no evaluation there."""
    our_end, their_end = ours.end(view), theirs.end(view)
    if our_end is None or their_end is None:
        return None
    budget = min(our_end, their_end)
    our_loss, their_loss = ours.at(view, budget), theirs.at(view, budget)
    return None if our_loss is None or their_loss is None else (budget, our_loss, their_loss)


def step_variances(metrics: Path) -> dict[str, float | None]:
    """Variance over the last half of a run's log lines of its loss and of its gradient norm; None for fewer than 3."""
    lines = [event for event in read_json_lines(metrics) if event.get("kind") == "step"]
    lines = lines[len(lines) // 2 :]
    found: dict[str, float | None] = {}
    for name, field in (("train.loss_variance", "loss"), ("train.grad_norm_variance", "grad_norm")):
        values = [float(event[field]) for event in lines if event.get(field) is not None]
        found[name] = _variance_about_trend(values)
    return found


def _variance_about_trend(values: Sequence[float]) -> float | None:
    """Half the mean squared difference of neighbours (von Neumann 1941): a variance that a slow trend does not raise."""
    if len(values) < 3:
        return None
    return sum((b - a) ** 2 for a, b in itertools.pairwise(values)) / (2 * (len(values) - 1))
