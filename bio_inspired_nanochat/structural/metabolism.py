"""The account of every expert: what a training step earns and costs it. Applied between steps, from statistics of all ranks.

    fair      = k tokens / living experts
    account   E <- clip(E + r (demand / fair - 1) - lambda (E - 1/2), 0, 1)      fair demand rests at one half
    balance   b <- b + rate sign(fair load - load), centred                       per slot; twins are one slot of two fair shares
    identity  moves towards experts that are chosen with it more often than the average pair, and away from those nearby that are not

Demand is what tokens ask for without the balancing bias, which would cancel every difference. With income and tax r = 0.005 and
lambda = 0.01 twice the fair demand fills the account to 0.8 in 92 steps and no demand empties it to 0.1 in 161.

All layers are settled at once, as stacked tensors: what this costs on a GPU is launches.

Dimensions: L layers with experts, E slots for experts, D width.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.common import several, sum_over_ranks
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.kernels import rust_moe
from bio_inspired_nanochat.structural.neuroscore import contributions
from bio_inspired_nanochat.synaptic import Probe, Routing, SynapticMoE

AVERAGE = 0.05  # weight of the newest step in the averages of an account
ESTRANGE = 0.1  # how fast router rows of twins turn apart, relative to their length, per unit of router_contrastive_push
READ = ("alive", "lead", "child")  # what an update reads of an account, and what it changes
CHANGED = ("age", "energy", "balance", "blend", "tie", "load", "demand", "both", "together", "inputs", "common")
TIE_RATE = 0.05  # step of the bias between twins, times their relative difference in load


class Ledger:
    """Collects what the forwards and backwards of one optimizer step say of the experts, on the device.

    probes() gives the instruments of one forward; add() takes its routing. `settle` sums over micro-batches and ranks.
    """

    def __init__(self, model: GPT) -> None:
        self.layers = model.experts()
        device = self.layers[0].router.device
        self.taps = [torch.zeros(layer.slots, 2, device=device, requires_grad=True) for layer in self.layers]
        self._sums: list[Routing] | None = None

    def discard(self) -> None:
        """Forget what was collected since the last `settle`."""
        for tap in self.taps:
            tap.grad = None
        self._sums = None

    def probes(self) -> list[Probe]:
        """One per layer; their taps fill in the backward."""
        return [Probe(tap) for tap in self.taps]

    def add(self, routing: Sequence[Routing]) -> None:
        """Add the statistics of one forward."""
        if self._sums is None:
            self._sums = list(routing)
        else:
            self._sums = [Routing(*map(torch.add, mine, new)) for mine, new in zip(self._sums, routing, strict=True)]

    def settle(self) -> tuple[list[Routing], list[Tensor]]:
        """Sums over all forwards since the last call and over ranks: routing and taps [E, 2] per layer. Collective."""
        assert self._sums is not None, "settle() before any forward"
        sums = self._sums
        taps = [torch.zeros_like(tap) if tap.grad is None else tap.grad for tap in self.taps]
        if several():
            parts = [part.float() for routing in sums for part in routing] + taps
            flat = torch.cat([part.flatten() for part in parts])
            flat = sum_over_ranks(flat)  # one message
            pieces = [piece.view_as(part) for piece, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
            size = len(Routing._fields)
            sums = [Routing(*pieces[i * size : (i + 1) * size]) for i in range(len(sums))]
            taps = pieces[len(sums) * size :]
        self.discard()
        return sums, taps


@torch.no_grad()
def metabolise(model: GPT, routing: Sequence[Routing], taps: Sequence[Tensor] | None = None) -> None:
    """Apply one step's statistics, summed over micro-batches and ranks, to the accounts and identities. Waits for nothing. Changes the model.

    taps: what the backward of the mean loss left behind (see `Ledger`).
    """
    layers = model.experts()
    update(layers, routing, model.config.syn_cfg)
    if taps is not None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        gained = contributions(torch.stack(list(taps)), torch.stack([found.tokens for found in routing]), world)
        for name, new in (("benefit", gained), ("benefit_square", gained.square())):
            torch._foreach_lerp_([getattr(layer.accounts, name) for layer in layers], list(new), AVERAGE)


@torch.no_grad()
def update(layers: Sequence[SynapticMoE], routing: Sequence[Routing], cfg: SynapticConfig) -> None:
    """Apply one step's statistics to layers. Changes their accounts and identities. Equations (L8) and (L9)."""
    if _settled(layers, routing, cfg):
        return
    accounts = [layer.accounts for layer in layers]
    kept = SimpleNamespace(**{name: torch.stack([getattr(account, name) for account in accounts]) for name in READ + CHANGED})
    found = Routing(*(torch.stack(parts) for parts in zip(*routing, strict=True)))
    tokens, work = found.tokens[:, None], found.load.clamp(min=1)[..., None]
    fair = layers[0].k * tokens / kept.alive.float().sum(1, keepdim=True)
    demand, load = found.demand / fair, found.load / fair
    kept.energy += cfg.bank_rate * (demand - 1) - cfg.bank_decay * (kept.energy - 0.5)
    kept.energy = torch.where(kept.alive, kept.energy.clamp(0, 1), 0.5)
    kept.demand.lerp_(demand, AVERAGE)
    kept.load.lerp_(load, AVERAGE)
    kept.both.lerp_(found.both / tokens, AVERAGE)
    kept.together.lerp_(found.together / work, AVERAGE)
    kept.inputs = torch.where(found.load[..., None] > 0, torch.lerp(kept.inputs, found.inputs / work, AVERAGE), kept.inputs)
    kept.common.lerp_(found.common / tokens, AVERAGE)
    kept.age += kept.alive
    _balance(kept, load, cfg)
    for name in CHANGED:
        torch._foreach_copy_([getattr(account, name) for account in accounts], list(getattr(kept, name)))
    if _identity(layers[0]) is not None:
        _contrast(kept, [layer.synapse.identity for layer in layers], cfg)
    _estrange(kept, [layer.router for layer in layers], cfg)


def _identity(layer: SynapticMoE) -> Tensor | None:
    return getattr(layer.synapse, "identity", None)


def _settled(layers: Sequence[SynapticMoE], routing: Sequence[Routing], cfg: SynapticConfig) -> bool:
    """Whether the Rust extension did the same, layer by layer: on a CPU, with backend auto or rust."""
    for layer, sums in zip(layers, routing, strict=True):
        identity = _identity(layer)
        kept = {name: getattr(layer.accounts, name) for name in READ + CHANGED}
        changed = [*kept.values(), layer.router] + ([] if identity is None else [identity])
        if rust_moe.obstacle(layer.backend, sums.common, *changed) is not None:
            return False  # alike for all layers
        found = {name: value for name, value in sums._asdict().items() if name != "gates"}
        knobs = {"k": layer.k, "average": AVERAGE, "tie_rate": TIE_RATE, "estrange": ESTRANGE * cfg.router_contrastive_push}
        knobs |= {"bank_rate": cfg.bank_rate, "bank_decay": cfg.bank_decay, "balance_rate": cfg.balance_rate, "youth": cfg.expert_youth}
        knobs |= {"pull": cfg.router_contrastive_pull, "push": cfg.router_contrastive_push}
        rust_moe.settle(kept, found, identity, layer.router, knobs)
    return True


def _balance(kept: SimpleNamespace, load: Tensor, cfg: SynapticConfig) -> None:
    """Move the balancing bias of every slot, and blend and tie of its twins. Equations (L10) and (L14)."""
    places = torch.arange(load.shape[1], device=load.device)
    leads, paired = kept.alive & (kept.lead == places), kept.child != places
    younger = load.gather(1, kept.child) * paired
    gap = (1 + paired.float()) - (load + younger)
    kept.balance += cfg.balance_rate * gap.sign() * leads
    kept.balance -= (kept.balance * leads).sum(1, keepdim=True) / leads.sum(1, keepdim=True)
    kept.balance *= leads
    kept.blend.add_(1 / cfg.expert_youth).clamp_(max=1).mul_(paired)
    kept.tie.add_(TIE_RATE * (load - younger) / (load + younger).clamp(min=1e-6)).mul_(paired & (kept.blend < 1))


def _contrast(kept: SimpleNamespace, identities: list[Tensor], cfg: SynapticConfig) -> None:
    """Pull identities [E, d] of experts chosen together, push apart near ones that are not, along the sphere. Equation (L11)."""
    rows = torch.stack(identities)
    unit = F.normalize(rows, dim=-1)
    cosine = unit @ unit.mT
    pair = kept.alive[:, :, None] & kept.alive[:, None] & ~torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
    shared = (kept.together + kept.together.mT) / 2
    mean = (shared * pair).sum((1, 2), keepdim=True) / pair.sum((1, 2), keepdim=True).clamp(min=1)
    lift = shared - mean
    weight = cfg.router_contrastive_pull * lift.clamp(min=0) - cfg.router_contrastive_push * (-lift).clamp(min=0) * cosine.clamp(min=0)
    weight = weight * pair
    along = weight @ unit - (weight * cosine).sum(2, keepdim=True) * unit
    torch._foreach_copy_(identities, list(_turned(rows, along)))


def _estrange(kept: SimpleNamespace, routers: list[Tensor], cfg: SynapticConfig) -> None:
    """Turn the router rows of twins apart along the difference of what each of them serves: what the winner takes, the other asks for less.

    Equation (L12).
    """
    rows = torch.stack(routers)
    places = torch.arange(rows.shape[1], device=rows.device)
    other = torch.where(kept.child != places, kept.child, kept.lead)[..., None]
    away = (kept.inputs - kept.inputs.gather(1, other.expand_as(kept.inputs))) / rows.shape[2] ** 0.5
    by = torch.where(other != places[:, None], ESTRANGE * cfg.router_contrastive_push * away, 0.0)
    torch._foreach_copy_(routers, list(_turned(rows, by)))


def _turned(rows: Tensor, by: Tensor) -> Tensor:
    """Rows moved by shares of their length and given that length again: steps as small as these would grow without bound."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    moved = rows + by * length
    moved = moved * (length / torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp(min=1e-12))
    return torch.where((by != 0).any(-1, keepdim=True), moved, rows)
