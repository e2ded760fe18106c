"""What lies between the matrix products of a block, for inference: one kernel for what PyTorch does in two to eighteen.

A decoded token is as long as its launches. Values are computed in float32 and rounded where they are stored, once.

Dimensions: B batch, T tokens, H query heads, Hkv key heads, D head size, C width of the stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import launch, strides

WIDEST = 16384  # values of a row that one program holds
EPSILON = torch.finfo(torch.float32).eps  # that of `F.rms_norm`


@triton.jit
def _mix_norm(x_ptr, y_ptr, scale_ptr, sum_ptr, norm_ptr, width, epsilon, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    live = tl.arange(0, BLOCK) < width
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_ptr).to(tl.float32) + y * tl.load(scale_ptr + 1).to(tl.float32)
    else:
        x = x + y
    rounded = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, rounded, mask=live)
    x = rounded.to(tl.float32)
    tl.store(norm_ptr + at, x / tl.sqrt(tl.sum(x * x, 0) / width + epsilon), mask=live)


@triton.jit
def _turn(x_ptr, cos, sin, out_ptr, batch, token, tokens, heads, of_batch, of_head, of_token, gain, epsilon, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """All heads of one token."""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    live = (head < heads) & (d < HALF)
    source = x_ptr + batch * of_batch + token * of_token + head * of_head + d
    a = tl.load(source, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=live, other=0.0).to(tl.float32)
    first, second = a * cos + b * sin, b * cos - a * sin
    size = tl.sum(first * first + second * second, 1) / (2 * HALF)
    factor = (gain / tl.sqrt(size + epsilon))[:, None]
    out = out_ptr + ((batch * tokens + token) * heads + head) * (2 * HALF) + d
    tl.store(out, first * factor, mask=live)
    tl.store(out + HALF, second * factor, mask=live)


@triton.jit
def _rotate_norm(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads, q_b, q_h, q_t, k_b, k_h, k_t, of_angles, gain, epsilon,
    HALF: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: queries and keys of one token."""
    batch, token = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0).to(tl.int64) % tokens
    d = tl.arange(0, BLOCK)
    angle = batch * of_angles + token * HALF + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    _turn(q_ptr, cos, sin, q_out_ptr, batch, token, tokens, q_heads, q_b, q_h, q_t, gain, epsilon, HALF, BLOCK, Q)
    _turn(k_ptr, cos, sin, k_out_ptr, batch, token, tokens, k_heads, k_b, k_h, k_t, gain, epsilon, HALF, BLOCK, K)


@triton.jit
def _relu_squared(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    tl.store(out_ptr + at, x * x, mask=at < size)


def serves(x: Tensor) -> bool:
    """Whether these kernels take rows of x [..., C]."""
    return x.dtype in (torch.float32, torch.bfloat16) and 0 < x.shape[-1] <= WIDEST and x.numel() > 0


def mix_norm(x: Tensor, y: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of x and y [..., C], weighted by scales [2] if there are any, and its RMS norm."""
    x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    launch(
        _mix_norm, (x.numel() // width, 1), x, y, x if scales is None else scales.contiguous(), total, normed, width, EPSILON,
        SCALED=scales is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, normed


def rotate_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Rotary positions, RMS norm and gain of queries q [B, H, T, D] and keys k [B, Hkv, T, D]; cos and sin [B or 1, 1, T, D/2].

    The results lie [B, T, H, D] in memory.
    """
    (batch, heads, tokens, dim), shared = q.shape, k.shape[1]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    out_q, out_k = q.new_empty(batch, tokens, heads, dim), k.new_empty(batch, tokens, shared, dim)
    half, sizes = dim // 2, [triton.next_power_of_2(count) for count in (dim // 2, heads, shared)]
    launch(
        _rotate_norm, (batch * tokens, 1), q, k, cos, sin, out_q, out_k, tokens, heads, shared, *strides(q), *strides(k),
        0 if len(cos) == 1 else tokens * half, gain, EPSILON,
        HALF=half, BLOCK=sizes[0], Q=sizes[1], K=sizes[2], num_warps=_warps(sizes[0] * max(sizes[1:])),
    )  # fmt: skip
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


def relu_squared(x: Tensor) -> Tensor:
    """The square of what is positive in x, of any shape."""
    x = x.contiguous()
    out, block = torch.empty_like(x), 1024
    launch(_relu_squared, (triton.cdiv(x.numel(), block), 1), x, out, x.numel(), BLOCK=block, num_warps=4)
    return out


def _warps(values: int) -> int:
    """Of a program that holds so many values at once: eight a thread, if it can."""
    return min(8, max(1, values // 256))
