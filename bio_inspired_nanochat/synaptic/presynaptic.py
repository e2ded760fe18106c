"""The presynaptic terminals of one attention layer: learned kinetics, gains and barrier of every head.

The equations live in `kernels.reference`; this module owns the parameters and keeps them inside their stable range.
A parameter is stored relative to its knob, so that zero (or one, for a positive factor) is the value at birth.

Dimensions: B batch, H query heads, T tokens, N ticks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import PresynParams

POSITIVE = ("tau_c", "tau_rrp", "alpha_ca", "syt_fast_kd", "syt_gain", "release_rate")
GAINS = ("gain_release", "gain_depletion", "barrier_strength")
THETA_LOW, THETA_HIGH = -3.0, 2.8  # with QK norm about a tenth of the pairs lies above THETA_HIGH - 1 at birth
UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
GATE_BIAS = 4.0


class Presynaptic(nn.Module):
    """Kinetics, gains and barrier per query head. Parameters are [H]; `gate` maps the block input to a gate per head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cfg, heads = config.syn_cfg, config.n_head
        self.cfg = cfg
        self.two_sensors = cfg.presyn and cfg.syt_mix < 1.0
        if cfg.presyn:
            names = [*POSITIVE, "theta", "release_bias", "gain_release", "gain_depletion"]
            names += ["syt_slow_kd", "syt_mix"] if self.two_sensors else []
            for name in names:
                setattr(self, name, nn.Parameter(torch.empty(heads)))
        if cfg.barrier != "none":
            self.barrier_strength = nn.Parameter(torch.empty(heads))
        if cfg.barrier == "gated":
            self.gate_weight = nn.Parameter(torch.empty(heads, config.n_embd))
            self.gate_bias = nn.Parameter(torch.empty(heads))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Values at birth; they do not depend on a seed."""
        birth = {"gain_release": self.cfg.lambda_loge, "barrier_strength": self.cfg.barrier_strength, "gate_bias": GATE_BIAS}
        birth |= dict.fromkeys((*POSITIVE, "syt_slow_kd"), UNIT)
        for name, parameter in self.named_parameters():
            parameter.fill_(birth.get(name, 0.0))

    def _positive(self, name: str) -> Tensor:
        return getattr(self.cfg, name) * F.softplus(getattr(self, name))

    def theta_value(self) -> Tensor:
        """Drive threshold [H], kept inside (THETA_LOW, THETA_HIGH)."""
        span = THETA_HIGH - THETA_LOW
        share = (self.cfg.theta - THETA_LOW) / span
        return THETA_LOW + span * torch.sigmoid(self.theta * 4 / span + math.log(share / (1 - share)))

    def params(self) -> PresynParams:
        """The kinetics as the operators take them; differentiable."""
        cfg, slow_kd, mix = self.cfg, None, None
        if self.two_sensors:
            slow_kd = self._positive("syt_slow_kd")
            mix = torch.sigmoid(self.syt_mix + math.log(cfg.syt_mix / (1 - cfg.syt_mix)))
        return PresynParams(
            tick=cfg.tick,
            tau_c=self._positive("tau_c"),
            tau_rrp=self._positive("tau_rrp"),
            alpha_ca=self._positive("alpha_ca"),
            k_fast=self._positive("syt_fast_kd"),
            k_slow=slow_kd,
            syt_mix=mix,
            syt_gain=self._positive("syt_gain"),
            release_bias=cfg.release_bias + self.release_bias,
            release_rate=self._positive("release_rate"),
            gain_release=self.gain_release,
            gain_depletion=self.gain_depletion,
            beta_max=cfg.beta_max,
            epsilon=cfg.epsilon,
        )

    def strength(self) -> Tensor:
        """Barrier strength s_B [H] >= 0, with a straight-through gradient at the bound."""
        raw = self.barrier_strength
        return raw + (raw.clamp(min=0) - raw).detach()

    def barrier_cost(self, x: Tensor) -> Tensor:
        """Cost -log f of the forgetting gate f = sigmoid(w_h . x + b) at each token: x [B, T, n_embd] to [B, H, T] float."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        gate = F.linear(x, self.gate_weight.to(x.dtype)).to(dtype) + self.gate_bias.to(dtype)
        return F.softplus(-gate.transpose(1, 2).contiguous())

    def barrier_bias(self, total: Tensor | None, first: Tensor, keys: int) -> Tensor:
        """The barrier as a per-key bias [B or 1, H, N, Tk], up to a constant per query row that softmax cancels.

        total: [B, H, Tk] running sum L of the gate's costs (gated only); first: [B or 1, N] position of each tick's first token.
        Gated (the forgetting transformer): s_B (L_j - L_first). Linear: -s_B slope_h (first - j).
        """
        strength = self.strength()
        if total is None:
            heads = len(strength)
            slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=strength.device) / heads)
            distance = (torch.arange(keys, device=strength.device) - first[:, :, None]).to(strength.dtype)
            return (strength * slopes.to(strength.dtype))[:, None, None] * distance[:, None]
        index = first.clamp(max=keys - 1).expand(total.shape[0], -1)[:, None].expand(-1, total.shape[1], -1)
        gap = total[:, :, None] - total.gather(2, index)[..., None]
        return strength[:, None, None] * gap.to(strength.dtype)
