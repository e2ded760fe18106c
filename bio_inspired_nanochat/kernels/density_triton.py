"""The latch of `kernels.density` on CUDA: one thread per sequence walks the ticks, one launch instead of some twenty per tick.

A tick's code is generated from `molecules.latch_step` (see `kernels.codegen`). Dimensions: B batch, N ticks.
"""

from __future__ import annotations

import functools
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.molecules import DensityParams, latch_step
from bio_inspired_nanochat.kernels.presyn_codegen import IMPORTS, indented
from bio_inspired_nanochat.kernels.tiles import launch

BLOCK = 32


@functools.cache
def _course_kernel(tick: int) -> Any:
    """Compiled from the definition; some seconds the first time."""
    count = len(DensityParams._fields) - 2

    def step(camkii: Tensor, pp1: Tensor, calcium: Tensor, *constants: Tensor) -> list[Tensor]:
        return list(latch_step(camkii, pp1, calcium, DensityParams(tick, True, *constants)))

    with torch.no_grad():
        lines, after = codegen.emit(codegen.trace(step, 3 + count), ["s0", "s1", "calcium", *(f"h{i}" for i in range(count))], "v")
    store = [f"tl.store(out_ptr + (row * (ticks + 1) + {{n}}) * 2 + {i}, s{i}, mask=live)" for i in (0, 1)]
    body = [
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "live = row < batch",
        *(f"h{i} = tl.load(constant_ptr + {i})" for i in range(count)),
        *(f"s{i} = tl.load(start_ptr + row * 2 + {i}, mask=live, other=0.0)" for i in (0, 1)),
        *(line.format(n=0) for line in store),
        "for n in range(ticks):",
        *indented(
            [
                "keep = tl.load(kept_ptr + row * ticks + n, mask=live, other=0.0)",
                "calcium = tl.load(calcium_ptr + row * ticks + n, mask=live, other=0.0)",
                *(f"s{i} = s{i} * keep" for i in (0, 1)),
                *lines,
                *(f"a{i} = {value}" for i, value in enumerate(after)),
                *(f"s{i} = a{i}" for i in (0, 1)),
                *(line.format(n="n + 1") for line in store),
            ],
            1,
        ),
    ]
    arguments = "start_ptr, calcium_ptr, kept_ptr, constant_ptr, out_ptr, batch, ticks, BLOCK: tl.constexpr"
    source = "\n".join([IMPORTS, *codegen.kernel_text("course", arguments, body), ""])
    name = f"<latch kernel {tick}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return namespace["course"]


def course(start: Tensor, calcium: Tensor, kept: Tensor, constants: Tensor, tick: int) -> Tensor:
    """See `density.latch_course`; float32."""
    batch, ticks = calcium.shape
    out = torch.empty(batch, ticks + 1, 2, device=start.device)
    operands = [value.contiguous() for value in (start, calcium, kept, constants)]
    launch(_course_kernel(tick), (triton.cdiv(batch, BLOCK), 1), *operands, out, batch, ticks, BLOCK=BLOCK, num_warps=1)
    return out


@triton.jit
def _adjoint(grad_ptr, slope_ptr, out_ptr, batch, ticks, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < batch
    end = (row * (ticks + 1) + ticks) * 2
    a = tl.load(grad_ptr + end, mask=live, other=0.0)
    b = tl.load(grad_ptr + end + 1, mask=live, other=0.0)
    tl.store(out_ptr + end, a, mask=live)
    tl.store(out_ptr + end + 1, b, mask=live)
    for back in range(ticks):
        n = ticks - 1 - back
        at, slope = (row * (ticks + 1) + n) * 2, slope_ptr + (row * ticks + n) * 4
        aa, ab = tl.load(slope, mask=live, other=0.0), tl.load(slope + 1, mask=live, other=0.0)
        ba, bb = tl.load(slope + 2, mask=live, other=0.0), tl.load(slope + 3, mask=live, other=0.0)
        before = tl.load(grad_ptr + at, mask=live, other=0.0) + aa * a + ba * b
        b = tl.load(grad_ptr + at + 1, mask=live, other=0.0) + ab * a + bb * b
        a = before
        tl.store(out_ptr + at, a, mask=live)
        tl.store(out_ptr + at + 1, b, mask=live)


def adjoint(grad: Tensor, slopes: Tensor) -> Tensor:
    """See `density.latch_adjoint`; float32."""
    batch, ticks = slopes.shape[:2]
    grad, slopes, out = grad.contiguous(), slopes.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
    launch(_adjoint, (triton.cdiv(batch, BLOCK), 1), grad, slopes, out, batch, ticks, BLOCK=BLOCK, num_warps=1)
    return out
