"""Predictions judged by the records: success, neutral, failure or not measured, each with the runs that decided it.

A prediction needs the paired seeds that a table needs; what was run for a test of the machinery (`smoke`) or with too few tokens or
seeds does not decide anything.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bio_inspired_nanochat.study.predictions import PREDICTIONS, Bounds, Prediction
from bio_inspired_nanochat.study.statistics import Paired, Rule, judge, paired

VERDICTS = ("success", "neutral", "failure", "not measured")
ALIKE = 0.01  # nats: an interval that ends below this excludes a loss that matters
LOWER_IS_BETTER = ("perplexity", "calibration.ece")
# metric -> condition -> seed -> (value, id of the run), at one depth
Values = Mapping[str, Mapping[str, Mapping[int, tuple[float, str]]]]


@dataclass(frozen=True)
class Score:
    """The verdict on one prediction at one depth. value: what was computed, on its scale (see `Prediction.kind`); why: in words;
    runs: ids of those that decided it."""

    id: str
    depth: int | None
    verdict: str
    value: float | None
    metric: str
    why: str
    runs: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"runs": list(self.runs)}


class Unmeasured(Exception):
    """A prediction lacks records; the message says which."""


def score(
    values: Mapping[int, Values],
    aliases: Mapping[str, str],
    rule: Rule,
    facts: Mapping[str, tuple[float, str]] | None = None,
    predictions: Sequence[Prediction] = PREDICTIONS,
    diverged: Mapping[tuple[int, str], Sequence[str]] | None = None,
) -> list[Score]:
    """Judge every prediction at every depth. values: by depth, of runs that may enter a table; aliases: names of conditions to those in
    `values`; facts: measurements that no run of the matrix makes, as name -> (value, where it is from); diverged: runs whose training
    diverged, by depth and condition, which is a failure of whatever was predicted of that condition."""
    found = []
    for one in predictions:
        if one.condition is None and not one.series:
            found.append(_of_fact(one, facts or {}))
            continue
        tried = []
        for depth in sorted({*values, *(at for at, _ in diverged or {})}):
            lost = (diverged or {}).get((depth, aliases.get(str(one.condition), str(one.condition))))
            if lost:
                tried.append(Score(one.id, depth, "failure", None, "", f"training of {one.condition} diverged", tuple(lost)))
            else:
                tried.append(_at_depth(one, depth, _Look(values.get(depth, {}), aliases, rule)))
        found += tried or [Score(one.id, None, "not measured", None, "", "no run counts: each is missing, failed or listed apart")]
    return found


def _of_fact(one: Prediction, facts: Mapping[str, tuple[float, str]]) -> Score:
    for name in one.metrics:
        if name in facts:
            value, where = facts[name]
            verdict = _within(value, one.success, one.failure)
            return Score(one.id, None, verdict, value, name, f"{value:.4g} against {_bounds(one)}", (where,))
    return Score(one.id, None, "not measured", None, "", f"no measurement of {' or '.join(one.metrics)}")


def _at_depth(one: Prediction, depth: int, look: _Look) -> Score:
    try:
        verdict, value, metric, why = KINDS[one.kind](one, look)
    except Unmeasured as missing:
        return Score(one.id, depth, "not measured", None, "", str(missing))
    for metrics, kind, success, failure in one.guards:
        guard = replace(one, metrics=metrics, kind=kind, success=success, failure=failure, guards=())
        try:
            other, number, name, _ = KINDS[kind](guard, look)
        except Unmeasured as missing:
            return Score(one.id, depth, "not measured", value, metric, str(missing), look.runs())
        why += f"; {name} {number:+.4g} ({other})"
        if other == "failure" or (verdict == "success" and other == "neutral"):
            verdict = other
    return Score(one.id, depth, verdict, value, metric, why, look.runs())


class _Look:
    """Values at one depth; remembers the runs that were looked at."""

    def __init__(self, values: Values, aliases: Mapping[str, str], rule: Rule) -> None:
        self.values, self.aliases, self.rule, self._runs = values, aliases, rule, dict[str, None]()

    def runs(self) -> tuple[str, ...]:
        return tuple(self._runs)

    def of(self, metric: str, condition: str) -> dict[int, float]:
        """Values by seed; Unmeasured when there are fewer than the rule wants."""
        found = self.values.get(metric, {}).get(self.aliases.get(condition, condition), {})
        if len(found) < self.rule.min_seeds:
            raise Unmeasured(f"{metric} of {condition} has {len(found)} seeds of {self.rule.min_seeds}")
        return {seed: value for seed, (value, _) in found.items()}

    def both(self, one: Prediction) -> tuple[str, dict[int, float], dict[int, float]]:
        """The first metric that both sides have, with both sides at the seeds that they share."""
        reason: Unmeasured | None = None
        for metric in one.metrics:
            try:
                ours, theirs = self.together(metric, (str(one.condition), str(one.reference)))
            except Unmeasured as missing:
                reason = reason or missing
                continue
            return metric, ours, theirs
        raise reason or Unmeasured("nothing to measure it by")

    def note(self, metric: str, condition: str, seeds: Sequence[int]) -> None:
        found = self.values[metric][self.aliases.get(condition, condition)]
        self._runs |= dict.fromkeys(found[seed][1] for seed in seeds)

    def compare(self, metric: str, condition: str, reference: str) -> Paired:
        ours, theirs = self.together(metric, (condition, reference))
        return paired(ours, theirs, self.rule)

    def together(self, metric: str, conditions: Sequence[str]) -> list[dict[int, float]]:
        """Values of several conditions by seed, at the seeds that all of them have; Unmeasured when there are fewer than the rule wants."""
        every = [self.of(metric, name) for name in conditions]
        seeds = sorted(set.intersection(*(set(one) for one in every)))
        if len(seeds) < self.rule.min_seeds:
            raise Unmeasured(f"{metric}: {', '.join(conditions)} share {len(seeds)} seeds of {self.rule.min_seeds}")
        for name in conditions:
            self.note(metric, name, seeds)
        return [{seed: one[seed] for seed in seeds} for one in every]


Verdict = tuple[str, float | None, str, str]


def _change(one: Prediction, look: _Look) -> Verdict:
    metric, ours, theirs = look.both(one)
    value = statistics.fmean(ours[seed] - theirs[seed] for seed in ours)
    return _within(value, one.success, one.failure), value, metric, f"changes by {value:+.4g}, {_bounds(one)}"


def _relative(one: Prediction, look: _Look) -> Verdict:
    metric, ours, theirs = look.both(one)
    before = statistics.fmean(theirs.values())
    if before == 0:
        raise Unmeasured(f"{metric} of {one.reference} is 0: a relative change does not exist")
    value = statistics.fmean(ours.values()) / before - 1
    return _within(value, one.success, one.failure), value, metric, f"changes by {value:+.2%}, {_bounds(one)}"


def _level(one: Prediction, look: _Look) -> Verdict:
    reason: Unmeasured | None = None
    for metric in one.metrics:
        try:
            found = look.of(metric, str(one.condition))
        except Unmeasured as missing:
            reason = reason or missing
            continue
        look.note(metric, str(one.condition), list(found))
        value = statistics.fmean(found.values())
        return _within(value, one.success, one.failure), value, metric, f"{value:.4g}, {_bounds(one)}"
    raise reason or Unmeasured("nothing to measure it by")


def _by_rule(one: Prediction, look: _Look) -> Verdict:
    metric, ours, theirs = look.both(one)
    (found,) = judge([paired(ours, theirs, look.rule)], look.rule)
    if one.better == "not higher":
        verdict = "success" if (found.high or 0.0) < ALIKE else "failure" if found.verdict == "higher" else "neutral"
    else:
        worse = {"higher": "lower", "lower": "higher"}[one.better]
        verdict = {one.better: "success", worse: "failure"}.get(found.verdict, "neutral")
    return verdict, found.mean, metric, f"difference {found.mean:+.4g}, interval {found.low:+.4g} to {found.high:+.4g}: {found.verdict}"


def _peak(one: Prediction, look: _Look) -> Verdict:
    metric = one.metrics[0]
    means = {name: statistics.fmean(found.values()) for name, found in zip(one.series, look.together(metric, one.series), strict=True)}
    best = min(means, key=lambda name: means[name])
    ends = (one.series[0], one.series[-1])
    against = judge([look.compare(metric, best, end) for end in ends if end != best], look.rule)
    noise = judge([look.compare(metric, name, str(one.reference)) for name in one.series], look.rule)
    if best not in ends and all(found.verdict == "lower" for found in against):
        verdict = "success"
    else:
        verdict = "failure" if all(found.verdict == "higher" for found in noise) else "neutral"
    said = ", ".join(f"{name.partition(':')[2]}: {value:.4f}" for name, value in means.items())
    return verdict, means[best], metric, f"best is {best} ({said})"


def _halves(one: Prediction, look: _Look) -> Verdict:
    metric = one.metrics[0]
    steps = sorted({name for name in look.aliases if name.startswith(f"{one.series[0]}:")})
    if len(steps) < 2:
        raise Unmeasured("the set cumulative was not planned")
    names = (str(one.reference), steps[len(steps) // 2], "all_on")
    start, middle, end = (statistics.fmean(found.values()) for found in look.together(metric, names))
    first, second = start - middle, middle - end
    if second > max(first, 0.0):
        verdict = "failure"
    else:
        verdict = "success" if second < first / 2 else "neutral"
    return verdict, second - first, metric, f"the first half gains {first:+.4f} nats, the second {second:+.4f}"


def _count(one: Prediction, look: _Look) -> Verdict:
    gains: dict[str, float] = {}
    for benchmark in one.metrics:
        after, before = 0.0, 0.0
        for name in fnmatch.filter(look.values, benchmark):
            try:
                _, ours, theirs = look.both(replace(one, metrics=(name,)))
            except Unmeasured:
                continue
            after, before = after + statistics.fmean(ours.values()), before + statistics.fmean(theirs.values())
        if before > 0:
            share = after / before - 1
            gains[benchmark] = -share if benchmark in LOWER_IS_BETTER else share
    if len(gains) < 2:
        raise Unmeasured(f"{len(gains)} of the benchmarks were measured on {one.condition} and {one.reference}, two are needed")
    better = [name for name, gain in gains.items() if gain > float(one.success[0] or 0)]
    worse = [name for name, gain in gains.items() if gain < float(one.failure[1] or 0)]
    verdict = "success" if len(better) >= 2 else "failure" if worse and not better else "neutral"
    return (
        verdict,
        float(len(better)),
        ", ".join(gains),
        f"better by over 10 %: {', '.join(better) or 'none'}; worse by over 5 %: {', '.join(worse) or 'none'}",
    )


KINDS: dict[str, Callable[[Prediction, _Look], Verdict]] = {
    "change": _change,
    "relative": _relative,
    "level": _level,
    "rule": _by_rule,
    "peak": _peak,
    "halves": _halves,
    "count": _count,
}


def _inside(value: float, bounds: Bounds) -> bool:
    low, high = bounds
    return bounds != (None, None) and (low is None or value > low) and (high is None or value < high)


def _within(value: float, success: Bounds, failure: Bounds) -> str:
    if not math.isfinite(value):
        return "failure"
    return "success" if _inside(value, success) else "failure" if _inside(value, failure) else "neutral"


def _bounds(one: Prediction) -> str:
    """The thresholds in words."""

    def said(bounds: Bounds) -> str:
        low, high = bounds
        return " and ".join(filter(None, ("" if low is None else f"above {low:g}", "" if high is None else f"below {high:g}")))

    parts = [f"{name} {said(bounds)}" for name, bounds in (("success", one.success), ("failure", one.failure)) if bounds != (None, None)]
    return ", ".join(parts)
