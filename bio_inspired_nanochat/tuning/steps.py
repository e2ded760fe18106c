"""The training loop of a population: rows for every seed, gradients, optimizer steps, without a word from the device to the host.

A step of many small models is some thousand launches of kernels that take microseconds each, so on CUDA the host would set the pace. There
forward and backward pass are recorded once as a CUDA graph and replayed; the optimizer, whose learning rates change, stays eager.

K models, B batch, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bio_inspired_nanochat.common import aside, capture, reason, say
from bio_inspired_nanochat.optim import OptimConfig, Optimizer
from bio_inspired_nanochat.tasks.memory import MemoryTask
from bio_inspired_nanochat.training.gradients import WARM_RUNS
from bio_inspired_nanochat.tuning.stack import Single, Stack

Batch = tuple[Tensor, Tensor]
POOL = 16  # batches that are made together, so that making them costs a device next to nothing


def train(model: Stack | Single, batches: Iterator[Batch], steps: int, total: int, optim: OptimConfig, graph: bool) -> Iterator[int]:
    """Train for `steps` of a schedule of `total`, see `Gradients` for `graph`; yields the number of steps done."""
    optimizer: Optimizer | None = None
    gradients = Gradients(model, graph)
    for step in range(steps):
        idx, targets = next(batches)
        if optimizer is None:
            optimizer = model.optimizer(optim, idx.shape[-1] * idx.shape[-2])
        optimizer.schedule(step, total)
        gradients(idx, targets)
        optimizer.step()
        yield step + 1


class Gradients:
    """Calls leave the gradients of the sum of all models' losses in `.grad`, in place of those that were there.

    graph: on CUDA, record a stack's pass after some eager ones and replay it from then on. A recording that fails is said once, and the
    passes stay eager; their results are the same.
    """

    def __init__(self, model: Stack | Single, graph: bool) -> None:
        self.model, self.calls = model, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted = graph and isinstance(model, Stack) and model.device.type == "cuda"
        self.parameters = model.parameters()

    def __call__(self, idx: Tensor, targets: Tensor) -> None:
        """idx, targets: [K, B, T]."""
        self.calls += 1
        if self.wanted and self.calls > WARM_RUNS and self.graph is None:
            self._record(idx, targets)
        if self.graph is None:
            # autograd must not have met the default stream before a recording
            with aside() if self.wanted else contextlib.nullcontext():
                self._pass(idx, targets)
            return
        self.idx.copy_(idx)
        self.targets.copy_(targets)
        self.graph.replay()

    def _pass(self, idx: Tensor, targets: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.model.losses(idx, targets).sum().backward()

    def _record(self, idx: Tensor, targets: Tensor) -> None:
        self.idx, self.targets = idx.clone(), targets.clone()
        for parameter in self.parameters:
            parameter.grad = None
        try:
            self.graph, _ = capture(lambda: self.model.losses(self.idx, self.targets).sum().backward())
        except RuntimeError as error:
            self.wanted = False
            say(f"notice: steps are not replayed as a CUDA graph, which is slower ({reason(error)})")


def by_seed(seeds: Sequence[int], make: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    """Batches [K, B, T] of models of these seeds: models of one seed see the same rows."""
    streams = [make(seed) for seed in dict.fromkeys(seeds)]
    places = list(dict.fromkeys(seeds))
    which: Tensor | None = None
    while True:
        drawn = [next(stream) for stream in streams]
        if which is None:
            which = torch.tensor([places.index(seed) for seed in seeds], device=drawn[0][0].device)
        tokens, targets = (torch.stack([rows[side] for rows in drawn]).index_select(0, which) for side in (0, 1))
        yield tokens, targets


def task_rows(task: MemoryTask, generator: torch.Generator, rows: int) -> Iterator[Batch]:
    """Batches of `rows` rows of a task without end, on the generator's device."""
    while True:
        idx, targets = task.batch(generator, rows * POOL)
        yield from zip(idx.split(rows), targets.split(rows), strict=True)


def text_rows(held: Tensor, generator: torch.Generator, rows: int) -> Iterator[Batch]:
    """Batches of `rows` of the rows [N, T + 1] of a text, in an order drawn anew for every pass; `generator` is one of the CPU."""
    while True:
        order = torch.randperm(len(held), generator=generator).to(held.device)
        for picked in order[: len(held) // rows * rows].split(rows):
            chosen = held[picked]
            yield chosen[:, :-1], chosen[:, 1:]
