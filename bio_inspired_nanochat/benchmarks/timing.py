"""Timing of competitors in turns: A B A B ..., so that a clock that drifts or a neighbour on the machine hits all of them alike.

A run is a function of one argument, `mark`, that it may call between its phases. On CUDA the times are those of events on
the stream, elsewhere those of the host's clock with the device idle at every mark.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bio_inspired_nanochat.training.clock import wait_for_device

Mark = Callable[[], None]
Run = Callable[[Mark], object]
Phases = tuple[float, ...]

WARM_RUNS = 3
FEWEST_ROUNDS = 3
MOST_ROUNDS = 200
_ROUNDS_AHEAD = 2  # of the host before the device: enough to keep it busy
_COLD_BYTES = 1 << 28  # more than any second-level cache
_MOST_FLUSHES = 32
_LONG = 1.0  # seconds: what takes so long is warm after two runs
_SLOWER = 8  # a competitor this many times slower than the fastest sits out rounds


class Spread(NamedTuple):
    """Median and quartiles of `count` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; the quartiles lie between values by linear interpolation."""
        values = sorted(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high, len(values))

    def times(self, factor: float) -> Spread:
        """The same values in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)


def paired_ratio(above: Sequence[float | None], below: Sequence[float | None]) -> Spread | None:
    """Spread of the ratios above[i] / below[i] over the rounds in which both ran; None without such a round."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if a is not None and b]
    return Spread.of(ratios) if ratios else None


@dataclass
class Competitor:
    """What is timed. prepare: runs before every timed run; flushes: times that the cache is overwritten before it."""

    run: Run
    prepare: Callable[[], None] | None = None
    flushes: int = 0
    stride: int = 1


@dataclass
class Course:
    """The runs of one competitor: per round the seconds of its phases, or None for a round that it sat out."""

    rounds: list[Phases | None]

    def phase(self, index: int) -> list[float | None]:
        """Seconds of one phase per round."""
        return [None if phases is None else phases[index] for phases in self.rounds]

    def total(self) -> list[float | None]:
        """Seconds of whole runs per round."""
        return [None if phases is None else sum(phases) for phases in self.rounds]

    def spread(self, index: int | None = None) -> Spread:
        """Of one phase, or of whole runs."""
        values = self.total() if index is None else self.phase(index)
        return Spread.of(value for value in values if value is not None)


class _Marks:
    """Points in time of one run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.points = device, []

    def __call__(self) -> None:
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.points.append(event)
        else:
            wait_for_device(self.device)
            self.points.append(time.perf_counter())

    def wait(self) -> None:
        """Return when the run is over."""
        if self.device.type == "cuda":
            self.points[-1].synchronize()

    def phases(self) -> Phases:
        """Seconds between the marks of a run that is over."""
        pairs = zip(self.points, self.points[1:])
        if self.device.type == "cuda":
            return tuple(a.elapsed_time(b) / 1e3 for a, b in pairs)
        return tuple(b - a for a, b in pairs)


class ColdCache:
    """Overwrites the second-level cache of a CUDA device; elsewhere it does nothing.

    While it does, the host issues the launches of the run that follows, so it is repeated for as long as they take: what is
    timed is the device's work and not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(_COLD_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
        self.seconds = 0.0
        if self.buffer is not None:
            marks = _Marks(device)
            for _ in range(WARM_RUNS):
                self.flush(1)
            marks()
            self.flush(4)
            marks()
            marks.wait()
            self.seconds = marks.phases()[0] / 4

    def flush(self, times: int) -> None:
        """Overwrite the cache so many times."""
        if self.buffer is not None:
            for _ in range(times):
                self.buffer.zero_()

    def flushes_for(self, host_seconds: float) -> int:
        """How many flushes cover the host's part of a run."""
        return min(_MOST_FLUSHES, 1 + int(host_seconds / self.seconds)) if self.seconds else 0


class Tried(NamedTuple):
    """The quickest warm run: seconds until the host had issued it, and until the device was done."""

    host: float
    whole: float


def warm_up(competitor: Competitor, device: torch.device, runs: int = WARM_RUNS) -> Tried:
    """Run what is not timed: compilation, caches, the allocator. The first run does not count as warm."""
    tried: list[Tried] = []
    while len(tried) < runs:
        if competitor.prepare is not None:
            competitor.prepare()
        wait_for_device(device)
        began = time.perf_counter()
        competitor.run(_ignore)
        host = time.perf_counter() - began
        wait_for_device(device)
        tried.append(Tried(host, time.perf_counter() - began))
        if len(tried) > 1 and tried[-1].whole > _LONG:
            break
    return min(tried[1:] or tried, key=lambda one: one.whole)


def _ignore() -> None:
    """A mark outside of a measurement."""


def set_strides(competitors: Mapping[str, Competitor], tried: Mapping[str, Tried]) -> None:
    """Let the slow ones take part in few rounds, so that the others get many."""
    fastest = min(tried[name].whole for name in competitors)
    for name, competitor in competitors.items():
        competitor.stride = max(1, int(tried[name].whole / (_SLOWER * fastest)))


def interleave(
    competitors: Mapping[str, Competitor],
    device: torch.device,
    seconds: float,
    *,
    most: int = MOST_ROUNDS,
    cold: ColdCache | None = None,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Course]:
    """Run all competitors in turns for about `seconds`: at least FEWEST_ROUNDS rounds, at most `most`.

    The host stays at most two rounds ahead of the device, so that the device neither waits for it nor is the clock blind.
    """
    taken: dict[str, list[_Marks | None]] = {name: [] for name in competitors}
    flying: deque[_Marks] = deque()
    wait_for_device(device)
    began = time.perf_counter()
    for number in range(most):
        for name, competitor in competitors.items():
            taken[name].append(_one_run(competitor, device, cold) if number % competitor.stride == 0 else None)
        flying.extend([marks for rounds in taken.values() if (marks := rounds[-1]) is not None][-1:])
        if len(flying) > _ROUNDS_AHEAD:
            flying.popleft().wait()
        if on_round is not None:
            on_round()
        if number + 1 >= FEWEST_ROUNDS and time.perf_counter() - began >= seconds:
            break
    wait_for_device(device)
    return {name: Course([None if marks is None else marks.phases() for marks in rounds]) for name, rounds in taken.items()}


def _one_run(competitor: Competitor, device: torch.device, cold: ColdCache | None) -> _Marks:
    if competitor.prepare is not None:
        competitor.prepare()
    if cold is not None:
        cold.flush(competitor.flushes)
    marks = _Marks(device)
    marks()
    competitor.run(marks)
    marks()
    return marks


class Memory(NamedTuple):
    """Bytes of a run beyond what was held before it: kept at its first mark, and at the peak."""

    kept: int
    peak: int


def memory_of(competitor: Competitor, device: torch.device) -> Memory | None:
    """Memory of one run on CUDA; None on devices whose allocator keeps no count."""
    if device.type != "cuda":
        return None
    if competitor.prepare is not None:
        competitor.prepare()
    wait_for_device(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, kept = torch.cuda.memory_allocated(device), []
    competitor.run(lambda: kept.append(torch.cuda.memory_allocated(device) - before))
    return Memory(kept[0], torch.cuda.max_memory_allocated(device) - before)


class Deadline:
    """The time that a benchmark may take."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.ends - time.perf_counter())
