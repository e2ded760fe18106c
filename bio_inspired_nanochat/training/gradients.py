"""Forward and backward of the micro-batches of a step: launched one kernel after the other, or replayed as one CUDA graph.

A step of a synaptic model launches some thousand kernels, one with experts several thousand. On models that a GPU computes in less time
than Python takes to launch them, the host sets the pace. There a micro-batch is recorded once, after a few ordinary ones, and from then
on the device is told only to play it again: the same kernels on the same addresses, so the numbers are the same.

What the kernels read and write lies in memory that belongs to the recording: inputs are copied into it, gradients are handed out of it.
Everything that changes from step to step is such an input.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.common import aside, capture, reason, say
from bio_inspired_nanochat.synaptic import Routing
from bio_inspired_nanochat.training.experts import ExpertKeeper
from bio_inspired_nanochat.training.parallel import Engine
from bio_inspired_nanochat.training.plan import Plan

WARM_RUNS = 3  # micro-batches before a recording: kernels are compiled and chosen in them


class MicroBatch(NamedTuple):
    """Inputs of one forward: idx, targets [B, T]; share of its mean loss in the step's; step and first_row as in `job.Objective`."""

    idx: Tensor
    targets: Tensor
    share: float | Tensor
    step: int | Tensor
    first_row: int | Tensor


class Gradients:
    """Calls add the gradients of a micro-batch to `.grad` and its statistics to the keeper, and return its share of the step's loss.

    The first micro-batch of a step expects the gradients of the last one to be gone (`zero_grad`). With `graph=1` in the plan's
    configuration it is replayed; a recording that fails is said once, and everything stays as it was before.
    """

    def __init__(self, engine: Engine, keeper: ExpertKeeper | None, plan: Plan) -> None:
        self.engine, self.keeper, self.plan = engine, keeper, plan
        self.wanted = plan.config.graph == "1"
        self._calls = 0
        self._recording: _Recording | None = None

    def __call__(self, idx: Tensor, targets: Tensor, micro: int = 0, share: float = 1.0, step: int = 0, first_row: int = 0) -> Tensor:
        """idx, targets [B, T], the step's micro-batch number `micro`; the loss in nats, 0-dim on its device."""
        batch = MicroBatch(idx, targets, share, step, first_row)
        if not self.wanted:
            return self._run(batch, micro)
        self._calls += 1
        if self._recording is not None and not self._recording.fits(batch):
            self.release()
        if self._recording is None and self._calls > WARM_RUNS and micro == 0:
            self._record(batch)
        if self._recording is not None:
            return self._replay(self._recording, batch, micro)
        with aside():  # autograd must not have met the default stream before a recording
            return self._run(batch, micro)

    @property
    def holds(self) -> bool:
        """Whether a recording holds the memory of a step."""
        return self._recording is not None

    def release(self) -> None:
        """Give back the memory of the recording, which is that of a step, to whatever needs it before the next one."""
        self._recording = None

    def _run(self, batch: MicroBatch, micro: int) -> Tensor:
        with self.engine.micro_batch(last=micro == self.plan.accumulation - 1):
            loss, routing = self._pass(batch)
        if self.keeper is not None:
            self.keeper.add(routing)
        return loss

    def _pass(self, batch: MicroBatch) -> tuple[Tensor, list[Routing]]:
        probes = None if self.keeper is None else self.keeper.probes()
        objective, loss, routing = self.engine(batch.idx, batch.targets, batch.step, batch.first_row, probes)
        (objective * batch.share).backward()
        return loss * batch.share, routing or []

    def _record(self, batch: MicroBatch) -> None:
        leaves: list[Tensor] = [param for param in self.engine.model.parameters() if param.requires_grad]
        leaves += [] if self.keeper is None else self.keeper.taps()
        try:
            self._recording = _Recording(batch, leaves, self._pass, keeps=self.plan.accumulation > 1)
        except RuntimeError as error:
            self.wanted = False
            for leaf in leaves:
                leaf.grad = None
            say(f"notice: steps are not replayed as a CUDA graph, which may be slower ({reason(error)})")

    def _replay(self, recording: _Recording, batch: MicroBatch, micro: int) -> Tensor:
        loss, routing = recording.replay(batch, first=micro == 0)
        if self.keeper is not None:
            self.keeper.add(routing)
        return loss


class _Recording:
    """A recorded micro-batch. keeps: gradients and statistics of several replays add up, instead of those of the last one."""

    def __init__(
        self, batch: MicroBatch, leaves: list[Tensor], run: Callable[[MicroBatch], tuple[Tensor, list[Routing]]], keeps: bool
    ) -> None:
        device = batch.idx.device
        numbers = ((batch.share, torch.float32), (batch.step, torch.int64), (batch.first_row, torch.int64))
        share, step, first_row = (torch.tensor(value, dtype=dtype, device=device) for value, dtype in numbers)
        self._inputs = MicroBatch(batch.idx.clone(), batch.targets.clone(), share, step, first_row)
        self._keeps = keeps
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf) if keeps else None
        self._graph, (self._loss, self._routing) = capture(lambda: run(self._inputs))
        self._grads = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]

    def fits(self, batch: MicroBatch) -> bool:
        """Whether this is what was recorded."""
        return batch.idx.shape == self._inputs.idx.shape

    def replay(self, batch: MicroBatch, first: bool) -> tuple[Tensor, list[Routing]]:
        """Loss and statistics of another micro-batch; `.grad` of the leaves gets the gradients since the `first` one of a step."""
        for held, value in zip(self._inputs, batch, strict=True):
            assert isinstance(held, Tensor)
            held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)
        if self._keeps and first:
            torch._foreach_zero_([grad for _, grad in self._grads])
        self._graph.replay()
        for leaf, grad in self._grads:
            leaf.grad = grad
        routing = [Routing(*(part.clone() for part in found)) for found in self._routing] if self._keeps else self._routing
        return self._loss.clone(), routing
