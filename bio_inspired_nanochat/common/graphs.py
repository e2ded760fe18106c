"""Recording CUDA graphs, so that one that cannot be recorded costs a notice and nothing else."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_ONE = threading.Lock()  # all recordings of a process go over one stream of PyTorch's


def capture(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of what `run` launches, which is not executed yet, and what it returned.

    One at a time: other threads wait. RuntimeError where it cannot be recorded; streams, memory and random numbers are then as before.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    mode = {"pool": pool, "capture_error_mode": "thread_local"}  # other threads load data meanwhile
    with _ONE:
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **mode):
                made = run()
        except BaseException:
            _abandon(pool)
            raise
    return graph, made


@functools.cache
def side_stream(device: int, number: int = 0) -> torch.cuda.Stream:
    """A stream beside the default one, the same for all who ask: PyTorch keeps memory for each on which matrices were ever multiplied."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is launched here runs on a side stream, after all that was launched before and before all that will be."""
    here = torch.cuda.current_stream()
    side = side_stream(torch.cuda.current_device())
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def _abandon(pool: Any) -> None:
    """Undo what PyTorch does not undo where CUDA itself has ended a recording into `pool`.

    The allocator would go on recording, which keeps it from ever returning memory, and would hold the memory of the pool, which is that
    of a step. Older versions of PyTorch would also refuse to draw random numbers.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the recording had an end, so the graph returns its memory itself: a second time would be fatal
    torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


def reason(error: BaseException) -> str:
    """What went wrong first, in one line: the end of a recording complains about whatever failed in it."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)
