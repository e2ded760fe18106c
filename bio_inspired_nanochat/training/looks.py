"""When a run looks at its synapses and experts (`training.vitals`), and what that may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.training import guards

EVERY = 100  # steps, where the number is auto
SHARE = 0.005  # of the loop's time


class Looks:
    """The looks of one process: every `every` steps, with a first and a last one; 0 has none.

    With None they are due every EVERY steps, and one that is due is left out while looks have taken more than SHARE of the time: all
    of them take no more than that and one look. The clock runs from the end of the process's first look, in which kernels are made;
    the run's first and last look are always taken. first: whether this is rank 0, whose clock decides for all ranks; tell: is told once
    that looks are left out.

    left_out: looks that were due since the last one; left_out_in_all: in this process.
    """

    def __init__(
        self, every: int | None, first: bool = True, clock: Callable[[], float] = time.perf_counter, tell: Callable[[str], None] = say
    ) -> None:
        self.every, self.first, self._clock, self._tell = every, first, clock, tell
        self.left_out = self.left_out_in_all = 0
        self._since: float | None = None
        self._spent = 0.0

    def take(self, step: int, last: bool) -> bool:
        """Whether step `step` (from 1) is to be looked at; the same on every rank. Collective where time decides."""
        every = EVERY if self.every is None else self.every
        if every == 0 or not (last or step == 1 or step % every == 0):
            return False
        if self.every is not None or last or step == 1 or guards.agree([float(self.first and self._affordable())]) != [0.0]:
            return True
        if self.first and not self.left_out_in_all:
            self._tell(
                f"notice: looks at the synapses have taken more than {100 * SHARE:g} % of the time, so that some of those after every "
                f"{every} steps are left out: --vitals_every={every} takes them all"
            )
        self.left_out, self.left_out_in_all = self.left_out + 1, self.left_out_in_all + 1
        return False

    def _affordable(self) -> bool:
        return self._since is None or self._spent <= SHARE * (self._clock() - self._since)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around one look and what is logged of it. The device must be idle before, and what is timed must wait for it."""
        began = self._clock()
        yield
        self.left_out, now = 0, self._clock()
        if self._since is None:
            self._since = now
        else:
            self._spent += now - began
