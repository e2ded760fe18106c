"""NeuroScore: what experts are worth, from their gradients, exactly, and as a table.

    contribution_e = -mean a + 1/2 mean a^2,   a_t = g_t dl_t/dg_t              nats per token that the loss would rise without expert e
    efficiency     = contribution / share of the work;   specialization = 1 - cos(mean input of e, mean input)
    resilience     = 1 / variance of the contribution over time

The first-order term vanishes where the scale of an output is stationary; the second takes the square of the gradient for the curvature, as
the Fisher information does.

Dimensions: B batch, T tokens, E slots for experts, k choices.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import Probe, SynapticMoE

TINY = 1e-12


def contributions(tap: Tensor, tokens: Tensor, world: int = 1) -> Tensor:
    """Contribution [..., E] in nats per token, from the sums [..., E, 2] of a and a^2 that a backward left behind. Equation (L16).

    tokens [...]: over all forwards and ranks. The backward of a mean over each rank's tokens saw gradients 1 / (tokens / world) as large
    as those of one token's own loss.
    """
    tokens = tokens[..., None]
    scale = tokens / world
    first, second = tap[..., 0] * scale / tokens, tap[..., 1] * scale.square() / tokens
    return -first + second / 2


class NeuroScore(NamedTuple):
    """Scores [E] of one layer's slots, NaN for empty ones; gini and dead are numbers of the layer.

    contribution: nats per token; efficiency: contribution over the share of the work; specialization in [0, 2]; resilience; load: in
    units of the fair share; gini: inequality of the load in [0, 1); dead: share of living experts with less than a hundredth of it.
    """

    ids: Tensor
    contribution: Tensor
    efficiency: Tensor
    specialization: Tensor
    resilience: Tensor
    load: Tensor
    gini: float
    dead: float


@torch.no_grad()
def scores(layer: SynapticMoE) -> NeuroScore:
    """The scores of a layer from its accounts. Reads them on the host. Equation (L17)."""
    kept = layer.accounts
    return scores_of(kept, specialization(kept.inputs, kept.common))


def specialization(inputs: Tensor, common: Tensor) -> Tensor:
    """How far the mean inputs [..., E, D] of experts point away from the mean [..., D] of all tokens: 1 - cosine, [..., E]."""
    return 1 - F.cosine_similarity(inputs, common[..., None, :], dim=-1)


def scores_of(kept: Any, special: Tensor) -> NeuroScore:
    """`scores` of one layer. kept: its accounts, or what is read of them (ids, alive, load, benefit, benefit_square); special: [E], see
    `specialization`.
    """
    nothing = torch.full_like(kept.load, float("nan"))

    def alive(values: Tensor) -> Tensor:
        return torch.where(kept.alive, values, nothing)

    load = kept.load[kept.alive]
    variance = (kept.benefit_square - kept.benefit.square()).clamp(min=0)
    return NeuroScore(
        ids=kept.ids.clone(),
        contribution=alive(kept.benefit),
        efficiency=alive(kept.benefit / kept.load.clamp(min=TINY)),
        specialization=alive(special),
        resilience=alive(1 / (variance + TINY)),
        load=alive(kept.load),
        gini=gini(load),
        dead=float((load < 0.01).float().mean()),
    )


def gini(load: Tensor) -> float:
    """Gini coefficient of loads [n] >= 0: 0 where all are equal, 1 - 1/n where one has everything. Equation (L18)."""
    ordered = load.double().sort().values
    rank = torch.arange(1, len(ordered) + 1, device=ordered.device)
    return float((2 * rank - len(ordered) - 1).mul(ordered).sum() / (len(ordered) * ordered.sum()).clamp(min=TINY))


def variation(load: Tensor) -> float:
    """Coefficient of variation of loads [n] >= 0, their standard deviation over their mean: 0 where all are equal, sqrt(n - 1) where one
    has everything. Equation (L18)."""
    load = load.double()
    return float(load.std(correction=0) / load.mean().clamp(min=TINY))


@torch.no_grad()
def leave_one_out(model: GPT, idx: Tensor, targets: Tensor) -> list[Tensor]:
    """Exact loss increase in nats per token, [E] per layer, when the gate of one expert is set to zero without routing anew.

    One pass per living expert. Raises UserError for a model without experts.
    """
    layers = _layers(model)
    base = model.run(idx, targets).loss
    found = []
    for index, layer in enumerate(layers):
        rises = torch.zeros(layer.slots, device=base.device)
        for slot in layer.accounts.alive.nonzero().flatten().tolist():
            muted = torch.zeros(layer.slots, dtype=torch.bool, device=base.device)
            muted[slot] = True
            probes = [Probe(muted=muted) if other == index else Probe() for other in range(len(layers))]
            rises[slot] = model.run(idx, targets, probes=probes).loss - base
        found.append(rises)
    return found


def contribution_of(model: GPT, idx: Tensor, targets: Tensor) -> list[Tensor]:
    """Contribution [E] per layer on one batch, by one backward. Leaves no gradients behind and changes nothing."""
    layers = _layers(model)
    taps = [torch.zeros(layer.slots, 2, device=idx.device, requires_grad=True) for layer in layers]
    with torch.enable_grad():
        loss = model.run(idx, targets, probes=[Probe(tap) for tap in taps]).loss
        grads = torch.autograd.grad(loss, taps)
    tokens = (targets >= 0).sum()
    return [contributions(grad, tokens) for grad in grads]


@torch.no_grad()
def oracle_agreement(model: GPT, idx: Tensor, targets: Tensor, layer: int, samples: int = 256, seed: int = 0) -> float:
    """Share of a layer's choices that an oracle makes too, on sampled tokens of idx [B, T], one per row and pass.

    The oracle tries every living expert alone on the sampled token, with a gate of one, and takes the k of lowest loss of that token.
    """
    moe = _layers(model)[layer]
    rows = -(-samples // len(idx)) * len(idx)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(idx.shape[1], (rows,), generator=generator).to(idx.device)
    agreed = counted = 0
    living = moe.accounts.alive.nonzero().flatten()
    for start in range(0, rows, len(idx)):
        spot = F.one_hot(place[start : start + len(idx)], idx.shape[1]).bool()
        losses, chosen = [], None
        for slot in living.tolist():
            probes: list[Probe] = [Probe() for _ in model.experts()]
            seen: list[Tensor] = []
            probes[layer] = Probe(forced=(spot.flatten(), slot, seen))
            logits = model.run(idx, probes=probes).logits
            losses.append(F.cross_entropy(logits[spot], targets[spot], ignore_index=-1, reduction="none"))
            chosen = seen[0]
        assert chosen is not None
        best = living[torch.stack(losses, dim=1).topk(moe.k, largest=False).indices]
        own = chosen[spot.flatten()]
        agreed += int((best[:, :, None] == own[:, None]).any(2).sum())
        counted += best.numel()
    return agreed / counted


def _layers(model: GPT) -> list[SynapticMoE]:
    layers = model.experts()
    if not layers:
        raise UserError("this model has no experts: train one with --num_experts=8")
    return layers


class NeuroBoard:
    """The leaderboard of a model's experts."""

    COLUMNS = ("layer", "expert", "contribution", "efficiency", "specialization", "resilience", "load", "account", "age")

    def __init__(self, model: GPT) -> None:
        self.rows: list[tuple[float, ...]] = []
        for index, layer in enumerate(_layers(model)):
            kept, found = layer.accounts, scores(layer)
            for slot in kept.alive.nonzero().flatten().tolist():
                values = [found.contribution, found.efficiency, found.specialization, found.resilience, found.load, kept.energy, kept.age]
                self.rows.append((index, int(kept.ids[slot]), *(float(value[slot]) for value in values)))
        self.rows.sort(key=lambda row: -row[2])

    def best(self, count: int = 10) -> list[tuple[float, ...]]:
        """The experts with the largest contributions, in the order of `COLUMNS`."""
        return self.rows[:count]


class ForgettingCurve:
    """Losses of several tasks over training; forgetting is how far a task's loss stands above its best so far. Equation (L19)."""

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[int, float]]] = {}

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the loss of each task after `step`; steps must grow."""
        for task, loss in losses.items():
            curve = self.losses.setdefault(task, [])
            assert not curve or step > curve[-1][0], f"step {step} of {task} comes after {curve[-1][0]}"
            curve.append((step, float(loss)))

    def forgetting(self, task: str) -> list[tuple[int, float]]:
        """(step, loss above the best so far) at every record of a task; 0 at the first."""
        best, found = float("inf"), []
        for step, loss in self.losses[task]:
            best = min(best, loss)
            found.append((step, loss - best))
        return found
