"""CUDA execution of running sums in float64: one program per row.

Dimensions: rows of T values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import launch

CHUNK = 1024


@triton.jit
def _running_sum(x_ptr, high_ptr, low_ptr, length, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    carry = tl.zeros([1], tl.float64)
    for begin in range(0, length, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row + at, mask=at < length, other=0.0).to(tl.float64)
        total = carry + tl.cumsum(x, 0)
        high = total.to(tl.float32)
        tl.store(high_ptr + row + at, high, mask=at < length)
        tl.store(low_ptr + row + at, (total - high.to(tl.float64)).to(tl.float32), mask=at < length)
        carry += tl.sum(x, 0)


@triton.jit
def _sum_from_end(x_ptr, out_ptr, length, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    carry = tl.zeros([1], tl.float64)
    for back in range(0, length, CHUNK):
        at = length - 1 - back - tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row + at, mask=at >= 0, other=0.0).to(tl.float64)
        tl.store(out_ptr + row + at, (carry + tl.cumsum(x, 0)).to(tl.float32), mask=at >= 0)
        carry += tl.sum(x, 0)


def running_sum(x: Tensor) -> Tensor:
    """Inclusive sum of x [..., T] float32 over the last dimension, [2, ..., T]: two float32 whose sum it is."""
    x = x.contiguous()
    out = torch.empty(2, *x.shape, device=x.device)
    launch(_running_sum, (x.numel() // x.shape[-1], 1), x, out[0], out[1], x.shape[-1], CHUNK=CHUNK)
    return out


def sum_from_end(x: Tensor) -> Tensor:
    """The adjoint of `running_sum`: sums of x [..., T] float32 from the end."""
    x = x.contiguous()
    out = torch.empty_like(x)
    launch(_sum_from_end, (x.numel() // x.shape[-1], 1), x, out, x.shape[-1], CHUNK=CHUNK)
    return out
