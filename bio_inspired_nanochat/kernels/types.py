"""Typed records of the presynaptic operators.

Dimensions: B batch, H query heads, T tokens (Tq queries, Tk keys), N ticks, D head size, d slots of the endocytosis ring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels.noise import ReleaseSampler


class PresynParams(NamedTuple):
    """Kinetics of the terminals. Tensors are [H] float (per query head); times in tokens, rates per token.

    The fields of an optional part are None while it is off. The equations are in `kernels.terminal`.
    """

    tick: int
    tau_c: Tensor
    tau_rrp: Tensor
    alpha_ca: Tensor
    k_fast: Tensor
    k_slow: Tensor | None
    syt_mix: Tensor | None
    syt_gain: Tensor
    release_bias: Tensor
    release_rate: Tensor
    gain_release: Tensor
    gain_depletion: Tensor
    beta_max: float
    epsilon: float
    # calcium buffer
    tau_buf: Tensor | None = None
    buf_kd: Tensor | None = None
    # Doc2: asynchronous release
    doc2_gain: Tensor | None = None
    doc2_threshold: Tensor | None = None
    async_rate: Tensor | None = None
    # complexin clamp that calcium lifts
    complexin: Tensor | None = None
    tau_clamp: Tensor | None = None
    clamp_release: Tensor | None = None
    # SNARE priming
    tau_prime: Tensor | None = None
    tau_nsf: Tensor | None = None
    prime_use: Tensor | None = None
    priming_gain: Tensor | None = None
    gain_priming: Tensor | None = None
    # reserve pool and recycling
    reserve_size: Tensor | None = None
    tau_syn: Tensor | None = None
    mobilisation: Tensor | None = None
    rec_rate: Tensor | None = None
    endo_slots: int = 0
    tau_rab5: Tensor | None = None
    tau_rab7: Tensor | None = None
    # energy
    tau_energy: Tensor | None = None
    energy_cost_rel: Tensor | None = None
    energy_cost_pump: Tensor | None = None
    energy_cost_prime: Tensor | None = None
    # quantal amplitude
    quantal_slope: Tensor | None = None
    gain_quantal: Tensor | None = None
    # lateral inhibition between neighbouring keys
    lateral_strength: Tensor | None = None
    lateral_window: int = 0
    # stochastic release (the noise itself is an argument of `presyn`)
    sampler: ReleaseSampler | None = None

    def broadcast(self, dims: int) -> PresynParams:
        """The same parameters with `dims` trailing axes of size one on every tensor, to broadcast over ticks and keys."""
        return PresynParams(*[value[(..., *[None] * dims)] if isinstance(value, Tensor) else value for value in self])

    @property
    def core(self) -> bool:
        """Whether no optional part is on: calcium and pool are then two linear recurrences."""
        parts = (self.tau_buf, self.doc2_gain, self.tau_clamp, self.tau_prime, self.reserve_size, self.tau_energy, self.lateral_strength)
        return all(part is None for part in parts)


# Parts of a state that are full (1) in a terminal at rest; the others are empty (0).
FULL_AT_REST = frozenset({"vesicles", "clamp", "primed", "reserve", "energy"})


class PresynState(NamedTuple):
    """State of every terminal (one per batch row, query head and key) at the start of the open tick: [B, H, Tk] float32.

    calcium >= 0 and vesicles in [0, 1] (fraction of the full pool); open_drive: drive that the open tick has collected so far
    (already divided by the tick length). Optional parts, None while off: buffer, calcium bound by the buffer, in [0, 1];
    clamp, share of complexin in place; primed and spent, shares of release sites with a SNARE ready and used up;
    reserve, relative to its full size; ring [B, H, Tk, d], early, late and resynthesis, vesicles on their way back, in units
    of the full pool; energy in [0, 1].
    """

    calcium: Tensor
    vesicles: Tensor
    open_drive: Tensor
    buffer: Tensor | None = None
    clamp: Tensor | None = None
    primed: Tensor | None = None
    spent: Tensor | None = None
    reserve: Tensor | None = None
    ring: Tensor | None = None
    early: Tensor | None = None
    late: Tensor | None = None
    resynthesis: Tensor | None = None
    energy: Tensor | None = None

    @classmethod
    def rest(
        cls, *shape: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32, params: PresynParams | None = None
    ) -> PresynState:
        """Terminals at birth, which is also their fixed point without drive: no calcium, every pool full.

        params: says which optional parts exist (None: the core alone).
        """
        parts = {"buffer": "tau_buf", "clamp": "tau_clamp", "primed": "tau_prime", "spent": "tau_prime", "reserve": "reserve_size"}
        parts |= {"early": "tau_rab5", "late": "tau_rab5", "resynthesis": "reserve_size", "energy": "tau_energy"}
        names = ["calcium", "vesicles", "open_drive"]
        names += [name for name, constant in parts.items() if params is not None and getattr(params, constant) is not None]
        state = cls(**{name: torch.full(shape, float(name in FULL_AT_REST), device=device, dtype=dtype) for name in names})
        if params is None or not params.endo_slots:
            return state
        return state._replace(ring=torch.zeros(*shape, params.endo_slots, device=device, dtype=dtype))

    def parts(self) -> dict[str, Tensor]:
        """The tensors that exist, by name, [B, H, Tk] each, the endocytosis ring with a dimension of slots."""
        return {name: value for name, value in zip(self._fields, self, strict=True) if value is not None}
