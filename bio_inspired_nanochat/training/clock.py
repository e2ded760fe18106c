"""Time in training steps, without evaluation, sampling, saving and the first steps that compile and warm up."""

from __future__ import annotations

import time

import torch

WARMUP_STEPS = 10


class Clock:
    """Counts seconds and steps while it runs. The caller makes sure that the device is idle when it starts and stops.

    Two counts: `lap`, since the last `new_lap`; and `timed`, over the whole process from `warm` steps on.
    """

    def __init__(self, steps: int) -> None:
        self.warm = min(WARMUP_STEPS, max(1, steps // 5)) if steps > 1 else 0
        self.steps = 0
        self.timed_steps = 0
        self.timed_seconds = 0.0
        self._started: float | None = None
        self._steps_at_start = 0
        self.new_lap()

    def new_lap(self) -> None:
        """Begin a new lap; time that has not been counted yet by `stop` belongs to it."""
        self.lap_steps, self.lap_seconds = 0, 0.0

    def start(self) -> None:
        """The next steps count."""
        if self._started is None:
            self._started, self._steps_at_start = time.perf_counter(), self.steps

    def stop(self) -> None:
        """Count the time since `start`."""
        if self._started is None:
            return
        seconds, steps = time.perf_counter() - self._started, self.steps - self._steps_at_start
        self._started = None
        self.lap_seconds += seconds
        self.lap_steps += steps
        if self._steps_at_start >= self.warm:
            self.timed_seconds += seconds
            self.timed_steps += steps

    def seconds_per_step(self) -> float | None:
        """Of all timed steps, else of the current lap; None before the first."""
        if self.timed_steps:
            return self.timed_seconds / self.timed_steps
        return self.lap_seconds / self.lap_steps if self.lap_steps else None


def wait_for_device(device: torch.device) -> None:
    """Return when all work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
