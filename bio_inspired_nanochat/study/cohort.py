"""Models of several seeds that train side by side: on CUDA their passes are parallel branches of one recorded graph.

A small model leaves most of a GPU idle and waits for the host between kernels of microseconds. Recorded once and replayed, a step no
longer waits, and the branches of a few models take about as long as one. Weights, gradients and rows of the models never meet.

K models, B rows, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.common import capture, reason, say, side_stream
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, build_optimizer
from bio_inspired_nanochat.training.gradients import WARM_RUNS

Batch = tuple[Tensor, ...]


class Cohort:
    """K models of one shape with one optimizer, whose schedule has `steps` steps of `tokens` tokens.

    roles: of the parameters of one model. graph: record a step on CUDA; a recording that fails is said once, and steps stay eager.
    """

    def __init__(
        self, models: Sequence[GPT], roles: Mapping[str, str], optim: OptimConfig, tokens: int, steps: int, graph: bool = True
    ) -> None:
        self.models, self.steps, self.clips = list(models), steps, optim.grad_clip > 0
        assert len(models) == 1 or not self.clips, "clipping by the norm of all gradients would couple the models"
        named = [(f"{k}.{name}", parameter) for k, model in enumerate(models) for name, parameter in model.named_parameters()]
        every = {f"{k}.{name}": role for k in range(len(models)) for name, role in roles.items()}
        self.optimizer = build_optimizer(named, every, optim, n_embd=models[0].config.n_embd, batch_tokens=tokens)
        self.parameters = [parameter for _, parameter in named]
        device = self.parameters[0].device
        self.wanted = graph and device.type == "cuda"
        self._streams = [side_stream(device.index or 0, k) for k in range(len(models))] if device.type == "cuda" else []
        self._done = 0
        self._graph: Any = None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step of every model on its own idx and targets [B, T]; the losses [K] before it, on their device."""
        self.optimizer.schedule(self._done, self.steps)
        self._done += 1
        if self.wanted and self._graph is None and self._done > WARM_RUNS:
            self._record(batches)
        if self._graph is None:
            losses = self._passes(batches)
        else:
            torch._foreach_copy_(self._inputs, [side for batch in batches for side in batch])
            self._graph.replay()
            losses = self._losses.clone()
        if self.clips:
            self.optimizer.clip_grad_norm()
        self.optimizer.step()
        return losses

    def _passes(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients in place of those that were there, and the losses [K]."""
        for parameter in self.parameters:
            parameter.grad = None
        losses = []
        for k, (model, (idx, targets)) in enumerate(zip(self.models, batches, strict=True)):
            with self._branch(k):
                loss = model(idx, targets)
                loss.backward()
                losses.append(loss.detach())
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)
        return torch.stack(losses)

    @contextlib.contextmanager
    def _branch(self, k: int) -> Iterator[None]:
        """Work that waits for nothing of the other models."""
        if not self._streams:
            yield
            return
        self._streams[k].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._streams[k]):
            yield

    def _record(self, batches: Sequence[Batch]) -> None:
        held = [tuple(side.clone() for side in batch) for batch in batches]
        try:
            graph, self._losses = capture(lambda: self._passes(held))
        except RuntimeError as error:
            self.wanted = False
            say(f"notice: steps are not replayed as a CUDA graph, which is slower ({reason(error)})")
            return
        self._graph, self._inputs = graph, [side for batch in held for side in batch]
