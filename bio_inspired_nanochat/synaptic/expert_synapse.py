"""What a synaptic mixture of experts adds to a plain router: identities, codes, and kinetics that a genome decodes to.

An expert is one terminal per sequence. Its drive is the share of the tick's tokens that ask for it, its state biases the tokens of
later ticks, by the same equations as a key of the attention (`kernels.presyn`, where experts stand as heads with one key).

Dimensions: B batch, T tokens, N ticks, E slots for experts, K documents that a tick may belong to, D width.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import PresynParams, PresynState, presyn
from bio_inspired_nanochat.kernels.masks import local_ticks, num_ticks, query_positions
from bio_inspired_nanochat.kernels.scan import linear_scan
from bio_inspired_nanochat.kernels.terminal import terminal_bias
from bio_inspired_nanochat.synaptic.genome import Xi
from bio_inspired_nanochat.synaptic.state import ExpertState, Place

UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
POSITIVE = ("tau_c", "tau_rrp", "alpha_ca", "syt_fast_kd", "syt_slow_kd", "syt_gain", "release_rate")


class Effects(NamedTuple):
    """What the course of the sequence does to every expert, [B, T, E] each or None.

    bias: facilitation and depression of its score; slow: its slow weight; released: log of its release over that of a rested one.
    """

    bias: Tensor | None
    slow: Tensor | None
    released: Tensor | None


class Traits(NamedTuple):
    """What experts are while no parameter changes: codes of length 1, identity [E, d] and snare [E, s], how near slots are to each other
    [E, E], and their kinetics [E]; None where a mechanism is off.
    """

    identity: Tensor | None
    snare: Tensor | None
    near: Tensor | None
    kinetics: PresynParams | None


class ExpertSynapse(nn.Module):
    """Parameters of all experts, one row per slot: identity [E, d], snare [E, s], genome.xi [E, G], gains [E].

    Shared: probe [d, D] and cargo [s, D] that map a token to identity and SNARE space, the genome's decoder, and scalar gains.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        cfg, slots = config.syn_cfg, config.slots
        self.cfg, self.slots, self.born = cfg, slots, config.num_experts
        if cfg.router_identity or cfg.expert_lateral:
            self.identity = nn.Parameter(torch.empty(slots, cfg.identity_dim))
        if cfg.router_identity:
            self.gate_probe = nn.Parameter(torch.empty(cfg.identity_dim, config.n_embd))
            self.identity_gain = nn.Parameter(torch.empty(()))
        if cfg.snare_codes:
            self.snare = nn.Parameter(torch.empty(slots, cfg.snare_dim))
            self.gate_cargo = nn.Parameter(torch.empty(cfg.snare_dim, config.n_embd))
            self.snare_gain = nn.Parameter(torch.empty(()))
        if cfg.expert_lateral:
            self.expert_lateral = nn.Parameter(torch.empty(()))
        if cfg.expert_plasticity:
            self.genome = Xi(slots, cfg.xi_dim, [*POSITIVE, "release_bias"])
            self.gain_release = nn.Parameter(torch.empty(slots))
            self.gain_depletion = nn.Parameter(torch.empty(slots))
        if cfg.expert_plasticity and cfg.vesicle_output:
            self.vesicle_gain = nn.Parameter(torch.empty(()))
        if cfg.nmda:
            self.nmda_gain = nn.Parameter(torch.empty(()))

    @property
    def remembers(self) -> bool:
        """Whether experts have a state at all."""
        return self.cfg.expert_plasticity or self.cfg.nmda

    @torch.no_grad()
    def zero_gains(self) -> None:
        """Leave nothing but the plain router. Changes the module."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("gain_") or name.endswith("_gain") or name == "expert_lateral":
                parameter.zero_()

    @torch.no_grad()
    def init_weights(self, seed: int, name: str) -> None:
        """Values at birth; identities, codes and their maps are drawn by generators keyed by (seed, name of the module, name)."""
        birth = {"identity_gain": self.cfg.identity_gain, "snare_gain": 1.0, "vesicle_gain": 1.0, "nmda_gain": self.cfg.nmda_gain}
        birth |= {"expert_lateral": self.cfg.expert_lateral}
        birth |= {"gain_release": self.cfg.expert_gain, "gain_depletion": self.cfg.expert_depression}
        for leaf, parameter in self.named_parameters(recurse=False):
            if leaf in birth:
                parameter.fill_(birth[leaf])
            else:
                drawn = torch.empty(parameter.shape).normal_(generator=generator_for(seed, f"{name}.{leaf}"))
                parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
        if self.cfg.expert_plasticity:
            self.genome.init_weights()

    def params(self) -> PresynParams:
        """Kinetics of every expert [E] as `kernels.presyn` takes them; differentiable in the genome."""
        cfg, offsets = self.cfg, self.genome.offsets()
        factors = F.softplus(torch.stack([offsets[name] for name in POSITIVE]) + UNIT).unbind()
        values = {name: getattr(cfg, name) * factor for name, factor in zip(POSITIVE, factors, strict=True)}
        return PresynParams(
            tick=cfg.tick,
            tau_c=values["tau_c"],
            tau_rrp=values["tau_rrp"],
            alpha_ca=values["alpha_ca"],
            k_fast=values["syt_fast_kd"],
            k_slow=values["syt_slow_kd"],
            syt_mix=torch.full_like(values["tau_c"], cfg.syt_mix),
            syt_gain=values["syt_gain"],
            release_bias=cfg.release_bias + offsets["release_bias"],
            release_rate=values["release_rate"],
            gain_release=self.gain_release,
            gain_depletion=self.gain_depletion,
            beta_max=cfg.beta_max,
            epsilon=cfg.epsilon,
        )

    def traits(self, lead: Tensor) -> Traits:
        """What follows from the parameters and from the leaders [E] of slots alone."""
        cfg = self.cfg
        return Traits(
            identity=F.normalize(self.identity, dim=-1) if cfg.router_identity else None,
            snare=F.normalize(self.snare, dim=-1) if cfg.snare_codes else None,
            near=self.nearness(lead) if cfg.expert_lateral else None,
            kinetics=self.params() if cfg.expert_plasticity else None,
        )

    def affinity(self, x: Tensor, traits: Traits) -> Tensor | None:
        """What identity and SNARE codes add to the score of every expert, x [B, T, D] to [B, T, E] float. Equation (L1)."""
        score = None
        if traits.identity is not None:
            score = self.identity_gain * _cosine(x, self.gate_probe, traits.identity)
        if traits.snare is not None:
            more = self.snare_gain * _cosine(x, self.gate_cargo, traits.snare)
            score = more if score is None else score + more
        return score

    def inhibition(self, share: Tensor, traits: Traits) -> Tensor | None:
        """What experts lose to neighbours in identity space, [B, T, E], when `share` [B, T, E] of the demand goes to each slot.

        Equation (L6).
        """
        return None if traits.near is None else self.expert_lateral * (share @ traits.near.to(share.dtype))

    def nearness(self, lead: Tensor) -> Tensor:
        """How strongly slots inhibit each other, [E, E], symmetric: the cosine of two identities where it is positive. Twins, which share
        a slot, do not inhibit each other.
        """
        near = F.normalize(self.identity, dim=-1)[lead]
        return (near @ near.T).clamp(min=0) * (lead[:, None] != lead)

    def course(self, share: Tensor, place: Place, before: ExpertState | None, traits: Traits) -> tuple[Effects, ExpertState]:
        """Run the experts over the tokens' demand. Equations (L4), (L5) and (L7).

        share: [B, T, E] in units of the fair share; before: the state at the first token, None for fresh sequences.
        Returns the effects on every token, from the state at the start of its tick, and the state after the last one.
        """
        if before is None:
            before = ExpertState.rest(share.shape[0], self.slots, share.device, share.dtype)
        ticks = _Ticks.of(share, self.cfg.tick, place)
        drive = ticks.drive(share)
        bias = slow = released = None
        after = dict(before._asdict())
        if traits.kinetics is not None:
            params = traits.kinetics
            start = PresynState(*(ticks.carried(value, float(i == 1)) for i, value in enumerate(before[:3])))
            record: dict[str, Tensor] | None = {} if self.cfg.vesicle_output else None
            beta, end = presyn(drive, params, start, closed=ticks.closed, record=record)
            bias = ticks.per_token(beta)
            after |= {name: ticks.last(getattr(end, name)) for name in ("calcium", "vesicles", "open_drive")}
            if record is not None:
                unit = torch.ones_like(params.gain_release)
                plain = params._replace(gain_release=unit, gain_depletion=unit).broadcast(2)
                released = self.vesicle_gain * ticks.per_token(
                    terminal_bias(PresynState(record["calcium"], record["vesicles"], drive), plain)
                )
        if self.cfg.nmda:
            decay = math.exp(-self.cfg.tick / self.cfg.tau_nmda)
            full = torch.cat([drive[:, :, :1] + ticks.carried(before.open_drive)[:, :, None], drive[:, :, 1:]], dim=2)
            factor = torch.full_like(full[..., :1], decay)
            traces = linear_scan(factor, (1 - decay) * full, ticks.carried(before.slow))
            slow = ticks.per_token(traces[:, :, :-1])
            after["slow"] = ticks.last(ticks.at(traces, ticks.closed))
            if traits.kinetics is None:
                left = ticks.at(F.pad(full, (0, 0, 0, 1)), ticks.closed)
                after["open_drive"] = ticks.last(left)
        return Effects(bias, slow, released), ExpertState(**after)


def _cosine(x: Tensor, probe: Tensor, codes: Tensor) -> Tensor:
    """Cosines of what a probe [d, D] makes of x [..., D] and codes [E, d] of length 1: [..., E] float."""
    seen = F.linear(x, probe.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(seen, dim=-1) @ codes.to(seen.dtype).T


class _Ticks(NamedTuple):
    """How tokens share ticks. A tick belongs to the document of its last token, and every document that outlives a tick has a key of its own:
    key 0 is the document that was running before the first token, key n + 1 the last one that begins in tick n. Without documents
    there is one key.

    index [B, T]: tick of each token, counted from the first; key [B, T]; counted [B, T]: tokens that drive; owner [B, N]: key of a tick;
    final [B]: key of the last token; closed: ticks that end with these tokens; None where nothing is to be distinguished. One token
    and one document have one tick, and no index: in decoding every operation counts.
    """

    tick: int
    count: int
    front: int | None
    index: Tensor | None
    key: Tensor | None
    counted: Tensor | None
    owner: Tensor | None
    final: Tensor | None
    closed: int | Tensor

    @classmethod
    def of(cls, share: Tensor, tick: int, place: Place) -> _Ticks:
        first, fresh, live = place
        batch, tokens, _ = share.shape
        count, front = num_ticks(first, tokens, tick), first % tick if isinstance(first, int) else None
        stop: int | Tensor = first + (tokens if live is None else live.sum(1))
        closed = stop // tick - first // tick
        if tokens == 1 and fresh is None:
            return cls(tick, count, front, None, None, live, None, None, closed)
        index = local_ticks(first, query_positions(first, tokens, share.device), tick).expand(batch, -1)
        if fresh is None:
            return cls(tick, count, front, index, None, live, None, None, closed)
        fresh = fresh if live is None else fresh & live
        document = fresh.cumsum(1)
        alive = torch.ones_like(fresh) if live is None else live
        newest = torch.zeros(batch, count, dtype=document.dtype, device=share.device)
        newest = newest.scatter_reduce(1, index, torch.where(alive, document, 0), "amax")
        counted = (document == newest.gather(1, index)) & alive
        key = torch.where(fresh, index, -1).cummax(1).values + 1
        owner = torch.zeros_like(newest).scatter_reduce(1, index, torch.where(alive, key, 0), "amax")
        return cls(tick, count, front, index, key, counted, owner, torch.where(alive, key, 0).amax(1), closed)

    def drive(self, share: Tensor) -> Tensor:
        """Mean demand per token of every tick, share [B, T, E] to [B, E, N, K]."""
        if self.counted is not None:  # chosen and not multiplied: padding behind a short window sees no key, and is not a number
            share = torch.where(self.counted[..., None], share, 0.0)
        if self.index is None:
            total = share
        elif self.front is not None:
            back = self.count * self.tick - self.front - share.shape[1]
            total = F.pad(share, (0, 0, self.front, back)).unflatten(1, (self.count, self.tick)).sum(2)
        else:  # rows at different positions; a product keeps the order of the sums, which scattering would not
            total = F.one_hot(self.index, self.count).to(share.dtype).mT @ share
        drive = (total / self.tick).transpose(1, 2)[..., None]
        if self.owner is None:
            return drive
        return drive * F.one_hot(self.owner, self.count + 1).to(drive.dtype)[:, None]

    def carried(self, value: Tensor, rest: float = 0.0) -> Tensor:
        """A part of the state before, [B, E] to [B, E, K]: that of key 0; documents to come are at rest."""
        value = value[..., None]
        return value if self.owner is None else F.pad(value, (0, self.count), value=rest)

    def per_token(self, value: Tensor) -> Tensor:
        """[B, E, N, K] by tick and key to [B, T, E]."""
        if self.index is None:
            return value[..., 0].transpose(1, 2)
        tokens = self.index.shape[1]
        if self.key is None and self.front is not None:
            value = value[..., 0].transpose(1, 2)[:, :, None].expand(-1, -1, self.tick, -1)
            return value.flatten(1, 2)[:, self.front : self.front + tokens]
        place = self.index if self.key is None else self.index * value.shape[3] + self.key
        return value.flatten(2).gather(2, place[:, None].expand(-1, value.shape[1], -1)).transpose(1, 2)

    def at(self, value: Tensor, tick: int | Tensor) -> Tensor:
        """[B, E, N, K] at a tick, common or one per row: [B, E, K]."""
        if isinstance(tick, int):
            return value[:, :, tick]
        return value.gather(2, tick[:, None, None, None].expand(-1, value.shape[1], 1, value.shape[3]))[:, :, 0]

    def last(self, value: Tensor) -> Tensor:
        """[B, E, K] to that of the last token's document, [B, E]."""
        if self.final is None:
            return value[..., 0]
        return value.gather(2, self.final[:, None, None].expand(-1, value.shape[1], 1))[..., 0]
