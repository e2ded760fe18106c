"""Decoding in Triton: one new token per row against caches of a fixed length, at positions that lie in device memory.

No size depends on the position, so a captured CUDA graph serves every token. `attend` walks the keys in splits: each program
writes its keys' softmax statistics and its sum of values, and adds the drive of the new query to its terminals; a second
kernel joins the splits. `advance` takes the terminals over the end of a tick. A row at position -1 reads and changes nothing.

Dimensions: B batch, H query heads, Hkv key heads, L cache length, D head size, d slots of the endocytosis ring, S splits.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels import codegen, presyn_codegen
from bio_inspired_nanochat.kernels.presyn_codegen import Spec, constants_of, signature_of, states_of
from bio_inspired_nanochat.kernels.tiles import FAST, KINDS, LOG2E, drive_above, head_obstacle, launch, power2
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

BARRIERS = {"none": 0, "gated": 1, "linear": 2}
PROGRAMS = 2048  # a few for every multiprocessor of the largest card
TILE_BYTES = 8192  # of keys that a program loads at once


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] without loss of small x (Kahan)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * x / tl.where(above == 1.0, 1.0, above - 1.0))


@triton.jit
def _attend(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, position_ptr, beta_ptr, drive_ptr, theta_ptr, level_ptr, x_ptr, gate_ptr, gate_bias_ptr,
    shift_ptr, strength_ptr, part_ptr, stat_ptr, scale, share, length, heads, group, window, size, width,
    D: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, TERMINALS: tl.constexpr, KIND: tl.constexpr, BARRIER: tl.constexpr,
    SHIFTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: one split of `size` keys of one head. The split of the new token also puts it into the caches."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    source = row // group
    now = tl.load(position_ptr + batch).to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(now - window + 1, 0)
    start = tl.maximum(tl.program_id(1) * size, low // K * K)
    stop = tl.minimum(tl.program_id(1) * size + size, now + 1)
    if start >= stop:
        return
    newest = stop == now + 1
    stop = tl.minimum(stop, now)  # the new key comes last, out of the loop: it is in registers, which are what bounds the loop's pace
    start = tl.where(low < stop, start, stop)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + row * D + d).to(tl.float32)
    theta, strength, charge, before = 0.0, 0.0, 0.0, 0.0
    if TERMINALS:
        theta = tl.load(theta_ptr + head)
    if BARRIER > 0:
        strength = tl.load(strength_ptr + head)
    if BARRIER == 1:  # costs are counted from the token before the new one, which softmax cancels
        before = tl.load(level_ptr + row * length + now - 1, mask=now > 0, other=0.0)
    keys, values = k_ptr + source * length * D, v_ptr + source * length * D
    drives, biases, levels = drive_ptr + row * length, beta_ptr + row * length, level_ptr + row * length
    top, total = float("-inf"), 0.0
    y = tl.zeros([K, D], tl.float32)
    for begin in range(start, stop, K):
        key = begin + tl.arange(0, K)
        old = (key < stop) & (key >= low)
        at = key[:, None] * D + d[None, :]
        k = tl.load(keys + at, mask=old[:, None], other=0.0)
        v = tl.load(values + at, mask=old[:, None], other=0.0)
        if TERMINALS:  # what belongs to a key is asked for before the sum, behind whose barrier it would come late
            drive = tl.load(drives + key, mask=old, other=0.0)
            beta = tl.load(biases + key, mask=old, other=0.0)
        if BARRIER == 1:
            level = tl.load(levels + key, mask=old, other=0.0)
        x = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        if TERMINALS:
            tl.store(drives + key, drive + drive_above(x, 1.0, theta, KIND) * share, mask=old)
            x += beta
        if BARRIER == 1:
            x += strength * (level - before).to(tl.float32)
        if BARRIER == 2:
            x += strength * (key - now).to(tl.float32)
        x = tl.where(old, x * LOG2E, float("-inf"))
        peak = tl.maximum(top, tl.max(x, 0))
        weight, shrink = power2(x - peak), power2(top - peak)
        total = total * shrink + tl.sum(weight, 0)
        y = y * shrink + weight[:, None] * v.to(tl.float32)
        top = peak
    y = tl.sum(y, 0)
    if newest:
        new_k, new_v = tl.load(new_k_ptr + source * D + d), tl.load(new_v_ptr + source * D + d)
        if BARRIER == 1:  # the gate's own product: a launch of its own would take longer
            gate = tl.load(gate_bias_ptr + head)
            if SHIFTED:
                gate += tl.load(shift_ptr + row).to(tl.float32)
            for begin in range(0, width, WIDTH):
                column = begin + tl.arange(0, WIDTH)
                entry = tl.load(x_ptr + batch * width + column, mask=column < width, other=0.0).to(tl.float32)
                gate += tl.sum(entry * tl.load(gate_ptr + head * width + column, mask=column < width, other=0.0).to(tl.float32), 0)
            charge = tl.maximum(-gate, 0.0) + _log1p(tl.exp(-tl.abs(gate)))
            tl.store(level_ptr + row * length + now, before + charge.to(tl.float64))
        if head % group == 0:
            tl.store(keys + now * D + d, new_k)
            tl.store(values + now * D + d, new_v)
        x = (tl.sum(new_k.to(tl.float32) * q, 0) * scale + strength * charge) * LOG2E
        peak = tl.maximum(top, x)
        weight, shrink = power2(x - peak), power2(top - peak)
        total = total * shrink + weight
        y = y * shrink + weight * new_v.to(tl.float32)
        top = peak
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(stat_ptr + 2 * part, top)
    tl.store(stat_ptr + 2 * part + 1, total)
    tl.store(part_ptr + part * D + d, y)


@triton.jit
def _join(
    part_ptr, stat_ptr, position_ptr, y_ptr, heads, splits, window, size, D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the output of one head, from the splits that hold a key in sight."""
    row = tl.program_id(0).to(tl.int64)
    now = tl.load(position_ptr + row // heads).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(now - window + 1, 0) // size
    stop = tl.minimum(tl.cdiv(now + 1, size), splits)
    d = tl.arange(0, D)
    top, total = float("-inf"), 0.0
    y = tl.zeros([D], tl.float32)
    for begin in range(first, stop, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        live = split < stop
        part = row * splits + split
        peaks = tl.load(stat_ptr + 2 * part, mask=live, other=float("-inf"))
        peak = tl.maximum(top, tl.max(peaks, 0))
        weight, shrink = power2(peaks - peak), power2(top - peak)
        total = total * shrink + tl.sum(weight * tl.load(stat_ptr + 2 * part + 1, mask=live, other=0.0), 0)
        values = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        y = y * shrink + tl.sum(weight[:, None] * values, 0)
        top = peak
    tl.store(y_ptr + row * D + d, y / tl.where(total > 0.0, total, 1.0))


def _after_tick(spec: Spec) -> Callable[..., list[Tensor]]:
    """States, drive and constants to the bias of the next tick and the states at its start, as same-shaped tensors."""
    tick, states = presyn_codegen.tick_function(spec), len(spec.states)

    def after(*tensors: Tensor) -> list[Tensor]:
        _, *ahead = tick(*tensors)
        return [tick(*ahead, *tensors[states:])[0], *ahead]

    return after


@functools.cache
def _advance_kernel(signature: str) -> Any:
    """The kernel that takes the terminals of the rows whose tick ends over that end, in place; made from `kernels.terminal`."""
    spec = Spec.parse(signature)
    states, plain = len(spec.states), [name for name in spec.states if not name.startswith("ring")]
    with torch.no_grad():
        prelude, body = codegen.split(codegen.trace(_after_tick(spec), states + 1 + len(spec.constants)), len(spec.constants))
    once, derived = codegen.emit(prelude, [f"r{i}" for i in range(len(spec.constants))], "w")
    step, made = codegen.emit(body, [*(f"s{i}" for i in range(states)), "drive", *(f"h{i}" for i in range(len(derived)))], "v")
    places = [f"{name}_ptr + at" for name in plain] + [f"ring_ptr + at * {spec.endo_slots} + {i}" for i in range(spec.endo_slots)]
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "head = row % heads",
        "now = tl.load(position_ptr + row // heads).to(tl.int32)",
        f"if (now + 1) % {spec.tick} != 0:",
        "    return",
        "if tl.program_id(1) * BLOCK > now:",
        "    return",
        "offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "live = offset <= now",  # later keys are not born and stay at rest
        "at = row * length + offset",
        *(f"r{i} = tl.load(constant_ptr + {i} * heads + head)" for i in range(len(spec.constants))),
        *once,
        *(f"h{i} = {value}" for i, value in enumerate(derived)),
        *(f"s{i} = tl.load({place}, mask=live, other=0.0)" for i, place in enumerate(places)),
        "drive = tl.load(drive_ptr + at, mask=live, other=0.0)",
        *step,
        *(f"tl.store({place}, {value}, mask=live)" for place, value in zip(places, made[1:], strict=True)),
        "tl.store(drive_ptr + at, 0.0, mask=live)",
        f"tl.store(beta_ptr + at, {made[0]}, mask=live)",
    ]
    pointers = ", ".join(f"{name}_ptr" for name in [*plain, *(["ring"] if spec.endo_slots else [])])
    arguments = f"position_ptr, constant_ptr, beta_ptr, drive_ptr, {pointers}, length, heads, BLOCK: tl.constexpr"
    source = "\n".join([presyn_codegen.IMPORTS, *codegen.kernel_text("advance", arguments, lines), ""])
    name = f"<advance kernel {spec}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return namespace["advance"]


@dataclass(frozen=True)
class TokenSite:
    """What does not change from token to token in one layer.

    theta [H] and terminals: threshold and kinetics, None without terminals. barrier: none, gated or linear; strength [H]: its
    strength, times the slope for the linear one; gate_weight [H, C] and gate_bias [H]: what maps the layer's input to the gate's
    logits. All float32, but gate_weight may be bfloat16.
    """

    tick: int
    scale: float
    window: int | None = None
    kind: str = "phi"
    theta: Tensor | None = None
    terminals: PresynParams | None = None
    barrier: str = "none"
    strength: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None

    @functools.cached_property
    def constants(self) -> Tensor:
        """The per-head constants of the terminals, [C, H]."""
        return torch.stack(list(constants_of(self.terminals).values()))

    @functools.cached_property
    def states(self) -> tuple[str, ...]:
        """Names of the tensors that a terminal's state consists of, as the kernel `advance` takes them."""
        rest = PresynState.rest(1, 1, 1, params=self.terminals)
        return tuple(name for name in rest.parts() if name not in ("open_drive", "ring")) + (("ring",) if rest.ring is not None else ())

    @functools.cached_property
    def advance(self) -> Any:
        """The kernel of these terminals."""
        variables = list(states_of(PresynState.rest(1, 1, 1, params=self.terminals)))
        return _advance_kernel(signature_of(self.terminals, variables, ["bias"], False, "any"))


def obstacle(cache: Mapping[str, Tensor], terminals: PresynParams | None, random: bool) -> str | None:
    """Why these kernels cannot serve a layer, as half a sentence for a message, or None.

    cache: its tensors by name, of which keys k are [B, Hkv, L, D]; terminals: None without; random: release is to be drawn.
    """
    if terminals is not None and terminals.lateral_strength is not None:
        return "lateral inhibition looks across keys"
    if random and terminals is not None and terminals.sampler is not None:
        return "release is drawn at random"
    return head_obstacle(cache["k"])


def splits_of(pairs: int, length: int, k: Tensor) -> tuple[int, int]:
    """Keys that a program loads at once, and keys of a split: few splits, but programs for a whole card.

    pairs: of sequence and key head; length: of the cache k [B, Hkv, L, D] that is in use, in tokens.
    """
    if not FAST:  # the interpreter is for small sizes
        return 4, 8
    block = max(16, min(64, TILE_BYTES // (k.shape[-1] * k.element_size())))
    return block, max(block, min(512, triton.next_power_of_2(-(-length * pairs // PROGRAMS))))


def attend(
    q: Tensor, new_k: Tensor, new_v: Tensor, cache: Mapping[str, Tensor], positions: Tensor, site: TokenSite,
    x: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row, which joins the caches; its drive joins the open tick of older keys.

    q [B, H, 1, D]; new_k, new_v [B, Hkv, 1, D]; positions: int64 with B values, of the new tokens, < L. cache: k, v
    [B, Hkv, L, D]; with terminals beta and open_drive [B, H, L] float32; with the gated barrier the running cost `barrier`
    [B, H, L] float64. For the gated barrier x [B, 1, C], the layer's input, and shift, what is added to the gate's logits
    (broadcast to [B, 1, H]), or None. Returns y [B, H, 1, D]; changes the cache.
    """
    batch, heads, _, dim = q.shape
    k = cache["k"]
    length = k.shape[2]
    block, split = splits_of(batch * heads, length, k)
    splits = -(-length // split)
    part, stat = q.new_empty(batch * heads, splits, dim, dtype=torch.float32), q.new_empty(batch * heads, splits, 2, dtype=torch.float32)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    seen = {"WINDOW": site.window is not None, "num_warps": 4}
    x = None if x is None else x.contiguous()
    shift = None if shift is None else shift.expand(batch, 1, heads).contiguous()
    given = [
        cache.get("beta"),
        cache.get("open_drive"),
        site.theta,
        cache.get("barrier"),
        x,
        site.gate_weight,
        site.gate_bias,
        shift,
        site.strength,
    ]
    launch(
        _attend, (batch * heads, splits),
        q.contiguous(), new_k.contiguous(), new_v.contiguous(), k, cache["v"], positions, *(q if value is None else value for value in given),
        part, stat, site.scale, 1 / site.tick, length, heads, heads // k.shape[1], site.window or 0, split, 0 if x is None else x.shape[-1],
        D=dim, K=block, **seen, TERMINALS=site.terminals is not None, KIND=KINDS[site.kind], BARRIER=BARRIERS[site.barrier],
        SHIFTED=shift is not None, WIDTH=1024 if FAST else 16,
    )  # fmt: skip
    chunk = min(32, triton.next_power_of_2(splits)) if FAST else 1
    launch(_join, (batch * heads, 1), part, stat, positions, y, heads, splits, site.window or 0, split, D=dim, **seen, CHUNK=chunk)
    return y


def advance(cache: Mapping[str, Tensor], positions: Tensor, site: TokenSite) -> None:
    """End the tick of every row whose new token is the last of one: terminals up to it move on, their bias is that of the next tick.

    cache: as in `attend`, after it, and the state of the terminals, [B, H, L] float32 each (the ring [B, H, L, d]).
    """
    batch, heads, length = cache["beta"].shape
    states = (cache[name] for name in site.states)
    grid = (batch * heads, -(-length // presyn_codegen.BLOCK))
    given = (positions, site.constants, cache["beta"], cache["open_drive"], *states, length, heads)
    launch(site.advance, grid, *given, **presyn_codegen.LAUNCH)
