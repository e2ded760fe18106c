"""Ends of a run that all ranks must reach together: signals, time, non-finite numbers, memory."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import threading
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


class StopSignals:
    """Catches SIGINT and SIGTERM so that the step in progress is finished. A second signal acts as if nothing was caught.

    A context manager; outside of the main thread, where Python installs no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}


def agree(values: Sequence[float]) -> list[float]:
    """The largest of each value over all ranks. Collective under torchrun; goes through the CPU, so no device waits."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    box = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.tolist()


def first_not_finite(rows: Sequence[Sequence[float]]) -> int | None:
    """Index of the first row that holds NaN or infinity, or None."""
    for i, row in enumerate(rows):
        if not all(math.isfinite(value) for value in row):
            return i
    return None


def all_finite(params: Iterable[Tensor]) -> bool:
    """Whether every weight is finite on every rank; one wait for the device. Collective: ranks may hold different ones."""
    norms = torch._foreach_norm([param.detach() for param in params], float("inf"))
    return agree([float(not torch.isfinite(torch.stack(norms)).all().item())]) == [0.0]


def not_finite(step: int, what: str, last_saved: str | None) -> UserError:
    """The error for a run that diverged at `step` (counting from 1). what: the subject with its verb, `loss is`."""
    rest = f"the checkpoint before it is {last_saved}" if last_saved else "no checkpoint was saved before it"
    return UserError(
        f"step {step}: the {what} not finite, training diverged and stopped; {rest}; lower --optim.matrix_lr or set --optim.grad_clip=1"
    )


@contextlib.contextmanager
def out_of_memory_as_user_error(rows: int, fits: Callable[[], int], place: str) -> Iterator[None]:
    """Turn an allocation that failed into one line with a batch size that fits.

    rows: the --device_batch_size in use; fits: says, after the failure, how many would fit; place: the device in words.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(rows, fits(), place) from error
    except RuntimeError as error:
        if not any(text in str(error).lower() for text in OUT_OF_MEMORY):
            raise
        raise _too_large(rows, fits(), place) from error


def _too_large(rows: int, fits: int, place: str) -> UserError:
    smaller = min(rows // 2, fits)
    if rows == 1:
        return UserError(f"out of memory on {place} with a single row: use a shorter --max_seq_len or a smaller --depth")
    return UserError(
        f"out of memory on {place} with --device_batch_size={rows}: use --device_batch_size={max(1, smaller)} "
        "(--total_batch_size stays the same, by accumulating gradients)"
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
    """`freeze` takes all present objects out of the collector's sight, so that no step waits while it walks over them."""

    def __init__(self) -> None:
        self._frozen = False

    def freeze(self) -> None:
        """Collect once, then freeze what is left."""
        gc.collect()
        gc.freeze()
        self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
