"""Lateral inhibition of the fused layer: what looks across keys, between the walk over the ticks and the attention.

The walk leaves the bias of every tick and key as planes, and their activities; here every key loses what its older neighbours do.
Equation (P19) of prompts/presynapse.md; dimensions as in `kernels.fused`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import Site, launch, planes_of, store_planes

BLOCK = 128


@triton.jit
def _same(key, other, doc_ptr, batch, docs, DOC: tl.constexpr):
    """Whether two keys belong to one document."""
    if DOC:
        mine = tl.load(doc_ptr + batch * docs + tl.minimum(key, docs - 1))
        theirs = tl.load(doc_ptr + batch * docs + tl.minimum(tl.maximum(other, 0), docs - 1))
        return mine == theirs
    return key >= 0


@triton.jit
def _inhibit(
    activity_ptr, plane_ptr, strength_ptr, doc_ptr, inverse, first, ticks, keys, heads, docs, reach,
    C: tl.constexpr, P: tl.constexpr, DOC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tick of one pair: take the mean activity of the older neighbours from the keys that are born by its end."""
    local, n = (tl.program_id(0) // ticks).to(tl.int64), tl.program_id(0) % ticks
    row = first + local
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = key < tl.minimum(keys, (n + 1) * C)
    activity_at = activity_ptr + (local * ticks + n) * keys
    total = tl.zeros([BLOCK], tl.float32)
    for distance in range(1, reach + 1):
        older = key - distance
        near = live & (older >= 0) & _same(key, older, doc_ptr, row // heads, docs, DOC)
        total += tl.load(activity_at + older, mask=near, other=0.0)
    total *= tl.load(strength_ptr + row % heads) * (inverse / reach)
    plane_at = plane_ptr + (local * P * ticks + n) * keys + key
    bias = tl.load(plane_at, mask=live, other=0.0).to(tl.float32)
    if P == 2:
        bias += tl.load(plane_at + ticks * keys, mask=live, other=0.0).to(tl.float32)
    store_planes(plane_at, ticks * keys, bias - total, live, P)


@triton.jit
def _adjoint(
    gbeta_ptr, activity_ptr, gactivity_ptr, strength_ptr, share_ptr, doc_ptr, first, ticks, keys, heads, docs, reach,
    C: tl.constexpr, DOC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tick of one pair: gradient of the activities, and this program's share of that of the strength."""
    local, n = (tl.program_id(0) // ticks).to(tl.int64), tl.program_id(0) % ticks
    row = first + local
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    born = tl.minimum(keys, (n + 1) * C)
    at = (local * ticks + n) * keys
    total = tl.zeros([BLOCK], tl.float32)
    for distance in range(1, reach + 1):
        younger = key + distance
        near = (younger < born) & _same(younger, key, doc_ptr, row // heads, docs, DOC)
        total -= tl.load(gbeta_ptr + at + younger, mask=near, other=0.0)
    total /= reach
    tl.store(gactivity_ptr + at + key, total * tl.load(strength_ptr + row % heads), mask=key < born)
    share = tl.sum(total * tl.load(activity_ptr + at + key, mask=key < born, other=0.0), 0)
    tl.store(share_ptr + (row * ticks + n) * tl.num_programs(1) + tl.program_id(1), share)


def _grid(site: Site, ticks: int, keys: int) -> tuple[int, int]:
    return site.count * ticks, triton.cdiv(keys, BLOCK)


def _documents(site: Site) -> tuple[int, bool]:
    return (0, False) if site.doc is None else (site.doc.shape[1], True)


def inhibit(activity: Tensor, planes: Tensor, strength: Tensor, reach: int, site: Site) -> None:
    """Subtract from the bias in `planes` [pairs, P, N, Tk], in units of q . k, the inhibition by `activity` [pairs, N, Tk] float32.

    strength: [H] float32; reach: how many older keys inhibit a key.
    """
    _, ticks, keys = activity.shape
    docs, masked = _documents(site)
    launch(
        _inhibit, _grid(site, ticks, keys), activity, planes, strength, site.mask(activity), 1 / site.scale, site.first, ticks, keys,
        len(strength), docs, reach, C=site.tick, P=planes_of(planes.dtype), DOC=masked, BLOCK=BLOCK,
    )  # fmt: skip


def strength_shares(gbeta: Tensor, pairs: int) -> Tensor:
    """Room for the shares of the gradient of the strength, [pairs, N, blocks], where gbeta is [*, N, Tk]."""
    return gbeta.new_empty(pairs, gbeta.shape[1], triton.cdiv(gbeta.shape[2], BLOCK))


def adjoint(gbeta: Tensor, activity: Tensor, gactivity: Tensor, strength: Tensor, reach: int, site: Site, shares: Tensor) -> None:
    """Fill gactivity [pairs, N, Tk] and this site's part of `strength_shares` from the gradient of the bias, gbeta [pairs, N, Tk]."""
    _, ticks, keys = activity.shape
    docs, masked = _documents(site)
    launch(
        _adjoint, _grid(site, ticks, keys), gbeta, activity, gactivity, strength, shares, site.mask(activity), site.first, ticks, keys,
        len(strength), docs, reach, C=site.tick, DOC=masked, BLOCK=BLOCK,
    )  # fmt: skip
