"""The account of every expert: what a training step earns and costs it. Applied between steps, from statistics of all ranks.

    fair      = k tokens / living experts
    account   E <- clip(E + r (demand / fair - 1) - lambda (E - 1/2), 0, 1)      fair demand rests at one half
    balance   b <- b + rate sign(fair load - load), centred                       per slot; twins are one slot of two fair shares
    identity  moves towards experts that are chosen with it more often than the average pair, and away from those nearby that are not

Demand is what tokens ask for without the balancing bias, which would cancel every difference. With income and tax r = 0.005 and
lambda = 0.01 twice the fair demand fills the account to 0.8 in 92 steps and no demand empties it to 0.1 in 161.

Dimensions: E slots for experts, D width.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.common import several, sum_over_ranks
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.kernels import rust_moe
from bio_inspired_nanochat.structural.neuroscore import contributions
from bio_inspired_nanochat.synaptic import Accounts, Probe, Routing, SynapticMoE

AVERAGE = 0.05  # weight of the newest step in the averages of an account
ESTRANGE = 0.1  # how fast router rows of twins turn apart, relative to their length, per unit of router_contrastive_push
KEPT = ("alive", "lead", "child", "age", "energy", "balance", "blend", "tie")  # what an update reads and changes
KEPT += ("load", "demand", "both", "together", "inputs", "common")
TIE_RATE = 0.05  # step of the bias between twins, times their relative difference in load


class Ledger:
    """Collects what the forwards and backwards of one optimizer step say of the experts, on the device.

    probes() gives the instruments of one forward; add() takes its routing. `settle` sums over micro-batches and ranks.
    """

    def __init__(self, model: GPT) -> None:
        self.layers = model.experts()
        self.discard()

    def discard(self) -> None:
        """Forget what was collected since the last `settle`."""
        device = self.layers[0].router.device
        self._taps = [torch.zeros(layer.slots, 2, device=device, requires_grad=True) for layer in self.layers]
        self._sums: list[Routing] | None = None

    def probes(self) -> list[Probe]:
        """One per layer; their taps fill in the backward."""
        return [Probe(tap) for tap in self._taps]

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
        taps = [torch.zeros_like(tap) if tap.grad is None else tap.grad for tap in self._taps]
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
    world = dist.get_world_size() if dist.is_initialized() else 1
    cfg = model.config.syn_cfg
    for index, layer in enumerate(model.experts()):
        update(layer, routing[index], cfg)
        if taps is not None:
            gained = contributions(taps[index], routing[index].tokens, world)
            kept = layer.accounts
            _average(kept.benefit, gained)
            _average(kept.benefit_square, gained.square())


@torch.no_grad()
def update(layer: SynapticMoE, routing: Routing, cfg: SynapticConfig) -> None:
    """Apply one step's statistics to one layer. Changes its accounts and identities. Equation (L8)."""
    if _settled(layer, routing, cfg):
        return
    kept, k = layer.accounts, layer.k
    living = kept.alive.float()
    fair = k * routing.tokens / living.sum()
    demand, load = routing.demand / fair, routing.load / fair
    kept.energy.add_(cfg.bank_rate * (demand - 1) - cfg.bank_decay * (kept.energy - 0.5)).clamp_(0, 1)
    kept.energy.copy_(torch.where(kept.alive, kept.energy, 0.5))
    _average(kept.demand, demand)
    _average(kept.load, load)
    _average(kept.both, routing.both / routing.tokens)
    _average(kept.together, routing.together / routing.load.clamp(min=1)[:, None])
    seen = (routing.load > 0)[:, None]
    kept.inputs.copy_(torch.where(seen, torch.lerp(kept.inputs, routing.inputs / routing.load.clamp(min=1)[:, None], AVERAGE), kept.inputs))
    _average(kept.common, routing.common / routing.tokens)
    kept.age.add_(kept.alive)
    _balance(kept, load, cfg)
    if layer.synapse is not None and hasattr(layer.synapse, "identity"):
        _contrast(layer, cfg)
    _estrange(layer, cfg)


def _settled(layer: SynapticMoE, routing: Routing, cfg: SynapticConfig) -> bool:
    """Whether the Rust extension did the same: on a CPU, with backend auto or rust."""
    identity = getattr(layer.synapse, "identity", None)
    kept = {name: value for name, value in layer.accounts.named_buffers() if name in KEPT}
    changed = [*kept.values(), layer.router] + ([] if identity is None else [identity])
    if rust_moe.obstacle(layer.backend, routing.common, *changed) is not None:
        return False
    found = {name: value for name, value in routing._asdict().items() if name != "gates"}
    knobs = {"k": layer.k, "average": AVERAGE, "tie_rate": TIE_RATE, "estrange": ESTRANGE * cfg.router_contrastive_push}
    knobs |= {"bank_rate": cfg.bank_rate, "bank_decay": cfg.bank_decay, "balance_rate": cfg.balance_rate, "youth": cfg.expert_youth}
    knobs |= {"pull": cfg.router_contrastive_pull, "push": cfg.router_contrastive_push}
    rust_moe.settle(kept, found, identity, layer.router, knobs)
    return True


def _balance(kept: Accounts, load: Tensor, cfg: SynapticConfig) -> None:
    """Move the balancing bias of every slot, and blend and tie of its twins. Equation (L10)."""
    places = torch.arange(kept.slots, device=load.device)
    leads, paired = kept.leads(), kept.child != places
    younger = load[kept.child] * paired
    gap = (1 + paired.float()) - (load + younger)
    kept.balance.add_(cfg.balance_rate * gap.sign() * leads)
    kept.balance.sub_((kept.balance * leads).sum() / leads.sum()).mul_(leads)
    kept.blend.add_(1 / cfg.expert_youth).clamp_(max=1).mul_(paired)
    kept.tie.add_(TIE_RATE * (load - younger) / (load + younger).clamp(min=1e-6)).mul_(paired & (kept.blend < 1))


def _average(kept: Tensor, new: Tensor) -> None:
    """Let a running average follow the newest step. Equation (L9)."""
    kept.lerp_(new, AVERAGE)


def _contrast(layer: SynapticMoE, cfg: SynapticConfig) -> None:
    """Pull identities of experts chosen together, push apart near ones that are not, along the sphere. Equation (L11)."""
    kept, identity = layer.accounts, layer.synapse.identity
    unit = F.normalize(identity, dim=-1)
    cosine = unit @ unit.T
    pair = kept.alive[:, None] & kept.alive & ~torch.eye(kept.slots, dtype=torch.bool, device=cosine.device)
    shared = (kept.together + kept.together.T) / 2
    lift = shared - (shared * pair).sum() / pair.sum().clamp(min=1)
    weight = cfg.router_contrastive_pull * lift.clamp(min=0) - cfg.router_contrastive_push * (-lift).clamp(min=0) * cosine.clamp(min=0)
    weight = weight * pair
    along = weight @ unit - (weight * cosine).sum(1, keepdim=True) * unit
    _turn(identity, along)


def _estrange(layer: SynapticMoE, cfg: SynapticConfig) -> None:
    """Turn the router rows of twins apart along the difference of what each of them serves: what the winner takes, the other asks for less.

    Equation (L12).
    """
    kept, rows = layer.accounts, layer.router
    places = torch.arange(kept.slots, device=rows.device)
    other = torch.where(kept.child != places, kept.child, kept.lead)
    paired = (other != places)[:, None]
    away = (kept.inputs - kept.inputs[other]) / layer.router.shape[1] ** 0.5
    _turn(rows, torch.where(paired, ESTRANGE * cfg.router_contrastive_push * away, 0.0))


def _turn(rows: Tensor, by: Tensor) -> None:
    """Move rows by shares of their length and give them that length again: steps as small as these would grow without bound."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    moved = rows + by * length
    moved = moved * (length / torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp(min=1e-12))
    rows.copy_(torch.where((by != 0).any(-1, keepdim=True), moved, rows))
