"""Backward of `attention_triton`: one pass over the keys for dk, dv and the gradient of the bias, one over the queries for dq.

The gradients of a tick's bias are collected on the matrix units, and what belongs to a query, its statistic and its delta, joins
the products there too. Nothing is added up by atomics, so results are the same twice. Dimensions as in `attention_triton`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import (
    FEWEST,
    LOG2E,
    Site,
    allowed,
    dense,
    drive_slope,
    fill_zeros,
    key_span,
    launch,
    load_planes,
    one_hot,
    planes_of,
    power2,
    rows,
    store_ticks,
    strides,
    tick_columns,
    tile_for,
)


@triton.jit
def _key_tiles(
    gk, gv, low, high, k, v, key, spread, collect, factor,
    q_ptr, q_b, q_h, q_t, gy_ptr, gy_b, gy_h, gy_t, side_ptr, plane_ptr, gbeta_ptr, doc_ptr,
    batch, head, base, q_start, queries, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    STATS: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of queries that start in [low, high), counted from `base`, to dk and dv; store their dbeta."""
    line = tl.arange(0, 16)
    pick_stat = tl.broadcast_to(tl.where(line < STATS, 1.0, 0.0)[None, :], [K, 16]).to(k.dtype)
    pick_delta = tl.broadcast_to(tl.where((line >= STATS) & (line < STATS + P), 1.0, 0.0)[None, :], [K, 16]).to(k.dtype)
    for start in range(low, high, M):
        place = base + start + tl.arange(0, M)
        query = place - q_start
        q_at = rows(q_ptr, batch, head, q_b, q_h, q_t, query, D)
        gy_at = rows(gy_ptr, batch, head, gy_b, gy_h, gy_t, query, D)
        if EXACT:
            q, gy = tl.load(q_at), tl.load(gy_at)
            side = tl.load(side_ptr + line[:, None] * queries + query[None, :], mask=(line < STATS + P)[:, None], other=0.0)
        else:
            real = (query >= 0) & (query < queries)
            q, gy = tl.load(q_at, mask=real[:, None], other=0.0), tl.load(gy_at, mask=real[:, None], other=0.0)
            inside = (line < STATS + P)[:, None] & real[None, :]
            side = tl.load(side_ptr + line[:, None] * queries + query[None, :], mask=inside, other=0.0)
        planes = load_planes(plane_ptr, start // C, base, key, ticks, keys, C, M, P, R, MASKED)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        x = tl.dot(tl.trans(planes), spread, x, input_precision=PRECISION)
        weight = power2(tl.dot(pick_stat, side, x, input_precision=PRECISION) * factor)
        if MASKED:
            weight = tl.where(
                allowed(place[None, :], key[:, None], q_start + queries, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, True),
                weight,
                0.0,
            )
        gv = tl.dot(weight.to(gy.dtype), gy, gv, input_precision=PRECISION)
        slope = tl.dot(v, tl.trans(gy), input_precision=PRECISION)
        g = (weight * tl.dot(pick_delta, side, slope, input_precision=PRECISION)).to(q.dtype)
        gk = tl.dot(g, q, gk, input_precision=PRECISION)
        store_ticks(gbeta_ptr, tl.dot(g, collect, input_precision=PRECISION), start // C, key, ticks, keys, M // C, NB)
    return gk, gv


@triton.jit
def _backward_keys(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, gy_ptr, gy_b, gy_h, gy_t, plane_ptr, doc_ptr, side_ptr,
    gk_ptr, gk_b, gk_h, gk_t, gv_ptr, gv_b, gv_h, gv_t, gbeta_ptr, scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    STATS: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, EXACT: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (per query head) and dbeta of one block of keys; tiles of queries start on a tick."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    live = key[:, None] < keys
    k = tl.load(rows(k_ptr, batch, head // group, k_b, k_h, k_t, key, D), mask=live, other=0.0)
    v = tl.load(rows(v_ptr, batch, head // group, v_b, v_h, v_t, key, D), mask=live, other=0.0)
    spread, collect = tl.trans(one_hot(M, C, R)).to(k.dtype), tick_columns(M, C, NB).to(k.dtype)
    base = q_start // C * C
    gk, gv = tl.zeros([K, D], tl.float32), tl.zeros([K, D], tl.float32)
    end = q_start + queries - base
    low, high = key_span(tl.program_id(0), base, end, window, M, K, WINDOW)
    local = tl.program_id(1).to(tl.int64) * ticks * keys
    if FILL:
        fill_zeros(gbeta_ptr + local, 0, low, key, keys, ticks, C, M, K)
    plain = high
    if EXACT:  # later queries see every key of the block
        plain = tl.minimum(high, low + tl.cdiv(tl.program_id(0) * K + K - low, M) * M)
    gk, gv = _key_tiles(
        gk, gv, low, plain, k, v, key, spread, collect, scale * LOG2E, q_ptr, q_b, q_h, q_t, gy_ptr, gy_b, gy_h, gy_t,
        side_ptr + row * (STATS + P) * queries, plane_ptr + local * P, gbeta_ptr + local, doc_ptr,
        batch, head, base, q_start, queries, keys, docs, window, ticks,
        C, D, M, K, P, R, NB, STATS, WINDOW, DOC, EXACT, PRECISION, True,
    )  # fmt: skip
    if EXACT:
        gk, gv = _key_tiles(
            gk, gv, plain, high, k, v, key, spread, collect, scale * LOG2E, q_ptr, q_b, q_h, q_t, gy_ptr, gy_b, gy_h, gy_t,
            side_ptr + row * (STATS + P) * queries, plane_ptr + local * P, gbeta_ptr + local, doc_ptr,
            batch, head, base, q_start, queries, keys, docs, window, ticks,
            C, D, M, K, P, R, NB, STATS, WINDOW, DOC, EXACT, PRECISION, False,
        )  # fmt: skip
    if FILL:
        fill_zeros(gbeta_ptr + local, high, end, key, keys, ticks, C, M, K)
    tl.store(rows(gk_ptr, batch, head, gk_b, gk_h, gk_t, key, D), gk * scale, mask=live)
    tl.store(rows(gv_ptr, batch, head, gv_b, gv_h, gv_t, key, D), gv, mask=live)


@triton.jit
def _query_tiles(
    gq, total, low, high, q, gy, stat, delta, hot, place, theta, scale,
    k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, plane_ptr, gdrive_ptr, doc_ptr,
    batch, source, tick, base, q_start, end, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, GR: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys [low, high) to dq, and with ROWS the gradients of their logits to `total`, [M, 16] with equal columns."""
    column = tl.arange(0, 16)[None, :]
    upper = delta.to(q.dtype).to(tl.float32)
    parts = tl.where(column == 0, -upper[:, None], tl.where(column == 1, (upper - delta)[:, None], 0.0)).to(q.dtype)
    ones = tl.full([16, K], 1.0, q.dtype)
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
        logit = tl.dot(hot, planes, x, input_precision=PRECISION)
        g = power2(logit * (scale * LOG2E) - stat[:, None])
        g *= tl.dot(parts, ones, tl.dot(gy, tl.trans(v), input_precision=PRECISION), input_precision=PRECISION)
        if MASKED:
            g = tl.where(allowed(place[:, None], key[None, :], end, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, True), g, 0.0)
        if ROWS:  # rounded as in the pass over keys, where the same values are summed the other way
            total = tl.dot(g.to(k.dtype), tl.trans(ones), total, input_precision=PRECISION)
        if KIND >= 0:
            gdrive = load_planes(gdrive_ptr, tick, base, key, ticks, keys, C, M, 1, GR, MASKED)
            driven = drive_slope(x, scale, theta, KIND) * tl.dot(one_hot(M, C, GR).to(k.dtype), gdrive, input_precision=PRECISION)
            if MASKED:
                driven = tl.where(
                    allowed(place[:, None], key[None, :], end, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False), driven, 0.0
                )
            g += driven
        gq = tl.dot(g.to(k.dtype), k, gq, input_precision=PRECISION)
    return gq, total


@triton.jit
def _backward_queries(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t, gy_ptr, gy_b, gy_h, gy_t, plane_ptr, gdrive_ptr, theta_ptr, doc_ptr,
    stat_ptr, delta_ptr, gq_ptr, total_ptr, scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, GR: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, with KIND >= 0 that of the drive too (gdrive: its gradient); the longest tiles come first."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    base = q_start // C * C
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    place = base + start + tl.arange(0, M)
    query, end = place - q_start, q_start + queries
    real = (query >= 0) & (query < queries)
    q = tl.load(rows(q_ptr, batch, head, q_b, q_h, q_t, query, D), mask=real[:, None], other=0.0)
    gy = tl.load(rows(gy_ptr, batch, head, gy_b, gy_h, gy_t, query, D), mask=real[:, None], other=0.0)
    stat = tl.load(stat_ptr + row * queries + query, mask=real, other=0.0)
    delta = tl.load(delta_ptr + row * queries + query, mask=real, other=0.0)
    theta = tl.load(theta_ptr + head) if KIND >= 0 else 0.0
    hot = one_hot(M, C, R).to(q.dtype)
    gq, total = tl.zeros([M, D], tl.float32), tl.zeros([M, 16], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(base + start - window + 1, 0) // K * K
    high = tl.minimum(keys, base + start + M)
    local = tl.program_id(1).to(tl.int64) * ticks * keys
    plain = low
    if EXACT:
        plain = start // K * K
        gq, total = _query_tiles(
            gq, total, low, plain, q, gy, stat, delta, hot, place, theta, scale, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t,
            plane_ptr + local * P, gdrive_ptr + local, doc_ptr, batch, head // group, start // C, base, q_start, end, keys, docs, window, ticks,
            C, D, M, K, R, WINDOW, DOC, EXACT, PRECISION, P, GR, KIND, ROWS, False,
        )  # fmt: skip
    gq, total = _query_tiles(
        gq, total, plain, high, q, gy, stat, delta, hot, place, theta, scale, k_ptr, k_b, k_h, k_t, v_ptr, v_b, v_h, v_t,
        plane_ptr + local * P, gdrive_ptr + local, doc_ptr, batch, head // group, start // C, base, q_start, end, keys, docs, window, ticks,
        C, D, M, K, R, WINDOW, DOC, EXACT, PRECISION, P, GR, KIND, ROWS, True,
    )  # fmt: skip
    if ROWS:
        tl.store(total_ptr + row * queries + query, tl.max(total, 1), mask=real)
    tl.store(rows(gq_ptr, batch, head, q_b, q_h, q_t, query, D), gq * scale, mask=real[:, None])


def backward_keys(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, planes: Tensor, side: Tensor, site: Site,
    gk: Tensor, gv: Tensor, gbeta: Tensor, *, fill: bool,
) -> None:  # fmt: skip
    """Fill gk, gv [B, H, Tk, D] and gbeta [pairs, N, Tk]; fill: also with zeros the ticks outside a key's span."""
    tile = tile_for("attention_keys", q, site.tick)
    launch(
        _backward_keys, site.key_grid(k, tile),
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), planes, site.mask(q), side,
        gk, *strides(gk), gv, *strides(gv), gbeta, site.scale, *site.sizes(q, k), **site.static(q, k, tile, planes_of(q.dtype)),
        P=planes_of(q.dtype), NB=max(FEWEST, tile.queries // site.tick), STATS=stats_of(q.dtype), FILL=fill,
    )  # fmt: skip


def backward_queries(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, planes: Tensor, stat: Tensor, delta: Tensor, site: Site,
    gq: Tensor, gdrive: Tensor | None = None, theta: Tensor | None = None, kind: int = -1, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill gq; with gdrive [pairs, N, Tk], the drive's gradient in q's dtype, also the drive's part of it (theta and kind as in
    `tick_drive`).

    total [B, H, Tq]: to fill with the sums of the gradients of every query's logits, zero but for rounding.
    """
    tile = tile_for("attention_queries", q, site.tick)
    launch(
        _backward_queries, site.query_grid(q, tile),
        q, *strides(q), k, *strides(k), v, *strides(v), grad, *strides(grad), planes,
        *((planes, stat) if gdrive is None else (gdrive, theta)), site.mask(q), stat, delta,
        gq, stat if total is None else total, site.scale, *site.sizes(q, k), **site.static(q, k, tile, planes_of(q.dtype)),
        P=planes_of(q.dtype), GR=max(FEWEST, tile.queries // site.tick), KIND=kind, ROWS=total is not None,
    )  # fmt: skip


@triton.jit
def _row_products(
    gy_ptr, gy_b, gy_h, gy_t, y_ptr, y_b, y_h, y_t, stat_ptr, delta_ptr, side_ptr, inverse, heads, queries,
    D: tl.constexpr, M: tl.constexpr, STATS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * M + tl.arange(0, M)
    real = query < queries
    gy = tl.load(rows(gy_ptr, row // heads, row % heads, gy_b, gy_h, gy_t, query, D), mask=real[:, None], other=0.0)
    y = tl.load(rows(y_ptr, row // heads, row % heads, y_b, y_h, y_t, query, D), mask=real[:, None], other=0.0)
    delta = tl.sum(gy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta_ptr + row * queries + query, delta, mask=real)
    rest = tl.load(stat_ptr + row * queries + query, mask=real, other=0.0) * -inverse
    side_at = side_ptr + row * (STATS + P) * queries + query
    for part in tl.static_range(STATS + P):
        if part == STATS:
            rest = -delta
        value = rest.to(side_ptr.dtype.element_ty)
        tl.store(side_at + part * queries, value, mask=real)
        rest -= value.to(tl.float32)


def row_products(grad: Tensor, y: Tensor, stat: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the backward needs of every query: delta [B, H, Tq], the sum over D of grad * y, which a softmax subtracts from the
    gradients of its weights, and `side` [B, H, S, Tq], parts in y's dtype whose sums are -stat in units of q . k, then -delta.
    """
    grad, y = dense(grad), dense(y)
    batch, heads, queries, dim = y.shape
    stats, planes = stats_of(y.dtype), planes_of(y.dtype)
    delta, side = torch.empty_like(stat), y.new_empty(batch, heads, stats + planes, queries)
    launch(
        _row_products, (triton.cdiv(queries, 64), batch * heads),
        grad, *strides(grad), y, *strides(y), stat, delta, side, math.log(2) / scale, heads, queries, D=dim, M=64, STATS=stats, P=planes,
    )  # fmt: skip
    return delta, side


def stats_of(dtype: torch.dtype) -> int:
    """How many values of this dtype hold a float32."""
    return 1 if dtype == torch.float32 else 3
