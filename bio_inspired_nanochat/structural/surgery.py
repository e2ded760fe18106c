"""Carries out what `splitmerge` has decided: rows of parameters, rows of optimizer moments, and accounts.

Everything random is drawn on the CPU by a generator keyed by (seed, step, layer, event), so that every rank draws the same.

Dimensions: E slots for experts.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from bio_inspired_nanochat.common import fill, generator_for, is_cut, whole
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.structural.splitmerge import Event
from bio_inspired_nanochat.synaptic import SynapticMoE


class Moments(Protocol):
    """What surgery needs of an optimizer; `optim.Optimizer` has it."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's moments of a parameter, by their name; each has the parameter's shape."""
        ...


class _Body:
    """The rows of one layer: every tensor [E, ...] that belongs to its experts, and the optimizer's moments of each.

    Tensors that FSDP has cut are whole copies here, on every rank, until `put_back`. Events are rare enough to gather them.
    """

    def __init__(self, layer: SynapticMoE, prefix: str, optimizer: Moments | None) -> None:
        self.layer = layer
        self.parameters: dict[str, Tensor] = {
            "experts.w_in": layer.experts.w_in,
            "experts.w_out": layer.experts.w_out,
            "router": layer.router,
        }
        if layer.synapse is not None:
            per_expert = ("identity", "snare", "genome.xi", "gain_release", "gain_depletion")
            self.parameters |= {f"synapse.{name}": value for name, value in layer.synapse.named_parameters() if name in per_expert}

        moments = [] if optimizer is None else [m for name in self.parameters for m in optimizer.moments(f"{prefix}.{name}").values()]
        self._cut = [(tensor, whole(tensor)) for tensor in (*self.parameters.values(), *moments) if is_cut(tensor)]
        gathered = {id(tensor): full for tensor, full in self._cut}
        self.parameters = {name: gathered.get(id(value), value) for name, value in self.parameters.items()}
        self._tensors = [*self.parameters.values(), *(gathered.get(id(moment), moment) for moment in moments)]

    def tensors(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    def put_back(self) -> None:
        """Return the rows of cut tensors to the ranks that hold them."""
        for tensor, full in self._cut:
            fill(tensor, full)

    def copy(self, source: int, target: int) -> None:
        for tensor in self.tensors():
            tensor[target] = tensor[source]

    def average(self, kept: int, gone: int, share: float) -> None:
        for tensor in self.tensors():
            tensor[kept] = torch.lerp(tensor[kept], tensor[gone], share)

    def clear(self, slot: int) -> None:
        for tensor in self.tensors():
            tensor[slot] = 0


@torch.no_grad()
def operate(
    layer: SynapticMoE, event: Event, cfg: SynapticConfig, *, prefix: str, seed: int, step: int, optimizer: Moments | None = None
) -> None:
    """Carry out one event in a layer whose parameters are called `prefix`.name in the optimizer. Changes the model and the moments.

    Collective where the layer is cut: every rank then carries out the same event on whole copies, and keeps its rows.
    """
    body = _Body(layer, prefix, optimizer)
    key = f"life.{step}.{prefix}.{event.event}.{event.id}"
    kept = layer.accounts
    if event.event == "split":
        _split(body, event, cfg.mutation_strength, seed, key)
    elif event.event == "merge":
        _merge(body, event)
    elif event.event == "death":
        body.clear(event.slots[0])
        _empty(layer, event.slots[0])
    elif event.event == "birth":
        _birth(body, event, seed, key)
    else:
        assert event.event == "separate", event.event
        _separate(layer, *event.slots)
    body.put_back()
    for slot in event.slots:
        kept.age[slot] = 0


def _split(body: _Body, event: Event, mutation: float, seed: int, key: str) -> None:
    """The child is the parent's twin: equal weights and moments, identity and genome changed. The slot computes what it did.

    Equation (L14).
    """
    parent, child = event.slots
    body.copy(parent, child)
    for name in ("synapse.identity", "synapse.genome.xi"):
        if name in body.parameters:
            row = body.parameters[name][child]
            noise = torch.randn(row.shape, generator=generator_for(seed, f"{key}.{name}")).to(row)
            size = torch.linalg.vector_norm(row)
            row += mutation * (size if name == "synapse.identity" else 1.0) * noise / math.sqrt(len(row))
            if name == "synapse.identity":  # a direction: no generation is longer than the one before
                row *= size / torch.linalg.vector_norm(row).clamp(min=1e-12)
    kept = body.layer.accounts
    for name in ("demand", "load", "benefit", "benefit_square"):
        value = getattr(kept, name)
        value[parent] = value[child] = value[parent] / 2
    for name in ("energy", "balance", "inputs"):
        value = getattr(kept, name)
        value[child] = value[parent]
    kept.together[child] = kept.together[parent]
    kept.together[:, child] = kept.together[:, parent] / 2
    kept.together[:, parent] /= 2
    kept.together[child, parent] = kept.together[parent, child] = 0
    kept.alive[child] = True
    kept.ids[child] = event.id
    kept.next_id.fill_(event.id + 1)
    kept.lead[child], kept.child[parent] = parent, child
    kept.blend[parent] = kept.tie[parent] = 0
    kept.both[parent] = 1  # they would both enter, until the statistics say otherwise


def _merge(body: _Body, event: Event) -> None:
    """The survivor becomes the average of both, weighted with what they were used. Equation (L15)."""
    survivor, gone = event.slots
    kept = body.layer.accounts
    total = float(kept.load[survivor] + kept.load[gone])
    share = float(kept.load[gone]) / total if total > 0 else 0.5
    body.average(survivor, gone, share)
    for name in ("energy", "inputs"):
        value = getattr(kept, name)
        value[survivor] = torch.lerp(value[survivor], value[gone], share)
    for name in ("demand", "load", "benefit", "benefit_square"):
        getattr(kept, name)[survivor] += getattr(kept, name)[gone]
    kept.ids[survivor] = event.id
    kept.next_id.fill_(event.id + 1)
    body.clear(gone)
    _empty(body.layer, gone)


def _birth(body: _Body, event: Event, seed: int, key: str) -> None:
    """A newborn has random inputs, an output of zero, half an account, and the bias of the expert that is helped most."""
    (slot,) = event.slots
    body.clear(slot)
    layer, kept = body.layer, body.layer.accounts
    others = kept.alive & (kept.lead == torch.arange(kept.slots, device=kept.lead.device))
    for name in ("experts.w_in", "router", "synapse.identity", "synapse.snare"):
        if name in body.parameters:
            rows = body.parameters[name]
            size = rows[others].square().mean().sqrt()
            rows[slot] = size * torch.randn(rows[slot].shape, generator=generator_for(seed, f"{key}.{name}")).to(rows)
    for name in ("synapse.gain_release", "synapse.gain_depletion", "synapse.genome.xi"):
        if name in body.parameters:
            body.parameters[name][slot] = body.parameters[name][others].mean(0)
    _empty(layer, slot)
    kept.alive[slot] = True
    kept.ids[slot] = event.id
    kept.next_id.fill_(event.id + 1)
    kept.demand[slot] = kept.load[slot] = 1
    kept.balance[slot] = kept.balance[others].max()
    kept.inputs[slot] = kept.common


def _separate(layer: SynapticMoE, lead: int, child: int) -> None:
    kept = layer.accounts
    kept.lead[child], kept.child[lead] = child, lead
    kept.balance[child], kept.energy[child] = kept.balance[lead].clone(), kept.energy[lead].clone()
    kept.blend[lead] = kept.tie[lead] = kept.both[lead] = 0


def _empty(layer: SynapticMoE, slot: int) -> None:
    """The accounts of a slot without an expert."""
    kept = layer.accounts
    for name in ("balance", "blend", "tie", "load", "demand", "both", "benefit", "benefit_square", "inputs", "together", "age"):
        getattr(kept, name)[slot] = 0
    kept.together[:, slot] = 0
    kept.alive[slot] = False
    kept.ids[slot] = -1
    kept.energy[slot] = 0.5
    kept.lead[slot] = kept.child[slot] = slot
