"""The walk over the ticks as the fused layer needs it (its other site: `kernels.presyn_kernels`).

Terminals start at rest; the barrier, the sum of two float32 [2, B, H, T], joins the bias; bias and gradient of the drive are
written as planes. With lateral inhibition (output activity) the activities are written too, and their gradients read, for
`kernels.lateral_triton`; of outputs in `SHORTAGES` the sums leave the kernel. Small sets of parts take several ticks a turn: their states stay in registers, and the loads of a turn are
under way while the one before it is computed. Blocks of keys that are all born are walked without masks. Where a sequence will
go on (FINAL), the forward also gives the states at the start of tick `closed` and their bias without the barrier.

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.presyn_codegen import Tick, indented, partial_sums, random_arguments
from bio_inspired_nanochat.kernels.terminal import SHORTAGES
from bio_inspired_nanochat.kernels.types import FULL_AT_REST

BARRIER = """\
if BARRIER:
    strength = tl.load(strength_ptr + head)
    high_at = barrier_ptr + row * keys
    low_at = high_at + pairs * keys
    mine = tl.load(high_at + offset, mask=live, other=0.0)
    rest = tl.load(low_at + offset, mask=live, other=0.0)"""
# The first part from which on every key of the block exists and is born, in whole turns.
EDGE = """\
edge = parts
if EXACT:
    edge = tl.minimum(parts, tl.maximum(born, tl.cdiv(tl.cdiv((tl.program_id(1) + 1) * BLOCK, {tick}), every)))"""


class _Access(NamedTuple):
    """How one pair's [N, Tk] are read and written: with masks, or plainly where every key of the block is there and born."""

    tick: int
    masked: bool

    def load(self, name: str, source: str, u: int) -> str:
        """A line that loads the values of tick n + u. Before a key's own tick there are none, which counts as zero."""
        at = f"{name} = tl.load({source}_at + n * keys + {u} * keys"
        if not self.masked:
            return f"{at}).to(tl.float32)"
        return f"{at}, mask=live & (still + n + {u} < ticks) & (offset < (n + {u} + 1) * {self.tick}), other=0.0).to(tl.float32)"

    def store(self, value: str, count: str, u: int) -> str:
        """A line that stores a value of tick n + u as `count` planes."""
        mask = f"live & (still + n + {u} < ticks)" if self.masked else "None"
        return f"store_planes(plane_at + n * keys + {u} * keys, ticks * keys, {value}, {mask}, {count})"

    def plain(self, name: str, value: str, u: int) -> str:
        """A line that stores a float32 value of tick n + u."""
        mask = f", mask=live & (still + n + {u} < ticks)" if self.masked else ""
        return f"tl.store({name}_at + n * keys + {u} * keys, {value}{mask})"

    def real(self, value: str, u: int) -> str:
        """A value of tick n + u, 0 where that tick or the key does not exist."""
        return f"tl.where(live & (still + n + {u} < ticks), {value}, 0.0)" if self.masked else value

    def barrier(self, u: int, lines: list[str]) -> list[str]:
        """Lines that know, as `near`, what the barrier costs between a key and tick n + u, where there is one."""
        place = f"n * {self.tick} + {u * self.tick}"
        place = f"tl.minimum({place}, keys - 1)" if self.masked else place
        near = f"near = (mine - tl.load(high_at + {place})) + (rest - tl.load(low_at + {place}))"
        return ["if BARRIER:", *indented([near, *lines], 1)]


def _cotangents(tick: Tick) -> dict[str, str]:
    """Where the gradients of those outputs come from that every tick and key has, and their names."""
    sources = {"bias": "gbeta", "activity": "gactivity"}
    return {sources[name]: f"c{i}" for i, name in enumerate(tick.spec.outputs) if name in sources}


def _read_back(tick: Tick, access: _Access) -> list[str]:
    """The loads of a part of the backward."""
    sources = {"drive": "i"} | {source: f"{name}_" for source, name in _cotangents(tick).items()}
    return [line for source, name in sources.items() for line in _loads(tick, access, source, name)]


def _loads(tick: Tick, access: _Access, source: str, name: str) -> list[str]:
    return [access.load(f"{name}{u}", source, u) for u in range(tick.spec.unroll)]


def _forward_tick(tick: Tick, access: _Access, u: int) -> list[str]:
    return [
        *_replay(tick, u),
        f"total = {tick.out[0]}",
        "if FINAL:",
        *(f"    f{i} = tl.where(n + {u} == closed, s{i}, f{i})" for i in range(len(tick.spec.states))),
        f"    fbias = tl.where(n + {u} == closed, total, fbias)",
        *access.barrier(u, ["total += strength * near"]),
        access.store("total * inverse", "P", u),
        *(access.plain(name, value, u) for name, value in zip(tick.spec.outputs, tick.out, strict=True) if name == "activity"),
        *(f"m_{name} += {access.real(value, u)}" for name, value in zip(tick.spec.outputs, tick.out, strict=True) if name in SHORTAGES),
        *tick.advance,
    ]


def _replay(tick: Tick, u: int) -> list[str]:
    return [f"drive = i{u} * {1 / tick.spec.tick!r}", *tick.noise(f"(n + {u})"), *tick.step]


def _backward_tick(tick: Tick, access: _Access, u: int) -> list[str]:
    return [
        *(f"{name} = {name}_{u}" for name in _cotangents(tick).values()),
        *(f"c{i} = {access.real(f'g_{name}', u)}" for i, name in enumerate(tick.spec.outputs) if name in SHORTAGES),
        f"drive = i{u} * {1 / tick.spec.tick!r}",
        *access.barrier(u, ["gmine += c0", "gstrength += c0 * near"]),
        *tick.noise(f"(n + {u})"),
        *tick.back,
        # a factor of products that are rounded to the same digits
        access.store(f"{tick.gradients[len(tick.spec.states)]} * {1 / tick.spec.tick!r}", "1", u),
        *tick.retreat,
    ]


def _turns(tick: Tick, access: _Access, bounds: str, coming: str, before: list[str], loads: list[str], lines: list[str]) -> list[str]:
    """A loop over parts with the loads of the `coming` part ahead of the lines of this one, which their values enter."""
    here = [f"{name} = later_{name}" for name in (line.partition(" = ")[0] for line in loads)]
    return [
        f"for step in range({bounds}):",
        *indented([*before, *here, f"n = {coming} * every", *_later(loads), "n = part * every", *lines], 1),
    ]


def _later(loads: list[str]) -> list[str]:
    return [f"later_{line}" for line in loads]


def _ahead(tick: Tick) -> list[str]:
    """Forward over all parts with the states in registers."""
    spec, ticks = tick.spec, range(tick.spec.unroll)
    lines = []
    for masked in (True, False):
        access = _Access(spec.tick, masked)
        loads = _loads(tick, access, "drive", "i")
        before = ["part = step", *_check(tick, "live" if masked else "None")]
        steps = [line for u in ticks for line in _forward_tick(tick, access, u)]
        if masked:
            lines += ["n = born * every", *_later(loads), *_turns(tick, access, "born, edge", "(part + 1)", before, loads, steps)]
        else:
            lines += [
                "if EXACT:",
                *indented(_turns(tick, access, "edge, parts", "tl.minimum(part + 1, parts - 1)", before, loads, steps), 1),
            ]
    return lines


def _check(tick: Tick, mask: str) -> list[str]:
    """Lines that store the states for the backward, where one will come."""
    count = len(tick.spec.states)
    stores = [f"tl.store(check_ptr + (part * {count} + {i}) * size + at, s{i}, mask={mask})" for i in range(count)]
    return ["if CHECK:", *indented(stores, 1)]


def _back(tick: Tick) -> list[str]:
    """Back over all parts: forward through a part from its stored states, which registers keep, then in reverse."""
    spec, ticks, count = tick.spec, range(tick.spec.unroll), len(tick.spec.states)
    lines = ["n = (parts - 1) * every", *_later(_read_back(tick, _Access(spec.tick, True))), "plain = tl.maximum(parts - 1 - edge, 0)"]
    for masked in (False, True):
        access = _Access(spec.tick, masked)
        mask = "mask=live, other=0.0" if masked else "mask=None"
        before = ["part = parts - 1 - step"]
        before += [f"s{i} = tl.load(check_ptr + (part * {count} + {i}) * size + at, {mask})" for i in range(count)]
        loads, steps = _read_back(tick, access), []
        for u in ticks:
            steps += [*(f"s{i}_{u} = s{i}" for i in range(count)), *_replay(tick, u), *tick.advance]
        for u in reversed(ticks):
            steps += [*(f"s{i} = s{i}_{u}" for i in range(count)), *_backward_tick(tick, access, u)]
        if masked:
            lines += _turns(tick, access, "plain, parts - born", "tl.maximum(part - 1, 0)", before, loads, steps)
        else:
            lines += ["if EXACT:", *indented(_turns(tick, access, "plain", "(part - 1)", before, loads, steps), 1)]
    return lines


def _ahead_one_by_one(tick: Tick) -> list[str]:
    """As `_ahead` for large sets of parts, a tick at a time."""
    access = _Access(tick.spec.tick, True)
    step = [*_loads(tick, access, "drive", "i"), *_forward_tick(tick, access, 0)]
    inner = ["for n in range(part * every, tl.minimum((part + 1) * every, last)):", *indented(step, 1)]
    return ["for part in range(born, parts):", *indented([*_check(tick, "live"), *inner], 1)]


def _back_one_by_one(tick: Tick) -> list[str]:
    """As `_back`, with the states between two stored ones in memory."""
    count, access = len(tick.spec.states), _Access(tick.spec.tick, True)

    def scratch(verb: str, i: int) -> str:
        return f"tl.{verb}(scratch_ptr + ((n - part * every) * {count} + {i}) * size + at"

    drive = _loads(tick, access, "drive", "i")
    replay = [*drive, *(f"{scratch('store', i)}, s{i}, mask=live)" for i in range(count)), *_replay(tick, 0), *tick.advance]
    back = [*_read_back(tick, access), *(f"s{i} = {scratch('load', i)}, mask=live, other=0.0)" for i in range(count))]
    return [
        "for back in range(parts - born):",
        "    part = parts - 1 - back",
        *(f"    s{i} = tl.load(check_ptr + (part * {count} + {i}) * size + at, mask=live, other=0.0)" for i in range(count)),
        "    stop = tl.minimum((part + 1) * every, ticks)",
        "    for n in range(part * every, stop):",
        *indented(replay, 2),
        "    tl.debug_barrier()",
        "    for m in range(stop - part * every):",
        "        n = stop - 1 - m",
        *indented([*back, *_backward_tick(tick, access, 0)], 2),
        "    tl.debug_barrier()",
    ]


def _pointers(*names: str) -> str:
    return ", ".join(f"{name}_ptr" for name in names)


def layer_lines(tick: Tick) -> list[str]:
    """The source of both passes."""
    spec, states = tick.spec, len(tick.spec.states)
    gradients = list(_cotangents(tick))
    extra, low = ["activity"] * (len(gradients) - 1), [name for name in spec.outputs if name in SHORTAGES]

    def head(planes: str, *read: str) -> list[str]:
        return [
            "local = tl.program_id(0).to(tl.int64)", "row = first + local", *tick.head, *BARRIER.splitlines(),
            "size = tl.num_programs(0) * keys", "at = local * keys + offset", "still = tl.zeros([BLOCK], tl.int32)",
            *(f"{name}_at = {name}_ptr + (local * ticks * keys + offset)" for name in read),
            f"plane_at = plane_ptr + (local * {planes} * ticks * keys + offset)",
            "parts = tl.cdiv(ticks, every)", f"born = tl.program_id(1) * BLOCK // {spec.tick} // every",
            *EDGE.format(tick=spec.tick).splitlines(),
        ]  # fmt: skip

    at_once: dict[bool, tuple[Callable, Callable]] = {True: (_ahead, _back), False: (_ahead_one_by_one, _back_one_by_one)}
    ahead, back = at_once[spec.unroll > 1]
    forward = [
        *head("P", "drive", *extra),
        *(f"s{i} = tl.full([BLOCK], {float(name in FULL_AT_REST)}, tl.float32)" for i, name in enumerate(spec.states)),
        "last = ticks",
        "if FINAL:",
        "    last = closed + 1",
        "    parts = closed // every + 1",
        "    edge = parts",
        *(f"    f{i} = s{i}" for i in range(states)),
        "    fbias = tl.zeros([BLOCK], tl.float32)",
        *(f"m_{name} = tl.zeros([BLOCK], tl.float32)" for name in low),
        *ahead(tick),
        *(
            f"tl.store(low_ptr + ({i} * pairs + row) * tl.num_programs(1) + tl.program_id(1), tl.sum(m_{name}, 0))"
            for i, name in enumerate(low)
        ),
        "if FINAL:",
        *(f"    tl.store(final_ptr + ({i} * pairs + row) * keys + offset, f{i}, mask=live)" for i in range(states)),
        f"    tl.store(final_ptr + ({states} * pairs + row) * keys + offset, fbias, mask=live)",
    ]
    backward = [
        *head("1", "drive", *gradients),
        *(f"{name} = tl.zeros([BLOCK], tl.float32)" for name in ("gmine", "gstrength")),
        *(f"g_{name} = tl.load(glow_ptr + {i})" for i, name in enumerate(low)),
        *(f"g{i} = tl.zeros([BLOCK], tl.float32)" for i in range(states)),
        *(f"p{i} = tl.zeros([BLOCK], tl.float32)" for i in range(tick.derived)),
        *back(tick),
        "if BARRIER:",
        "    tl.store(gbarrier_ptr + row * keys + offset, gmine * strength, mask=live)",
        "    tl.store(gstrength_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(live, gstrength, 0.0), 0))",
        *partial_sums(tick, "pairs"),
    ]
    common = f"first, pairs, ticks, keys, heads, every{random_arguments(spec)}, BARRIER: tl.constexpr, EXACT: tl.constexpr"
    return [
        *codegen.kernel_text(
            "forward",
            f"drive_ptr, constant_ptr, {_pointers('plane', *extra, *(['low'] if low else []))}, check_ptr, final_ptr, barrier_ptr, strength_ptr, inverse, closed, {common}, "
            "P: tl.constexpr, CHECK: tl.constexpr, FINAL: tl.constexpr, BLOCK: tl.constexpr",
            forward,
        ),
        *codegen.kernel_text(
            "backward",
            f"drive_ptr, constant_ptr, check_ptr, scratch_ptr, {_pointers(*gradients, *(['glow'] if low else []), 'plane')}, barrier_ptr, strength_ptr, gbarrier_ptr, gstrength_ptr, "
            f"gh_ptr, {common}, BLOCK: tl.constexpr",
            backward,
        ),
    ]
