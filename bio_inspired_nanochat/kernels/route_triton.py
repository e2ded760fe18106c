"""The route of one token per row to its experts, for decoding: one product maps the token, one kernel does all the rest.

The rest is what `SynapticMoE.route` and `ExpertSynapse.course` compute, without twins: identities and codes, lateral inhibition, the
terminal and the NMDA trace of every expert over one token, and the choice. As a kernel it is written anew for every set of
mechanisms; the equations of the terminal come from `kernels.terminal`. A row at position -1 changes nothing.

Dimensions: B batch, E experts, k choices, D width, d and s sizes of identities and SNARE codes, W = E + d + s, C constants of a terminal.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels import codegen, presyn_codegen
from bio_inspired_nanochat.kernels.presyn_codegen import Spec, constants_of, signature_of
from bio_inspired_nanochat.kernels.tiles import launch
from bio_inspired_nanochat.kernels.types import PresynParams

MOST_EXPERTS = 128  # whose nearness to each other one program holds
MOST_CODE = 32  # elements of a code that one program holds at once: with all of a long one, its registers would spill
STATES = ("calcium", "vesicles")


@triton.jit
def cosines(seen_ptr, codes_ptr, e, there, size, BLOCK: tl.constexpr):
    """Cosine of what a token shows in code space [size] and the codes of experts e [E, size], which have length 1."""
    total = tl.zeros([e.shape[0], BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        seen = tl.load(seen_ptr + d, mask=d < size, other=0.0).to(tl.float32)
        codes = tl.load(codes_ptr + e[:, None] * size + d[None, :], mask=there[:, None] & (d < size)[None, :], other=0.0)
        total += codes * seen[None, :]
        length += seen * seen
    return tl.sum(total, 1) / tl.maximum(tl.sqrt(tl.sum(length, 0)), 1e-12)


@triton.jit
def choose(logit, open_slot, bank_ptr, balance_ptr, scale, expert_ptr, gate_ptr, e, there, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K best of one token's logits [BLOCK], and their gates, times e ** scale. Ties go to the lower index."""
    logit = tl.where(open_slot, logit, float("-inf"))
    score = logit + tl.load(bank_ptr + e, mask=there, other=0.0) + tl.load(balance_ptr + e, mask=there, other=0.0)
    score = tl.where(score <= float("inf"), score, float("inf"))  # NaN is the largest, as for `grouped.top_k`: its gate shows it
    score = tl.where(open_slot, score, float("-inf"))
    rank = tl.where(there, K, K + 1)  # K: not chosen
    for choice in tl.static_range(K):
        best = tl.max(tl.where(rank == K, score, float("-inf")), 0)
        place = tl.min(tl.where((rank == K) & (score == best), e, BLOCK), 0)
        rank = tl.where(e == place, choice, rank)
    chosen = rank < K
    top = tl.max(tl.where(chosen, logit, float("-inf")), 0)
    weight = tl.where(chosen, tl.exp(logit - top), 0.0)
    gate = weight / tl.sum(weight, 0) * tl.exp(scale)
    tl.store(expert_ptr + rank, e.to(tl.int64), mask=chosen)
    tl.store(gate_ptr + rank, gate, mask=chosen)


@dataclass(frozen=True, eq=False)
class Router:
    """What a route takes from parameters and accounts alone; all tensors float32 but `sees`.

    sees [W, D]: router, probe and cargo, of the activations' dtype; shut [E] bool: never chosen while others are left; bank, balance [E]:
    what joins the score; identity [E, d], snare [E, s]: codes of length 1, or None; near [E, E]: how strongly slots inhibit each other,
    gain included, or None;
    kinetics: of every expert, or None; vesicle_gain: of what it releases, or None; nmda: gain and decay per tick, or None; fair: experts
    of a fair share.
    """

    k: int
    tick: int
    fair: float
    sees: Tensor
    shut: Tensor
    bank: Tensor
    balance: Tensor
    identity: Tensor | None = None
    identity_gain: float = 0.0
    snare: Tensor | None = None
    snare_gain: float = 0.0
    near: Tensor | None = None
    kinetics: PresynParams | None = None
    vesicle_gain: float | None = None
    nmda: tuple[float, float] | None = None

    @functools.cached_property
    def constants(self) -> Tensor | None:
        """Of the terminals, [C, E]."""
        return None if self.kinetics is None else torch.stack(list(constants_of(self.kinetics).values())).contiguous()

    @functools.cached_property
    def kernel(self) -> Any:
        """The kernel of these mechanisms."""
        signature = None if self.kinetics is None else signature_of(self.kinetics, list(STATES), ["bias"], False, "any")
        parts = (
            self.identity is not None,
            self.snare is not None,
            self.near is not None,
            self.vesicle_gain is not None,
            self.nmda is not None,
        )
        return _kernel(self.tick, signature, *parts)

    def route(self, x: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Experts [B, k] int64 and gates [B, k] float32 of the tokens x [B, 1, D] at positions [B]; `state`, an `ExpertState` of
        [B, E] float32 each or None, advances in place.
        """
        seen, experts = F.linear(x, self.sees), len(self.shut)
        batch = x.shape[0]
        expert, gates = torch.empty(batch, self.k, dtype=torch.long, device=x.device), self.bank.new_empty(batch, self.k)
        codes = [1 if code is None else code.shape[1] for code in (self.identity, self.snare)]
        pieces = [min(triton.next_power_of_2(size), MOST_CODE) for size in codes]
        given = (self.identity, self.snare, self.near, self.constants, *((None,) * 4 if state is None else state))
        launch(
            self.kernel, (batch, 1), seen, positions, self.shut, self.bank, self.balance, *(seen if part is None else part for part in given),
            expert, gates, experts, self.sees.shape[0], *codes, self.fair, self.identity_gain, self.snare_gain, self.vesicle_gain or 0.0,
            *(self.nmda or (0.0, 0.0)),
            K=self.k, BLOCK=triton.next_power_of_2(experts), D=pieces[0], S=pieces[1], num_warps=4,
        )  # fmt: skip
        return expert, gates


def _after_token(spec: Spec) -> Callable[..., list[Tensor]]:
    """States, drive and constants to the bias of the tick, the same with gains of 1, and the states at the next one's start."""
    tick, states = presyn_codegen.tick_function(spec), len(spec.states)

    def after(*tensors: Tensor) -> list[Tensor]:
        before, constants = tensors[: states + 1], tensors[states + 1 :]
        bias, *ahead = tick(*tensors)
        plain = [torch.ones_like(c) if name.startswith("gain_") else c for name, c in zip(spec.constants, constants, strict=True)]
        return [bias, tick(*before, *plain)[0], *ahead]

    return after


@functools.cache
def _kernel(tick: int, signature: str | None, identity: bool, snare: bool, near: bool, vesicles: bool, nmda: bool) -> Any:
    """The kernel of a set of mechanisms; signature: of the terminals, or None without. Equations (L1), (L2), (L4), (L5), (L6) and (L7)."""
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "now = tl.load(position_ptr + row)",
        f"ends = (now >= 0) & ((now + 1) % {tick} == 0)",
        "e = tl.arange(0, BLOCK)",
        "there = e < experts",
        "at = row * experts + e",
        "open_slot = there & (tl.load(shut_ptr + e, mask=there, other=1) == 0)",
        "logit = tl.load(seen_ptr + row * width + e, mask=there, other=0.0).to(tl.float32)",
    ]
    if identity:
        lines.append("logit += identity_gain * cosines(seen_ptr + row * width + experts, identity_ptr, e, there, identity_size, D)")
    if snare:
        start = "experts + identity_size" if identity else "experts"
        lines.append(f"logit += snare_gain * cosines(seen_ptr + row * width + {start}, snare_ptr, e, there, snare_size, S)")
    remembers = signature is not None or nmda
    if near or remembers:
        lines += [
            "plain = logit",
            "shown = tl.where(open_slot, logit, float('-inf'))",
            "share = tl.exp(shown - tl.max(shown, 0))",
            "share = share / tl.sum(share, 0)",
        ]
    if near:
        lines += [
            "both = there[:, None] & there[None, :]",
            "nearness = tl.load(near_ptr + e[:, None] * experts + e[None, :], mask=both, other=0.0)",  # symmetric
            "logit -= tl.sum(nearness * share[None, :], 1)",
        ]
    if remembers:
        lines.append(f"drive = tl.load(drive_ptr + at, mask=there, other=0.0) + tl.where(now >= 0, share * fair, 0.0) * {1 / tick!r}")
    scale = "0.0"
    if signature is not None:
        spec = Spec.parse(signature)
        with torch.no_grad():
            module = codegen.trace(_after_token(spec), len(STATES) + 1 + len(spec.constants))
        names = [f"s{i}" for i in range(len(STATES))]
        step, made = codegen.emit(module, [*names, "drive", *(f"r{i}" for i in range(len(spec.constants)))], "v")
        lines += [
            *(f"r{i} = tl.load(constant_ptr + {i} * experts + e, mask=there, other=1.0)" for i in range(len(spec.constants))),
            *(f"{name} = tl.load({part}_ptr + at, mask=there, other=1.0)" for name, part in zip(names, STATES, strict=True)),
            *step,
            f"logit += {made[0]}",
            *(
                f"tl.store({part}_ptr + at, tl.where(ends, {new}, {old}), mask=there)"
                for part, old, new in zip(STATES, names, made[2:], strict=True)
            ),
        ]
        if vesicles:
            scale = f"vesicle_gain * {made[1]}"
    if nmda:
        lines += [
            "slow = tl.load(slow_ptr + at, mask=there, other=0.0)",
            "logit += nmda_gain * slow * tl.sigmoid(plain)",
            "tl.store(slow_ptr + at, tl.where(ends, decay * slow + (1.0 - decay) * drive, slow), mask=there)",
        ]
    if remembers:
        lines.append("tl.store(drive_ptr + at, tl.where(ends, 0.0, drive), mask=there)")
    lines += [
        f"scale = {scale} + tl.zeros([BLOCK], tl.float32)",
        "choose(logit, open_slot, bank_ptr, balance_ptr, scale, expert_ptr + row * K, gate_ptr + row * K, e, there, K, BLOCK)",
    ]
    arguments = (
        "seen_ptr, position_ptr, shut_ptr, bank_ptr, balance_ptr, identity_ptr, snare_ptr, near_ptr, constant_ptr, calcium_ptr, vesicles_ptr, "
        "drive_ptr, slow_ptr, expert_ptr, gate_ptr, experts, width, identity_size, snare_size, fair, identity_gain, snare_gain, vesicle_gain, "
        "nmda_gain, decay, K: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, S: tl.constexpr"
    )
    source = "\n".join([presyn_codegen.IMPORTS, *codegen.kernel_text("route", arguments, lines), ""])
    name = f"<route kernel {tick} {signature} {identity} {snare} {near} {vesicles} {nmda}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name, "cosines": cosines, "choose": choose}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    return namespace["route"]
