"""Triton execution of `tick_biased_attention`: flash attention whose logits carry one bias per tick and key.

The bias arrives as planes (`kernels.tiles`) in units of the raw product q . k, and joins the logits on the matrix units. No
tensor of the size queries x keys exists but the bias and its gradient, which are smaller by the tick length.

Logits of bounded size need no running maximum (BOUNDED): the bound is subtracted instead, and with a gate the query's own part
of the barrier. `stat` is what is subtracted from a query's logits, in units of log 2, to get probabilities.

Dimensions: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, N ticks, D head size; M queries and K keys of a tile,
R rows of planes. Programs cover the pairs of batch row and head from `first` on; planes and biases start at `first` too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels import attention_adjoint_triton as adjoint
from bio_inspired_nanochat.kernels.tiles import (
    LOG2E,
    Site,
    allowed,
    dense,
    key_gradients,
    launch,
    load_planes,
    one_hot,
    planes_of,
    power2,
    rows,
    strides,
    sum_groups,
    tile_for,
    to_planes,
)


@triton.jit
def _softmax_tiles(
    top, total, y, low, high, q, hot, place, cut, factor,
    k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, plane_ptr, doc_ptr,
    batch, source, tick, base, q_start, end, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    DOC: tl.constexpr, EXACT: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Continue a softmax over the keys [low, high); `cut` [M] is subtracted from the logits of a query.

    The sum is one more product, of the weights as they are rounded for the other one, in 16 equal columns.
    """
    ones = tl.full([K, 16], 1.0, q.dtype)
    for begin in range(low, high, K):
        key = begin + tl.arange(0, K)
        k_at = rows(k_ptr, batch, source, k_b, k_h, k_t, key, D)
        v_at = rows(v_ptr, batch, source, v_b, v_h, v_t, key, D)
        if EXACT:
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            k, v = tl.load(k_at, mask=key[:, None] < keys, other=0.0), tl.load(v_at, mask=key[:, None] < keys, other=0.0)
        planes = load_planes(plane_ptr, tick, base, key, ticks, keys, C, M, P, R, MASKED)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x = tl.dot(hot, planes, x, input_precision=PRECISION) * factor
        if MASKED:
            x = tl.where(
                allowed(place[:, None], key[None, :], end, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, True), x, float("-inf")
            )
        if BOUNDED:
            weight = power2(x - cut[:, None])
        else:
            peak = tl.maximum(top, tl.max(x, 1))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            weight = power2(x - safe[:, None])
            shrink = power2(top - safe)[:, None]
            total, y = total * shrink, y * shrink
            top = peak
        weight = weight.to(v.dtype)
        total = tl.dot(weight, ones, total, input_precision=PRECISION)
        y = tl.dot(weight, v, y, input_precision=PRECISION)
    return top, total, y


@triton.jit
def _forward(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, plane_ptr, doc_ptr, barrier_ptr, strength_ptr,
    y_ptr, y_b, y_h, y_t, stat_ptr, limit, pairs, scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    DOC: tl.constexpr, EXACT: tl.constexpr, BOUNDED: tl.constexpr, BARRIER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head; the longest tiles come first."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    base = q_start // C * C
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    place = base + start + tl.arange(0, M)
    query, end = place - q_start, q_start + queries
    real = (query >= 0) & (query < queries)
    q = tl.load(rows(q_ptr, batch, head, q_b, q_h, q_t, query, D), mask=real[:, None], other=0.0)
    hot = one_hot(M, C, R).to(q.dtype)
    cut = tl.zeros([M], tl.float32) + limit
    if BARRIER:  # relative to the first query of each tick, as the planes are
        own, rest = barrier_ptr + row * queries, barrier_ptr + (pairs + row) * queries
        gap = tl.load(own + query, mask=real, other=0.0) - tl.load(own + query // C * C, mask=real, other=0.0)
        gap += tl.load(rest + query, mask=real, other=0.0) - tl.load(rest + query // C * C, mask=real, other=0.0)
        cut += gap * (tl.load(strength_ptr + head) * LOG2E)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M, 16], tl.float32)
    y = tl.zeros([M, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(base + start - window + 1, 0) // K * K
    high = tl.minimum(keys, base + start + M)
    plane_at = plane_ptr + tl.program_id(1).to(tl.int64) * P * ticks * keys
    plain = low
    if EXACT:  # keys that every query of the tile sees need no mask
        plain = start // K * K
        top, total, y = _softmax_tiles(
            top, total, y, low, plain, q, hot, place, cut, scale * LOG2E, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, plane_at, doc_ptr,
            batch, head // group, start // C, base, q_start, end, keys, docs, window, ticks,
            C, D, M, K, P, R, WINDOW, DOC, EXACT, BOUNDED, PRECISION, False,
        )  # fmt: skip
    top, total, y = _softmax_tiles(
        top, total, y, plain, high, q, hot, place, cut, scale * LOG2E, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, plane_at, doc_ptr,
        batch, head // group, start // C, base, q_start, end, keys, docs, window, ticks,
        C, D, M, K, P, R, WINDOW, DOC, EXACT, BOUNDED, PRECISION, True,
    )  # fmt: skip
    total = tl.max(total, 1)
    total = tl.where(total > 0, total, 1.0)
    tl.store(rows(y_ptr, batch, head, y_b, y_h, y_t, query, D), (y / total[:, None]).to(q.dtype), mask=real[:, None])
    tl.store(stat_ptr + row * queries + query, (cut if BOUNDED else top) + tl.log2(total), mask=real)


def forward(
    q: Tensor, k: Tensor, v: Tensor, planes: Tensor, barrier: Tensor | None, strength: Tensor | None, limit: float | None, site: Site,
    y: Tensor, stat: Tensor,
) -> None:  # fmt: skip
    """Fill y and stat for the pairs of `site`. barrier: as two float32 whose sum it is, [2, B, H, T]; limit: bound on the biased
    logits in units of log 2; None: unknown.
    """
    tile = tile_for("attention", q, site.tick)
    launch(
        _forward, site.query_grid(q, tile),
        q, *strides(q), k, *strides(k), v, *strides(v), planes, site.mask(q), *((q, q) if barrier is None else (barrier, strength)),
        y, *strides(y), stat, limit or 0.0, q.shape[0] * q.shape[1], site.scale, *site.sizes(q, k), **site.static(q, k, tile, planes_of(q.dtype)),
        P=planes_of(q.dtype), BOUNDED=limit is not None, BARRIER=barrier is not None,
    )  # fmt: skip


@torch.library.custom_op("bio_inspired_nanochat::tick_biased_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, doc: Tensor | None, tick: int, scale: float, q_start: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.tick_biased_attention`; returns y and the statistic of every query's logits, [B, H, Tq] float32."""
    q, k, v = dense(q), dense(k), dense(v)
    site = Site(tick, scale, q_start, window, doc, 0, q.shape[0] * q.shape[1])
    y, stat = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    forward(q, k, v, to_planes(beta, q.dtype, 1 / scale), None, None, None, site, y, stat)
    return y, stat


@attention_op.register_fake
def _(q, k, v, beta, doc, tick, scale, q_start, window):
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bio_inspired_nanochat::tick_biased_attention_adjoint", mutates_args=())
def attention_adjoint(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, doc: Tensor | None, y: Tensor, stat: Tensor,
    tick: int, scale: float, q_start: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and beta, of their shapes, from grad, that of y [B, H, Tq, D]; stat [B, H, Tq]: what the forward kept."""
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    site = Site(tick, scale, q_start, window, doc, 0, q.shape[0] * q.shape[1])
    planes, (delta, side) = to_planes(beta, q.dtype, 1 / scale), adjoint.row_products(grad, y, stat, scale)
    gq, gk, gv, gbeta = torch.empty_like(q), key_gradients(q, k), key_gradients(q, v), torch.empty(beta.shape, device=q.device)
    adjoint.backward_keys(grad, q, k, v, planes, side, site, gk, gv, gbeta, fill=True)
    adjoint.backward_queries(grad, q, k, v, planes, stat, delta, site, gq)
    return gq, sum_groups(gk, k), sum_groups(gv, v), gbeta


@attention_adjoint.register_fake
def _(grad, q, k, v, beta, doc, y, stat, tick, scale, q_start, window):
    q, k, v = dense(q), dense(k), dense(v)
    gk, gv = (sum_groups(key_gradients(q, x), x) for x in (k, v))
    return torch.empty_like(q), gk, gv, torch.empty_like(beta, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.tick, ctx.scale, ctx.q_start, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    q, k, v, beta, doc, y, stat = ctx.saved_tensors
    grads = attention_adjoint(grad, q, k, v, beta, doc, y, stat, ctx.tick, ctx.scale, ctx.q_start, ctx.window)
    return *grads, *[None] * 5


attention_op.register_autograd(_backward, setup_context=_setup)
