"""`bench_kernels`: forward, backward and memory of the attention operators, against what PyTorch has for plain attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.floor import Floor, floor_of, peaks
from bio_inspired_nanochat.benchmarks.operators import BACKENDS, ROWS, Cell, Inputs, operator
from bio_inspired_nanochat.benchmarks.records import (
    MIB,
    check_record_path,
    dtype_of,
    failures,
    free_unused,
    keep_record,
    nearest_to,
    place,
    quartiles,
    reason,
    say_skipped,
    short,
    shown,
)
from bio_inspired_nanochat.benchmarks.timing import (
    ColdCache,
    Competitor,
    Course,
    Deadline,
    Memory,
    Spread,
    interleave,
    memory_of,
    paired_ratio,
    set_strides,
    warm_up,
)
from bio_inspired_nanochat.common import pick_device, progress, say, table
from bio_inspired_nanochat.config import PRESETS, SynapticConfig, device_knob, dtype_knob, knob, validate
from bio_inspired_nanochat.errors import UserError

HEADLINE_CONTEXT, HEADLINE_TICK = 2048, 8
NO_TIME = "no time left: raise --seconds"
BASELINE = ("attention", "flash")
_LAYERS = ("fused", "triton", "sdpa", "reference")  # the first one that ran is the layer of the headline
_FEWEST_SECONDS = 0.05  # of rounds per size, whatever compiling took
COLUMNS = (
    *("D", "T", "c", "pairs", "operator", "execution", "forward ms", "backward ms", "both ms", "quartiles", "x flash"),
    *("peak MiB", "kept MiB", "moved GB", "TFLOP", "floor ms", "runs"),
)


LAUNCHED = ("D", "T", "c", "execution", "kernel", "ms", "launches", "registers", "spills", "shared KiB")
_WATCHED_RUNS = 5


@dataclass(frozen=True)
class BenchKernelsConfig:
    """Sizes and competitors. The tokens of a batch are the same at every context: pairs * 2048."""

    head_dim: tuple[int, ...] | None = knob(None, "head sizes; auto is 64,128 on CUDA, 64 elsewhere", lo=2, hi=1024)
    context: tuple[int, ...] | None = knob(
        None, "context lengths; auto is 1024,2048,4096,8192 on CUDA, 64,128 elsewhere", lo=1, hi=1 << 20, unit="tokens"
    )
    tick: tuple[int, ...] | None = knob(None, "tick lengths; auto is 1,4,8,16 on CUDA, 8 elsewhere", lo=1, hi=1024, unit="tokens")
    pairs: int | None = knob(
        None,
        "pairs of batch row and head at context 2048, more at a shorter and fewer at a longer one; auto is 128 on CUDA, 1 elsewhere",
        lo=1,
    )
    backends: tuple[str, ...] = knob(BACKENDS, "executions to measure; flash is what the others are compared with", choices=BACKENDS)
    syn_preset: str = knob("default", "constants of the terminals and their barrier", choices=tuple(PRESETS))
    seconds: float = knob(
        300.0, "time limit; T=2048 with c=8 comes first, and its first size is measured in any case", lo=0.0, hi=1e6, unit="seconds"
    )
    device: str = device_knob()
    dtype: str = dtype_knob("operands")
    seed: int = knob(0, "seed of the operands", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("head_dim", "context", "tick", "backends"):
            if getattr(self, name) == ():
                raise UserError(f"{name} is empty: give at least one value")
        if not SynapticConfig.preset(self.syn_preset).presyn:
            raise UserError(f"syn_preset={self.syn_preset!r} has no terminals: use core or default")


@dataclass
class Row:
    """One competitor at one size: its times, or why it has none."""

    cell: Cell
    operator: str
    backend: str
    floor: Floor
    floor_seconds: float | None
    course: Course | None = None
    ratio: Spread | None = None
    memory: Memory | None = None
    skipped: str = ""

    def record(self) -> dict[str, Any]:
        """The row for the JSON record: milliseconds, MiB."""
        head_dim, context, tick, pairs = self.cell
        row: dict[str, Any] = {"head_dim": head_dim, "context": context, "tick": tick, "pairs": pairs}
        row |= {"operator": self.operator, "backend": self.backend}
        if self.course is None:
            return row | {"skipped": self.skipped}
        forward, backward, both = (self.course.spread(index).times(1e3) for index in (0, 1, None))
        row |= {"forward_ms": short(forward.median), "backward_ms": short(backward.median), "both_ms": short(both.median)}
        row |= {"both_ms_quartiles": quartiles(both), "runs": both.count}
        row |= {"ratio": short(self.ratio.median) if self.ratio else None, "ratio_quartiles": quartiles(self.ratio)}
        peak, kept = (None, None) if self.memory is None else (self.memory.peak / MIB, self.memory.kept / MIB)
        row |= {"peak_mib": short(peak), "kept_mib": short(kept)}
        row |= {"floor_gb": short((self.floor.forward_bytes + self.floor.backward_bytes) / 1e9)}
        row |= {"floor_tflop": short((self.floor.forward_flops + self.floor.backward_flops) / 1e12)}
        return row | {"floor_ms": None if self.floor_seconds is None else short(self.floor_seconds * 1e3)}

    def cells(self) -> tuple:
        """The row for the table, of a competitor that ran."""
        assert self.course is not None
        row = self.record()
        times = ("forward_ms", "backward_ms", "both_ms")
        rest = ("ratio", "peak_mib", "kept_mib", "floor_gb", "floor_tflop", "floor_ms", "runs")
        return (
            *(*self.cell, self.operator, self.backend),
            *map(row.get, times),
            shown(self.course.spread().times(1e3)),
            *map(row.get, rest),
        )


def bench_kernels(config: BenchKernelsConfig) -> dict[str, Any]:
    """Measure every size and competitor, print the table; returns the script's last line. Raises UserError for what cannot be."""
    check_record_path(config.json)
    device = pick_device(config.device)
    dtype = dtype_of(config.dtype, device)
    where = place(device, dtype)
    cells = _cells(config, device.type == "cuda")
    deadline, bench = Deadline(config.seconds), _Bench(config, device, dtype)
    rows: list[Row] = []
    with progress(len(cells), "measure", "sizes") as bar:
        for number, cell in enumerate(cells):
            seconds = max(_FEWEST_SECONDS, deadline.left() / (len(cells) - number))
            measured = bench.measure(cell, deadline if number else None, seconds)
            rows += measured
            say(_line(cell, measured))
            bar.advance()
            free_unused(device)
    rows.sort(key=lambda row: row.cell)
    if bench.launched:
        table(LAUNCHED, [tuple(one.values()) for one in bench.launched])
    table(COLUMNS, [row.cells() for row in rows if row.course is not None])
    say_skipped((_name(row), row.skipped) for row in rows if row.course is None)
    record = where | _ratios(rows) | {"syn_preset": config.syn_preset, "rows": [row.record() for row in rows], "kernels": bench.launched}
    keep_record(config.json, record)
    return record


def _cells(config: BenchKernelsConfig, gpu: bool) -> list[Cell]:
    """All sizes, those of the headline first."""
    head_dims = config.head_dim or ((64, 128) if gpu else (64,))
    contexts = config.context or ((1024, 2048, 4096, 8192) if gpu else (64, 128))
    ticks = config.tick or ((1, 4, 8, 16) if gpu else (8,))
    tokens = HEADLINE_CONTEXT * (config.pairs or (128 if gpu else 1))
    cells = {Cell(d, t, c, max(1, round(tokens / t))) for d in head_dims for t in contexts for c in ticks}
    headline = (nearest_to(HEADLINE_CONTEXT, contexts), nearest_to(HEADLINE_TICK, ticks))
    return sorted(cells, key=lambda cell: ((cell.tokens, cell.tick) != headline, cell))


class _Bench:
    """Measures one size after the other."""

    def __init__(self, config: BenchKernelsConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.cold, self.peaks = ColdCache(device), peaks(device, dtype)
        self.failures = failures()
        self.launched: list[dict[str, Any]] = []

    def measure(self, cell: Cell, deadline: Deadline | None, seconds: float) -> list[Row]:
        """All rows of a size, those that cannot run with the reason. deadline: after it nothing new is tried; seconds: for the rounds."""
        rows = [self._row(cell, name, backend) for name, backend in ROWS if backend in self.config.backends]
        if deadline is not None and not deadline.left():
            return _skip(rows, NO_TIME)
        try:
            inputs = Inputs.make(cell, SynapticConfig.preset(self.config.syn_preset), self.device, self.dtype, self.config.seed)
            competitors = self._warm(rows, inputs, deadline)
            courses = interleave(competitors, self.device, seconds, cold=self.cold) if competitors else {}
            for backend in ("fused", "triton"):
                if self.device.type == "cuda" and f"layer {backend}" in competitors:
                    self.launched += _kernels_of(competitors[f"layer {backend}"], cell, backend)
        except self.failures as error:
            return _skip(rows, reason(error))
        baseline = courses.get(" ".join(BASELINE))
        for row in rows:
            row.course = courses.get(_name(row))
            if row.course and baseline:
                row.ratio = paired_ratio(row.course.total(), baseline.total())
        return rows

    def _row(self, cell: Cell, name: str, backend: str) -> Row:
        size = torch.finfo(self.dtype).bits // 8
        floor = floor_of(name, cell.pairs, cell.tokens, cell.head_dim, cell.tick, size)
        return Row(cell, name, backend, floor, floor.seconds(*self.peaks))

    def _warm(self, rows: Sequence[Row], inputs: Inputs, deadline: Deadline | None) -> dict[str, Competitor]:
        """The competitors that run, compiled and with their memory measured."""
        competitors, tried = {}, {}
        for row in rows:
            if deadline is not None and not deadline.left():
                row.skipped = NO_TIME
                continue
            try:
                competitor = operator(row.operator, row.backend, inputs).competitor()
                tried[_name(row)] = warm_up(competitor, self.device)
                row.memory = memory_of(competitor, self.device)
            except self.failures as error:
                row.skipped = reason(error)
                continue
            competitor.flushes = self.cold.flushes_for(tried[_name(row)].host)
            competitors[_name(row)] = competitor
        if competitors:
            set_strides(competitors, tried)
        return competitors


def _kernels_of(competitor: Competitor, cell: Cell, backend: str) -> list[dict[str, Any]]:
    """The Triton kernels of one execution: median milliseconds of a launch, launches per run, and what each takes."""
    from bio_inspired_nanochat.kernels.tiles import watch

    with watch() as launches:
        for _ in range(_WATCHED_RUNS):
            torch.cuda._sleep(10_000_000)  # the host gets ahead, so that an interval holds nothing but its kernel
            competitor.run(lambda: None)
    torch.cuda.synchronize()
    kernels = []
    for name in dict.fromkeys(launch.name for launch in launches):
        these = [launch for launch in launches if launch.name == name]
        taken = statistics.median(launch.begin.elapsed_time(launch.end) for launch in these)
        compiled = these[0].compiled
        kernels.append({
            "head_dim": cell.head_dim, "context": cell.tokens, "tick": cell.tick, "backend": backend, "kernel": name,
            "ms": short(taken), "launches": len(these) // _WATCHED_RUNS, "registers": compiled.n_regs, "spills": compiled.n_spills,
            "shared_kib": short(compiled.metadata.shared / 1024),
        })  # fmt: skip
    return kernels


def _skip(rows: list[Row], why: str) -> list[Row]:
    for row in rows:
        row.skipped = row.skipped or why
    return rows


def _name(row: Row) -> str:
    return f"{row.operator} {row.backend}"


def _line(cell: Cell, rows: Sequence[Row]) -> str:
    """What a size came to, in one line."""
    parts = []
    for row in rows:
        if row.course is not None:
            ratio = f" ({row.ratio.median:.2f}x)" if row.ratio else ""
            parts.append(f"{_name(row)} {row.course.spread().median * 1e3:.3g} ms{ratio}")
    skipped = sum(row.course is None for row in rows)
    return f"{cell}: {', '.join(parts) or 'nothing ran'}" + (f"; {skipped} skipped" if skipped else "")


def _ratios(rows: Sequence[Row]) -> dict[str, Any]:
    """fwd_bwd_ratio per head size: a synaptic layer over plain flash attention, forward and backward together."""
    ratios, spreads, of = {}, {}, {}
    for head_dim in sorted({row.cell.head_dim for row in rows}):
        layers = [row for row in rows if row.cell.head_dim == head_dim and row.operator == "layer" and row.ratio is not None]
        if not layers:
            ratios[str(head_dim)] = None
            continue
        context = nearest_to(HEADLINE_CONTEXT, [row.cell.tokens for row in layers])
        layers = [row for row in layers if row.cell.tokens == context]
        tick = nearest_to(HEADLINE_TICK, [row.cell.tick for row in layers])
        chosen = min((row for row in layers if row.cell.tick == tick), key=lambda row: _LAYERS.index(row.backend))
        assert chosen.ratio is not None
        ratios[str(head_dim)] = short(chosen.ratio.median)
        spreads[str(head_dim)] = quartiles(chosen.ratio)
        of[str(head_dim)] = {"layer": chosen.backend, "context": context, "tick": tick, "pairs": chosen.cell.pairs}
    return {"fwd_bwd_ratio": ratios, "fwd_bwd_ratio_quartiles": spreads, "fwd_bwd_ratio_of": of}
