"""Triton execution of `presyn`: one program walks the ticks of a block of keys with their whole state in registers.

The kernels are generated from `kernels.terminal` (see `kernels.codegen`), one pair for every set of optional parts: the
forward stores its states every few ticks, the backward recomputes the ticks between two of them and walks them in reverse.

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants, O outputs per tick.
"""

from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.noise import ReleaseNoise, ReleaseSampler, normal_probability
from bio_inspired_nanochat.kernels.terminal import activity, release_logit, terminal_bias, terminal_step
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

WARPS = 4
BLOCK = 32 * WARPS  # one key per thread: a value that a thread stores is loaded by the same thread


class Spec(NamedTuple):
    """Everything that shapes a kernel: the static fields of the parameters, which parts exist, the outputs, the sampler."""

    tick: int
    beta_max: float
    epsilon: float
    endo_slots: int
    constants: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[str, ...]
    sampler: ReleaseSampler | None
    young: bool  # key j rests without drive until tick j // c, so a block of keys starts at its first key's tick

    @classmethod
    def parse(cls, signature: str) -> Spec:
        """The inverse of `signature_of`."""
        static, constants, states, outputs, sampler = signature.split("|")
        tick, beta_max, epsilon, slots, young = static.split(",")
        drawn = sampler.split(",") if sampler else None
        return cls(
            int(tick),
            float(beta_max),
            float(epsilon),
            int(slots),
            tuple(constants.split(",")),
            tuple(states.split(",")),
            tuple(outputs.split(",")),
            ReleaseSampler(float(drawn[0]), drawn[1], float(drawn[2]), int(drawn[3])) if drawn else None,
            young == "young",
        )


def signature_of(p: PresynParams, states: list[str], outputs: list[str], noisy: bool, young: bool) -> str:
    """A Spec as text, which is what an operator can take."""
    constants = ",".join(
        [name for name, value in zip(p._fields, p, strict=True) if isinstance(value, Tensor) and name != "lateral_strength"]
    )
    static = f"{p.tick},{p.beta_max},{p.epsilon},{p.endo_slots},{'young' if young else 'any'}"
    sampler = ""
    if noisy:
        sampler = f"{p.sampler.fraction},{p.sampler.mode},{p.sampler.temperature},{p.sampler.count}"
    return f"{static}|{constants}|{','.join(states)}|{','.join(outputs)}|{sampler}"


def obstacle(p: PresynParams, noise: ReleaseNoise | None, drive: Tensor) -> str | None:
    """Why the kernel cannot serve this call, or None."""
    if drive.dtype != torch.float32:
        return f"the kernel computes in float32, not {drive.dtype}"
    if noise is not None and p.sampler is not None and p.sampler.mode != "normal_reparam":
        return f"stochastic_mode={p.sampler.mode} draws every vesicle (only normal_reparam runs in the kernel)"
    if p.endo_slots > 16:
        return f"an endocytosis ring of {p.endo_slots} ticks is longer than 16"
    return None


def _tick_function(spec: Spec) -> Callable[..., list[Tensor]]:
    """One tick as a function of same-shaped tensors: states, ring slots, drive, [eps, chosen], constants."""
    plain = [name for name in spec.states if not name.startswith("ring")]

    def tick(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        values = {name: next(given) for name in plain}
        slots = [next(given) for _ in range(spec.endo_slots)]
        drive = next(given)
        eps, chosen = (next(given), next(given)) if spec.sampler else (None, None)
        fields = dict.fromkeys(PresynParams._fields) | {name: next(given) for name in spec.constants}
        fields |= {
            "tick": spec.tick,
            "beta_max": spec.beta_max,
            "epsilon": spec.epsilon,
            "endo_slots": spec.endo_slots,
            "lateral_window": 0,
        }
        p = PresynParams(**fields)
        state = PresynState(**values, open_drive=drive, ring=torch.stack(slots, dim=-1) if slots else None)
        probability = None
        if spec.sampler:
            logit = release_logit(state, p)
            probability = torch.where(chosen > 0.5, normal_probability(logit, eps, spec.sampler.count), torch.sigmoid(logit))
        ahead, freed = terminal_step(state, drive, p, probability)
        made = {"bias": lambda: terminal_bias(state, p), "activity": lambda: activity(state, p), "released": lambda: freed}
        outputs = [made[name]() if name in made else getattr(state, name) for name in spec.outputs]
        return [*outputs, *(getattr(ahead, name) for name in plain), *(ahead.ring.unbind(-1) if slots else ())]

    return tick


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
    states, draws = len(spec.states), 2 if spec.sampler else 0
    with torch.no_grad():
        graph = codegen.trace(_tick_function(spec), states + 1 + draws + len(spec.constants))
        prelude, body = codegen.split(graph, len(spec.constants))
        inputs = sum(node.op == "placeholder" for node in body.graph.nodes)
        # the draws come first, so that everything after them is differentiated
        ordered = _draws_first(body, states + 1, draws)
        reverse = codegen.derivative(ordered, draws, inputs, len(spec.outputs) + states)
        derived = inputs - states - 1 - draws
        adjoint = codegen.derivative(prelude, 0, len(spec.constants), derived)
    raw, names = [f"r{i}" for i in range(len(spec.constants))], [f"h{i}" for i in range(derived)]
    finish = codegen.finish_text(len(raw), names, *codegen.emit(adjoint, [*raw, *(f"d{name}" for name in names)], "v"))
    source = "\n".join([*_source(spec, prelude, body, reverse, derived), *finish, ""])
    name = f"<presyn kernel {spec}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return Kernels(spec, derived, namespace["forward"], namespace["backward"], namespace["finish"])


def _draws_first(body: fx.GraphModule, at: int, draws: int) -> Callable[..., Any]:
    def moved(*tensors: Tensor) -> Any:
        noise, rest = tensors[:draws], tensors[draws:]
        return body(*rest[:at], *noise, *rest[at:])

    return moved


NOISE = """\
same = tl.zeros([BLOCK], tl.int32)
word0, word1, word2, word3 = tl.philox((k1 << 32) | k0, offset, same + (tick0 + {n}).to(tl.int32), same + (head | (layer << 16)).to(tl.int32), same)
chosen = tl.where(((word0 >> 9).to(tl.float32) + 0.5) * {grid} < {fraction}, 1.0, 0.0)
eps = tl.sqrt(-2.0 * tl.log(((word1 >> 9).to(tl.float32) + 0.5) * {grid})) * tl.cos({turn} * ((word2 >> 9).to(tl.float32) + 0.5) * {grid})"""


def _source(spec: Spec, prelude: fx.GraphModule, body: fx.GraphModule, reverse: fx.GraphModule, derived: int) -> list[str]:
    """The source lines of both passes."""
    states, outputs, draws = len(spec.states), len(spec.outputs), ["eps", "chosen"] if spec.sampler else []
    s, h = [f"s{i}" for i in range(states)], [f"h{i}" for i in range(derived)]
    once, constants = codegen.emit(prelude, [f"r{i}" for i in range(len(spec.constants))], "w")
    step, made = codegen.emit(body, [*s, "drive", *draws, *h], "v")
    out, ahead = made[:outputs], made[outputs:]
    cotangents = [f"c{i}" for i in range(outputs)] + [f"g{i}" for i in range(states)]
    back, gradients = codegen.emit(reverse, [*draws, *s, "drive", *h, *cotangents], "u")

    def noise(n: str) -> list[str]:
        if not spec.sampler:
            return []
        return NOISE.format(n=n, grid=repr(2.0**-23), fraction=repr(spec.sampler.fraction), turn=repr(2 * math.pi)).splitlines()

    head = [
        "row = tl.program_id(0).to(tl.int64)",
        "offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "live = offset < keys",
        "head = row % heads",
        "at = row * keys + offset",
        *(f"r{i} = tl.load(constant_ptr + {i} * heads + head)" for i in range(len(spec.constants))),
        *once,
        *(f"h{i} = {value}" for i, value in enumerate(constants)),
    ]
    if spec.sampler:
        head += ["k0 = tl.load(key_ptr + 2 * (row // heads))", "k1 = tl.load(key_ptr + 2 * (row // heads) + 1)"]
        head += ["tick0 = tl.load(first_ptr + row // heads)", "layer = tl.load(layer_ptr)"]
    load_states = [f"s{i} = tl.load(start_ptr + {i} * size + at, mask=live, other=0.0)" for i in range(states)]
    load_drive = "drive = tl.load(drive_ptr + (row * ticks + n) * keys + offset, mask=live, other=0.0)"
    advance = [f"a{i} = {value}" for i, value in enumerate(ahead)] + [f"s{i} = a{i}" for i in range(states)]
    scratch = "tl.{verb}(scratch_ptr + ((n % every) * {count} + {i}) * size + at"
    born = [
        f"birth = tl.program_id(1) * BLOCK // {spec.tick} // every * every",
        "birth = tl.minimum(birth, ticks)" if spec.young else "birth = 0",
    ]
    forward = [
        *head,
        *load_states,
        *born,
        "for n in range(birth):",
        *(f"    tl.store(out_ptr + {i} * size * ticks + (row * ticks + n) * keys + offset, 0.0, mask=live)" for i in range(outputs)),
        "for n in range(birth, ticks):",
        "    if n % every == 0:",
        *(f"        tl.store(check_ptr + ((n // every) * {states} + {i}) * size + at, s{i}, mask=live)" for i in range(states)),
        *("    " + line for line in [load_drive, *noise("n"), *step]),
        *(
            f"    tl.store(out_ptr + ({i} * size * ticks) + (row * ticks + n) * keys + offset, {value}, mask=live)"
            for i, value in enumerate(out)
        ),
        *("    " + line for line in advance),
        *(f"tl.store(final_ptr + {i} * size + at, s{i}, mask=live)" for i in range(states)),
    ]
    backward = [
        *head,
        *(f"g{i} = tl.load(gfinal_ptr + {i} * size + at, mask=live, other=0.0)" for i in range(states)),
        *(f"p{i} = tl.zeros([BLOCK], tl.float32)" for i in range(derived)),
        *born,
        "for n in range(birth):",
        "    tl.store(gdrive_ptr + (row * ticks + n) * keys + offset, 0.0, mask=live)",
        "for back in range(tl.cdiv(ticks, every) - birth // every):",
        "    part = tl.cdiv(ticks, every) - 1 - back",
        *(f"    s{i} = tl.load(check_ptr + (part * {states} + {i}) * size + at, mask=live, other=0.0)" for i in range(states)),
        "    stop = tl.minimum((part + 1) * every, ticks)",
        "    for n in range(part * every, stop):",
        *("        " + scratch.format(verb="store", count=states, i=i) + f", s{i}, mask=live)" for i in range(states)),
        *("        " + line for line in [load_drive, *noise("n"), *step, *advance]),
        "    tl.debug_barrier()",
        "    for m in range(stop - part * every):",
        "        n = stop - 1 - m",
        *(f"        s{i} = " + scratch.format(verb="load", count=states, i=i) + ", mask=live, other=0.0)" for i in range(states)),
        *(
            f"        c{i} = tl.load(gout_ptr + ({i} * size * ticks) + (row * ticks + n) * keys + offset, mask=live, other=0.0)"
            for i in range(outputs)
        ),
        *("        " + line for line in [load_drive, *noise("n"), *back]),
        f"        tl.store(gdrive_ptr + (row * ticks + n) * keys + offset, {gradients[states]}, mask=live)",
        *(f"        p{i} += {value}" for i, value in enumerate(gradients[states + 1 :])),
        *(f"        b{i} = {value}" for i, value in enumerate(gradients[:states])),
        *(f"        g{i} = b{i}" for i in range(states)),
        "    tl.debug_barrier()",
        *(f"tl.store(gstart_ptr + {i} * size + at, g{i}, mask=live)" for i in range(states)),
        "blocks = tl.num_programs(1)",
        *(
            f"tl.store(gh_ptr + ({i} * tl.num_programs(0) + row) * blocks + tl.program_id(1), tl.sum(tl.where(live, p{i}, 0.0), 0))"
            for i in range(derived)
        ),
    ]
    random = ", key_ptr, first_ptr, layer_ptr" if spec.sampler else ""
    common = f"ticks, keys, heads, size, every{random}, BLOCK: tl.constexpr"
    return [
        "import triton",
        "import triton.language as tl",
        "from bio_inspired_nanochat.kernels.tiles import logarithm, reciprocal",
        *codegen.kernel_text("forward", f"drive_ptr, constant_ptr, start_ptr, out_ptr, final_ptr, check_ptr, {common}", forward),
        *codegen.kernel_text(
            "backward",
            f"drive_ptr, constant_ptr, check_ptr, scratch_ptr, gout_ptr, gfinal_ptr, gdrive_ptr, gstart_ptr, gh_ptr, {common}",
            backward,
        ),
    ]


def _run(signature: str, drive: Tensor, constants: Tensor, start: Tensor, noise: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    kernels = kernels_for(signature)
    batch, heads, ticks, keys = drive.shape
    states, every = len(kernels.spec.states), _every(ticks)
    size = batch * heads * keys
    out = drive.new_empty(len(kernels.spec.outputs), batch, heads, ticks, keys)
    final = torch.empty_like(start)
    check = drive.new_empty(-(-ticks // every), states, batch, heads, keys)
    grid = (batch * heads, -(-keys // BLOCK))
    kernels.forward[grid](
        drive, constants.contiguous(), start, out, final, check, ticks, keys, heads, size, every, *noise, BLOCK=BLOCK, num_warps=WARPS
    )
    return out, final, check


def _every(ticks: int) -> int:
    """Ticks between two stored states: the square root keeps what is stored and what is recomputed small together."""
    return max(1, math.isqrt(ticks))


@torch.library.custom_op("bio_inspired_nanochat::presyn", mutates_args=())
def presyn_op(
    drive: Tensor, constants: Tensor, start: Tensor, signature: str, key: Tensor | None, first: Tensor | None, layer: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All ticks: drive [B, H, N, Tk], constants [C, H], start [S, B, H, Tk] to outputs [O, B, H, N, Tk], final state, stored states."""
    noise = [] if key is None else [key, first, layer]
    return _run(signature, drive.contiguous(), constants, start.contiguous(), noise)


@presyn_op.register_fake
def _(drive, constants, start, signature, key, first, layer):
    outputs, ticks = len(Spec.parse(signature).outputs), drive.shape[2]
    check = drive.new_empty(-(-ticks // _every(ticks)), *start.shape)
    return drive.new_empty(outputs, *drive.shape), torch.empty_like(start), check


@torch.library.custom_op("bio_inspired_nanochat::presyn_adjoint", mutates_args=())
def presyn_adjoint(
    drive: Tensor,
    constants: Tensor,
    check: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    signature: str,
    key: Tensor | None,
    first: Tensor | None,
    layer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of drive, constants and start from those of the outputs and of the final state."""
    kernels = kernels_for(signature)
    batch, heads, ticks, keys = drive.shape
    states, every = len(kernels.spec.states), _every(ticks)
    constants = constants.contiguous()
    drive, grad_drive = drive.contiguous(), torch.empty_like(drive, memory_format=torch.contiguous_format)
    grad_start = drive.new_empty(states, batch, heads, keys)
    scratch = drive.new_empty(every, states, batch, heads, keys)
    grid = (batch * heads, -(-keys // BLOCK))
    partial = drive.new_empty(kernels.derived, *grid)
    noise = [] if key is None else [key, first, layer]
    kernels.backward[grid](
        *(
            drive,
            constants,
            check,
            scratch,
            grad_out.contiguous(),
            grad_final.contiguous(),
            grad_drive,
            grad_start,
            partial,
        ),
        *(ticks, keys, heads, batch * heads * keys, every, *noise),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    grad_constants = torch.empty_like(constants)
    kernels.finish[(heads,)](constants, partial, grad_constants, batch, heads, grid[1], BLOCK=BLOCK, num_warps=WARPS)
    return grad_drive, grad_constants, grad_start


@presyn_adjoint.register_fake
def _(drive, constants, check, grad_out, grad_final, signature, key, first, layer):
    return torch.empty_like(drive, memory_format=torch.contiguous_format), torch.empty_like(constants), torch.empty_like(grad_final)


def _setup(ctx, inputs, output) -> None:
    drive, constants, _, ctx.signature, key, first, layer = inputs
    ctx.save_for_backward(drive, constants, output[2], key, first, layer)


def _backward(ctx, grad_out, grad_final, _):
    drive, constants, check, *noise = ctx.saved_tensors
    grads = presyn_adjoint(drive, constants, check, grad_out, grad_final, ctx.signature, *noise)
    return *grads, None, None, None, None


presyn_op.register_autograd(_backward, setup_context=_setup)


def run(
    drive: Tensor, p: PresynParams, state: PresynState, outputs: list[str], noise: ReleaseNoise | None = None, young: bool = False
) -> tuple[dict[str, Tensor], PresynState]:
    """Advance over all ticks of `drive` [B, H, N, Tk] float32: the wanted outputs, [B, H, N, Tk] each, and the final state.

    outputs: bias, activity, released, or a part of the state at the start of a tick. young: state is at rest, key j has no drive
    before tick j // c, and outputs are bias, activity and released only.
    """
    slots = list(state.ring.unbind(-1)) if state.ring is not None else []
    plain = [name for name in state.parts() if name not in ("open_drive", "ring")]
    names = [*plain, *(f"ring{i}" for i in range(len(slots)))]
    noisy = noise is not None and p.sampler is not None
    signature = signature_of(p, names, outputs, noisy, young)
    constants = torch.stack(
        [value for name, value in zip(p._fields, p, strict=True) if isinstance(value, Tensor) and name != "lateral_strength"]
    )
    start = torch.stack([*(getattr(state, name) for name in plain), *slots])
    if not torch.compiler.is_compiling():
        kernels_for(signature)  # here and not in the operator, below which autograd is excluded
    key = first = layer = None
    if noisy:
        key = torch.stack([word.flatten() for word in noise.key], dim=1)
        first = torch.as_tensor(noise.first_tick, device=drive.device, dtype=torch.int64).expand(drive.shape[0]).contiguous()
        layer = torch.as_tensor(noise.layer, device=drive.device, dtype=torch.int64).reshape(1)
    out, final, _ = presyn_op(drive, constants, start, signature, key, first, layer)
    values = dict(zip(plain, final, strict=False))
    ring = torch.stack(list(final[len(plain) :]), dim=-1) if slots else None
    return dict(zip(outputs, out, strict=True)), PresynState(**values, open_drive=torch.zeros_like(state.open_drive), ring=ring)
