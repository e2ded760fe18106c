"""What a training step of each condition costs, alone on the device: for runs that were done side by side, whose own times say nothing.

    speed.json   by depth and condition: seconds per token and GiB, measured in turns with the depth's first condition

A speed belongs to a model and a batch, not to a seed or a text, so once is enough for all runs of a condition, and of those that train
the same model.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.records import failures, free_unused, reason, short
from bio_inspired_nanochat.benchmarks.timing import Competitor, interleave, paired_ratio, warm_up
from bio_inspired_nanochat.benchmarks.train import Trainee
from bio_inspired_nanochat.common import pick_device, progress, say, table, write_atomic
from bio_inspired_nanochat.config import from_dict, knob, to_dict
from bio_inspired_nanochat.errors import UserError, damaged_file, nearest
from bio_inspired_nanochat.git import source_revision
from bio_inspired_nanochat.study.plan import FolderConfig, read_plan
from bio_inspired_nanochat.study.statistics import digest
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.hardware import GIB
from bio_inspired_nanochat.training.plan import Plan, make_plan

FILE = "speed.json"
COLUMNS = ("depth", "condition", "µs a token", "x first", "quartiles", "memory GiB")
# What a step does not feel of a run's configuration.
UNFELT: dict[str, Any] = {"seed": 0, "num_iterations": 1, **dict.fromkeys(("eval_every", "log_every", "vitals_every"), 1)}


@dataclass(frozen=True)
class SpeedConfig(FolderConfig):
    """Measure what a training step of each condition takes, alone on the device, so that runs done side by side can be compared at equal time."""

    conditions: tuple[str, ...] = knob((), "conditions to measure; none given: all that are not measured yet")
    seconds: float = knob(4.0, "time for the steps of a condition, in turns with those of the first one", lo=0.0, hi=3600.0, unit="seconds")
    budget_minutes: float = knob(0.0, "begin no further condition after this time; 0 is no limit", lo=0.0, off=0.0, unit="minutes")


@dataclass(frozen=True)
class Speed:
    """What training a model takes: seconds and GiB; ratio: its step over that of the plan's first condition, median and quartiles."""

    seconds_per_token: float
    gib: float
    ratio: tuple[float, float, float]


@dataclass(frozen=True)
class Speeds:
    """What was measured on one device, by depth and condition; git: the code that was measured first."""

    device: str
    git: str | None
    found: dict[int, dict[str, Speed]]


def measure_speed(config: SpeedConfig) -> dict[str, Any]:
    """Measure, and write speed.json after every condition; returns the script's last line.

    Raises UserError without a plan, for an unknown condition, and where speed.json is of another device.
    """
    folder = config.folder()
    plan = read_plan(folder)
    for name in config.conditions:
        known = list(plan["conditions"])
        if name not in known:
            raise UserError(f"conditions={name!r} is not in the plan: one of {', '.join(known)}{nearest(name, known)}")
    device = pick_device(from_dict(TrainConfig, plan["runs"][0]["train"]).device)
    speeds = read_speeds(folder) or Speeds(_place(device), source_revision(), {})
    if speeds.device != _place(device):
        raise UserError(f"{folder / FILE} was measured on {speeds.device}, and this is {_place(device)}: move it away, or use that device")
    models = {depth: _models(plan, depth) for depth in sorted({run["depth"] for run in plan["runs"]})}
    wanted = [(depth, one) for depth in models for one in _due(models[depth], config.conditions, speeds.found.get(depth, {}))]
    began, left_out, failed = time.monotonic(), 0, {}
    reference: Trainee | None = None
    with progress(len(wanted), "measure", "models") as bar:
        for depth, model in wanted:
            first = models[depth][0]
            if config.budget_minutes and time.monotonic() - began > 60 * config.budget_minutes:
                left_out += 1
                continue
            try:
                if reference is None or reference.plan is not first.plan:
                    reference = None  # the old one is freed before the new one is made
                    reference = Trainee(first.plan, device)
                speed = _measured(reference, model.plan, speeds.found.get(depth, {}).get(first.names[0]), device, config.seconds)
            except failures() as error:
                failed[f"{model.names[0]} at depth {depth}"] = reason(error)
                say(f"notice: {model.names[0]} at depth {depth} was not measured: {reason(error)}")
                continue
            finally:
                free_unused(device)
                bar.advance()
            speeds.found.setdefault(depth, {}).update(dict.fromkeys(model.names, speed))
            write_speeds(folder, speeds)
            say(f"depth {depth}, {model.names[0]}: {short(speed.ratio[0])} x the step of {first.names[0]}")
    return _describe(speeds, left_out, failed, folder)


@dataclass(frozen=True)
class _Model:
    """What conditions `names` of one depth train."""

    names: list[str]
    plan: Plan


def _models(plan: Mapping[str, Any], depth: int) -> list[_Model]:
    """The models of a depth, in the order of the plan's conditions."""
    runs = {name: run for run in reversed(plan["runs"]) if run["depth"] == depth for name in run["conditions"]}
    found: dict[str, _Model] = {}
    for name in plan["conditions"]:
        if name in runs:
            config = from_dict(TrainConfig, runs[name]["train"])
            key = digest(to_dict(dataclasses.replace(config, **UNFELT)))
            if key not in found:
                found[key] = _Model([], make_plan(config, pick_device(config.device), 1))
            found[key].names.append(name)
    return list(found.values())


def _due(models: Sequence[_Model], conditions: Sequence[str], known: Mapping[str, Speed]) -> list[_Model]:
    """The models to measure: those asked for, or all that are not known; while the first one is not known it comes first."""
    first, due = (
        models[0],
        [one for one in models if (any(name in conditions for name in one.names) if conditions else one.names[0] not in known)],
    )
    return due if first in due or first.names[0] in known or not due else [first, *due]


def _measured(reference: Trainee, plan: Plan, known: Speed | None, device: torch.device, seconds: float) -> Speed:
    """A model in turns with the depth's first one, which is `known` unless it is measured itself. Its time is the ratio to the first one's:
    that stays when the device gets warm or busy between two measurements."""
    trainee = reference if plan is reference.plan else Trainee(plan, device)
    works = {id(one): Competitor(one.step) for one in (reference, trainee)}
    for one in works.values():
        warm_up(one, device)
    gib = trainee.memory() / GIB
    courses = interleave({str(key): one for key, one in works.items()}, device, seconds)
    first, own = courses[str(id(reference))], courses[str(id(trainee))]
    ratio = paired_ratio(own.total(), first.total())
    assert ratio is not None
    unit = first.spread().median / reference.plan.tokens_per_step if known is None else known.seconds_per_token
    return Speed(unit * ratio.median, gib, (ratio.median, ratio.low, ratio.high))


def _place(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"


def read_speeds(folder: Path) -> Speeds | None:
    """What `measure_speed` has written, or None. Raises UserError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    with damaged_file(path, "move it away and measure again"):
        held = json.loads(path.read_text(encoding="utf-8"))
        found = {
            int(depth): {name: Speed(one["seconds_per_token"], one["gib"], tuple(one["ratio"])) for name, one in by_name.items()}
            for depth, by_name in held["depths"].items()
        }
        return Speeds(held["device"], held["git"], found)


def write_speeds(folder: Path, speeds: Speeds) -> None:
    """Write speed.json whole. Raises UserError where the folder cannot be written."""
    depths = {str(depth): {name: dataclasses.asdict(one) for name, one in by.items()} for depth, by in speeds.found.items()}
    try:
        write_atomic(folder / FILE, json.dumps({"device": speeds.device, "git": speeds.git, "depths": depths}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out={str(folder)!r} cannot be written ({error.strerror}): give a writable folder") from None


def _describe(speeds: Speeds, left_out: int, failed: Mapping[str, str], folder: Path) -> dict[str, Any]:
    every = [(depth, name, one) for depth, by_name in sorted(speeds.found.items()) for name, one in by_name.items()]
    rows = [
        (depth, name, short(one.seconds_per_token * 1e6), short(one.ratio[0]), "-".join(f"{x:.4g}" for x in one.ratio[1:]), short(one.gib))
        for depth, name, one in every
    ]
    table(COLUMNS, rows)
    return {
        "device": speeds.device,
        "measured": len(every),
        "left_out": left_out,
        "failed": failed,
        "step_ratio": {str(depth): {name: short(one.ratio[0]) for name, one in by.items()} for depth, by in sorted(speeds.found.items())},
        "speed": str(folder / FILE),
    }
