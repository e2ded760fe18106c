"""What the Triton kernels share: fast elementary functions, the mask of a tile, ticks as matrices, tile sizes by device limits.

A tick is a one-hot matrix. What belongs to a tick and a key, [N, Tk], is spread over the queries of a tile, or collected from
them, by one more small product on the matrix units, which costs no arithmetic elsewhere. Where operands are bfloat16, such a
value is held as a sum of two of them, in two planes [2, N, Tk], and keeps 16 bits of mantissa.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.masks import num_ticks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAST = tl.constexpr(not INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
KINDS = {"phi": 0, "softplus": 1}  # of the drive, as kernels take them


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
def power2(x):
    """2 ** x in one instruction; results below 1e-38 are 0."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def exponential(x):
    """e ** x with a relative error of 2e-7 * (1 + |x|)."""
    return power2(x * LOG2E)


@triton.jit
def saturate(x, factor, summand):
    """x * factor + summand, limited to [0, 1]."""
    if FAST:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, factor, summand], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.minimum(tl.maximum(x * factor + summand, 0.0), 1.0)


@triton.jit
def drive_above(x, scale, theta, KIND: tl.constexpr):
    """phi or softplus of the logit x * scale - theta, `kernels.reference.phi`."""
    if KIND == 0:
        low = saturate(x, 0.5 * scale, 0.5 - 0.5 * theta)
        return low * low + 2.0 * tl.maximum(x * (0.5 * scale) - (0.5 + 0.5 * theta), 0.0)
    above = x * scale - theta
    return tl.maximum(above, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(above)))


@triton.jit
def drive_slope(x, scale, theta, KIND: tl.constexpr):
    """Derivative of phi (KIND 0) or softplus (1) at the logit x * scale - theta."""
    if KIND == 0:
        return saturate(x, 0.5 * scale, 0.5 - 0.5 * theta)
    return 1.0 / (1.0 + tl.exp(theta - x * scale))


@triton.jit
def allowed(
    place, key, queries_end, q_start, keys, doc_ptr, batch, docs, window, WINDOW: tl.constexpr, DOC: tl.constexpr, DIAGONAL: tl.constexpr
):
    """Mask of the pairs of a tile, `kernels.masks.allowed`; place and key are positions in shapes that broadcast."""
    distance = place - key
    seen = (place >= q_start) & (place < queries_end) & (key < keys) & (distance >= 0 if DIAGONAL else distance > 0)
    if WINDOW:
        seen = seen & (distance < window)
    if DOC:
        mine = tl.load(doc_ptr + batch * docs + tl.minimum(tl.maximum(place, 0), docs - 1))
        theirs = tl.load(doc_ptr + batch * docs + tl.minimum(key, docs - 1))
        seen = seen & (mine == theirs)
    return seen


@triton.jit
def rows(ptr, batch, head, of_batch, of_head, of_token, token, D: tl.constexpr):
    """Pointers [*, D] to tokens of one head; the strides are those of a [B, H, T, D] tensor whose last one is 1."""
    return ptr + (batch * of_batch + head * of_head) + token[:, None] * of_token + tl.arange(0, D)


@triton.jit
def one_hot(M: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """[M, R]: 1 where a query lies in the tick of a row of planes (rows repeat the N = M / C ticks of the tile)."""
    N: tl.constexpr = M // C
    return tl.where((tl.arange(0, M) // C)[:, None] == (tl.arange(0, R) % N)[None, :], 1.0, 0.0)


@triton.jit
def tick_columns(M: tl.constexpr, C: tl.constexpr, NB: tl.constexpr):
    """[M, NB]: 1 where a query lies in the tick of a column; columns beyond the N ticks of the tile are 0."""
    return tl.where((tl.arange(0, M) // C)[:, None] == tl.arange(0, NB)[None, :], 1.0, 0.0)


@triton.jit
def load_planes(
    plane_ptr, tick, base, key, ticks, keys, C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr
):
    """Planes of the ticks of a tile, [R, K]: rows 0..N-1 from the first plane, then the next; 0 before a key's own tick.

    tick: the tile's first tick counted from position `base`.
    """
    N: tl.constexpr = M // C
    r = tl.arange(0, R)
    n = tick + r % N
    at = plane_ptr + ((r // N) * ticks + n)[:, None] * keys + key[None, :]
    if MASKED:
        live = ((r < P * N) & (n < ticks))[:, None] & (key < keys)[None, :]
        return tl.load(at, mask=live & ((base + (n + 1) * C)[:, None] > key[None, :]), other=0.0)
    if R > P * N:
        return tl.load(at, mask=(r < P * N)[:, None], other=0.0)
    return tl.load(at)


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


@triton.jit
def store_ticks(out_ptr, value, tick, key, ticks, keys, N: tl.constexpr, NB: tl.constexpr):
    """Store value [K, NB], of which the first N columns are ticks from `tick` on, into one head's [N, Tk]."""
    n = tl.arange(0, NB)
    tl.store(
        out_ptr + (tick + n)[None, :] * keys + key[:, None], value, mask=((n < N) & (tick + n < ticks))[None, :] & (key < keys)[:, None]
    )


class Tile(NamedTuple):
    """Sizes of a tile and how it is launched; registers: the most that a thread may take."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# Per kernel and head size up to 64, up to 128: measured on an H100.
TILES = {
    "drive": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    "drive_keys": (Tile(64, 64, 4, 4, 168), Tile(64, 64, 4, 3, 168)),
    "drive_queries": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    "attention": (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
    "attention_keys": (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    "attention_queries": (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
}
# What does not fit into the shared memory of consumer cards has another tile there.
SMALL = {("attention_keys", 128): Tile(32, 64, 4, 2)}
SMALL_BYTES = 99 * 1024
WIDEST_HEAD = 128
FEWEST = 16  # rows of the smallest matrix product


def tile_for(kernel: str, q: Tensor, tick: int) -> Tile:
    """The tile of a kernel on the device of q [B, H, T, D], of whole ticks of `tick` tokens.

    float32 operands take twice the shared memory, so they get half the keys.
    """
    wide = q.shape[3] > 64
    tile = TILES[kernel][wide]
    if INTERPRETED:
        return tile._replace(queries=max(16, tick), keys=16)
    if q.element_size() > 2:
        return tile._replace(queries=max(32, tick), keys=32, stages=1)
    if tick > tile.queries:  # a tile holds whole ticks
        return tile._replace(queries=tick, stages=1)
    if shared_bytes(q.device) >= 2 * SMALL_BYTES:
        return tile
    tile = SMALL.get((kernel, 128 if wide else 64), tile)
    return tile if tick >= 4 else tile._replace(stages=1)  # the shorter the ticks, the more rows of planes


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take; SHARED_LIMIT_KB in the environment sets a smaller card's limit."""
    if limit := os.environ.get("SHARED_LIMIT_KB"):
        return int(limit) * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else SMALL_BYTES


def planes_of(dtype: torch.dtype) -> int:
    """How many values of this dtype hold one that belongs to a tick and a key."""
    return 1 if dtype == torch.float32 else 2


@triton.jit
def store_planes(plane_ptr, behind, value, mask, P: tl.constexpr):
    """Store a float32 value as P planes: at plane_ptr, and the second one `behind` elements later."""
    if P == 2:  # the upper half of a float32 is a bfloat16, and what it leaves over is exact: no conversion, which is slow
        half_ptr = plane_ptr.to(tl.pointer_type(tl.uint16))
        bits = value.to(tl.uint32, bitcast=True)
        low = (value - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True)
        tl.store(half_ptr, (bits >> 16).to(tl.uint16), mask=mask)
        tl.store(half_ptr + behind, (low >> 16).to(tl.uint16), mask=mask)
    else:
        tl.store(plane_ptr, value, mask=mask)


@triton.jit
def _to_planes(x_ptr, plane_ptr, factor, size, P: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * size + at, mask=at < size, other=0.0)
    store_planes(plane_ptr + row * P * size + at, size, x * factor, at < size, P)


def to_planes(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """x * factor, x [B, H, N, Tk] float32, as planes [B, H, P, N, Tk] whose sum it is."""
    x, planes = x.contiguous(), planes_of(dtype)
    out = torch.empty(*x.shape[:2], planes, *x.shape[2:], dtype=dtype, device=x.device)
    size = x.shape[2] * x.shape[3]
    launch(_to_planes, (triton.cdiv(size, 2048), x.shape[0] * x.shape[1]), x, out, factor, size, P=planes, BLOCK=2048)
    return out


def dense(x: Tensor) -> Tensor:
    """x [B, H, T, D] in one of the two layouts that the kernels write their gradients in: heads before tokens or after."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


def key_gradients(q: Tensor, k: Tensor) -> Tensor:
    """Room [B, H, Tk, D] for a gradient of k or v per query head; in float32 where heads share keys and are summed afterwards."""
    if q.shape[1] == k.shape[1]:
        return torch.empty_like(k)
    return k.new_empty(q.shape[0], q.shape[1], *k.shape[2:], dtype=torch.float32)


def sum_groups(grad: Tensor, k: Tensor) -> Tensor:
    """What `key_gradients` holds, grad [B, H, Tk, D], summed over the query heads that share a key head: [B, Hkv, Tk, D] in k's dtype."""
    return grad if grad.shape[1] == k.shape[1] else grad.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of a [B, H, T, D] tensor."""
    batch, head, token = x.stride()[:3]
    return batch, head, token


def head_obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot serve queries q [B, H, T, D], or None."""
    if q.shape[-1] > WIDEST_HEAD or q.shape[-1] < 16 or q.shape[-1] & (q.shape[-1] - 1):
        return f"head size {q.shape[-1]} is not a power of two from 16 to {WIDEST_HEAD}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} is neither float32 nor bfloat16"
    if INTERPRETED and q.dtype != torch.float32:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


class Launched(NamedTuple):
    """A launch that was watched: the kernel's name, events before and after it, and what was compiled."""

    name: str
    begin: torch.cuda.Event
    end: torch.cuda.Event
    compiled: Any


_compiled: dict[tuple, tuple[Any, tuple]] = {}
_watched: list[Launched] | None = None


@contextlib.contextmanager
def watch() -> Iterator[list[Launched]]:
    """Collect the launches made inside, on CUDA."""
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **static: Any) -> None:
    """kernel[grid](*arguments, **static), where a call like an earlier one skips Triton's own look at its many arguments,
    which takes longer than a small kernel runs. static: compile-time arguments by name and options of the launch.
    """
    if INTERPRETED:
        kernel[grid](*arguments, **static)
        return
    kinds, alignment = [], 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            alignment |= argument.data_ptr()
            argument = argument.dtype
        kinds.append(argument)
    key = (id(kernel), torch.cuda.current_device(), *kinds, *static.values())
    if alignment % 16:  # compiled for another alignment than the common one
        key += tuple(argument.data_ptr() % 16 == 0 for argument in arguments if isinstance(argument, Tensor))
    known = _compiled.get(key)
    begin = None if _watched is None else _mark()
    if known is None:
        compiled = kernel[grid](*arguments, enable_fp_fusion=True, **static)  # said, because the default changes between versions
        _compiled[key] = compiled, tuple(static[name] for name in kernel.arg_names[len(arguments) :])
    else:
        compiled = known[0]
        compiled[(*grid, 1)](*arguments, *known[1])
    if _watched is not None:
        module = kernel.fn.__module__.strip("<").partition(" ")[0].rpartition(".")[2]  # of a generated kernel the first word
        _watched.append(Launched(f"{module} {kernel.fn.__name__.strip('_')}", begin, _mark(), compiled))


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Site(NamedTuple):
    """Where a call takes place: the queries' start, the mask, and which of the B * H pairs of batch row and head it covers."""

    tick: int
    scale: float
    q_start: int
    window: int | None
    doc: Tensor | None
    first: int
    count: int

    def sizes(self, q: Tensor, k: Tensor) -> tuple[int, ...]:
        """The arguments of every kernel from `first` to `ticks`, for q [B, H, Tq, D] and k [B, Hkv, Tk, D]; window 0 is none."""
        docs = 0 if self.doc is None else self.doc.shape[1]
        group = q.shape[1] // k.shape[1]
        return (
            *(self.first, self.q_start, q.shape[2], k.shape[2], q.shape[1], group, docs, self.window or 0),
            num_ticks(self.q_start, q.shape[2], self.tick),
        )

    def static(self, q: Tensor, k: Tensor, tile: Tile, planes: int = 1) -> dict:
        """The compile-time arguments of every kernel. EXACT: whole tiles from position 0 and no mask but the causal one; R: rows of
        so many planes in a tile.
        """
        plain = self.q_start == 0 and q.shape[2] == k.shape[2] and self.window is None and self.doc is None
        return {
            "C": self.tick, "D": q.shape[3], "M": tile.queries, "K": tile.keys,
            "R": max(FEWEST, planes * tile.queries // self.tick), "WINDOW": self.window is not None, "DOC": self.doc is not None,
            "EXACT": plain and q.shape[2] % max(tile.queries, tile.keys) == 0,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "num_warps": tile.warps, "num_stages": tile.stages,
            **({"maxnreg": tile.registers} if tile.registers else {}),
        }  # fmt: skip

    def query_grid(self, q: Tensor, tile: Tile) -> tuple[int, int]:
        """The launch grid (tiles of queries, pairs of row and head); tiles start on a tick, so a start in mid-tick may cost one more."""
        return triton.cdiv(self.q_start % self.tick + q.shape[2], tile.queries), self.count

    def key_grid(self, k: Tensor, tile: Tile) -> tuple[int, int]:
        """The launch grid (blocks of keys, pairs of row and head) for k [B, Hkv, Tk, D]."""
        return triton.cdiv(k.shape[2], tile.keys), self.count

    def mask(self, instead: Tensor) -> Tensor:
        """The documents [B, T], or any tensor (`instead`) where there are none."""
        return instead if self.doc is None else self.doc
