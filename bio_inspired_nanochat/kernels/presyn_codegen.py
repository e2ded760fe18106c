"""One tick of a terminal as Triton code, forward and adjoint, generated from `kernels.terminal` (see `kernels.codegen`).

`kernels.presyn_kernels` puts it into loops over the ticks, once for every set of optional parts.

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants, O outputs per tick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.noise import ReleaseSampler, normal_probability
from bio_inspired_nanochat.kernels.terminal import SHORTAGES, activity, release_logit, shortage, terminal_bias, terminal_step
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

WARPS = 4
BLOCK = 32 * WARPS  # one key per thread: a value that a thread stores is loaded by the same thread
LAUNCH = {"BLOCK": BLOCK, "num_warps": WARPS}
UNROLL = 4  # ticks of the core whose loads are in flight together


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
    site: str  # any; young: key j rests without drive until tick j // c, so a block of keys starts at its first key's tick; layer

    @classmethod
    def parse(cls, signature: str) -> Spec:
        """The inverse of `signature_of`."""
        static, constants, states, outputs, sampler = signature.split("|")
        tick, beta_max, epsilon, slots, site = static.split(",")
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
            site,
        )

    @property
    def unroll(self) -> int:
        """Ticks per turn of the loop in a layer; every tick of it is a copy of the code, so large sets of parts take one."""
        return UNROLL if len(self.states) == 2 and not self.sampler else 1

    def every(self, ticks: int) -> int:
        """Ticks between two stored states. A turn's states fit into registers; for one tick per turn it is the square root,
        which keeps what is stored and what is recomputed small together.
        """
        return self.unroll if self.unroll > 1 and self.site == "layer" else max(1, math.isqrt(ticks))


def signature_of(p: PresynParams, states: list[str], outputs: list[str], noisy: bool, site: str) -> str:
    """A Spec as text, which is what an operator can take."""
    static = f"{p.tick},{p.beta_max},{p.epsilon},{p.endo_slots},{site}"
    sampler = ""
    if noisy:
        sampler = f"{p.sampler.fraction},{p.sampler.mode},{p.sampler.temperature},{p.sampler.count}"
    return f"{static}|{','.join(constants_of(p))}|{','.join(states)}|{','.join(outputs)}|{sampler}"


def constants_of(p: PresynParams) -> dict[str, Tensor]:
    """The per-head parameters that a tick of one key depends on, by name, [H] each."""
    return {name: value for name, value in zip(p._fields, p, strict=True) if isinstance(value, Tensor) and name != "lateral_strength"}


def states_of(state: PresynState) -> dict[str, Tensor]:
    """The variables of a state that a kernel keeps, by name; the slots of the endocytosis ring one by one; [B, H, Tk] each."""
    plain = {name: value for name, value in state.parts().items() if name not in ("open_drive", "ring")}
    slots = () if state.ring is None else state.ring.unbind(-1)
    return {**plain, **{f"ring{i}": slot for i, slot in enumerate(slots)}}


def state_from(values: Mapping[str, Tensor], open_drive: Tensor) -> PresynState:
    """The inverse of `states_of`: `values` by name and `open_drive`, [B, H, Tk] each."""
    slots = [value for name, value in values.items() if name.startswith("ring")]
    plain = {name: value for name, value in values.items() if not name.startswith("ring")}
    return PresynState(**plain, open_drive=open_drive, ring=torch.stack(slots, dim=-1) if slots else None)


def tick_function(spec: Spec) -> Callable[..., list[Tensor]]:
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
        made |= {name: lambda name=name, part=part: shortage(name, getattr(state, part)) for name, (part, _) in SHORTAGES.items()}
        outputs = [made[name]() if name in made else getattr(state, name) for name in spec.outputs]
        return [*outputs, *(getattr(ahead, name) for name in plain), *(ahead.ring.unbind(-1) if slots else ())]

    return tick


class Tick(NamedTuple):
    """The code of one tick: lines for the constants of a head, for a step with its results, and for its adjoint."""

    spec: Spec
    head: list[str]
    derived: int
    step: list[str]
    out: list[str]
    ahead: list[str]
    back: list[str]
    gradients: list[str]

    @property
    def advance(self) -> list[str]:
        """Lines that make the states after the tick the current ones; no state may be overwritten before all are known."""
        return [f"a{i} = {value}" for i, value in enumerate(self.ahead)] + [f"s{i} = a{i}" for i in range(len(self.ahead))]

    @property
    def retreat(self) -> list[str]:
        """Lines that add up the gradients of the constants and step the adjoint states back over the tick."""
        states = len(self.ahead)
        return [
            *(f"p{i} += {value}" for i, value in enumerate(self.gradients[states + 1 :])),
            *(f"b{i} = {value}" for i, value in enumerate(self.gradients[:states])),
            *(f"g{i} = b{i}" for i in range(states)),
        ]

    def noise(self, n: str) -> list[str]:
        """Lines that draw `eps` and `chosen` for tick n (`kernels.noise`)."""
        if not self.spec.sampler:
            return []
        return NOISE.format(n=n, grid=repr(2.0**-23), fraction=repr(self.spec.sampler.fraction), turn=repr(2 * math.pi)).splitlines()


def code_of(spec: Spec) -> tuple[Tick, list[str]]:
    """The code of one tick, and the lines of the kernel that finishes the gradients of the constants."""
    states, draws = len(spec.states), 2 if spec.sampler else 0
    with torch.no_grad():
        graph = codegen.trace(tick_function(spec), states + 1 + draws + len(spec.constants))
        prelude, body = codegen.split(graph, len(spec.constants))
        inputs = sum(node.op == "placeholder" for node in body.graph.nodes)
        # the draws come first, so that everything after them is differentiated
        ordered = _draws_first(body, states + 1, draws)
        reverse = codegen.derivative(ordered, draws, inputs, len(spec.outputs) + states)
        derived = inputs - states - 1 - draws
        adjoint = codegen.derivative(prelude, 0, len(spec.constants), derived)
    raw, names = [f"r{i}" for i in range(len(spec.constants))], [f"h{i}" for i in range(derived)]
    finish = codegen.finish_text(len(raw), names, *codegen.emit(adjoint, [*raw, *(f"d{name}" for name in names)], "v"))
    return _tick_code(spec, prelude, body, reverse, derived), finish


def _draws_first(body: fx.GraphModule, at: int, draws: int) -> Callable[..., Any]:
    def moved(*tensors: Tensor) -> Any:
        noise, rest = tensors[:draws], tensors[draws:]
        return body(*rest[:at], *noise, *rest[at:])

    return moved


def indented(lines: list[str], depth: int) -> list[str]:
    """Lines that many levels further in."""
    return ["    " * depth + line for line in lines]


def random_arguments(spec: Spec) -> str:
    """The arguments of a kernel that draws."""
    return ", key_ptr, first_ptr, layer_ptr" if spec.sampler else ""


def partial_sums(tick: Tick, pairs: str) -> list[str]:
    """Store this program's share of the gradients of the derived constants, [P, B * H, blocks]."""
    return [
        f"tl.store(gh_ptr + ({i} * {pairs} + row) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(live, p{i}, 0.0), 0))"
        for i in range(tick.derived)
    ]


IMPORTS = """\
import triton
import triton.language as tl
from bio_inspired_nanochat.kernels.tiles import exponential, logarithm, power2, reciprocal, store_planes"""
NOISE = """\
same = tl.zeros([BLOCK], tl.int32)
word0, word1, word2, word3 = tl.philox((k1 << 32) | k0, offset, same + (tick0 + {n}).to(tl.int32), same + (head | (layer << 16)).to(tl.int32), same)
chosen = tl.where(((word0 >> 9).to(tl.float32) + 0.5) * {grid} < {fraction}, 1.0, 0.0)
eps = tl.sqrt(-2.0 * tl.log(((word1 >> 9).to(tl.float32) + 0.5) * {grid})) * tl.cos({turn} * ((word2 >> 9).to(tl.float32) + 0.5) * {grid})"""


def _tick_code(spec: Spec, prelude: fx.GraphModule, body: fx.GraphModule, reverse: fx.GraphModule, derived: int) -> Tick:
    states, outputs, draws = len(spec.states), len(spec.outputs), ["eps", "chosen"] if spec.sampler else []
    s, h = [f"s{i}" for i in range(states)], [f"h{i}" for i in range(derived)]
    once, constants = codegen.emit(prelude, [f"r{i}" for i in range(len(spec.constants))], "w")
    step, made = codegen.emit(body, [*s, "drive", *draws, *h], "v")
    cotangents = [f"c{i}" for i in range(outputs)] + [f"g{i}" for i in range(states)]
    back, gradients = codegen.emit(reverse, [*draws, *s, "drive", *h, *cotangents], "u")
    head = [
        "offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "live = offset < keys",
        "head = row % heads",
        *(f"r{i} = tl.load(constant_ptr + {i} * heads + head)" for i in range(len(spec.constants))),
        *once,
        *(f"h{i} = {value}" for i, value in enumerate(constants)),
    ]
    if spec.sampler:
        head += ["k0 = tl.load(key_ptr + 2 * (row // heads))", "k1 = tl.load(key_ptr + 2 * (row // heads) + 1)"]
        head += ["tick0 = tl.load(first_ptr + row // heads)", "layer = tl.load(layer_ptr)"]
    return Tick(spec, head, derived, step, made[:outputs], made[outputs:], back, gradients)
