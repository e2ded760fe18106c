"""What the Triton attention kernels share: the mask of a tile, tile sizes by device limits, precision of matrix products."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FAST = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def logarithm(x):
    """Natural logarithm of a positive x with an absolute error of 2e-7; the exact one costs twenty instructions."""
    if FAST:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log(x)


@triton.jit
def allowed(place, key, real, keys, doc_ptr, batch, docs, window, WINDOW: tl.constexpr, DOC: tl.constexpr, DIAGONAL: tl.constexpr):
    """Mask [M, K] of the pairs of a tile, `kernels.masks.allowed`: queries at positions `place`, `real` where they exist."""
    distance = place[:, None] - key
    seen = real[:, None] & (key < keys) & (distance >= 0 if DIAGONAL else distance > 0)
    if WINDOW:
        seen = seen & (distance < window)
    if DOC:
        mine = tl.load(doc_ptr + batch * docs + tl.minimum(tl.maximum(place, 0), docs - 1))
        theirs = tl.load(doc_ptr + batch * docs + tl.minimum(key, docs - 1))
        seen = seen & (mine[:, None] == theirs)
    return seen


@triton.jit
def key_span(block, base, end, window, M: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr):
    """Starts of the tiles of queries that can see a block of keys: [low, high) in steps of M, counted from `base`."""
    low = tl.maximum(block * K - base, 0) // M * M
    high = end
    if WINDOW:
        high = tl.minimum(end, block * K + K + window - base)
    return low, low + tl.cdiv(tl.maximum(high - low, 0), M) * M


@triton.jit
def fill_zeros(out_ptr, low, high, key, keys, ticks, C: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """Zeros for the ticks of the tiles that start in [low, high), of one head's [N, Tk] at out_ptr."""
    for start in range(low, high, M):
        tick = start // C + tl.arange(0, M // C)
        tl.store(out_ptr + (tick[:, None] * keys + key), tl.zeros([M // C, K], tl.float32), mask=(tick[:, None] < ticks) & (key < keys))


class Tile(NamedTuple):
    """Sizes of a tile and how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


# Per kernel and head size up to 64, up to 128: measured on an H100; all fit into 99 KB of shared memory, the limit of consumer cards.
TILES = {
    "drive": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "drive_backward": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    "attention": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "attention_backward": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
    "fused": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "fused_backward": (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
}
WIDEST_HEAD = 128


def tile_for(kernel: str, head_dim: int, element_size: int, tick: int) -> Tile:
    """The tile of a kernel; float32 operands take twice the shared memory, so they get half the keys."""
    tile = TILES[kernel][head_dim > 64]
    if _interpreted():
        return tile._replace(queries=max(16, tick) if "fused" not in kernel else 32, keys=16)
    return tile if element_size <= 2 else tile._replace(queries=max(32, tick), keys=32, stages=1)


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision(q: Tensor) -> str:
    """Float32 matrix products stay float32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def head_obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot serve these queries, or None."""
    if q.shape[-1] > WIDEST_HEAD or q.shape[-1] < 16 or q.shape[-1] & (q.shape[-1] - 1):
        return f"head size {q.shape[-1]} is not a power of two from 16 to {WIDEST_HEAD}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} is neither float32 nor bfloat16"
    if _interpreted() and q.dtype != torch.float32:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None
