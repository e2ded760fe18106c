"""What lies between the matrix products of a block: sums, norms, rotary positions, the activation.

In training they are PyTorch's operations, which the compiler joins. For inference on a GPU, where every launch counts and nothing
is compiled, they are Triton kernels that compute the same in float32 and round once.

Dimensions: B batch, T tokens, H query heads, Hkv key heads, D head size, C width of the stream.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.kernels.scan import for_inference

QK_SCALE = 1.2


def _kernels(x: Tensor, *others: Tensor) -> Any:
    """The kernels, if they take rows of x [..., C] and the others."""
    if not for_inference(x, *others):
        return None
    from bio_inspired_nanochat.kernels import glue_triton  # imported late: a machine without Triton never gets here

    return glue_triton if glue_triton.serves(x) else None


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last dimension of x [..., C], without gains."""
    return F.rms_norm(x, (x.shape[-1],))


def mix_norm(x: Tensor, y: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + y, or scales[0] x + scales[1] y, and the RMS norm of that; x and y [..., C], scales [2]."""
    scales = None if scales is None else scales.to(x.dtype)
    if kernels := _kernels(x, y):
        return kernels.mix_norm(x, y, scales)
    if scales is not None:
        x, y = scales[0] * x, scales[1] * y
    x = x + y
    return x, rms_norm(x)


def apply_rotary(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head's coordinates, x [B, H, T, D]."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def rotate_norm(q: Tensor, k: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotary positions and QK norm of queries q [B, H, T, D] and keys k [B, Hkv, T, D]; cos and sin [B or 1, 1, T, D/2]."""
    if kernels := _kernels(q, k, *cos_sin):
        return kernels.rotate_norm(q, k, *cos_sin, QK_SCALE)
    q, k = (rms_norm(apply_rotary(side, cos_sin)) * QK_SCALE for side in (q, k))
    return q, k


def relu_squared(x: Tensor) -> Tensor:
    """The activation of an MLP, max(x, 0)^2."""
    kernels = _kernels(x)
    return F.relu(x).square() if kernels is None else kernels.relu_squared(x)
