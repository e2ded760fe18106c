"""`bench_scaling`: what several processes train per second, against as many times what one trains, in one run.

Weak scaling: every process has the same rows, so N processes make steps of N times the tokens. In each round the first process trains
alone while the others wait, then all train together by ddp and by fsdp; the efficiency of a round is the time of a step alone over the time
of a step together.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.records import (
    check_record_path,
    free_unused,
    keep_record,
    place,
    quartiles,
    short,
    shown,
)
from bio_inspired_nanochat.benchmarks.timing import Spread, paired_ratio
from bio_inspired_nanochat.benchmarks.train import CPU_ROWS, TrainingSizes
from bio_inspired_nanochat.common import Rank, pick_device, say, table, this_rank
from bio_inspired_nanochat.config import PRESETS, SynapticConfig, dtype_knob, knob, knobs_of, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import TrainConfig, guards
from bio_inspired_nanochat.training.clock import wait_for_device
from bio_inspired_nanochat.training.hardware import GIB
from bio_inspired_nanochat.training.pace import Rehearsal
from bio_inspired_nanochat.training.plan import Plan, make_plan
from bio_inspired_nanochat.training.ranks import broadcast, process_group

_KINDS, _WAYS = ("vanilla", "synaptic"), ("ddp", "fsdp")
_TRAINING = knobs_of(TrainConfig)
FEWEST_ROUNDS, MOST_ROUNDS = 3, 100
WARM_STEPS = 3
PROFILED_STEPS = 3
COLUMNS = (
    "model",
    "parallel",
    "step ms alone",
    "step ms together",
    "tok/s",
    "efficiency",
    "quartiles",
    "sent ms",
    "hidden",
    "GiB",
    "rounds",
)


@dataclass(frozen=True)
class BenchScalingConfig(TrainingSizes):
    """Models of one size, trained by one process and by all."""

    device_batch_size: int | None = knob(
        None,
        "rows of one forward of one process; auto is half of what the synaptic model fits on CUDA, 2 elsewhere",
        lo=1,
        hi=1 << 20,
        aliases=("batch_size",),
    )
    accumulation: int = knob(1, "forwards of one process per step, whose gradients travel once", lo=1, hi=1 << 20)
    models: tuple[str, ...] = knob(_KINDS, "models to train", choices=_KINDS)
    parallel: tuple[str, ...] = knob(_WAYS, "how the processes share a model", choices=_WAYS)
    bucket_mb: float = knob(25.0, _TRAINING["bucket_mb"].doc, lo=0.01, hi=4096.0, unit="MB")
    reduce_dtype: str = knob("float32", _TRAINING["reduce_dtype"].doc, choices=_TRAINING["reduce_dtype"].choices)
    reshard: bool = knob(False, _TRAINING["reshard"].doc, off=False)
    syn_preset: str = knob("default", "named set of synaptic constants that --syn_cfg.* flags then change", choices=tuple(PRESETS))
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")
    compile: str = knob("auto", "torch.compile; auto is 1 on CUDA, 0 elsewhere", choices=("auto", "0", "1"))
    steps: int = knob(5, "steps of each competitor in a round", lo=1, hi=1000, unit="steps")
    seconds: float = knob(60.0, "time for the rounds of one model; compiling comes before", lo=0.0, hi=1e6, unit="seconds")
    trace: str | None = knob(None, "folder for the profiler's traces of the first process (CUDA)", none="none")
    device: str = knob("auto", "where to run; auto takes CUDA, then the CPU", choices=("auto", "cpu", "cuda"))
    dtype: str = dtype_knob()
    seed: int = knob(0, "seed of weights and tokens", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("models", "parallel"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give at least one")


def bench_scaling(config: BenchScalingConfig) -> dict[str, Any]:
    """Train every model alone and together, print the table; returns the script's last line. Collective.

    Raises UserError for what cannot be, also for a process that has no others.
    """
    if this_rank().world == 1:
        command = "torchrun --standalone --nproc_per_node=2 -m scripts.bench_scaling"
        raise UserError(f"one process has nothing to scale to: start several by {command}")
    check_record_path(config.json)
    device = pick_device(config.device)
    with process_group(device) as rank:
        rows = broadcast(_rows(config, device))
        where = place(device, _plan(config, device, 1, rows, "vanilla", "ddp").dtype)
        results = [result for kind in config.models for result in _measure(config, device, rank, rows, kind)]
    table(COLUMNS, [_cells(result) for result in results])
    plan = _plan(config, device, rank.world, rows, "vanilla", "ddp")
    record: dict[str, Any] = where | {
        "world": rank.world,
        "depth": plan.model.n_layer,
        "n_embd": plan.model.n_embd,
        "max_seq_len": plan.model.sequence_len,
    }
    record |= {"vocab_size": plan.model.vocab_size, "device_batch_size": plan.rows, "accumulation": plan.accumulation}
    record |= {"tokens_per_step": plan.tokens_per_step, "compiled": plan.config.compile != "0", "bucket_mb": config.bucket_mb}
    record |= {"reduce_dtype": config.reduce_dtype, "reshard": config.reshard, "syn_preset": config.syn_preset}
    record["efficiency"] = {kind: {r["parallel"]: r["efficiency"] for r in results if r["model"] == kind} for kind in config.models}
    record["results"] = results
    if rank.first:
        keep_record(config.json, record)
    return record


def _rows(config: BenchScalingConfig, device: torch.device) -> int:
    """Rows of one forward: half of what fits, because up to three models are on the device together."""
    if config.device_batch_size is not None:
        return config.device_batch_size
    if device.type != "cuda":
        return CPU_ROWS
    return max(1, _plan(config, device, 1, None, "synaptic", "ddp").rows // 2)


def _plan(config: BenchScalingConfig, device: torch.device, world: int, rows: int | None, kind: str, way: str) -> Plan:
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("compile", "dtype", "seed", "bucket_mb", "reduce_dtype")}
    shared |= config.sizes(device) | {"device_batch_size": rows, "parallel": way, "reshard": config.reshard and way == "fsdp"}
    base = TrainConfig(**shared, num_iterations=1)
    if kind == "synaptic":
        base = dataclasses.replace(base, synapses=True, syn_preset=config.syn_preset, syn_cfg=config.syn_cfg)
    if rows is None:
        return make_plan(base, device, 1)
    length = make_plan(base, device, 1).model.sequence_len
    return make_plan(dataclasses.replace(base, total_batch_size=rows * length * world * config.accumulation), device, world)


class _Together:
    """A model in training on all ranks, or on the first one alone."""

    def __init__(self, plan: Plan, device: torch.device, rank: Rank) -> None:
        self.device, self.plan, self.takes_part = device, plan, plan.world > 1 or rank.first
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if self.takes_part:
            self.rehearsal = Rehearsal(plan, device)
        self.steps(WARM_STEPS)
        self.gib: float | None = None
        if device.type == "cuda" and self.takes_part:
            self.rehearsal.gradients.release()
            torch.cuda.reset_peak_memory_stats(device)
            self.rehearsal.step()
            wait_for_device(device)
            self.gib = (torch.cuda.max_memory_allocated(device) - before) / GIB

    def steps(self, count: int) -> float:
        """Seconds of `count` steps, those of the slowest rank. Collective."""
        guards.agree([0.0])  # all begin at once
        began = time.perf_counter()
        if self.takes_part:
            for _ in range(count):
                self.rehearsal.step()
            wait_for_device(self.device)
        return guards.agree([time.perf_counter() - began if self.takes_part else 0.0])[0]


def _measure(config: BenchScalingConfig, device: torch.device, rank: Rank, rows: int, kind: str) -> list[dict[str, Any]]:
    """One model: a result per way of sharing it. Collective."""
    plans = {"alone": _plan(config, device, 1, rows, kind, "ddp")}
    plans |= {way: _plan(config, device, rank.world, rows, kind, way) for way in config.parallel}
    say(plans["alone"].describe()[0])
    say(plans[config.parallel[0]].describe()[1].partition(";")[0])
    taken: dict[str, list[float]] = {name: [] for name in plans}
    try:
        with guards.out_of_memory_as_user_error(rows, lambda: max(1, rows // 2), str(device)):
            trainees = {}
            for name, plan in plans.items():
                began = time.perf_counter()
                trainees[name] = _Together(plan, device, rank)
                say(f"{kind}, {name}: ready after {time.perf_counter() - began:.1f} s")
            began = time.perf_counter()
            for number in range(MOST_ROUNDS):
                for name, trainee in trainees.items():
                    taken[name].append(trainee.steps(config.steps) / config.steps)
                if number + 1 >= FEWEST_ROUNDS and guards.agree([time.perf_counter() - began])[0] >= config.seconds:
                    break
            sent = {way: _traffic(trainees[way], rank, _trace_path(config.trace, kind, way)) for way in config.parallel}
            held = {name: trainee.gib for name, trainee in trainees.items()}
    finally:
        trainees = {}
        free_unused(device)
    return [_result(kind, way, plans, taken, held, sent[way]) for way in config.parallel]


def _result(
    kind: str,
    way: str,
    plans: dict[str, Plan],
    taken: dict[str, list[float]],
    held: dict[str, float | None],
    sent: dict[str, float | None],
) -> dict[str, Any]:
    """One line of the record: milliseconds, tokens per second, GiB of the first rank."""
    alone, together = Spread.of(taken["alone"]), Spread.of(taken[way])
    efficiency = paired_ratio(taken["alone"], taken[way])
    assert efficiency is not None
    return {
        "model": kind,
        "parallel": way,
        "efficiency": short(efficiency.median),
        "efficiency_quartiles": quartiles(efficiency),
        "step_ms_alone": short(alone.median * 1e3),
        "step_ms": short(together.median * 1e3),
        "tok_per_s_alone": short(plans["alone"].tokens_per_step / alone.median),
        "tok_per_s": short(plans[way].tokens_per_step / together.median),
        "memory_gib_alone": short(held["alone"]),
        "memory_gib": short(held[way]),
        "params": plans[way].params,
        "rounds": efficiency.count,
        **sent,
    }


def _cells(result: dict[str, Any]) -> tuple:
    low, high = result["efficiency_quartiles"]
    names = ("model", "parallel", "step_ms_alone", "step_ms", "tok_per_s", "efficiency")
    rest = (result["communication_ms"], result["hidden_share"], result["memory_gib"], result["rounds"])
    return (*map(result.get, names), shown(Spread(0.0, low, high, 0)), *rest)


# --- where the time goes ---------------------------------------------------------------------------------------------------------


def _trace_path(folder: str | None, kind: str, way: str) -> Path | None:
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{kind}-{way}.json"


def _traffic(trainee: _Together, rank: Rank, path: Path | None) -> dict[str, float | None]:
    """Milliseconds of communication and computation per step on the first rank's GPU, and how much of the first the second hides.

    None where there is no CUDA device: gloo's work has no place on a device's timeline. Collective.
    """
    nothing = dict.fromkeys(("communication_ms", "compute_ms", "hidden_share"))
    if trainee.device.type != "cuda":
        return nothing
    if not rank.first:
        trainee.steps(PROFILED_STEPS)
        return nothing
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainee.steps(PROFILED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return traffic_of(json.loads(path.read_text())["traceEvents"], PROFILED_STEPS)


def traffic_of(events: Sequence[dict[str, Any]], steps: int) -> dict[str, float | None]:
    """The same from the events of a trace: kernels (`cat` is kernel) with `ts` and `dur` in microseconds; NCCL's have it in their name.

    hidden_share: part of the time of communication during which another kernel runs, too; None without communication.
    """
    kernels = [(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") == "kernel"]
    sent = _union([(a, b) for name, a, b in kernels if "nccl" in name.lower()])
    computed = _union([(a, b) for name, a, b in kernels if "nccl" not in name.lower()])
    communication, both = _length(sent), _length(sent) + _length(computed) - _length(_union([*sent, *computed]))
    return {
        "communication_ms": short(communication / steps / 1e3),
        "compute_ms": short(_length(computed) / steps / 1e3),
        "hidden_share": short(both / communication) if communication else None,
    }


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint spans in order that cover the same points."""
    merged: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(b - a for a, b in spans)
