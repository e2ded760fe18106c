"""Replayed steps without a GPU: a tape in the place of a CUDA graph."""

import contextlib

import pytest
import torch

from bio_inspired_nanochat.training import gradients
from bio_inspired_nanochat.training.gradients import Gradients


class Tape:
    """A CUDA graph for CPUs: `replay` does again what was recorded, with inputs, results and gradients in the same memory."""

    played = 0  # replays of all tapes

    def __init__(self, run, leaves) -> None:
        self.run, self.leaves = run, leaves
        self.fresh = [leaf.grad is None for leaf in leaves]
        drawn = torch.get_rng_state()
        self.made = run()
        torch.set_rng_state(drawn)
        self.grads = [leaf.grad for leaf in leaves]
        for grad in self.grads:
            if grad is not None:
                grad.fill_(torch.nan)  # a recording computes nothing

    def replay(self) -> None:
        Tape.played += 1
        for leaf, fresh, grad in zip(self.leaves, self.fresh, self.grads, strict=True):
            leaf.grad = None if fresh else grad
        loss, routing = self.run()
        self.made[0].copy_(loss)
        for held, found in zip(self.made[1], routing, strict=True):
            for mine, new in zip(held, found, strict=True):
                mine.copy_(new)
        for leaf, grad in zip(self.leaves, self.grads, strict=True):
            if grad is not None and grad is not leaf.grad:
                grad.copy_(leaf.grad)
            leaf.grad = None


class Taped(Gradients):
    """Gradients that record on a CPU."""

    def __init__(self, engine, keeper, plan) -> None:
        super().__init__(engine, keeper, plan)
        self.wanted = True

    def _record(self, batch) -> None:
        leaves = [*self.engine.model.parameters(), *([] if self.keeper is None else self.keeper.taps())]

        def capture(run):
            tape = Tape(run, leaves)
            return tape, tape.made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "capture", capture)
            super()._record(batch)

    def __call__(self, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "aside", contextlib.nullcontext)
            return super().__call__(*args, **options)
