"""The kernels that walk the ticks of a block of keys with their whole state in registers (one tick: `presyn_codegen`).

The forward stores its states every few ticks, the backward recomputes the ticks between two of them and walks them in reverse.
The pair exists for two sites: `operator` reads any start state and writes any output per tick, as `kernels.presyn` needs;
`layer` starts at rest, adds the barrier to the bias and reads and writes what the fused layer passes between its kernels; the
barrier comes as the sum of two float32 [2, B, H, T].

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants, O outputs per tick.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.presyn_codegen import IMPORTS, Spec, Tick, code_of
from bio_inspired_nanochat.kernels.types import FULL_AT_REST


@dataclass(frozen=True)
class Kernels:
    """What was compiled for one Spec: the two passes over the ticks, and `finish`, which turns their gradients of the P derived
    per-head constants into those of the parameters.
    """

    spec: Spec
    derived: int
    forward: Any
    backward: Any
    finish: Any


@functools.cache
def kernels_for(signature: str) -> Kernels:
    """Trace, split and compile the kernels of a signature; some seconds the first time."""
    spec = Spec.parse(signature)
    tick, finish = code_of(spec)
    lines = _layer_lines(tick) if spec.site == "layer" else _operator_lines(tick)
    source = "\n".join([IMPORTS, *lines, *finish, ""])
    name = f"<presyn kernel {spec}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return Kernels(spec, tick.derived, namespace["forward"], namespace["backward"], namespace["finish"])


def _indent(lines: list[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def _random(spec: Spec) -> str:
    return ", key_ptr, first_ptr, layer_ptr" if spec.sampler else ""


def _operator_lines(tick: Tick) -> list[str]:
    """Both passes of `presyn_triton.presyn_op`."""
    spec, states, outputs = tick.spec, len(tick.spec.states), len(tick.spec.outputs)
    head = ["row = tl.program_id(0).to(tl.int64)", *tick.head, "at = row * keys + offset", "along = row * ticks * keys + offset"]
    load_drive = "drive = tl.load(drive_ptr + along + n * keys, mask=live, other=0.0)"
    scratch = "tl.{verb}(scratch_ptr + ((n - part * every) * {count} + {i}) * size + at"
    born = ["parts = tl.cdiv(ticks, every)", "born = 0"]
    if spec.site == "young":
        born[1] = f"born = tl.minimum(tl.program_id(1) * BLOCK // {spec.tick} // every, parts)"
    forward = [
        *head,
        *(f"s{i} = tl.load(start_ptr + {i} * size + at, mask=live, other=0.0)" for i in range(states)),
        *born,
        "for n in range(tl.minimum(born * every, ticks)):",
        *(f"    tl.store(out_ptr + {i} * size * ticks + along + n * keys, 0.0, mask=live)" for i in range(outputs)),
        "for part in range(born, parts):",
        *(f"    tl.store(check_ptr + (part * {states} + {i}) * size + at, s{i}, mask=live)" for i in range(states)),
        "    for n in range(part * every, tl.minimum((part + 1) * every, ticks)):",
        *_indent([load_drive, *tick.noise("n"), *tick.step], 2),
        *(f"        tl.store(out_ptr + {i} * size * ticks + along + n * keys, {value}, mask=live)" for i, value in enumerate(tick.out)),
        *_indent(tick.advance, 2),
        *(f"tl.store(final_ptr + {i} * size + at, s{i}, mask=live)" for i in range(states)),
    ]
    backward = [
        *head,
        *(f"g{i} = tl.load(gfinal_ptr + {i} * size + at, mask=live, other=0.0)" for i in range(states)),
        *(f"p{i} = tl.zeros([BLOCK], tl.float32)" for i in range(tick.derived)),
        *born,
        "for n in range(tl.minimum(born * every, ticks)):",
        "    tl.store(gdrive_ptr + along + n * keys, 0.0, mask=live)",
        "for back in range(parts - born):",
        "    part = parts - 1 - back",
        *(f"    s{i} = tl.load(check_ptr + (part * {states} + {i}) * size + at, mask=live, other=0.0)" for i in range(states)),
        "    stop = tl.minimum((part + 1) * every, ticks)",
        "    for n in range(part * every, stop):",
        *(f"        {scratch.format(verb='store', count=states, i=i)}, s{i}, mask=live)" for i in range(states)),
        *_indent([load_drive, *tick.noise("n"), *tick.step, *tick.advance], 2),
        "    tl.debug_barrier()",
        "    for m in range(stop - part * every):",
        "        n = stop - 1 - m",
        *(f"        s{i} = {scratch.format(verb='load', count=states, i=i)}, mask=live, other=0.0)" for i in range(states)),
        *(f"        c{i} = tl.load(gout_ptr + {i} * size * ticks + along + n * keys, mask=live, other=0.0)" for i in range(outputs)),
        *_indent([load_drive, *tick.noise("n"), *tick.back], 2),
        f"        tl.store(gdrive_ptr + along + n * keys, {tick.gradients[states]}, mask=live)",
        *_indent(tick.retreat, 2),
        "    tl.debug_barrier()",
        *(f"tl.store(gstart_ptr + {i} * size + at, g{i}, mask=live)" for i in range(states)),
        *_partial(tick, "tl.num_programs(0)"),
    ]
    common = f"ticks, keys, heads, size, every{_random(spec)}, BLOCK: tl.constexpr"
    return [
        *codegen.kernel_text("forward", f"drive_ptr, constant_ptr, start_ptr, out_ptr, final_ptr, check_ptr, {common}", forward),
        *codegen.kernel_text(
            "backward",
            f"drive_ptr, constant_ptr, check_ptr, scratch_ptr, gout_ptr, gfinal_ptr, gdrive_ptr, gstart_ptr, gh_ptr, {common}",
            backward,
        ),
    ]


def _partial(tick: Tick, pairs: str) -> list[str]:
    """Store this program's share of the gradients of the derived constants, [P, B * H, blocks]."""
    return [
        f"tl.store(gh_ptr + ({i} * {pairs} + row) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(live, p{i}, 0.0), 0))"
        for i in range(tick.derived)
    ]


BARRIER = """\
if BARRIER:
    strength = tl.load(strength_ptr + head)
    high_at = barrier_ptr + row * keys
    low_at = high_at + pairs * keys
    mine = tl.load(high_at + offset, mask=live, other=0.0)
    rest = tl.load(low_at + offset, mask=live, other=0.0)"""
NEARNESS = """\
    begin = tl.minimum({n} * {tick}, keys - 1)
    near = (mine - tl.load(high_at + begin)) + (rest - tl.load(low_at + begin))"""
PLANES = "store_planes(plane_ptr + plane_at + {n} * keys, ticks * keys, {value}, live & (still + {n} < ticks), P)"


class _Registers(NamedTuple):
    """Where the backward keeps the states of the ticks between two stored ones: in registers, for a few ticks of few states."""

    states: int

    def store(self, u: int) -> list[str]:
        """Lines that put the states of tick u of a turn away."""
        return [f"s{i}_{u} = s{i}" for i in range(self.states)]

    def load(self, u: int) -> list[str]:
        """Lines that take them back."""
        return [f"s{i} = s{i}_{u}" for i in range(self.states)]

    def first(self, part: str, loads: list[str]) -> list[str]:
        """Lines before the loop over parts: the loads of a turn are under way while the one before it is computed."""
        return [f"n = ({part}) * every", *map(_later, loads)]

    def ahead(self, drives: list[str], forward: list[str]) -> list[str]:
        """One part forward."""
        return self._turn("part + 1", drives, forward)

    def loops(self, drives: list[str], cotangents: list[str], replay: list[str], reverse: list[str]) -> list[str]:
        """Forward and back over the ticks of a part."""
        return self._turn("tl.maximum(part - 1, 0)", [*drives, *cotangents], [*replay, *reverse])

    def _turn(self, coming: str, loads: list[str], lines: list[str]) -> list[str]:
        here = [f"{line.partition(' = ')[0]} = later_{line.partition(' = ')[0]}" for line in loads]
        return [*here, f"n = ({coming}) * every", *map(_later, loads), "n = part * every", *lines]


def _later(line: str) -> str:
    return f"later_{line}"


class _Scratch(NamedTuple):
    """The same in memory, tick by tick."""

    states: int

    def _at(self, verb: str, i: int) -> str:
        return f"tl.{verb}(scratch_ptr + ((n - part * every) * {self.states} + {i}) * size + at"

    def store(self, u: int) -> list[str]:
        """See `_Registers`."""
        return [f"{self._at('store', i)}, s{i}, mask=live)" for i in range(self.states)]

    def load(self, u: int) -> list[str]:
        """See `_Registers`."""
        return [f"s{i} = {self._at('load', i)}, mask=live, other=0.0)" for i in range(self.states)]

    def first(self, part: str, loads: list[str]) -> list[str]:
        """See `_Registers`."""
        return []

    def ahead(self, drives: list[str], forward: list[str]) -> list[str]:
        """See `_Registers`."""
        return ["for n in range(part * every, tl.minimum((part + 1) * every, ticks)):", *_indent([*drives, *forward], 1)]

    def loops(self, drives: list[str], cotangents: list[str], replay: list[str], reverse: list[str]) -> list[str]:
        """See `_Registers`."""
        return [
            "stop = tl.minimum((part + 1) * every, ticks)",
            "for n in range(part * every, stop):",
            *_indent([*drives, *replay], 1),
            "tl.debug_barrier()",
            "for m in range(stop - part * every):",
            "    n = stop - 1 - m",
            *_indent([*drives, *cotangents, *reverse], 1),
            "tl.debug_barrier()",
        ]


def _layer_lines(tick: Tick) -> list[str]:
    """Both passes as the fused layer needs them: from rest, several ticks per turn, bias and gradient as planes.

    A drive or a gradient before a key's own tick does not exist and counts as zero; ticks beyond the last one have neither.
    """
    spec, states, unroll = tick.spec, len(tick.spec.states), tick.spec.unroll
    head = [
        "local = tl.program_id(0).to(tl.int64)", "row = first + local", *tick.head, *BARRIER.splitlines(),
        "size = tl.num_programs(0) * keys", "at = local * keys + offset",
        "still = tl.zeros([BLOCK], tl.int32)", "along = local * ticks * keys + offset", "plane_at = local * P * ticks * keys + offset",
        "parts = tl.cdiv(ticks, every)", f"born = tl.program_id(1) * BLOCK // {spec.tick} // every",
    ]  # fmt: skip

    def load(name: str, source: str, n: str) -> str:
        return f"{name} = tl.load({source}_ptr + along + ({n}) * keys, mask=live & (still + ({n}) < ticks) & (offset < ({n} + 1) * {spec.tick}), other=0.0).to(tl.float32)"

    def turn(lines: Callable[[str, int], list[str]], ahead: bool) -> list[str]:
        order = range(unroll) if ahead else reversed(range(unroll))
        return [line for u in order for line in lines(f"(n + {u})", u)]

    def replay(n: str, u: int) -> list[str]:
        return [f"drive = i{u} * {1 / spec.tick!r}", *tick.noise(n), *tick.step]

    def forward_tick(n: str, u: int) -> list[str]:
        gate = ["if BARRIER:", *NEARNESS.format(n=n, tick=spec.tick).splitlines(), "    total += strength * near"]
        planes = [PLANES.format(value="total * inverse", n=n)]
        return [*replay(n, u), f"total = {tick.out[0]}", *gate, *planes, *tick.advance]

    def replay_tick(n: str, u: int) -> list[str]:
        return [*keep.store(u), *replay(n, u), *tick.advance]

    def backward_tick(n: str, u: int) -> list[str]:
        gate = ["if BARRIER:", *NEARNESS.format(n=n, tick=spec.tick).splitlines(), "    gmine += c0", "    gstrength += c0 * near"]
        planes = [PLANES.format(value=f"{tick.gradients[states]} * {1 / spec.tick!r}", n=n)]
        return [
            f"c0 = c0_{u}", *keep.load(u), f"drive = i{u} * {1 / spec.tick!r}", *gate, *tick.noise(n), *tick.back, *planes, *tick.retreat
        ]  # fmt: skip

    keep = _Registers(states) if unroll > 1 else _Scratch(states)
    drives = [load(f"i{u}", "drive", f"n + {u}") for u in range(unroll)]
    cotangents = [load(f"c0_{u}", "gbeta", f"n + {u}") for u in range(unroll)]
    forward = [
        *head,
        *(f"s{i} = tl.full([BLOCK], {float(name in FULL_AT_REST)}, tl.float32)" for i, name in enumerate(spec.states)),
        *keep.first("born", drives),
        "for part in range(born, parts):",
        *(f"    tl.store(check_ptr + (part * {states} + {i}) * size + at, s{i}, mask=live)" for i in range(states)),
        *_indent(keep.ahead(drives, turn(forward_tick, True)), 1),
    ]
    backward = [
        *head,
        *(f"{name} = tl.zeros([BLOCK], tl.float32)" for name in ("gmine", "gstrength")),
        *(f"g{i} = tl.zeros([BLOCK], tl.float32)" for i in range(states)),
        *(f"p{i} = tl.zeros([BLOCK], tl.float32)" for i in range(tick.derived)),
        *keep.first("parts - 1", [*drives, *cotangents]),
        "for back in range(parts - born):",
        "    part = parts - 1 - back",
        *(f"    s{i} = tl.load(check_ptr + (part * {states} + {i}) * size + at, mask=live, other=0.0)" for i in range(states)),
        *_indent(keep.loops(drives, cotangents, turn(replay_tick, True), turn(backward_tick, False)), 1),
        "if BARRIER:",
        "    tl.store(gbarrier_ptr + row * keys + offset, gmine * strength, mask=live)",
        "    tl.store(gstrength_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(live, gstrength, 0.0), 0))",
        *_partial(tick, "pairs"),
    ]
    common = f"first, pairs, ticks, keys, heads, every{_random(spec)}, BARRIER: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr"
    return [
        *codegen.kernel_text(
            "forward", f"drive_ptr, constant_ptr, plane_ptr, check_ptr, barrier_ptr, strength_ptr, inverse, {common}", forward
        ),
        *codegen.kernel_text(
            "backward",
            "drive_ptr, constant_ptr, check_ptr, scratch_ptr, gbeta_ptr, plane_ptr, barrier_ptr, strength_ptr, gbarrier_ptr, gstrength_ptr, "
            f"gh_ptr, {common}",
            backward,
        ),
    ]
