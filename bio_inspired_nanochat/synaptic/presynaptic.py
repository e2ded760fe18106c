"""The presynaptic terminals of one attention layer: learned kinetics, gains and barrier of every head.

The equations live in `kernels.reference`; this module owns the parameters and keeps them inside their stable range.
A parameter is stored relative to its knob, so that zero (or one, for a positive factor) is the value at birth.

Dimensions: B batch, H query heads, T tokens, N ticks.

Numbered equations are those of prompts/hybrid.md and prompts/presynapse.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import PresynParams, ReleaseSampler
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms
from bio_inspired_nanochat.synaptic.genome import Proteins, Xi

# Kinetic constants of each mechanism that stay positive, and those that may have either sign (stored as an offset).
POSITIVE: dict[str, tuple[str, ...]] = {
    "presyn": ("tau_c", "tau_rrp", "alpha_ca", "syt_fast_kd", "syt_gain", "release_rate"),
    "slow_sensor": ("syt_slow_kd",),
    "buffer": ("tau_buf", "buf_kd"),
    "doc2": ("doc2_gain", "doc2_threshold", "async_rate"),
    "clamp_dynamics": ("complexin_bias", "tau_clamp", "clamp_release"),
    "priming": ("tau_prime", "tau_nsf", "prime_use", "priming_gain"),
    "reserve": ("reserve_size", "mobilisation", "tau_syn"),
    "rab": ("tau_rab5", "tau_rab7"),
    "energy": ("tau_energy", "energy_cost_rel", "energy_cost_pump"),
    "quantal": ("quantal_slope",),
}
OFFSETS: dict[str, tuple[str, ...]] = {"presyn": ("theta", "release_bias"), "slow_sensor": ("syt_mix",), "endocytosis": ("rec_rate",)}
# Output gains: learned directly whatever the genome, and all zero in a model that computes vanilla attention.
GAIN_OF: dict[str, tuple[str, ...]] = {
    "presyn": ("gain_release", "gain_depletion"),
    "priming": ("gain_priming",),
    "quantal": ("gain_quantal",),
    "lateral": ("lateral_strength",),
}
GAINS = (*(name for names in GAIN_OF.values() for name in names), "barrier_strength")
THETA_LOW, THETA_HIGH = -3.0, 2.8  # with QK norm about a tenth of the pairs lies above THETA_HIGH - 1 at birth
UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
GATE_BIAS = 4.0


def _of(table: dict[str, tuple[str, ...]], on: set[str]) -> list[str]:
    return [name for mechanism, names in table.items() if mechanism in on for name in names]


def _logit(share: float | Tensor) -> float | Tensor:
    return torch.logit(share) if isinstance(share, Tensor) else math.log(share / (1 - share))


def _shifted(name: str, raw: Mapping[str, Tensor], effects: Mapping[str, Tensor]) -> Tensor:
    """A stored value with what the genome adds to it."""
    return raw[name] + effects[name] if name in effects else raw[name]


class Presynaptic(nn.Module):
    """Kinetics, gains and barrier per query head. Parameters are [H]; `gate` maps the block input to a gate per head. Equation (P21).

    genome `direct`: every constant is a parameter of its own; `xi`: all constants are decoded from one small vector per head;
    `proteins`: they follow from the levels of 16 proteins per head. Where `cfg` is read for a constant it may also hold a tensor [H]:
    models that are trained as one (`tuning.stack`) have constants of their own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cfg, heads = config.syn_cfg, config.n_head
        self.cfg = cfg
        active = active_mechanisms(cfg)
        on = set(active)
        self.positive, self.shifted = _of(POSITIVE, on), _of(OFFSETS, on)
        if {"energy", "priming"} <= on:
            self.positive.append("energy_cost_prime")
        kinetic = [*self.positive, *self.shifted]
        self.genome: nn.Module | None = None
        if cfg.presyn and cfg.genome == "xi":
            self.genome = Xi(heads, cfg.xi_dim, kinetic)
        elif cfg.presyn and cfg.genome == "proteins":
            self.genome = Proteins(heads)
        else:
            for name in kinetic:
                setattr(self, name, nn.Parameter(torch.empty(heads)))
        self.gain_names = {name: "gain_release" if cfg.tied_gains and name.startswith("gain_") else name for name in _of(GAIN_OF, on)}
        for name in dict.fromkeys(self.gain_names.values()):
            setattr(self, name, nn.Parameter(torch.empty(heads)))
        if cfg.barrier != "none":
            self.barrier_strength = nn.Parameter(torch.empty(heads))
        if cfg.barrier == "gated":
            self.gate_weight = nn.Parameter(torch.empty(heads, config.n_embd))
            self.gate_bias = nn.Parameter(torch.empty(heads))
        self.extra = nn.ModuleDict({name: build(config) for name in active if (build := MECHANISMS[name].build)})
        self.on = frozenset(on)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, name: str = "synapse") -> None:
        """Values at birth; those of `extra` alone draw, keyed by (seed, name of this module)."""
        birth = {"gain_release": self.cfg.lambda_loge, "gate_bias": GATE_BIAS} | dict.fromkeys(self.positive, UNIT)
        birth |= {name: getattr(self.cfg, name) for name in ("barrier_strength", "lateral_strength")}
        for own, parameter in self.named_parameters(recurse=False):
            parameter.fill_(birth.get(own, 0.0))
        if self.genome is not None:
            self.genome.init_weights()
        for own, part in self.extra.items():
            part.init_weights(generator_for(seed, f"{name}.extra.{own}"))

    def _raw(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the genome says: stored values by name, and effects (log factor of a positive constant, shift of another)."""
        if isinstance(self.genome, Xi):
            offsets = self.genome.offsets()
            return {name: offsets[name] + (UNIT if name in self.positive else 0.0) for name in offsets}, {}
        if isinstance(self.genome, Proteins):
            gains = next(parameter for name, parameter in self.named_parameters(recurse=False) if name in GAINS)
            unit, zero = torch.full_like(gains, UNIT), torch.zeros_like(gains)
            return {**dict.fromkeys(self.positive, unit), **dict.fromkeys(self.shifted, zero)}, self.genome.effects()
        return {name: getattr(self, name) for name in (*self.positive, *self.shifted)}, {}

    def _values(self) -> dict[str, Tensor]:
        """Every kinetic constant [H] but theta, in its own unit and inside its stable range; differentiable."""
        raw, effects = self._raw()
        factors = F.softplus(torch.stack([raw[name] for name in self.positive])).unbind()  # together: a GPU step has few kernels
        values = {}
        for name, factor in zip(self.positive, factors, strict=True):
            values[name] = getattr(self.cfg, name) * factor
            if name in effects:
                values[name] = values[name] * torch.exp(effects[name])
        shift = {name: _shifted(name, raw, effects) for name in self.shifted}
        values["release_bias"] = self.cfg.release_bias + shift["release_bias"] - self._rest_clamp(values, effects)
        for name in ("syt_mix", "rec_rate"):
            if name in shift:
                values[name] = torch.sigmoid(shift[name] + _logit(getattr(self.cfg, name)))
        return values

    def _rest_clamp(self, values: dict[str, Tensor], effects: dict[str, Tensor]) -> Tensor | float:
        """Complexin's hold on the release logit of a rested terminal."""
        if "clamp_dynamics" in self.on:
            return values["complexin_bias"]
        return self.cfg.complexin_bias * torch.exp(effects["complexin_bias"]) if "complexin_bias" in effects else self.cfg.complexin_bias

    @torch.no_grad()
    def constants(self) -> dict[str, Tensor]:
        """What every head has learned, [H] each in its own unit: kinetic constants, output gains and barrier strength."""
        found = dict(self._values()) | {"theta": self.theta_value()} if self.cfg.presyn else {}
        found |= {name: getattr(self, stored) for name, stored in self.gain_names.items()}
        if self.cfg.barrier != "none":
            found["barrier_strength"] = self.strength()
        return {name: value.detach().float() for name, value in found.items()}

    @property
    def endo_slots(self) -> int:
        """Ticks that released vesicles spend in the endocytosis ring; 0 without one."""
        return max(1, round(self.cfg.endo_delay / self.cfg.tick)) if "endocytosis" in self.on else 0

    def params(self) -> PresynParams:
        """The kinetics as the operators take them; differentiable."""
        cfg, values = self.cfg, self._values()
        gains = {name: getattr(self, stored) for name, stored in self.gain_names.items()}
        optional = {name: values[name] for name in PresynParams._fields if name in values}
        sampler = None
        if "stochastic" in self.on:
            count = cfg.stochastic_count_cap * cfg.tick
            sampler = ReleaseSampler(cfg.stochastic_train_frac, cfg.stochastic_mode, cfg.stochastic_tau, count)
        return PresynParams(
            tick=cfg.tick,
            k_fast=values["syt_fast_kd"],
            k_slow=values.get("syt_slow_kd"),
            beta_max=cfg.beta_max,
            epsilon=cfg.epsilon,
            complexin=values.get("complexin_bias"),
            endo_slots=self.endo_slots,
            lateral_window=cfg.lateral_window if "lateral" in self.on else 0,
            sampler=sampler,
            **{"syt_mix": None} | optional | gains,
        )

    def theta_value(self) -> Tensor:
        """Drive threshold [H], kept inside (THETA_LOW, THETA_HIGH)."""
        raw, effects = self._raw()
        span = THETA_HIGH - THETA_LOW
        shift = _shifted("theta", raw, effects)
        return THETA_LOW + span * torch.sigmoid(shift * 4 / span + _logit((self.cfg.theta - THETA_LOW) / span))

    def strength(self) -> Tensor:
        """Barrier strength s_B [H] >= 0, with a straight-through gradient at the bound."""
        raw = self.barrier_strength
        bounded = raw.clamp(min=0)
        return raw + (bounded - raw).detach() if torch.is_grad_enabled() else bounded

    def barrier_cost(self, x: Tensor) -> Tensor:
        """What the barrier charges for each token, x [B, T, n_embd] to [B, H, T] float: -log f of the forgetting gate
        f = sigmoid(gate_drive(x) + b), or the slope of the linear barrier.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.cfg.barrier == "linear":
            return self._slopes(x.device).to(dtype)[:, None].expand(x.shape[0], -1, x.shape[1])
        gate = self.gate_drive(x).to(dtype) + self.gate_bias.to(dtype)
        return F.softplus(-gate.transpose(1, 2).contiguous())

    def gate_drive(self, x: Tensor) -> Tensor:
        """What moves the gate's logit away from its bias, x [B, T, n_embd] to [B, T, H] in x's dtype: w_h . x and the mechanisms of `extra`."""
        drive, shift = F.linear(x, self.gate_weight.to(x.dtype)), self.gate_shift(x)
        return drive if shift is None else drive + shift

    def gate_shift(self, x: Tensor) -> Tensor | None:
        """What the mechanisms of `extra` add to the gate's logit, x [B, T, n_embd] to [B, T, H]; None without any."""
        shift = None
        for part in self.extra.values():
            shift = part(x) if shift is None else shift + part(x)
        return shift

    def _slopes(self, device: torch.device) -> Tensor:
        """Slopes of the linear barrier per head, [H], spread geometrically (Press et al. 2022)."""
        heads = len(self.barrier_strength)
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)

    def barrier_bias(self, total: Tensor | None, first: Tensor, keys: int) -> Tensor:
        """The barrier as a per-key bias [B or 1, H, N, Tk], up to a constant per query row that softmax cancels. Equations (H2) and (H3).

        total: [B, H, Tk] running sum L of the gate's costs (gated only); first: [B or 1, N] position of each tick's first token.
        Gated (the forgetting transformer): s_B (L_j - L_first). Linear: -s_B slope_h (first - j).
        """
        strength = self.strength()
        if total is None:
            slopes = self._slopes(strength.device)
            distance = (torch.arange(keys, device=strength.device) - first[:, :, None]).to(strength.dtype)
            return (strength * slopes.to(strength.dtype))[:, None, None] * distance[:, None]
        index = first.clamp(max=keys - 1).expand(total.shape[0], -1)[:, None].expand(-1, total.shape[1], -1)
        gap = total[:, :, None] - total.gather(2, index)[..., None]
        return strength[:, None, None] * gap.to(strength.dtype)
