"""Gradient norm and clipping without a wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], limit: float) -> Tensor:
    """The global L2 norm of the gradients before clipping, 0-dim float32 on their device; above `limit` they are scaled to it in place.

    limit 0 only measures. Nothing is copied to the host: read the norm when you log. A NaN or infinite gradient gives a NaN or
    infinite norm, and clipping then makes all gradients NaN or zero: skip such a step.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)  # float32, because a norm of bfloat16 gradients would be rounded
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if limit > 0:
        factor = (limit / norm).clamp(max=1.0)
        torch._foreach_mul_(grads, factor)
    return norm
