"""Triton execution of `tick_drive`: logits tile by tile, summed over each tick before anything is stored.

Dimensions: B batch, H query heads, Hkv key heads, Tq queries, Tk keys, N ticks, D head size; M queries and K keys of a tile,
R rows of planes (`kernels.tiles`). Programs cover the pairs of batch row and head from `first` on.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.masks import num_ticks
from bio_inspired_nanochat.kernels.tiles import (
    FEWEST,
    KINDS,
    Site,
    allowed,
    dense,
    drive_above,
    drive_slope,
    fill_zeros,
    key_gradients,
    key_span,
    launch,
    load_planes,
    one_hot,
    rows,
    store_ticks,
    strides,
    sum_groups,
    tick_columns,
    tile_for,
)


@triton.jit
def _collect_tiles(
    low, high, k, key, collect, theta, scale, q_ptr, q_b, q_h, q_t, u_ptr, doc_ptr,
    batch, head, base, q_start, queries, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, EXACT: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store the drive of the tiles of queries that start in [low, high), counted from `base`."""
    for start in range(low, high, M):
        place = base + start + tl.arange(0, M)
        query = place - q_start
        q_at = rows(q_ptr, batch, head, q_b, q_h, q_t, query, D)
        if EXACT:
            q = tl.load(q_at)
        else:
            q = tl.load(q_at, mask=((query >= 0) & (query < queries))[:, None], other=0.0)
        raised = drive_above(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, theta, KIND)
        if MASKED:
            raised = tl.where(
                allowed(place[None, :], key[:, None], q_start + queries, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False),
                raised,
                0.0,
            )
        store_ticks(u_ptr, tl.dot(raised.to(q.dtype), collect, input_precision=PRECISION), start // C, key, ticks, keys, M // C, NB)


@triton.jit
def _forward(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, theta_ptr, doc_ptr, u_ptr,
    scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    WINDOW: tl.constexpr, DOC: tl.constexpr, EXACT: tl.constexpr, FILL: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one block of keys of one head against every query tile; tiles start on a tick."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    k = tl.load(rows(k_ptr, batch, head // group, k_b, k_h, k_t, key, D), mask=key[:, None] < keys, other=0.0)
    collect = tick_columns(M, C, NB).to(k.dtype)
    theta = tl.load(theta_ptr + head)
    base = q_start // C * C
    end = q_start + queries - base
    low, high = key_span(tl.program_id(0), base, end, window, M, K, WINDOW)
    out = u_ptr + tl.program_id(1).to(tl.int64) * ticks * keys
    if FILL:
        fill_zeros(out, 0, low, key, keys, ticks, C, M, K)
    plain = high
    if EXACT:
        plain = tl.minimum(high, low + tl.cdiv(tl.program_id(0) * K + K - low, M) * M)
    _collect_tiles(
        low, plain, k, key, collect, theta, scale, q_ptr, q_b, q_h, q_t, out, doc_ptr,
        batch, head, base, q_start, queries, keys, docs, window, ticks, C, D, M, NB, WINDOW, DOC, EXACT, KIND, PRECISION, True,
    )  # fmt: skip
    if EXACT:
        _collect_tiles(
            plain, high, k, key, collect, theta, scale, q_ptr, q_b, q_h, q_t, out, doc_ptr,
            batch, head, base, q_start, queries, keys, docs, window, ticks, C, D, M, NB, WINDOW, DOC, EXACT, KIND, PRECISION, False,
        )  # fmt: skip
    if FILL:
        fill_zeros(out, high, end, key, keys, ticks, C, M, K)


@triton.jit
def _key_tiles(
    gk, gtheta, low, high, k, key, spread, theta, scale, q_ptr, q_b, q_h, q_t, gdrive_ptr, doc_ptr,
    batch, head, base, q_start, queries, keys, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr,
    EXACT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of queries that start in [low, high), counted from `base`, to dk and dtheta."""
    ones = tl.full([M, 16], 1.0, k.dtype)
    for start in range(low, high, M):
        place = base + start + tl.arange(0, M)
        query = place - q_start
        q_at = rows(q_ptr, batch, head, q_b, q_h, q_t, query, D)
        if EXACT:
            q = tl.load(q_at)
        else:
            q = tl.load(q_at, mask=((query >= 0) & (query < queries))[:, None], other=0.0)
        gdrive = load_planes(gdrive_ptr, start // C, base, key, ticks, keys, C, M, 1, R, MASKED)
        g = drive_slope(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, theta, KIND)
        g *= tl.dot(tl.trans(gdrive), spread, input_precision=PRECISION)
        if MASKED:
            g = tl.where(
                allowed(place[None, :], key[:, None], q_start + queries, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False),
                g,
                0.0,
            )
        g = g.to(q.dtype)
        gk = tl.dot(g, q, gk, input_precision=PRECISION)
        gtheta = tl.dot(g, ones, gtheta, input_precision=PRECISION)
    return gk, gtheta


@triton.jit
def _backward_keys(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, theta_ptr, gdrive_ptr, doc_ptr, gk_ptr, gk_b, gk_h, gk_t, gtheta_ptr,
    scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    DOC: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one block of keys (per query head; ADD: on top of what is there), and its share of dtheta."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    key = tl.program_id(0) * K + tl.arange(0, K)
    live = key[:, None] < keys
    k = tl.load(rows(k_ptr, batch, head // group, k_b, k_h, k_t, key, D), mask=live, other=0.0)
    spread = tl.trans(one_hot(M, C, R)).to(k.dtype)
    theta = tl.load(theta_ptr + head)
    base = q_start // C * C
    gk = tl.zeros([K, D], tl.float32)
    gtheta = tl.zeros([K, 16], tl.float32)
    low, high = key_span(tl.program_id(0), base, q_start + queries - base, window, M, K, WINDOW)
    gdrive_at = gdrive_ptr + tl.program_id(1).to(tl.int64) * ticks * keys
    plain = high
    if EXACT:
        plain = tl.minimum(high, low + tl.cdiv(tl.program_id(0) * K + K - low, M) * M)
    gk, gtheta = _key_tiles(
        gk, gtheta, low, plain, k, key, spread, theta, scale, q_ptr, q_b, q_h, q_t, gdrive_at, doc_ptr,
        batch, head, base, q_start, queries, keys, docs, window, ticks, C, D, M, R, WINDOW, DOC, EXACT, KIND, PRECISION, True,
    )  # fmt: skip
    if EXACT:
        gk, gtheta = _key_tiles(
            gk, gtheta, plain, high, k, key, spread, theta, scale, q_ptr, q_b, q_h, q_t, gdrive_at, doc_ptr,
            batch, head, base, q_start, queries, keys, docs, window, ticks, C, D, M, R, WINDOW, DOC, EXACT, KIND, PRECISION, False,
        )  # fmt: skip
    at = rows(gk_ptr, batch, head, gk_b, gk_h, gk_t, key, D)
    gk *= scale
    if ADD:
        gk += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, gk, mask=live)
    tl.store(gtheta_ptr + row * tl.num_programs(0) + tl.program_id(0), -tl.sum(tl.max(gtheta, 1), 0))  # 16 equal columns


@triton.jit
def _backward_queries(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, theta_ptr, gdrive_ptr, doc_ptr, gq_ptr,
    scale, first, q_start, queries, keys, heads, group, docs, window, ticks,
    C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WINDOW: tl.constexpr,
    DOC: tl.constexpr, EXACT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; the longest tiles come first."""
    row = first + tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    base = q_start // C * C
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    place = base + start + tl.arange(0, M)
    query = place - q_start
    real = (query >= 0) & (query < queries)
    q = tl.load(rows(q_ptr, batch, head, q_b, q_h, q_t, query, D), mask=real[:, None], other=0.0)
    theta = tl.load(theta_ptr + head)
    hot = one_hot(M, C, R).to(q.dtype)
    gq = tl.zeros([M, D], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(base + start - window + 1, 0) // K * K
    gdrive_at = gdrive_ptr + tl.program_id(1).to(tl.int64) * ticks * keys
    for begin in range(low, tl.minimum(keys, base + start + M), K):
        key = begin + tl.arange(0, K)
        k = tl.load(rows(k_ptr, batch, head // group, k_b, k_h, k_t, key, D), mask=key[:, None] < keys, other=0.0)
        gdrive = load_planes(gdrive_at, start // C, base, key, ticks, keys, C, M, 1, R, True)
        g = drive_slope(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, theta, KIND)
        g *= tl.dot(hot, gdrive, input_precision=PRECISION)
        seen = allowed(place[:, None], key[None, :], q_start + queries, q_start, keys, doc_ptr, batch, docs, window, WINDOW, DOC, False)
        gq = tl.dot(tl.where(seen, g, 0.0).to(k.dtype), k, gq, input_precision=PRECISION)
    tl.store(rows(gq_ptr, batch, head, q_b, q_h, q_t, query, D), gq * scale, mask=real[:, None])


def forward(q: Tensor, k: Tensor, theta: Tensor, kind: int, site: Site, out: Tensor, *, fill: bool) -> None:
    """Fill out [pairs, N, Tk] float32; fill: also with zeros the ticks outside a key's span."""
    tile = tile_for("drive", q, site.tick)
    launch(
        _forward, site.key_grid(k, tile),
        q, *strides(q), k, *strides(k), theta, site.mask(q), out, site.scale, *site.sizes(q, k), **site.static(q, k, tile),
        NB=max(FEWEST, tile.queries // site.tick), KIND=kind, FILL=fill,
    )  # fmt: skip


def theta_shares(q: Tensor, k: Tensor, tick: int) -> Tensor:
    """Room [B, H, blocks of keys] for the shares of theta's gradient."""
    return q.new_empty(*q.shape[:2], triton.cdiv(k.shape[2], tile_for("drive_keys", q, tick).keys), dtype=torch.float32)


def backward_keys(
    q: Tensor, k: Tensor, theta: Tensor, kind: int, gdrive: Tensor, site: Site, gk: Tensor, shares: Tensor, *, add: bool
) -> None:
    """Fill gk [B, H, Tk, D] or add to it, from the drive's gradient [pairs, N, Tk] in q's dtype, and `theta_shares`."""
    tile = tile_for("drive_keys", q, site.tick)
    launch(
        _backward_keys, site.key_grid(k, tile),
        q, *strides(q), k, *strides(k), theta, gdrive, site.mask(q), gk, *strides(gk), shares,
        site.scale, *site.sizes(q, k), **site.static(q, k, tile), KIND=kind, ADD=add,
    )  # fmt: skip


@torch.library.custom_op("bio_inspired_nanochat::tick_drive", mutates_args=())
def tick_drive_op(
    q: Tensor, k: Tensor, theta: Tensor, doc: Tensor | None, tick: int, scale: float, q_start: int, window: int | None, kind: str
) -> Tensor:
    """See `kernels.tick_drive`; q [B, H, Tq, D], k [B, Hkv, Tk, D], theta [H] float32 to [B, H, N, Tk] float32."""
    q, k = dense(q), dense(k)
    site = Site(tick, scale, q_start, window, doc, 0, q.shape[0] * q.shape[1])
    out = q.new_empty(*q.shape[:2], num_ticks(q_start, q.shape[2], tick), k.shape[2], dtype=torch.float32)
    forward(q, k, theta.contiguous(), KINDS[kind], site, out, fill=True)
    return out


@tick_drive_op.register_fake
def _(q, k, theta, doc, tick, scale, q_start, window, kind):
    return q.new_empty(q.shape[0], q.shape[1], num_ticks(q_start, q.shape[2], tick), k.shape[2], dtype=torch.float32)


@torch.library.custom_op("bio_inspired_nanochat::tick_drive_adjoint", mutates_args=())
def tick_drive_adjoint(
    grad: Tensor, q: Tensor, k: Tensor, theta: Tensor, doc: Tensor | None,
    tick: int, scale: float, q_start: int, window: int | None, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and theta, of their shapes, from that of the drive [B, H, N, Tk]."""
    q, k, theta = dense(q), dense(k), theta.contiguous()
    site = Site(tick, scale, q_start, window, doc, 0, q.shape[0] * q.shape[1])
    gdrive, gq, gk = grad.to(q.dtype).contiguous(), torch.empty_like(q), key_gradients(q, k)
    shares = theta_shares(q, k, tick)
    backward_keys(q, k, theta, KINDS[kind], gdrive, site, gk, shares, add=False)
    tile = tile_for("drive_queries", q, tick)
    launch(
        _backward_queries, site.query_grid(q, tile),
        q, *strides(q), k, *strides(k), theta, gdrive, site.mask(q), gq, scale, *site.sizes(q, k), **site.static(q, k, tile), KIND=KINDS[kind],
    )  # fmt: skip
    return gq, sum_groups(gk, k), shares.sum((0, 2))


@tick_drive_adjoint.register_fake
def _(grad, q, k, theta, doc, tick, scale, q_start, window, kind):
    q, k = dense(q), dense(k)
    return torch.empty_like(q), sum_groups(key_gradients(q, k), k), torch.empty_like(theta, memory_format=torch.contiguous_format)


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
