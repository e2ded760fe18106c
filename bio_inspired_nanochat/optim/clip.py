"""Gradient norm and clipping without a wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from bio_inspired_nanochat.common import is_cut, local


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], limit: float) -> Tensor:
    """The global L2 norm of the gradients before clipping, 0-dim float32 on their device; above `limit` they are scaled to it in place.

    limit 0 only measures. Nothing is copied to the host: read the norm when you log. A NaN or infinite gradient gives a NaN or
    infinite norm, and clipping then makes all gradients NaN or zero: skip such a step. Of gradients that FSDP has cut every rank
    measures its own rows, and the squares are summed over ranks: collective then, with the same result on all.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    rows = [local(grad) for grad in grads if is_cut(grad)]
    held = [grad for grad in grads if not is_cut(grad)]
    norm = _norm(held) if held else rows[0].new_zeros((), dtype=torch.float32)
    if rows:
        square = _norm(rows).square()
        dist.all_reduce(square)
        norm = (norm.square() + square).sqrt()
    if limit > 0:
        factor = (limit / norm).clamp(max=1.0)
        torch._foreach_mul_(rows + held, factor)
    return norm


def _norm(grads: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)  # float32, because a norm of bfloat16 gradients would be rounded
    return torch.linalg.vector_norm(torch.stack(norms))
