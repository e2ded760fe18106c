"""`bench_memory`: time and memory of the fast weights by rule and execution, beside the attention of one layer of the same batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bio_inspired_nanochat.benchmarks.operators import Operator
from bio_inspired_nanochat.benchmarks.records import (
    MIB,
    check_record_path,
    dtype_of,
    failures,
    keep_record,
    place,
    quartiles,
    reason,
    say_skipped,
    short,
    shown,
)
from bio_inspired_nanochat.benchmarks.timing import ColdCache, Deadline, interleave, memory_of, paired_ratio, set_strides, warm_up
from bio_inspired_nanochat.common import pick_device, progress, table
from bio_inspired_nanochat.config import device_knob, dtype_knob, knob, validate
from bio_inspired_nanochat.kernels.fast_weights import RULES, fast_weights

EXECUTIONS = ("triton", "chunked", "fla", "compiled", "reference")  # those that need most time to get ready come last
READY = 0.5  # share of the time after which nothing new is compiled
BASELINE = "attention"
COLUMNS = ("rule", "execution", "modes", "forward ms", "backward ms", "both ms", "quartiles", "x attention", "peak MiB", "kept MiB", "runs")


@dataclass(frozen=True)
class BenchMemoryConfig:
    """Sizes and executions."""

    rows: int | None = knob(None, "sequences of a batch; auto is 16 on CUDA, 2 elsewhere", lo=1, hi=1 << 16)
    context: int | None = knob(None, "tokens of a sequence; auto is 2048 on CUDA, 128 elsewhere", lo=1, hi=1 << 20, unit="tokens")
    modes: tuple[int, ...] = knob((16, 64), "modes r of the fast weights", lo=1, hi=4096)
    heads: int = knob(12, "heads of the plain attention that is timed for comparison", lo=1, hi=1024)
    head_dim: int = knob(64, "size of one of these heads", lo=1, hi=1024)
    rules: tuple[str, ...] = knob(RULES, "rules to measure", choices=RULES)
    executions: tuple[str, ...] = knob(
        EXECUTIONS, "executions to measure; compiled is chunked under torch.compile, fla needs the package fla-core", choices=EXECUTIONS
    )
    seconds: float = knob(60.0, "time limit", lo=0.0, hi=1e6, unit="seconds")
    device: str = device_knob()
    dtype: str = dtype_knob()
    seed: int = knob(0, "seed of the operands", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)


def bench_memory(config: BenchMemoryConfig) -> dict[str, Any]:
    """Measure everything in turns, print the table; returns the script's last line. Raises UserError for what cannot be."""
    check_record_path(config.json)
    device = pick_device(config.device)
    dtype = dtype_of(config.dtype, device)
    gpu = device.type == "cuda"
    rows, context = config.rows or (16 if gpu else 2), config.context or (2048 if gpu else 128)
    deadline, cold = Deadline(config.seconds), ColdCache(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    operators = {BASELINE: lambda: _attention(config, rows, context, device, dtype, generator)}
    for execution, modes, rule in itertools.product(config.executions, config.modes, config.rules):
        make = partial(_memory, rule, execution, rows, context, modes, device, dtype, generator)
        operators[f"{rule} {execution} {modes}"] = make
    competitors, tried, memories, skipped = {}, {}, {}, []
    with progress(len(operators), "get ready", "executions") as bar:
        for name, make in operators.items():
            bar.advance()
            if competitors and deadline.left() <= (1 - READY) * config.seconds:
                skipped.append((name, "no time left: raise --seconds"))
                continue
            try:
                competitor = make().competitor()
                tried[name] = warm_up(competitor, device)
                memories[name] = memory_of(competitor, device)
            except failures() as error:
                skipped.append((name, reason(error)))
                continue
            competitor.flushes = cold.flushes_for(tried[name].host)
            competitors[name] = competitor
    set_strides(competitors, tried)
    courses = interleave(competitors, device, max(0.05, deadline.left()), cold=cold)
    shelf = [f"{rule} {execution} {modes}" for modes, rule, execution in itertools.product(config.modes, config.rules, config.executions)]
    records = []
    for name in (one for one in (BASELINE, *shelf) if one in courses):
        course = courses[name]
        forward, backward, both = (course.spread(index).times(1e3) for index in (0, 1, None))
        ratio, memory = paired_ratio(course.total(), courses[BASELINE].total()), memories[name]
        rule, execution, modes = (*name.split(), "", "")[:3]
        records.append({
            "rule": rule, "execution": execution, "modes": int(modes or 0), "forward_ms": short(forward.median),
            "backward_ms": short(backward.median), "both_ms": short(both.median), "both_ms_quartiles": quartiles(both),
            "ratio": short(ratio.median) if ratio else None, "peak_mib": short(memory.peak / MIB) if memory else None,
            "kept_mib": short(memory.kept / MIB) if memory else None, "runs": both.count, "shown": shown(both),
        })  # fmt: skip
    names = ("rule", "execution", "modes", "forward_ms", "backward_ms", "both_ms", "shown", "ratio", "peak_mib", "kept_mib", "runs")
    table(COLUMNS, [tuple(record[name] for name in names) for record in records])
    say_skipped(skipped)
    for record in records:
        del record["shown"]
    last = place(device, dtype) | {"rows": rows, "context": context, "heads": config.heads, "head_dim": config.head_dim, "memory": records}
    keep_record(config.json, last)
    return last


def _attention(
    config: BenchMemoryConfig, rows: int, context: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Operator:
    """Plain causal attention by whatever PyTorch takes."""
    shape = (rows, config.heads, context, config.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3))
    return Operator(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), torch.ones_like(q))


def _memory(
    rule: str,
    execution: str,
    rows: int,
    context: int,
    modes: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Operator:
    """Fast weights alone, from zero: reads z of random keys and values."""
    u, m = (torch.randn(rows, context, modes, generator=generator, device=device) for _ in range(2))
    u, m = F.normalize(u, dim=-1).to(dtype).requires_grad_(), m.to(dtype).requires_grad_()
    eta = torch.rand(rows, context, generator=generator, device=device).requires_grad_()
    gamma = torch.full((modes,) if rule == "hebb" else (), 0.99, device=device).requires_grad_()

    def read() -> torch.Tensor:
        return fast_weights(u, m, eta, gamma, rule=rule, backend="chunked" if execution == "compiled" else execution)[0]

    if execution == "compiled":
        torch._dynamo.reset()
        read = torch.compile(read, dynamic=False)
    return Operator(read, (u, m, eta, gamma), torch.randn(rows, context, modes, generator=generator, device=device).to(dtype))
