"""The molecules of the postsynaptic density: CaMKII (K), PP1 (P) and BDNF (D), one of each per sequence.

They are constant within a tick and move once at its end, driven by ca, the tick's calcium (always divided by the tick length c).
With s = ca^4 / (camkii_half^4 + ca^4), p = ca / (ca + pp1_half) and times in tokens:

    linear   dK/dt = (min(1, ca) - K) / tau_camkii          dP/dt = (p - P) / tau_pp1
    latch    dK/dt = [(s + latch_gain K^4 / (latch_half^4 + K^4)) (1 - K) - (1 + pp1_block P) K] / tau_camkii
             dP/dt = [pp1_drive p (1 - s) (1 - P) - (1 + camkii_block K) P] / tau_pp1
    both     dD/dt = (min(1, ca) - D) / tau_bdnf

PP1's calcium sensor (calcineurin) has the higher affinity: moderate calcium raises P above K, high calcium K above P. The
latch is Lisman's switch (1985): CaMKII phosphorylates itself, PP1 undoes it, each suppresses the other (here K shuts P off and
high calcium keeps P from rising). High calcium sets it, zero calcium keeps it, sustained low calcium erases it.

The linear mode and D are exact for calcium that is constant within a tick. The latch takes exponential Euler steps: the exact
solution for rates frozen at the start of the tick, X+ = X_inf + (X - X_inf) exp(-c rate), so K and P stay in [0, 1] for every
calcium >= 0 and every tick, the resting points are those of the equations whatever the tick, and refining the tick converges
with first order. At rest K = P = D = 0, which is the fixed point without calcium.

Dimensions: B batch, c tick length.

Numbered equations are those of prompts/synaptic_unit.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Constant = float | Tensor
# More calcium than this saturates every sensor; without the limit its fourth power would overflow.
MOST_CALCIUM = 1e4
TINY = 1e-12


class DensityParams(NamedTuple):
    """Constants, floats or 0-d tensors; those after pp1_half belong to the latch. Times in tokens, calcium in units of ca."""

    tick: int
    latch: bool = False
    tau_camkii: Constant = 64.0
    tau_pp1: Constant = 32.0
    tau_bdnf: Constant = 512.0
    pp1_half: Constant = 0.2
    camkii_half: Constant = 0.5
    latch_gain: Constant = 6.0
    latch_half: Constant = 0.5
    pp1_block: Constant = 6.0
    pp1_drive: Constant = 3.0
    camkii_block: Constant = 2.0


class DensityState(NamedTuple):
    """The molecules during the open tick, [B] float32 (float64 for float64 calcium), K, P and D in [0, 1].

    open_calcium: calcium of the open tick's tokens so far, of the running document, not yet divided by the tick length.
    """

    camkii: Tensor
    pp1: Tensor
    bdnf: Tensor
    open_calcium: Tensor

    @classmethod
    def rest(cls, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> DensityState:
        """The state at birth: nothing active."""
        return cls(*torch.zeros(4, batch, device=device, dtype=dtype))


def hill(x: Tensor, half: Constant) -> Tensor:
    """A Hill curve of order four, x^4 / (half^4 + x^4), elementwise for x >= 0."""
    ratio = x / half
    ratio = ratio * ratio
    ratio = ratio * ratio
    return ratio / (1 + ratio)


def drives(calcium: Tensor, params: DensityParams) -> tuple[Tensor, Tensor, Tensor]:
    """What K, P and D relax to in the linear mode: min(1, ca), ca / (ca + pp1_half), min(1, ca), each of the shape of calcium."""
    share = calcium.clamp(max=1.0)
    calcium = calcium.clamp(max=MOST_CALCIUM)
    return share, calcium / (calcium + params.pp1_half), share


def latch_rates(camkii: Tensor, pp1: Tensor, calcium: Tensor, params: DensityParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On- and off-rates of the latch, times their time constants: dK/dt = [on_K (1 - K) - off_K K] / tau_camkii, likewise P.

    Equation (D14).
    """
    strong = hill(calcium.clamp(max=MOST_CALCIUM), params.camkii_half)
    moderate = drives(calcium, params)[1] * (1 - strong)
    on = strong + params.latch_gain * hill(camkii, params.latch_half)
    return on, 1 + params.pp1_block * pp1, params.pp1_drive * moderate, 1 + params.camkii_block * camkii


def latch_step(camkii: Tensor, pp1: Tensor, calcium: Tensor, params: DensityParams) -> tuple[Tensor, Tensor]:
    """K and P after one tick of the latch; all of the shape of calcium. Equation (D15)."""
    on, off, rise, fall = latch_rates(camkii, pp1, calcium, params)
    rate, speed = on + off, rise + fall
    target, goal = on / rate, rise / speed
    camkii = target + (camkii - target) * torch.exp(-params.tick / params.tau_camkii * rate)
    return camkii, goal + (pp1 - goal) * torch.exp(-params.tick / params.tau_pp1 * speed)


def latch_slopes(camkii: Tensor, pp1: Tensor, calcium: Tensor, params: DensityParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of `latch_step`: dK+/dK, dK+/dP, dP+/dK, dP+/dP, each of the shape of calcium."""
    on, off, rise, fall = latch_rates(camkii, pp1, calcium, params)
    rate, speed = on + off, rise + fall
    late, slow = params.tick / params.tau_camkii, params.tick / params.tau_pp1
    fade, wane = torch.exp(-late * rate), torch.exp(-slow * speed)
    drift = late * (camkii - on / rate) * fade
    excited = hill(camkii, params.latch_half)
    steep = params.latch_gain * 4 * excited * (1 - excited) / camkii.clamp(min=TINY)
    by_camkii = fade + steep * ((1 - fade) * off / (rate * rate) - drift)
    by_pp1 = -params.pp1_block * ((1 - fade) * on / (rate * rate) + drift)
    shut = -params.camkii_block * ((1 - wane) * rise / (speed * speed) + slow * (pp1 - rise / speed) * wane)
    return by_camkii, by_pp1, shut, wane


def relax(level: Tensor, target: Tensor, tick: int, tau: Constant) -> Tensor:
    """A leaky integrator after one tick (tokens) under a constant target of the same shape; tau in tokens; exact. Equation (D13)."""
    return target + (level - target) * torch.exp(torch.zeros_like(target) - tick / tau)


def density_step(state: DensityState, calcium: Tensor, params: DensityParams) -> DensityState:
    """Advance every density by one tick under mean calcium ca >= 0 of that tick; elementwise, tensors of one shape."""
    toward = drives(calcium, params)
    bdnf = relax(state.bdnf, toward[2], params.tick, params.tau_bdnf)
    if params.latch:
        camkii, pp1 = latch_step(state.camkii, state.pp1, calcium, params)
    else:
        camkii = relax(state.camkii, toward[0], params.tick, params.tau_camkii)
        pp1 = relax(state.pp1, toward[1], params.tick, params.tau_pp1)
    return DensityState(camkii, pp1, bdnf, torch.zeros_like(calcium))
