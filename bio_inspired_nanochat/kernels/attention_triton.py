"""Triton execution of `tick_biased_attention`: flash attention whose logits carry one bias per tick and key.

No tensor of the size queries x keys exists but the bias and its gradient, which are smaller by the tick length.

Dimensions: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, N ticks, D head size; M queries and K keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import Tile, allowed, fill_zeros, key_span, precision, tile_for

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
    q, k, place, key, real, beta_ptr, scale, row, batch, base, keys, docs, window, ticks, doc_ptr,
    C: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in units of log 2, [M, K], -inf where a pair is masked."""
    tick = (place - base) // C
    seen = real[:, None] & (key < keys)
    if MASKED:
        seen = allowed(place, key, real, keys, doc_ptr, batch, docs, window, WINDOW, DOC, True)
    bias = tl.load(beta_ptr + row * ticks * keys + (tick[:, None] * keys + key), mask=seen, other=0.0)
    x = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias) * LOG2E
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _softmax_tiles(
    top, total, y, low, high, q, k_ptr, v_ptr, place, real, beta_ptr, scale, row, source, batch, base, keys, docs, window, ticks, doc_ptr,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Continue an online softmax over the keys [low, high)."""
    depth = tl.arange(0, D)
    for begin in range(low, high, K):
        key = begin + tl.arange(0, K)
        at = (source * keys + key[:, None]) * D + depth
        k = tl.load(k_ptr + at, mask=key[:, None] < keys, other=0.0)
        v = tl.load(v_ptr + at, mask=key[:, None] < keys, other=0.0)
        x = _logits(
            q, k, place, key, real, beta_ptr, scale, row, batch, base, keys, docs, window, ticks, doc_ptr, C, WINDOW, DOC, PRECISION, MASKED
        )
        peak = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weight, 1)
        y = y * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = peak
    return top, total, y


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, beta_ptr, doc_ptr, y_ptr, lse_ptr, scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head; the longest tiles come first."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    source = batch * (heads // group) + head // group
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    query = begin + tl.arange(0, M)
    place, real = q_start + query, query < queries
    base = q_start // C * C
    at = (row * queries + query[:, None]) * D + tl.arange(0, D)
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    y = tl.zeros([M, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(q_start + begin - window + 1, 0) // K * K
    high = tl.minimum(keys, q_start + begin + M)
    plain = low
    if not (WINDOW or DOC):  # keys that every query of the tile sees need no mask
        plain = tl.minimum((q_start + begin + 1) // K * K, high)
        top, total, y = _softmax_tiles(
            top, total, y, low, plain, q, k_ptr, v_ptr, place, real, beta_ptr, scale, row, source, batch, base, keys, docs, window, ticks, doc_ptr,
            C, D, K, WINDOW, DOC, PRECISION, False,
        )  # fmt: skip
    top, total, y = _softmax_tiles(
        top, total, y, plain, high, q, k_ptr, v_ptr, place, real, beta_ptr, scale, row, source, batch, base, keys, docs, window, ticks, doc_ptr,
        C, D, K, WINDOW, DOC, PRECISION, True,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    tl.store(y_ptr + at, (y / total[:, None]).to(q.dtype), mask=real[:, None])
    tl.store(lse_ptr + row * queries + query, top + tl.log2(total), mask=real)


@triton.jit
def _key_tiles(
    gk, gv, low, high, k, v, key, q_ptr, gy_ptr, lse_ptr, delta_ptr, beta_ptr, gbeta_ptr, doc_ptr,
    scale, row, batch, base, q_start, queries, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of queries that start in [low, high), counted from `base`, to dk and dv; store their dbeta."""
    depth = tl.arange(0, D)
    for start in range(low, high, M):
        tick = start // C + tl.arange(0, M // C)
        place = base + start + tl.arange(0, M)
        query = place - q_start
        real = (query >= 0) & (query < queries)
        there = (row * queries + query[:, None]) * D + depth
        q = tl.load(q_ptr + there, mask=real[:, None], other=0.0)
        gy = tl.load(gy_ptr + there, mask=real[:, None], other=0.0)
        lse = tl.load(lse_ptr + row * queries + query, mask=real, other=0.0)
        delta = tl.load(delta_ptr + row * queries + query, mask=real, other=0.0)
        x = _logits(
            q, k, place, key, real, beta_ptr, scale, row, batch, base, keys, docs, window, ticks, doc_ptr, C, WINDOW, DOC, PRECISION, MASKED
        )
        weight = tl.exp2(x - lse[:, None])
        gv += tl.dot(tl.trans(weight).to(gy.dtype), gy, input_precision=PRECISION)
        g = weight * (tl.dot(gy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        gk += tl.dot(tl.trans(g).to(q.dtype), q, input_precision=PRECISION)
        total = tl.sum(tl.reshape(g, [M // C, C, K]), 1)
        tl.store(gbeta_ptr + row * ticks * keys + (tick[:, None] * keys + key), total, mask=(tick[:, None] < ticks) & (key < keys))
    return gk, gv


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, beta_ptr, doc_ptr, gy_ptr, lse_ptr, delta_ptr, gk_ptr, gv_ptr, gbeta_ptr,
    scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (per query head) and dbeta of one block of keys; tiles of queries start on a tick."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    depth = tl.arange(0, D)
    at = ((batch * (heads // group) + head // group) * keys + key[:, None]) * D + depth
    k = tl.load(k_ptr + at, mask=key[:, None] < keys, other=0.0)
    v = tl.load(v_ptr + at, mask=key[:, None] < keys, other=0.0)
    base = q_start // C * C
    gk, gv = tl.zeros([K, D], tl.float32), tl.zeros([K, D], tl.float32)
    end = q_start + queries - base
    low, high = key_span(tl.program_id(0), base, end, window, M, K, WINDOW)
    fill_zeros(gbeta_ptr + row * ticks * keys, 0, low, key, keys, ticks, C, M, K)
    plain = high
    if not (WINDOW or DOC):  # later queries see every key of the block
        plain = tl.minimum(high, low + tl.cdiv(tl.maximum(tl.program_id(0) * K + K - base - low, 0), M) * M)
    gk, gv = _key_tiles(
        gk, gv, low, plain, k, v, key, q_ptr, gy_ptr, lse_ptr, delta_ptr, beta_ptr, gbeta_ptr, doc_ptr,
        scale, row, batch, base, q_start, queries, keys, docs, window, ticks, C, D, M, K, WINDOW, DOC, PRECISION, True,
    )  # fmt: skip
    if not (WINDOW or DOC):
        gk, gv = _key_tiles(
            gk, gv, plain, high, k, v, key, q_ptr, gy_ptr, lse_ptr, delta_ptr, beta_ptr, gbeta_ptr, doc_ptr,
            scale, row, batch, base, q_start, queries, keys, docs, window, ticks, C, D, M, K, WINDOW, DOC, PRECISION, False,
        )  # fmt: skip
    fill_zeros(gbeta_ptr + row * ticks * keys, high, end, key, keys, ticks, C, M, K)
    own = (row * keys + key[:, None]) * D + depth
    tl.store(gk_ptr + own, gk * scale, mask=key[:, None] < keys)
    tl.store(gv_ptr + own, gv, mask=key[:, None] < keys)


@triton.jit
def _query_tiles(
    gq, low, high, q, gy, lse, delta, place, real, k_ptr, v_ptr, beta_ptr, doc_ptr,
    scale, row, source, batch, base, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys [low, high) to dq."""
    depth = tl.arange(0, D)
    for first in range(low, high, K):
        key = first + tl.arange(0, K)
        there = (source * keys + key[:, None]) * D + depth
        k = tl.load(k_ptr + there, mask=key[:, None] < keys, other=0.0)
        v = tl.load(v_ptr + there, mask=key[:, None] < keys, other=0.0)
        x = _logits(
            q, k, place, key, real, beta_ptr, scale, row, batch, base, keys, docs, window, ticks, doc_ptr, C, WINDOW, DOC, PRECISION, MASKED
        )
        g = tl.exp2(x - lse[:, None]) * (tl.dot(gy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        gq += tl.dot(g.to(k.dtype), k, input_precision=PRECISION)
    return gq


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, beta_ptr, doc_ptr, gy_ptr, lse_ptr, delta_ptr, gq_ptr,
    scale, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; the longest tiles come first."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    source = batch * (heads // group) + head // group
    depth = tl.arange(0, D)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    query = begin + tl.arange(0, M)
    place, real = q_start + query, query < queries
    base = q_start // C * C
    at = (row * queries + query[:, None]) * D + depth
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    gy = tl.load(gy_ptr + at, mask=real[:, None], other=0.0)
    lse = tl.load(lse_ptr + row * queries + query, mask=real, other=0.0)
    delta = tl.load(delta_ptr + row * queries + query, mask=real, other=0.0)
    gq = tl.zeros([M, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(q_start + begin - window + 1, 0) // K * K
    high = tl.minimum(keys, q_start + begin + M)
    plain = low
    if not (WINDOW or DOC):
        plain = tl.minimum((q_start + begin + 1) // K * K, high)
        gq = _query_tiles(
            gq, low, plain, q, gy, lse, delta, place, real, k_ptr, v_ptr, beta_ptr, doc_ptr,
            scale, row, source, batch, base, keys, docs, window, ticks, C, D, K, WINDOW, DOC, PRECISION, False,
        )  # fmt: skip
    gq = _query_tiles(
        gq, plain, high, q, gy, lse, delta, place, real, k_ptr, v_ptr, beta_ptr, doc_ptr,
        scale, row, source, batch, base, keys, docs, window, ticks, C, D, K, WINDOW, DOC, PRECISION, True,
    )  # fmt: skip
    tl.store(gq_ptr + at, gq * scale, mask=real[:, None])


def _arguments(
    q: Tensor, k: Tensor, beta: Tensor, tick: int, q_start: int, window: int | None, doc: Tensor | None, tile: Tile
) -> tuple[tuple, dict]:
    sizes = (q_start, q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1], 0 if doc is None else doc.shape[1], window or 0)
    static = {
        "C": tick, "D": q.shape[3], "M": tile.queries, "K": tile.keys, "WINDOW": window is not None, "DOC": doc is not None,
        "PRECISION": precision(q), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (*sizes, beta.shape[2]), static


@torch.library.custom_op("bio_inspired_nanochat::tick_biased_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, doc: Tensor | None, tick: int, scale: float, q_start: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.tick_biased_attention`; returns y and the log2-sum-exp2 of every query's logits, [B, H, Tq] float32."""
    q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous()
    batch, heads, length, dim = q.shape
    tile = tile_for("attention", dim, q.element_size(), tick)
    sizes, static = _arguments(q, k, beta, tick, q_start, window, doc, tile)
    y, lse = torch.empty_like(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    grid = (triton.cdiv(length, tile.queries), batch * heads)
    _forward[grid](q, k, v, beta, doc if doc is not None else q, y, lse, scale, *sizes, **static)
    return y, lse


@attention_op.register_fake
def _(q, k, v, beta, doc, tick, scale, q_start, window):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bio_inspired_nanochat::tick_biased_attention_adjoint", mutates_args=())
def attention_adjoint(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, doc: Tensor | None, y: Tensor, lse: Tensor,
    tick: int, scale: float, q_start: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and beta."""
    q, k, v, beta, grad = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), grad.contiguous()
    batch, heads, length, dim = q.shape
    keys, group = k.shape[2], q.shape[1] // k.shape[1]
    tile = tile_for("attention_backward", dim, q.element_size(), tick)
    sizes, static = _arguments(q, k, beta, tick, q_start, window, doc, tile)
    delta = (grad.float() * y.float()).sum(-1)
    wide = q.dtype if group == 1 else torch.float32
    gk, gv = (q.new_empty(batch, heads, keys, dim, dtype=wide) for _ in range(2))
    gq, gbeta = torch.empty_like(q), torch.empty_like(beta)
    mask = doc if doc is not None else q
    _backward_keys[(triton.cdiv(keys, tile.keys), batch * heads)](
        q, k, v, beta, mask, grad, lse, delta, gk, gv, gbeta, scale, *sizes, **static
    )
    _backward_queries[(triton.cdiv(length, tile.queries), batch * heads)](
        q, k, v, beta, mask, grad, lse, delta, gq, scale, *sizes, **static
    )
    if group > 1:
        gk, gv = (g.view(batch, k.shape[1], group, keys, dim).sum(2).to(k.dtype) for g in (gk, gv))
    return gq, gk, gv, gbeta


@attention_adjoint.register_fake
def _(grad, q, k, v, beta, doc, y, lse, tick, scale, q_start, window):
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in (q, k, v, beta))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.tick, ctx.scale, ctx.q_start, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    q, k, v, beta, doc, y, lse = ctx.saved_tensors
    grads = attention_adjoint(grad, q, k, v, beta, doc, y, lse, ctx.tick, ctx.scale, ctx.q_start, ctx.window)
    return *grads, *[None] * 5


attention_op.register_autograd(_backward, setup_context=_setup)
