"""Ends of a run that all ranks must reach together: signals, time, non-finite numbers, memory."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from bio_inspired_nanochat.errors import UserError

# Reasons to stop; ranks agree on the largest.
GO_ON, TIME_IS_UP, INTERRUPTED = 0, 1, 2

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


GRACE = 25.0  # seconds from a signal until an orderly stop is given up; launchers kill after 30
ECHO = 2.0  # seconds in which a second signal is the same one: a launcher passes on what the terminal has sent already


class Interrupted(BaseException):
    """A signal ends the run here, in the middle of what it was doing. Not an Exception, so that no handler of errors keeps it."""


class StopSignals:
    """Catches SIGINT and SIGTERM. A context manager that can be entered again inside of itself; outside of the main thread, where Python
    installs no handlers, it does nothing.

    While `at_once`, a signal raises Interrupted where it arrives. Else it is only noted in `received`, for the caller to come to an
    orderly end; if that takes longer than `grace` seconds, Interrupted is raised after all, unless `relax` was called. A further
    signal later than `echo` seconds after the first acts as if nothing was caught.
    """

    def __init__(self, grace: float = GRACE, echo: float = ECHO) -> None:
        self.received, self.at_once = "", False
        self._grace, self._echo = grace, echo
        self._first, self._late = 0.0, False
        self._timer: threading.Timer | None = None
        self._before: dict[int, object] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._restore()

    def _restore(self) -> None:
        self.relax()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def relax(self) -> None:
        """No deadline any more: what comes now, such as writing a checkpoint, is worth its time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._late:
            self._late = False
            raise Interrupted
        if self.received:
            if now - self._first > self._echo:
                self._restore()
                signal.raise_signal(number)
            return
        self.received, self._first = signal.Signals(number).name, now
        if self.at_once:
            raise Interrupted
        self._timer = threading.Timer(self._grace, self._overdue, [number])
        self._timer.daemon = True
        self._timer.start()

    def _overdue(self, number: int) -> None:
        self._late = True
        signal.pthread_kill(threading.main_thread().ident, number)  # type: ignore[arg-type]  # wakes it from a system call, too


def agree(values: Sequence[float]) -> list[float]:
    """The largest of each value over all ranks. Collective under torchrun; goes through the CPU, so no device waits."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    box = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.tolist()


def all_finite(params: Iterable[Tensor]) -> bool:
    """Whether every weight is finite on every rank; one wait for the device. Collective: ranks may hold different ones."""
    norms = torch._foreach_norm([param.detach() for param in params], float("inf"))
    return agree([float(not torch.isfinite(torch.stack(norms)).all().item())]) == [0.0]


@contextlib.contextmanager
def out_of_memory_as_user_error(rows: int, fits: Callable[[], int], place: str, instead: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn an allocation that failed into one line with a batch size that fits.

    rows: the --device_batch_size in use; place: the device in words. What is asked after the failure: fits, how many rows would fit, and
    instead, another flag that would help, or an empty string.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(rows, fits(), place, instead()) from error
    except RuntimeError as error:
        if not any(text in str(error).lower() for text in OUT_OF_MEMORY):
            raise
        raise _too_large(rows, fits(), place, instead()) from error


def _too_large(rows: int, fits: int, place: str, instead: str) -> UserError:
    smaller, other = min(rows // 2, fits), f", or {instead}" if instead else ""
    if rows == 1:
        return UserError(f"out of memory on {place} with a single row: use a shorter --max_seq_len or a smaller --depth{other}")
    return UserError(
        f"out of memory on {place} with --device_batch_size={rows}: use --device_batch_size={max(1, smaller)} "
        f"(--total_batch_size stays the same, by accumulating gradients){other}"
    )


@contextlib.contextmanager
def frozen_garbage() -> Iterator[FrozenGarbage]:
    """Control over Python's garbage collector for the loop; everything is as before afterwards."""
    control = FrozenGarbage()
    try:
        yield control
    finally:
        control.thaw()


class FrozenGarbage:
    """`freeze` takes all present objects out of the collector's sight, so that no step waits while it walks over them.

    In a process that has frozen objects itself, it only collects: what is frozen can be thawed only all together.
    """

    def __init__(self) -> None:
        self._frozen = False

    def freeze(self) -> None:
        """Collect once, then freeze what is left, unless something is frozen already."""
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()
            self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
