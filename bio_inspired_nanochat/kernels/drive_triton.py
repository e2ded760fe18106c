"""Triton execution of `tick_drive`: logits tile by tile, summed over each tick before anything is stored.

Dimensions: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, N ticks, D head size; M queries and K keys of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.masks import num_ticks
from bio_inspired_nanochat.kernels.tiles import Tile, allowed, fill_zeros, key_span, precision, tile_for

KINDS = {"phi": 0, "softplus": 1}


@triton.jit
def _drive(x, KIND: tl.constexpr):
    """phi or softplus of a logit above threshold, `kernels.reference.phi`."""
    if KIND == 0:
        raised = tl.maximum(x + 1.0, 0.0)
        return tl.where(x < 1.0, raised * raised * 0.25, x)
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == 0:
        return tl.minimum(tl.maximum(x + 1.0, 0.0), 2.0) * 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward(
    q_ptr, k_ptr, theta_ptr, doc_ptr, u_ptr, scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of keys of one head against every query tile; tiles start on a tick."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    depth = tl.arange(0, D)
    k = tl.load(k_ptr + ((batch * (heads // group) + head // group) * keys + key[:, None]) * D + depth, mask=key[:, None] < keys, other=0.0)
    theta = tl.load(theta_ptr + head)
    base = q_start // C * C
    end = q_start + queries - base
    low, high = key_span(tl.program_id(0), base, end, window, M, K, WINDOW)
    out = u_ptr + row * ticks * keys
    fill_zeros(out, 0, low, key, keys, ticks, C, M, K)
    for start in range(low, high, M):
        tick = start // C + tl.arange(0, M // C)
        place = base + start + tl.arange(0, M)
        query = place - q_start
        real = (query >= 0) & (query < queries)
        q = tl.load(q_ptr + (row * queries + query[:, None]) * D + depth, mask=real[:, None], other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - theta
        seen = allowed(place, key, real, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False)
        total = tl.sum(tl.reshape(tl.where(seen, _drive(x, KIND), 0.0), [M // C, C, K]), 1)
        tl.store(out + (tick[:, None] * keys + key), total, mask=(tick[:, None] < ticks) & (key < keys))
    fill_zeros(out, high, end, key, keys, ticks, C, M, K)


@triton.jit
def _cotangent(
    q, k, place, key, real, gu_ptr, theta, scale, row, batch, base, keys, docs, window, ticks, doc_ptr,
    C: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of a tile, [M, K]."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - theta
    seen = allowed(place, key, real, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False)
    tick = (place - base) // C
    spread = tl.load(gu_ptr + row * ticks * keys + (tick[:, None] * keys + key), mask=seen, other=0.0)
    return tl.where(seen, _slope(x, KIND) * spread, 0.0)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, theta_ptr, doc_ptr, gu_ptr, gk_ptr, gtheta_ptr, scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one block of keys (per query head), and its share of dtheta."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    depth = tl.arange(0, D)
    k = tl.load(k_ptr + ((batch * (heads // group) + head // group) * keys + key[:, None]) * D + depth, mask=key[:, None] < keys, other=0.0)
    theta = tl.load(theta_ptr + head)
    base = q_start // C * C
    gk = tl.zeros([K, D], tl.float32)
    gtheta = tl.zeros([K], tl.float32)
    low, high = key_span(tl.program_id(0), base, q_start + queries - base, window, M, K, WINDOW)
    for start in range(low, high, M):
        place = base + start + tl.arange(0, M)
        query = place - q_start
        real = (query >= 0) & (query < queries)
        q = tl.load(q_ptr + (row * queries + query[:, None]) * D + depth, mask=real[:, None], other=0.0)
        g = _cotangent(
            q, k, place, key, real, gu_ptr, theta, scale, row, batch, base, keys, docs, window, ticks, doc_ptr,
            C, WINDOW, DOC, KIND, PRECISION,
        )  # fmt: skip
        gtheta -= tl.sum(g, 0)
        gk += tl.dot(tl.trans(g).to(q.dtype), q, input_precision=PRECISION)
    tl.store(gk_ptr + (row * keys + key[:, None]) * D + depth, gk * scale, mask=key[:, None] < keys)
    tl.store(gtheta_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(gtheta, 0))


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, theta_ptr, doc_ptr, gu_ptr, gq_ptr, scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; the longest tiles come first."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    depth = tl.arange(0, D)
    base = q_start // C * C
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    place = q_start + begin + tl.arange(0, M)
    query = begin + tl.arange(0, M)
    real = query < queries
    q = tl.load(q_ptr + (row * queries + query[:, None]) * D + depth, mask=real[:, None], other=0.0)
    theta = tl.load(theta_ptr + head)
    gq = tl.zeros([M, D], tl.float32)
    first = 0
    if WINDOW:
        first = tl.maximum(q_start + begin - window + 1, 0) // K * K
    for low in range(first, tl.minimum(keys, q_start + begin + M), K):
        key = low + tl.arange(0, K)
        k = tl.load(
            k_ptr + ((batch * (heads // group) + head // group) * keys + key[:, None]) * D + depth, mask=key[:, None] < keys, other=0.0
        )
        g = _cotangent(
            q, k, place, key, real, gu_ptr, theta, scale, row, batch, base, keys, docs, window, ticks, doc_ptr,
            C, WINDOW, DOC, KIND, PRECISION,
        )  # fmt: skip
        gq += tl.dot(g.to(k.dtype), k, input_precision=PRECISION)
    tl.store(gq_ptr + (row * queries + query[:, None]) * D + depth, gq * scale, mask=real[:, None])


def _arguments(
    q: Tensor, k: Tensor, tick: int, q_start: int, window: int | None, doc: Tensor | None, kind: str, tile: Tile
) -> tuple[tuple, dict]:
    sizes = (q_start, q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1], 0 if doc is None else doc.shape[1], window or 0)
    static = {
        "C": tick, "D": q.shape[3], "M": tile.queries, "K": tile.keys, "WINDOW": window is not None, "DOC": doc is not None,
        "KIND": KINDS[kind], "PRECISION": precision(q), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (*sizes, num_ticks(q_start, q.shape[2], tick)), static


@torch.library.custom_op("bio_inspired_nanochat::tick_drive", mutates_args=())
def tick_drive_op(
    q: Tensor, k: Tensor, theta: Tensor, doc: Tensor | None, tick: int, scale: float, q_start: int, window: int | None, kind: str
) -> Tensor:
    """See `kernels.tick_drive`; q [B, H, Tq, D], k [B, Hkv, Tk, D], theta [H] float32 to [B, H, N, Tk] float32."""
    q, k = q.contiguous(), k.contiguous()
    batch, heads, length, dim = q.shape
    tile = tile_for("drive", dim, q.element_size(), tick)
    sizes, static = _arguments(q, k, tick, q_start, window, doc, kind, tile)
    out = q.new_empty(batch, heads, num_ticks(q_start, length, tick), k.shape[2], dtype=torch.float32)
    grid = (triton.cdiv(k.shape[2], tile.keys), batch * heads)
    _forward[grid](q, k, theta.contiguous(), doc if doc is not None else q, out, scale, *sizes, **static)
    return out


@tick_drive_op.register_fake
def _(q, k, theta, doc, tick, scale, q_start, window, kind):
    return q.new_empty(q.shape[0], q.shape[1], num_ticks(q_start, q.shape[2], tick), k.shape[2], dtype=torch.float32)


@torch.library.custom_op("bio_inspired_nanochat::tick_drive_adjoint", mutates_args=())
def tick_drive_adjoint(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    doc: Tensor | None,
    tick: int,
    scale: float,
    q_start: int,
    window: int | None,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and theta from that of the drive."""
    q, k, grad, theta = q.contiguous(), k.contiguous(), grad.contiguous(), theta.contiguous()
    batch, heads, length, dim = q.shape
    keys, group = k.shape[2], q.shape[1] // k.shape[1]
    tile = tile_for("drive_backward", dim, q.element_size(), tick)
    sizes, static = _arguments(q, k, tick, q_start, window, doc, kind, tile)
    grid = (triton.cdiv(keys, tile.keys), batch * heads)
    gq, gk = torch.empty_like(q), q.new_empty(batch, heads, keys, dim, dtype=q.dtype if group == 1 else torch.float32)
    gtheta = theta.new_empty(batch, heads, grid[0])
    mask = doc if doc is not None else q
    _backward_keys[grid](q, k, theta, mask, grad, gk, gtheta, scale, *sizes, **static)
    _backward_queries[(triton.cdiv(length, tile.queries), batch * heads)](q, k, theta, mask, grad, gq, scale, *sizes, **static)
    if group > 1:
        gk = gk.view(batch, k.shape[1], group, keys, dim).sum(2).to(k.dtype)
    return gq, gk, gtheta.sum((0, 2))


@tick_drive_adjoint.register_fake
def _(grad, q, k, theta, doc, tick, scale, q_start, window, kind):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(theta),
    )


def _setup(ctx, inputs, output) -> None:
    q, k, theta, doc, *ctx.rest = inputs
    ctx.save_for_backward(q, k, theta, doc)


def _backward(ctx, grad):
    return *tick_drive_adjoint(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


tick_drive_op.register_autograd(_backward, setup_context=_setup)


def obstacle(tick: int) -> str | None:
    """Why the kernel cannot serve a tick length, or None."""
    if tick > 64 or math.log2(tick) % 1:
        return f"a tick of {tick} tokens is not a power of two up to 64"
    return None
