"""SynapticLinear: a linear layer with a postsynaptic density, whose fast weights a sequence writes while it is read.

    u_t = x_t A / |x_t A|        m_t = (x_t W) P                        pre and post activity in r modes
    z_t = F_{t-1} u_t            then F_t by the rule (`kernels.fast_weights`), with write strength eta_t
    y_t = x_t W + r_t n_t z_t O,  n_t = rsqrt(mean(z_t^2) + 1)          O is zero at birth
    eta_t = min(1, eta_0 sigmoid(camkii_gain K - pp1_gain P) (1 + bdnf_gamma D) sigmoid(w . x_t))
    r_t = sigmoid(v . x_t + camkii_read K)

W is the layer's ordinary weight. K, P and D are the molecules of `kernels.density`, driven by |m_t| / sqrt(r) sigmoid(w . x_t): by
inputs alone, never by F, so that every eta_t is known before the parallel form starts. With PSD-95 slots a mode answers at most
s = slots (1 + K): z becomes s tanh(z / s) before it is normalised. F, K, P and D belong to a sequence and are no parameters.

Source: the postsynaptic half of the background (CaMKII, PP1, BDNF, PSD-95, eligibility trace of low rank).
Dimensions: B batch, T tokens, r modes.

Numbered equations are those of prompts/synaptic_unit.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels.density import DensityParams, DensityState, density
from bio_inspired_nanochat.kernels.fast_weights import fast_weights
from bio_inspired_nanochat.registry import active_mechanisms
from bio_inspired_nanochat.synaptic.linear import Linear
from bio_inspired_nanochat.synaptic.state import Arrival, Extras, FastState, LayerState, Place

TAU_LEAST = 4.0  # tokens; what the parallel form can factor
TAU_SPREAD = (16.0, 4096.0)  # tokens; decay times of the modes of the Hebb rule at birth
UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
FLOOR = 1e-6  # added to |x A|^2, so that a silent input has a gradient
# Constants that stay positive, stored as a factor of their knob, by the mechanisms of which one must be on.
POSITIVE = {
    "hebb_rate": ("fast_delta", "fast_hebb"),
    "camkii_gain": ("camkii",),
    "pp1_gain": ("pp1",),
    "bdnf_gamma": ("bdnf",),
    "tau_camkii": ("camkii", "camkii_read", "psd95"),
    "tau_pp1": ("pp1", "camkii_latch"),
    "tau_bdnf": ("bdnf",),
}
# What the parameters of a density are for the optimizer; all others are kinetics.
DENSITY_ROLES = {**dict.fromkeys(("pre", "post", "out", "start"), "fast"), **dict.fromkeys(("write_gate", "read_gate"), "gate")}


class Density(nn.Module):
    """What a layer of n_in inputs and n_out outputs adds to its weight. Matrices have the layout [out, in] of a linear layer."""

    def __init__(self, n_in: int, n_out: int, cfg: SynapticConfig, key: str) -> None:
        super().__init__()
        modes = cfg.rank_eligibility
        if modes > min(n_in, n_out):
            raise UserError(
                f"syn_cfg.rank_eligibility={modes} is larger than the projection {key} of {n_in} x {n_out}: "
                f"at most {min(n_in, n_out)}, or leave {key} out of syn_cfg.fast_layers"
            )
        self.cfg, self.modes, self.rule = cfg, modes, cfg.hebb
        self.on = frozenset(active_mechanisms(cfg))
        self.gated = bool(self.on & {"camkii", "pp1", "bdnf", "camkii_read", "psd95"})
        self.pre = nn.Parameter(torch.empty(modes, n_in))
        self.post = nn.Parameter(torch.empty(modes, n_out))
        self.out = nn.Parameter(torch.empty(n_out, modes))
        self.write_gate = nn.Parameter(torch.empty(n_in))
        self.read_gate = nn.Parameter(torch.empty(n_in))
        self.decay = nn.Parameter(torch.empty(modes if self.rule == "hebb" else ()))
        self.positive = [name for name, mechanisms in POSITIVE.items() if self.on.intersection(mechanisms)]
        for name in self.positive:
            setattr(self, name, nn.Parameter(torch.empty(())))
        if "camkii_read" in self.on:
            self.camkii_read = nn.Parameter(torch.empty(()))
        if "fast_init" in self.on:
            self.start = nn.Parameter(torch.empty(modes, modes))

    @torch.no_grad()
    def init_weights(self, seed: int, name: str) -> None:
        """Values at birth; the two matrices that are drawn use generators keyed by (seed, name of the module, name of the matrix)."""
        for leaf, parameter in self.named_parameters():
            if leaf in ("pre", "post"):
                limit = math.sqrt(3 / parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator_for(seed, f"{name}.{leaf}")))
            else:
                parameter.fill_(UNIT if leaf == "decay" or leaf in self.positive else 0.0)

    def constants(self) -> dict[str, Tensor]:
        """The learned positive constants by knob name: 0-d, in the unit of the knob, at birth its value; differentiable."""
        return {name: getattr(self.cfg, name) * F.softplus(getattr(self, name)) for name in self.positive}

    def decay_time(self) -> Tensor:
        """Decay time of the fast weights in tokens, at least TAU_LEAST: [r] for hebb, [] for delta. Equation (D11)."""
        share = self.cfg.rho_elig
        birth: Tensor | float = -1 / (torch.log(share) if isinstance(share, Tensor) else math.log(share))
        if self.rule == "hebb":
            low, high = map(math.log, TAU_SPREAD)
            if self.modes == 1:
                low = high = (low + high) / 2
            birth = torch.linspace(low, high, self.modes, device=self.decay.device, dtype=self.decay.dtype).exp()
        return TAU_LEAST + (birth - TAU_LEAST) * F.softplus(self.decay)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> FastState:
        """Fast weights (zero, or the learned ones) and molecules at rest of `batch` fresh sequences."""
        weights = torch.zeros(batch, self.modes, self.modes, device=device, dtype=dtype)
        if "fast_init" in self.on:
            weights += self.start.detach()
        return _at_rest(weights)

    def read(
        self,
        x: Tensor,
        weight: Tensor,
        place: Place,
        before: FastState | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, FastState]:
        """The layer's output [B, T, n_out] for inputs x [B, T, n_in] and slow weights [n_out, n_in]; the state after the last token.

        Equations (D1), (D2) and (D16).
        before: the state at the first token, None for fresh sequences; record: gets means of what happened.
        """
        if before is None:
            start = self.start if "fast_init" in self.on else self.pre.new_zeros(self.modes, self.modes)
            before = _at_rest(start.to(torch.promote_types(x.dtype, torch.float32)).expand(x.shape[0], -1, -1))
        wide = before.weights.dtype
        table = [self.pre, self.write_gate[None], self.read_gate[None]]
        many = x.shape[0] * x.shape[1] > x.shape[2]  # then matrices are cheaper to join than all of the output is to read again
        base = None if many else F.linear(x, weight.to(x.dtype))
        if many:
            table.append(self.post @ weight.to(self.post.dtype))
        widths = [len(part) for part in table]
        table.append(self.pre.new_zeros(-sum(widths) % 8, x.shape[-1]))  # rows of 16 bytes in half precision, as matrix units want them
        pre, write, read, *m = F.linear(x, torch.cat(table).to(x.dtype))[..., : sum(widths)].split(widths, dim=-1)
        pre, write, read, m = pre.to(wide), write.to(wide), read.to(wide), m[0] if base is None else F.linear(base, self.post.to(x.dtype))
        shrink = torch.rsqrt(pre.square().sum(-1) + FLOOR)
        u = (pre * shrink[..., None]).to(x.dtype)
        write, read = torch.sigmoid(write[..., 0]), read[..., 0]
        eta, opening, slots, molecules = self._gates(m.to(wide), write, before, place)
        gamma = torch.exp(-1 / self.decay_time()).to(wide)
        z, weights = self._memory(u, m, eta, gamma, before.weights, place)
        z = z.to(wide)
        if slots is not None:
            z = slots * torch.tanh(z / slots)
        norm = torch.rsqrt(z.square().mean(-1) + 1)
        gate = torch.sigmoid(read if opening is None else read + opening)
        recalled, out = (z * (norm * gate)[..., None]).to(x.dtype), self.out
        if base is None:
            spare = -self.modes % 8
            joined = torch.cat([weight, F.pad(out, (0, spare)).to(weight.dtype)], dim=1).to(x.dtype)
            y = F.linear(torch.cat([x, F.pad(recalled, (0, spare))], dim=-1), joined)
        else:
            y = base + F.linear(recalled, out.to(x.dtype))
        sums = _running(torch.stack([norm * shrink, gate, torch.ones_like(gate)]), before, place)
        after = FastState(weights, *molecules, *sums)
        if record is not None:
            record |= self._summary(after, eta)
        return y, after

    def as_matrix(self, state: FastState) -> Tensor:
        """The addition [n_out, n_in] to the layer's weight that acts as the fast weights of `state` did on average, float32.

        Equation (D17).
        The normalisations and the read gate are replaced by their means over the tokens of the running document.
        """
        means = (torch.stack([state.norm_sum, state.gate_sum]) / state.tokens.clamp(min=1)).prod(0)
        mean = (state.weights * means[:, None, None]).mean(0)
        return self.out.to(mean.dtype) @ mean @ self.pre.to(mean.dtype)

    def _gates(
        self, m: Tensor, write: Tensor, before: FastState, place: Place
    ) -> tuple[Tensor, Tensor | None, Tensor | None, DensityState]:
        """Write strength eta [B, T], what K adds to the logit of the read gate, slots [B, T, 1] of a mode, and the molecules after.

        Equations (D9), (D10) and (D12).
        """
        values = self.constants()
        strength = values["hebb_rate"] * write
        molecules = DensityState(*before[1:5])
        if not self.gated:
            return (strength / 2).clamp(max=1.0), None, None, molecules
        fixed = {name: getattr(self.cfg, name) for name in ("pp1_half", "camkii_half", "latch_gain")}
        taus = {name: value for name, value in values.items() if name in DensityParams._fields}
        params = DensityParams(self.cfg.tick, "camkii_latch" in self.on, **fixed, **taus)
        calcium = torch.linalg.vector_norm(m, dim=-1) * (self.modes**-0.5) * write
        camkii, pp1, bdnf, molecules = density(calcium, params, molecules, place.first, fresh=place.fresh, live=place.live)
        logit = torch.zeros_like(camkii)
        if "camkii" in self.on:
            logit = logit + values["camkii_gain"] * camkii
        if "pp1" in self.on:
            logit = logit - values["pp1_gain"] * pp1
        strength = strength * torch.sigmoid(logit)
        if "bdnf" in self.on:
            strength = strength * (1 + values["bdnf_gamma"] * bdnf)
        opening = (self.cfg.camkii_read + self.camkii_read) * camkii if "camkii_read" in self.on else None
        slots = self.cfg.psd95_slots * (1 + camkii)[..., None] if "psd95" in self.on else None
        return strength.clamp(max=1.0), opening, slots, molecules

    def _memory(self, u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, weights: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """z [B, T, r] and the fast weights after the last token. Equation (D18).

        The operator empties F where a document begins. A document that begins with F_0 is F = G + F_0 g_t, where g_t is gamma to the
        power of the tokens since its beginning and G starts from zero; under the delta rule G is written with m_t - g_t F_0 u_t.
        """
        if place.fresh is None or "fast_init" not in self.on:
            return fast_weights(u, m, eta, gamma, weights, rule=self.rule, fresh=place.fresh, live=place.live)
        fresh = place.fresh if place.live is None else place.fresh & place.live
        step = torch.arange(fresh.shape[1], device=fresh.device)
        begun = torch.where(fresh, step, -1).cummax(1).values[..., None]
        wide = weights.dtype
        start = self.start.to(wide)
        power = torch.where(begun >= 0, gamma ** (step[:, None] - begun).clamp(min=0), 0)  # before token t; its own decay comes after
        innate = (u.to(wide) * power) @ start.T
        if self.rule == "delta":
            m = m - (gamma * innate).to(m.dtype)
        z, weights = fast_weights(u, m, eta, gamma, weights, rule=self.rule, fresh=place.fresh, live=place.live)
        final = (
            power[:, -1]
            if place.live is None
            else power.gather(1, (place.live.sum(1) - 1)[:, None, None].expand(-1, 1, power.shape[2]))[:, 0]
        )
        return z + innate.to(z.dtype), weights + start * (gamma * final)[:, None, :]

    def _summary(self, after: FastState, eta: Tensor) -> dict[str, Tensor]:
        means = {f"{name}_mean": getattr(after, name).mean() for name in ("camkii", "pp1", "bdnf")}
        norm = torch.linalg.matrix_norm(after.weights).mean()
        return {name: value.detach() for name, value in {"fast_weight_norm": norm, "eta_mean": eta.mean(), **means}.items()}


def _at_rest(weights: Tensor) -> FastState:
    """The state of fresh sequences with these fast weights [B, r, r]."""
    nothing = torch.zeros(3, len(weights), device=weights.device, dtype=weights.dtype)
    return FastState(weights, *DensityState.rest(len(weights), weights.device, weights.dtype), *nothing)


def _running(values: Tensor, before: FastState, place: Place) -> Tensor:
    """Sums [3, B] over the running document of values [3, B, T], on top of those in `before`."""
    carried = torch.stack([before.norm_sum, before.gate_sum, before.tokens])
    if place.live is not None:
        values = torch.where(place.live, values, 0)
    if place.fresh is not None:
        fresh = place.fresh if place.live is None else place.fresh & place.live
        document = fresh.cumsum(1)
        values = torch.where(document == document[:, -1:], values, 0)
        carried = torch.where(document[:, -1] == 0, carried, 0)
    return (carried + values.sum(-1)).detach()


class SynapticLinear(Linear):
    """A linear layer that carries fast weights when `key` is among `syn_cfg.fast_layers` and hebb is not off; else the plain layer.

    `weight` [n_out, n_in] keeps its name and layout; all that is added lies under `density`. With `density.out` zero, as at birth,
    it computes the plain layer. Raises UserError when rank_eligibility is larger than the layer.
    """

    def __init__(self, n_in: int, n_out: int, cfg: SynapticConfig, key: str) -> None:
        super().__init__(n_in, n_out)
        self.key = key
        self.density = Density(n_in, n_out, cfg, key) if cfg.hebb != "off" and key in cfg.fast_layers else None

    def forward(self, x: Tensor, extras: Extras | None = None) -> Tensor:
        """Whole sequences from position 0, x [B, T, n_in] to [B, T, n_out]."""
        if self.density is None:
            return super().forward(x)
        extras = extras or Extras()
        record = None if extras.record is None else extras.record.setdefault("fast", {}).setdefault(self.key, {})
        return self.density.read(x, self.weight, Place.whole(extras.doc), record=record)[0]

    def step(self, x: Tensor, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of running sequences, x [B, t, n_in]; the fast weights in `state` advance in place."""
        if self.density is None:
            return super().forward(x)
        y, after = self.density.read(x, self.weight, chunk.place(x.device), state.fast[self.key])
        state.fast[self.key].copy_(after)
        return y

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> FastState:
        """The fast weights of `batch` fresh sequences; dtype is that of the activations."""
        assert self.density is not None
        return self.density.init_state(batch, device, torch.promote_types(dtype, torch.float32))
