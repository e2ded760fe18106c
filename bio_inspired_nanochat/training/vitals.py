"""One look at a model in training: what its terminals, fast weights and experts do on a row of text, and what they have learned.

The look is one forward of at most `TOKENS` tokens in evaluation mode, without gradients, on rank 0; it changes nothing.

Dimensions: H heads, E living experts, d width of an identity.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import health, scores
from bio_inspired_nanochat.synaptic import LayerTelemetry, SynapticMoE
from bio_inspired_nanochat.training.experts import Ballot
from bio_inspired_nanochat.training.metrics import OF_FAST, OF_TERMINALS, SCALARS

TOKENS = 256  # of the row that is looked at: telemetry keeps every tick of every terminal
TINY = 1e-12
_TOTALS = {metric.tag: metric.total for metric in SCALARS}


@dataclass(frozen=True)
class Look:
    """What was seen after `step` steps.

    values, layers: by tag of `training.metrics`, of the whole model and per layer (None where a layer has none); constants: per layer
    what was learned, a list over heads each; memory: per layer the memory of its fast weights in tokens, by projection; experts: a row
    per living expert; identities [E, d] or None: their router embedding, in that order; pools: per layer and quantity the histograms
    [H, BINS]; ballots: decisions of the life cycle in the whole run, newest last.
    """

    step: int
    values: dict[str, float]
    layers: dict[str, list[float | None]]
    constants: list[dict[str, list[float]]]
    memory: list[dict[str, float]]
    experts: list[dict[str, float]]
    identities: Tensor | None = None
    pools: list[dict[str, Tensor]] = field(default_factory=list)
    ballots: tuple[Ballot, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The part that belongs into a log, with places in the plane for the experts."""
        places = plane(self.identities).tolist() if self.identities is not None else []
        rows = [{**row, "x": x, "y": y} for row, (x, y) in zip(self.experts, places, strict=True)]
        rows = [{name: _short(value) for name, value in row.items()} for row in rows]
        constants = [{name: [_short(value) for value in values] for name, values in layer.items()} for layer in self.constants]
        layers = {tag: [_short(value) for value in values] for tag, values in self.layers.items()}
        values = {tag: _short(value) for tag, value in self.values.items()}
        return {"step": self.step, "values": values, "layers": layers, "constants": constants, "memory": self.memory, "experts": rows}


def look(model: GPT, idx: Tensor, step: int, ballots: Iterable[Ballot] = ()) -> Look | None:
    """Look at the first row of idx [B, T]; None for a model that has neither synapses nor experts."""
    if not model.config.synapses and not model.experts():
        return None
    seen: list[LayerTelemetry] = []
    cfg = model.config.syn_cfg
    if model.config.synapses and (cfg.presyn or cfg.hebb != "off"):
        eager = torch.compiler.set_stance("force_eager") if model.compiled else contextlib.nullcontext()
        with evaluating(model), eager:
            seen = model.run(idx[:1, :TOKENS], telemetry=True).telemetry or []
    layers = _terminals(seen) | _fast(seen)
    rows: list[dict[str, float]] = []
    identities = []
    for index, layer in enumerate(model.experts()):
        for tag, value in _population(layer).items():
            layers.setdefault(tag, []).append(value)
        rows += [{"layer": index, **row} for row in expert_rows(layer)]
        identities.append(embedding(layer))
    return Look(
        step,
        {tag: _total(tag, values) for tag, values in layers.items()},
        layers,
        constants(model),
        [{key: float(one.density.decay_time().detach().mean()) for key, one in block.fast_layers().items()} for block in model.blocks],
        rows,
        torch.cat(identities).cpu() if identities else None,
        [summary.histogram for summary in seen],
        tuple(ballots),
    )


def constants(model: GPT) -> list[dict[str, list[float]]]:
    """What the terminals of every layer have learned: a list over heads for every constant that exists."""
    found = []
    for block in model.blocks:
        synapse = getattr(block.attn, "synapse", None)
        values = {} if synapse is None else synapse.constants()
        table = torch.stack(list(values.values())).tolist() if values else []  # one wait for the device
        found.append(dict(zip(values, table, strict=True)))
    return found


def expert_rows(layer: SynapticMoE) -> list[dict[str, float]]:
    """A row per living expert of a layer: id, slot, age in steps, load and demand in fair shares, account, health and scores."""
    kept, found = layer.accounts, scores(layer)
    columns = {
        "id": kept.ids,
        "slot": torch.arange(kept.slots, device=kept.ids.device),
        "age": kept.age,
        "load": kept.load,
        "demand": kept.demand,
        "account": kept.energy,
        "health": health(kept, False),
        "contribution": found.contribution,
        "efficiency": found.efficiency,
        "specialization": found.specialization,
        "resilience": found.resilience,
    }
    table = torch.stack([value.double() for value in columns.values()], dim=1)[kept.alive].tolist()
    whole = ("id", "slot", "age")
    return [{name: int(value) if name in whole else value for name, value in zip(columns, row, strict=True)} for row in table]


def embedding(layer: SynapticMoE) -> Tensor:
    """Where the living experts of a layer stand, [E, d]: identities, or the rows of a plain router."""
    codes = layer.synapse.identity if layer.synapse is not None and hasattr(layer.synapse, "identity") else layer.router
    return codes.detach()[layer.accounts.alive].float()


def plane(points: Tensor) -> Tensor:
    """Points [n, d] on their first two principal components, [n, 2] float32; the sign of each is that of its largest entry."""
    centred = (points - points.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    flat = centred @ axes.T
    return torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])).float()


def _terminals(seen: list[LayerTelemetry]) -> dict[str, list[float | None]]:
    found = {}
    for tag, quantity in OF_TERMINALS.items():
        if any(quantity in summary.mean for summary in seen):
            found[tag] = [float(summary.mean[quantity].mean()) if quantity in summary.mean else None for summary in seen]
    return found


def _fast(seen: list[LayerTelemetry]) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for tag, name in OF_FAST.items():
        held = [[float(told[name]) for told in summary.fast.values()] for summary in seen]
        if any(held):
            found[tag] = [sum(values) / len(values) if values else None for values in held]
    return found


def _population(layer: SynapticMoE) -> dict[str, float]:
    """The numbers of one layer's experts."""
    kept, found = layer.accounts, scores(layer)
    living = kept.alive
    share = kept.load[living] / kept.load[living].sum().clamp(min=TINY)
    entropy = float(-(share * share.clamp(min=TINY).log()).sum())
    means = {name: getattr(found, name)[living].double().mean() for name in ("contribution", "efficiency", "specialization")}
    return {
        "experts/population": float(living.sum()),
        "experts/utilisation": math.exp(entropy) / int(living.sum()),
        "experts/health": float(health(kept, False)[living].mean()),
        "experts/account": float(kept.energy[living].mean()),
        "experts/dead": found.dead,
        "experts/gini": found.gini,
        **{f"neuroscore/{name}": float(value) for name, value in means.items()},
        "neuroscore/best": float(found.contribution[living].max()),
        "neuroscore/resilience": float(found.resilience[living].double().log10().mean()),
    }


def _total(tag: str, values: list[float | None]) -> float:
    held = [value for value in values if value is not None]
    return sum(held) if _TOTALS[tag] == "sum" else sum(held) / len(held)


def _short(value: float | None) -> float | None:
    """Six digits are enough for a log; what is not finite is nothing."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
