"""`bench_vitals`: what the logs of a run cost, as a share of the time that its steps take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.records import check_record_path, free_unused, keep_record, place, short
from bio_inspired_nanochat.benchmarks.timing import Competitor, interleave, warm_up
from bio_inspired_nanochat.common import pick_device, say, table
from bio_inspired_nanochat.config import PRESETS, SynapticConfig, device_knob, knob, knobs_of, validate
from bio_inspired_nanochat.training import Callback, StepRecord, TrainConfig
from bio_inspired_nanochat.training.callbacks import JsonLog, Run
from bio_inspired_nanochat.training.looks import EVERY, Looks
from bio_inspired_nanochat.training.pace import Rehearsal
from bio_inspired_nanochat.training.plan import make_plan
from bio_inspired_nanochat.training.vitals import look

_TRAINING = knobs_of(TrainConfig)
_DEFAULTS = TrainConfig()
RUN_STEPS = 100_000


@dataclass(frozen=True)
class BenchVitalsConfig:
    """A synaptic model and how often it is looked at. Sizes that are auto are those of training."""

    depth: int | None = knob(None, "number of layers; auto is that of training", lo=1, hi=256)
    n_embd: int | None = knob(None, "width; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is that of training", lo=2, hi=1024)
    max_seq_len: int | None = knob(None, "context length; auto is that of training", lo=2, hi=1 << 20, unit="tokens")
    vocab_size: int | None = knob(None, "token ids; auto is that of training", lo=266, hi=1 << 20)
    device_batch_size: int | None = knob(None, "rows of one forward; auto is that of training", lo=1, hi=1 << 20, aliases=("batch_size",))
    num_experts: int = knob(0, "experts of every MLP", lo=0, hi=4096, off=0)
    syn_preset: str = knob("default", "named set of synaptic constants", choices=tuple(PRESETS))
    vitals_every: int | None = knob(_DEFAULTS.vitals_every, _TRAINING["vitals_every"].doc.partition("; 0")[0], lo=1, unit="steps")
    log_every: int = knob(_DEFAULTS.log_every, _TRAINING["log_every"].doc.partition("; 0")[0], lo=1, unit="steps")
    seconds: float = knob(60.0, "time for the timed runs", lo=0.0, hi=1e6, unit="seconds")
    device: str = device_knob()
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)


def bench_vitals(config: BenchVitalsConfig, make: Callable[[], Sequence[Callback]]) -> dict[str, Any]:
    """Time steps, looks and lines in turns; returns the script's last line. make: the callbacks that a run has beside its JSON log."""
    check_record_path(config.json)
    device = pick_device(config.device)
    sizes = {name: getattr(config, name) for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size")}
    training = TrainConfig(
        **sizes,
        synapses=True,
        syn_preset=config.syn_preset,
        syn_cfg=SynapticConfig.preset(config.syn_preset),
        num_experts=config.num_experts,
        num_iterations=1,
        device=config.device,
    )
    plan = make_plan(training, device, 1)
    for line in plan.describe():
        say(line)
    rehearsal = Rehearsal(plan, device)
    steps = 0

    def see(_: Callable) -> None:
        nonlocal steps
        steps += 1
        seen = look(rehearsal.model, rehearsal.idx, steps)
        assert seen is not None
        for callback in callbacks:
            callback.on_look(seen)

    def line(_: Callable) -> None:
        record = StepRecord(steps, 1.0, 1.0, 1.0, 1.0, None, 1.0, 0.0, 0, steps, None)
        for callback in callbacks:
            callback.on_step(record)

    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Callback] = [JsonLog(), *make()]
        run = Run(plan.config, rehearsal.model, 0, 1, Path(folder))
        try:
            for callback in callbacks:
                callback.on_start(run)
            competitors = {"step": Competitor(rehearsal.step), "look": Competitor(see), "line": Competitor(line)}
            for one in competitors.values():
                warm_up(one, device)
            courses = interleave(competitors, device, config.seconds)
        finally:
            for callback in callbacks:
                callback.close()
            free_unused(device)
    return _record(config, plan.dtype, device, {name: course.spread().median for name, course in courses.items()})


def bounded_share(every: int | None, step: float, look: float) -> float:
    """The share of step time that looks take in a run of `RUN_STEPS` steps, by the rule of `training.looks`, its first look included.

    every: as `--vitals_every`, not 0; step, look: seconds of one.
    """
    now = spent = 0.0
    looks, often = Looks(every, clock=lambda: now, tell=lambda _: None), every or EVERY
    for at in (1, *range(often, RUN_STEPS + 1, often)):
        now = at * step + spent
        if looks.take(at, at == RUN_STEPS):
            with looks.timed():
                spent += look
                now += look
    return spent / (RUN_STEPS * step)


def _record(config: BenchVitalsConfig, dtype: torch.dtype, device: torch.device, seconds: dict[str, float]) -> dict[str, Any]:
    step, every = seconds["step"], {"look": config.vitals_every or EVERY, "line": config.log_every}
    shares = {name: seconds[name] / (every[name] * step) for name in every}
    kept = shares | {"look": bounded_share(config.vitals_every, step, seconds["look"])}
    rows = [("step", short(1e3 * step), "", "", "")]
    rows += [(name, short(1e3 * seconds[name]), every[name], *(f"{100 * one[name]:.3f} %" for one in (shares, kept))) for name in every]
    table(("what", "ms", "every", "share of step time", "with looks left out"), rows)
    record = place(device, dtype) | {f"{name}_ms": short(1e3 * value) for name, value in seconds.items()}
    record |= {"look_share": short(shares["look"]), "line_share": short(shares["line"]), "share": short(sum(shares.values()))}
    record |= {"bounded_look_share": short(kept["look"]), "bounded_share": short(sum(kept.values()))}
    record |= {"vitals_every": config.vitals_every, "log_every": config.log_every}
    keep_record(config.json, record)
    return record
