"""A recording that fails leaves what it found."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bio_inspired_nanochat.common import aside, capture, reason, side_stream


class Refused:
    """What PyTorch has of a GPU that refuses to record: whether the recording is over then, or only CUDA's part of it."""

    def __init__(self, monkeypatch, over: bool) -> None:
        self.said: list[str] = []
        self.streams = [0]
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
        for name, value in (("graph_pool_handle", (0, 7)), ("current_device", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(
            torch.cuda, "default_generators", [SimpleNamespace(graphsafe_set_state=self.said.append, clone_state=lambda: "drawn")]
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[-1])
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

        def end(device, pool) -> None:
            if over:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.said.append(f"end {pool}")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.said.append(f"release {pool}"))

    @contextlib.contextmanager
    def _stream(self, stream):
        before = list(self.streams)
        try:
            yield
        finally:
            self.streams = before

    @contextlib.contextmanager
    def _graph(self, graph, pool, capture_error_mode):
        assert (graph, pool, capture_error_mode) == ("graph", (0, 7), "thread_local")
        self.streams.append(1)
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("over", [False, True])
def test_a_recording_that_cuda_ends_leaves_streams_memory_and_random_numbers_as_they_were(monkeypatch, over):
    gpu = Refused(monkeypatch, over)

    def run() -> None:
        try:
            raise KeyError("not made yet")
        except KeyError:
            raise RuntimeError("operation not permitted when stream is capturing\nmore") from None

    with pytest.raises(RuntimeError, match="previous error") as failed:
        capture(run)
    assert gpu.streams == [0]
    assert gpu.said == ([] if over else ["end (0, 7)", "release (0, 7)", "drawn"]), "memory is given back once: by the graph, or here"
    assert reason(failed.value) == "operation not permitted when stream is capturing"


def test_recordings_of_several_threads_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **mode: contextlib.nullcontext())
    inside, most, gate = [], [], threading.Barrier(3, timeout=20)

    def run() -> None:
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()

    def thread() -> None:
        gate.wait()
        capture(run)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(thread) for _ in range(3)]:
            done.result(20)
    assert most == [1, 1, 1]


def test_whoever_runs_aside_shares_the_stream_and_both_sides_wait(monkeypatch):
    """A stream of its own for each run would cost each run the memory that PyTorch keeps for every stream."""
    said = []

    class Stream:
        def __init__(self, name) -> None:
            self.name = name

        def wait_stream(self, other) -> None:
            said.append(f"{self.name} waits for {other.name}")

    side_stream.cache_clear()
    numbers = iter(range(9))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side {next(numbers)}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    try:
        for _ in range(2):
            with aside():
                said.append("work")
        assert said == ["side 0 waits for main", "work", "main waits for side 0"] * 2
        assert side_stream(0, 1) is side_stream(0, 1) is not side_stream(0, 0)
    finally:
        side_stream.cache_clear()
