"""The records of a matrix as values by depth, metric, condition and seed; which of them count, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.errors import UserError, damaged_file
from bio_inspired_nanochat.study.job import OF_SPEED
from bio_inspired_nanochat.study.plan import FEWEST_SEEDS, fewest_tokens
from bio_inspired_nanochat.study.queue import read_attempts, read_record
from bio_inspired_nanochat.study.speed import FILE, Speeds, read_speeds
from bio_inspired_nanochat.study.views import VIEWS, Curve, meet

DIVERGED = "training diverged"  # what a run says whose loss or weights are not finite, or jump (see `training.faults.diverged`)
# depth -> metric -> condition -> seed -> (value, id of the run)
ByDepth = dict[int, dict[str, dict[str, dict[int, tuple[float, str]]]]]


@dataclass
class Records:
    """What the runs of a plan have left.

    counted: records that may enter a table; apart: (run, reason) of those that may not; missing: ids of runs without a record;
    failed: the last attempt of runs that failed, by id; notices: what a reader should know about the counted ones.
    """

    counted: list[dict[str, Any]] = field(default_factory=list)
    apart: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def diverged(self, plan: Mapping[str, Any]) -> dict[tuple[int, str], list[str]]:
        """Ids of runs of a countable size whose training diverged, by depth and condition."""
        found: dict[tuple[int, str], list[str]] = {}
        for run in plan["runs"]:
            attempt = self.failed.get(run["id"])
            large = plan["smoke"] or run["tokens"] >= fewest_tokens(run["depth"])
            if attempt and large and any(DIVERGED in line for line in attempt["last_lines"]):
                for name in run["conditions"]:
                    found.setdefault((run["depth"], name), []).append(run["id"])
        return found

    def values(self) -> ByDepth:
        """Everything that was measured, by depth, metric, condition and seed."""
        found: ByDepth = {}
        for record in self.counted:
            metrics = dict(record["metrics"])
            if metrics.get("tok_per_s"):
                metrics["seconds_per_token"] = 1 / metrics["tok_per_s"]
            by_metric = found.setdefault(record["depth"], {})
            for name, value in metrics.items():
                if value is None:
                    continue
                for condition in record["conditions"]:
                    by_metric.setdefault(name, {}).setdefault(condition, {})[record["seed"]] = (value, record["id"])
        return found

    def curves(self) -> dict[tuple[int, str, int], Curve]:
        """Loss curves by depth, condition and seed."""
        return {(one["depth"], name, one["seed"]): curve_of(one) for one in self.counted for name in one["conditions"]}


def curve_of(record: Mapping[str, Any]) -> Curve:
    """The curve in a record."""
    return Curve(**{name: tuple(values) for name, values in record["curve"].items()})


def collect(folder: Path, plan: Mapping[str, Any]) -> Records:
    """Read the records of a plan's runs. Raises UserError for a record that was made under another rule, plan or text, or is damaged."""
    found = Records()
    done: list[dict[str, Any]] = []
    for run in plan["runs"]:
        place = folder / "runs" / run["id"]
        record = read_record(place)
        if record is None:
            if (place / "record.json").exists():
                found.notices.append(f"the record of {run['id']} cannot be read: it counts as missing")
            attempts = read_attempts(place)
            if attempts:
                found.failed[run["id"]] = attempts[-1]
            found.missing.append(run["id"])
            continue
        with damaged_file(place / "record.json", "move its folder away and resume"):
            _belongs(record, run, plan)
            done.append(checked(record))
    speeds = read_speeds(folder)
    _count(found, done if speeds is None else [_timed(one, speeds) for one in done], smoke=plan["smoke"])
    for what in ("device", "git"):
        kinds = sorted({str(one[what]) for one in found.counted})
        if len(kinds) > 1:
            found.notices.append(f"the runs differ in {what}: {', '.join(kinds)}")
    if speeds is not None:
        others = sorted({str(one["device"]) for one in found.counted} - {speeds.device})
        found.notices.append(
            f"times and memory are those that `eval_matrix speed` measured alone on {speeds.device} (git {speeds.git})"
            + (f", while runs were done on {', '.join(others)}" if others else "")
        )
    for (depth, name), ids in found.diverged(plan).items():
        found.notices.append(f"training diverged in {', '.join(ids)}: what is said of {name} at depth {depth} is of the other seeds alone")
    if untimed := sum(one["metrics"].get("tok_per_s") is None for one in found.counted):
        why = (
            f"have no speed in {FILE}"
            if speeds is not None
            else "shared their device with others (`eval_matrix speed` measures them alone)"
        )
        found.notices.append(f"{untimed} runs {why}: they take no part in what is said of time and memory")
    kinds = sorted({str(one["versions"]) for one in found.counted})
    if len(kinds) > 1:
        found.notices.append(f"the runs differ in versions: {'; '.join(kinds)}")
    return found


def _belongs(record: Mapping[str, Any], run: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises UserError unless a record is that of a plan's run."""
    if record["digest"] != plan["digest"]:
        raise UserError(
            f"run {run['id']} was made under another rule or plan (digest {record['digest']}, now {plan['digest']}): "
            "rule and comparisons may not change after the runs; use the plan of the runs, or do them anew in another folder"
        )
    if record["key"] != run["key"] or record["data"] != plan["data"]:
        raise UserError(f"run {run['id']} was trained with other settings or text than the plan's: move its folder away and resume")
    for name in ("id", "conditions", "depth", "seed"):
        if record[name] != run[name]:
            raise UserError(f"run {run['id']} has {name}={record[name]!r}, the plan {run[name]!r}: move its folder away and resume")


def checked(record: dict[str, Any]) -> dict[str, Any]:
    """A record with None for metrics that are not finite. Raises KeyError, TypeError or ValueError where it is not one."""
    for name in ("device", "git", "versions"):
        record[name]
    if not isinstance(record["tokens"], int):
        raise TypeError(f"tokens is {record['tokens']!r}, which is no count")
    metrics = {name: _number(name, value) for name, value in record["metrics"].items()}
    curve = curve_of(record)
    for name, values in record["curve"].items():
        if len(values) != len(curve.loss) and (values or name != "seconds"):
            raise ValueError(f"its curve has {len(values)} {name} for {len(curve.loss)} losses")
        if any(_number(name, value) is None for value in values) or (
            name != "loss" and not all(a < b for a, b in pairwise((0.0, *values)))
        ):
            raise ValueError(f"{name} of its curve are no rising numbers" if name != "loss" else "a loss of its curve is not finite")
    return {**record, "metrics": metrics}


def _number(name: str, value: Any) -> float | None:
    """A finite number, None for one that is not. Raises TypeError for anything else."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} is {value!r}, which is no number")
    return float(value) if value is not None and math.isfinite(value) else None


def _timed(record: dict[str, Any], speeds: Speeds) -> dict[str, Any]:
    """A record with the times and memory of its condition measured alone, in place of those of the run; without them where there are none."""
    by_name = speeds.found.get(record["depth"], {})
    speed = next((by_name[name] for name in record["conditions"] if name in by_name), None)
    if speed is None:
        spent, seconds = dict.fromkeys(OF_SPEED), []
    else:
        spent = {
            "tok_per_s": 1 / speed.seconds_per_token,
            "peak_memory_gib": speed.gib,
            "seconds": record["tokens"] * speed.seconds_per_token,
        }
        seconds = [tokens * speed.seconds_per_token for tokens in record["curve"]["tokens"]]
    return {**record, "metrics": record["metrics"] | spent, "curve": record["curve"] | {"seconds": seconds}}


def _count(found: Records, done: Iterable[dict[str, Any]], smoke: bool) -> None:
    """Sort records into those that count and those that are listed apart."""
    large = []
    for record in done:
        least = fewest_tokens(record["depth"])
        if not smoke and record["tokens"] < least:
            found.apart.append((record, f"{record['tokens']:,} tokens, below {least:,} of depth {record['depth']}"))
        elif record["metrics"].get("val_loss") is None:
            found.apart.append((record, "no validation loss"))
        else:
            large.append(record)
    seeds: dict[tuple[int, str], set[int]] = {}
    for record in large:
        for name in record["conditions"]:
            seeds.setdefault((record["depth"], name), set()).add(record["seed"])
    for record in large:
        most = max(len(seeds[record["depth"], name]) for name in record["conditions"])
        if most < FEWEST_SEEDS:
            found.apart.append((record, f"{most} of {FEWEST_SEEDS} seeds"))
        else:
            found.counted.append(record)


def viewed(
    curves: Mapping[tuple[int, str, int], Curve], depth: int, condition: str, reference: str, view: str
) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of both sides by seed where both have spent the same; seeds at which they do not meet are left out."""
    assert view in VIEWS
    ours: dict[int, float] = {}
    theirs: dict[int, float] = {}
    for at, name, seed in curves:
        if at == depth and name == condition and (depth, reference, seed) in curves:
            met = meet(view, curves[depth, condition, seed], curves[depth, reference, seed])
            if met is not None:
                _, ours[seed], theirs[seed] = met
    return ours, theirs
