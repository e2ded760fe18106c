"""Steps that went wrong: a loss or gradient that is not finite, a loss spike.

They are judged from numbers that are reduced over ranks, so all ranks see the same fault at the same step and do the same about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training.ranks import gather

FEWEST = 10  # steps before a loss can be called a spike: the first ones fall steeply
SHOWN = 3  # documents that a message names


@dataclass(frozen=True)
class Fault:
    """step: number of the optimizer step, from 1; what: the finding, as a clause; batches: the documents (file:row) of each suspect rank.

    Suspects are the ranks whose own loss is not finite, all ranks where none is, and for a spike the one with the largest loss.
    """

    step: int
    what: str
    batches: dict[int, list[str]]

    def batch(self) -> str:
        """The suspects in a few words: `batch of rank 1: 18 documents, shard_00000.parquet:3, ...`."""
        parts = []
        for rank, documents in self.batches.items():
            more = ", ..." if len(documents) > SHOWN else ""
            parts.append(f"batch of rank {rank}: {len(documents)} documents, {', '.join(documents[:SHOWN])}{more}")
        return "; ".join(parts)


def judge(loss: float, norm: float, recent: Sequence[float], spike: float) -> str | None:
    """What is wrong with a step, or None. recent: losses of the steps before; spike: nats above their mean, 0 for none."""
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    mean = sum(recent) / max(1, len(recent))
    if spike and len(recent) >= FEWEST and loss > mean + spike:
        return f"the loss {loss:.4g} is a spike above {mean:.4g}, more than --loss_spike={spike:g}"
    return None


def find(step: int, what: str, own_loss: float, documents: list[str]) -> Fault:
    """The fault with its suspects. own_loss, documents: of this rank in that step. Collective."""
    seen = gather((own_loss, documents))
    losses = [loss for loss, _ in seen]
    suspects = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not suspects and "spike" in what:
        suspects = [losses.index(max(losses))]
    return Fault(step, what, {rank: seen[rank][1] for rank in suspects or range(len(seen)) if seen[rank][1]})


def diverged(fault: Fault, last_saved: str | None, cap: str = "") -> UserError:
    """The error for a run that ends with a fault. cap: why it was not put up with, where faults are."""
    saved = f"the checkpoint before it is {last_saved}" if last_saved else "no checkpoint was saved before it"
    fix = cap or "lower --optim.matrix_lr, set --optim.grad_clip=1, or go on past it with --on_nonfinite=skip or rollback"
    middle = [fault.batch()] if fault.batches else []
    return UserError("; ".join([f"step {fault.step}: {fault.what}, training diverged and stopped", *middle, saved, fix]))
