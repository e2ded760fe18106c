"""The kernels that walk the ticks of a block of keys with their whole state in registers (one tick: `presyn_codegen`).

The forward stores its states every few ticks, the backward recomputes the ticks between two of them and walks them in reverse.
The pair exists for two sites: the operator's (here) reads any start state and writes any output per tick, as `kernels.presyn`
needs; the fused layer's is in `kernels.presyn_layer`.

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants, O outputs per tick.
"""

from __future__ import annotations

import functools
import linecache
from dataclasses import dataclass
from typing import Any

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.presyn_codegen import IMPORTS, Spec, Tick, code_of, indented, partial_sums, random_arguments
from bio_inspired_nanochat.kernels.presyn_layer import layer_lines


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
    lines = layer_lines(tick) if spec.site == "layer" else _operator_lines(tick)
    source = "\n".join([IMPORTS, *lines, *finish, ""])
    name = f"<presyn kernel {spec}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return Kernels(spec, tick.derived, namespace["forward"], namespace["backward"], namespace["finish"])


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
        *indented([load_drive, *tick.noise("n"), *tick.step], 2),
        *(f"        tl.store(out_ptr + {i} * size * ticks + along + n * keys, {value}, mask=live)" for i, value in enumerate(tick.out)),
        *indented(tick.advance, 2),
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
        *indented([load_drive, *tick.noise("n"), *tick.step, *tick.advance], 2),
        "    tl.debug_barrier()",
        "    for m in range(stop - part * every):",
        "        n = stop - 1 - m",
        *(f"        s{i} = {scratch.format(verb='load', count=states, i=i)}, mask=live, other=0.0)" for i in range(states)),
        *(f"        c{i} = tl.load(gout_ptr + {i} * size * ticks + along + n * keys, mask=live, other=0.0)" for i in range(outputs)),
        *indented([load_drive, *tick.noise("n"), *tick.back], 2),
        f"        tl.store(gdrive_ptr + along + n * keys, {tick.gradients[states]}, mask=live)",
        *indented(tick.retreat, 2),
        "    tl.debug_barrier()",
        *(f"tl.store(gstart_ptr + {i} * size + at, g{i}, mask=live)" for i in range(states)),
        *partial_sums(tick, "tl.num_programs(0)"),
    ]
    common = f"ticks, keys, heads, size, every{random_arguments(spec)}, BLOCK: tl.constexpr"
    return [
        *codegen.kernel_text("forward", f"drive_ptr, constant_ptr, start_ptr, out_ptr, final_ptr, check_ptr, {common}", forward),
        *codegen.kernel_text(
            "backward",
            f"drive_ptr, constant_ptr, check_ptr, scratch_ptr, gout_ptr, gfinal_ptr, gdrive_ptr, gstart_ptr, gh_ptr, {common}",
            backward,
        ),
    ]
