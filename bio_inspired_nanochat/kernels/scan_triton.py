"""CUDA execution of the linear scan: one program per row and block of keys walks the ticks with its state in registers.

Dimensions: B batch, H query heads, N ticks, Tk keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _forward(a_ptr, b_ptr, start_ptr, x_ptr, ticks, keys, a_keys, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = offset < keys
    a_offset = tl.where(a_keys == 1, 0, offset)
    x = tl.load(start_ptr + row * keys + offset, mask=live, other=0.0)
    tl.store(x_ptr + row * (ticks + 1) * keys + offset, x, mask=live)
    for n in range(ticks):
        a = tl.load(a_ptr + (row * ticks + n) * a_keys + a_offset, mask=live, other=0.0)
        b = tl.load(b_ptr + (row * ticks + n) * keys + offset, mask=live, other=0.0)
        x = a * x + b
        tl.store(x_ptr + (row * (ticks + 1) + n + 1) * keys + offset, x, mask=live)


@triton.jit
def _adjoint(a_ptr, grad_ptr, out_ptr, ticks, keys, a_keys, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = offset < keys
    a_offset = tl.where(a_keys == 1, 0, offset)
    base = row * (ticks + 1) * keys + offset
    g = tl.load(grad_ptr + base + ticks * keys, mask=live, other=0.0)
    tl.store(out_ptr + base + ticks * keys, g, mask=live)
    for step in range(ticks):
        n = ticks - 1 - step
        a = tl.load(a_ptr + (row * ticks + n) * a_keys + a_offset, mask=live, other=0.0)
        g = tl.load(grad_ptr + base + n * keys, mask=live, other=0.0) + a * g
        tl.store(out_ptr + base + n * keys, g, mask=live)


def scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """See `scan.linear_scan`."""
    batch, heads, ticks, keys = b.shape
    a, b, start = a.contiguous(), b.contiguous(), start.contiguous()
    x = b.new_empty(batch, heads, ticks + 1, keys)
    grid = (batch * heads, triton.cdiv(keys, BLOCK))
    _forward[grid](a, b, start, x, ticks, keys, a.shape[3], BLOCK=BLOCK)
    return x


def adjoint(a: Tensor, grad: Tensor) -> Tensor:
    """See `scan.linear_scan_adjoint`."""
    batch, heads, states, keys = grad.shape
    a, grad = a.contiguous(), grad.contiguous()
    out = torch.empty_like(grad)
    grid = (batch * heads, triton.cdiv(keys, BLOCK))
    _adjoint[grid](a, grad, out, states - 1, keys, a.shape[3], BLOCK=BLOCK)
    return out
