"""One look at a model in training: what its terminals, fast weights and experts do on a row of text, and what they have learned.

The look is one forward of at most `TOKENS` tokens in evaluation mode, without gradients, on rank 0; it changes nothing. On a GPU it
costs launches and waits: everything that it needs of the device is copied at once, and reduced on the host.

Dimensions: H heads, E living experts, d width of an identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.common import to_host
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import NeuroScore, health, scores_of, specialization, variation
from bio_inspired_nanochat.synaptic import LayerTelemetry, SynapticMoE, summarise
from bio_inspired_nanochat.training.experts import Ballot
from bio_inspired_nanochat.training.metrics import OF_FAST, OF_TERMINALS, SCALARS

TOKENS = 256  # of the row that is looked at: telemetry keeps every tick of every terminal
TINY = 1e-12
_READ = ("alive", "ids", "age", "energy", "load", "demand", "benefit", "benefit_square")  # of an expert's account
_TOTALS = {metric.tag: metric.total for metric in SCALARS}


@dataclass(frozen=True)
class Look:
    """What was seen after `step` steps, all of it in the CPU's memory.

    values, layers: by tag of `training.metrics`, of the whole model and per layer (None where a layer has none); constants: per layer
    what was learned, a list over heads each; memory: per layer the memory of its fast weights in tokens, by projection; experts: a row
    per living expert; identities [E, d] or None: their router embedding, in that order; pools: per layer and quantity the histograms
    [H, BINS]; gains: see `GPT.gains`; ballots: decisions of the life cycle in the whole run, newest last; left_out: looks that were
    due since the one before and not taken.
    """

    step: int
    values: dict[str, float]
    layers: dict[str, list[float | None]]
    constants: list[dict[str, list[float]]]
    memory: list[dict[str, float]]
    experts: list[dict[str, float]]
    identities: Tensor | None = None
    pools: list[dict[str, Tensor]] = field(default_factory=list)
    gains: list[dict[str, list[float]]] = field(default_factory=list)
    ballots: tuple[Ballot, ...] = ()
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """The part that belongs into a log, with places in the plane for the experts."""
        places = plane(self.identities).tolist() if self.identities is not None else []
        rows = [{**row, "x": x, "y": y} for row, (x, y) in zip(self.experts, places, strict=True)]
        rows = [{name: _short(value) for name, value in row.items()} for row in rows]
        constants = [{name: [_short(value) for value in values] for name, values in layer.items()} for layer in self.constants]
        layers = {tag: [_short(value) for value in values] for tag, values in self.layers.items()}
        values = {tag: _short(value) for tag, value in self.values.items()}
        found = {"step": self.step, "left_out": self.left_out, "values": values, "layers": layers, "constants": constants}
        return found | {"memory": self.memory, "experts": rows}


def look(model: GPT, idx: Tensor, step: int, ballots: Iterable[Ballot] = (), left_out: int = 0) -> Look | None:
    """Look at the first row of idx [B, T]; None for a model that has neither synapses nor experts. Waits for the device, once."""
    if not model.config.synapses and not model.experts():
        return None
    seen: list[LayerTelemetry] = []
    cfg = model.config.syn_cfg
    with evaluating(model):
        if model.config.synapses and (cfg.presyn or cfg.hebb != "off"):
            seen = summarise(model.course(idx[:1, :TOKENS]), cfg.tick)
        seen, learned, gains, memory, groups = to_host(
            (seen, _constants(model), [block.gains() for block in model.blocks], _memory(model), _accounts(model.experts()))
        )
    experts = [_Experts(group) for group in groups]
    layers = _terminals(seen) | _fast(seen)
    for one in experts:
        for tag, value in one.population().items():
            layers.setdefault(tag, []).append(value)
    return Look(
        step,
        {tag: _total(tag, values) for tag, values in layers.items()},
        layers,
        [_lists(layer) for layer in learned],
        [{key: float(tokens) for key, tokens in layer.items()} for layer in memory],
        [{"layer": index, **row} for index, one in enumerate(experts) for row in one.rows()],
        torch.cat([one.codes() for one in experts]) if experts else None,
        [summary.histogram for summary in seen],
        [_lists(layer) for layer in gains if layer],
        tuple(ballots),
        left_out,
    )


def constants(model: GPT) -> list[dict[str, list[float]]]:
    """What the terminals of every layer have learned: a list over heads for every constant that exists."""
    return [_lists(layer) for layer in to_host(_constants(model))]


def expert_rows(layer: SynapticMoE) -> list[dict[str, float]]:
    """A row per living expert of a layer: id, slot, age in steps, load and demand in fair shares, account, health and scores."""
    (group,) = to_host(_accounts([layer]))
    return _Experts(group).rows()


def embedding(layer: SynapticMoE) -> Tensor:
    """Where the living experts of a layer stand, [E, d]: identities, or the rows of a plain router."""
    return _codes(layer)[layer.accounts.alive].float()


def plane(points: Tensor) -> Tensor:
    """Points [n, d] on their first two principal components, [n, 2] float32; the sign of each is that of its largest entry."""
    centred = (points - points.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    flat = centred @ axes.T
    return torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])).float()


# --- what is copied from the device ------------------------------------------------------------------------------------------------


def _constants(model: GPT) -> list[dict[str, Tensor]]:
    synapses = [getattr(block.attn, "synapse", None) for block in model.blocks]
    return [{} if synapse is None else synapse.constants() for synapse in synapses]


@torch.no_grad()
def _memory(model: GPT) -> list[dict[str, Tensor]]:
    return [{key: one.density.decay_time().mean() for key, one in block.fast_layers().items()} for block in model.blocks]


def _accounts(layers: Sequence[SynapticMoE]) -> list[dict[str, Tensor]]:
    """Of every layer [slots]: what is read of its accounts, and how special its experts are; codes: [slots, d]."""
    if not layers:
        return []
    special = specialization(*(torch.stack([getattr(layer.accounts, name) for layer in layers]) for name in ("inputs", "common")))
    return [
        {name: getattr(layer.accounts, name) for name in _READ} | {"specialization": own, "codes": _codes(layer)}
        for layer, own in zip(layers, special.unbind(), strict=True)
    ]


def _codes(layer: SynapticMoE) -> Tensor:
    codes = layer.synapse.identity if layer.synapse is not None and hasattr(layer.synapse, "identity") else layer.router
    return codes.detach()


# --- what is made of it ------------------------------------------------------------------------------------------------------------


class _Experts:
    """The experts of one layer, from a copy of their accounts on the host."""

    def __init__(self, group: dict[str, Tensor]) -> None:
        self.kept = SimpleNamespace(**group)
        self.found: NeuroScore = scores_of(self.kept, self.kept.specialization)
        columns = {
            "id": self.kept.ids,
            "slot": torch.arange(len(self.kept.ids)),
            "age": self.kept.age,
            "load": self.kept.load,
            "demand": self.kept.demand,
            "account": self.kept.energy,
            "health": health(self.kept, False),
            "contribution": self.found.contribution,
            "efficiency": self.found.efficiency,
            "specialization": self.found.specialization,
            "resilience": self.found.resilience,
        }
        self.names = tuple(columns)
        self.table = torch.stack([value.double() for value in columns.values()], dim=1)[self.kept.alive]  # a row per living expert

    def rows(self) -> list[dict[str, float]]:
        """See `expert_rows`."""
        whole = ("id", "slot", "age")
        return [
            {name: int(value) if name in whole else value for name, value in zip(self.names, row, strict=True)}
            for row in self.table.tolist()
        ]

    def codes(self) -> Tensor:
        """See `embedding`."""
        return self.kept.codes[self.kept.alive].float()

    def population(self) -> dict[str, float]:
        """The numbers of the layer."""
        column = dict(zip(self.names, self.table.unbind(1), strict=True))
        mean = dict(zip(self.names, self.table.mean(0).tolist(), strict=True))
        share = column["load"] / column["load"].sum().clamp(min=TINY)
        entropy = float(-(share * share.clamp(min=TINY).log()).sum())
        return {
            "experts/population": float(len(self.table)),
            "experts/utilisation": math.exp(entropy) / len(self.table),
            "experts/health": mean["health"],
            "experts/account": mean["account"],
            "experts/dead": self.found.dead,
            "experts/gini": self.found.gini,
            "experts/cv": variation(column["load"]),
            **{f"neuroscore/{name}": mean[name] for name in ("contribution", "efficiency", "specialization")},
            "neuroscore/best": float(column["contribution"].max()),
            "neuroscore/resilience": float(column["resilience"].log10().mean()),
        }


def _lists(layer: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in layer.items()}


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


def _total(tag: str, values: list[float | None]) -> float:
    held = [value for value in values if value is not None]
    return sum(held) if _TOTALS[tag] == "sum" else sum(held) / len(held)


def _short(value: float | None) -> float | None:
    """Six digits are enough for a log; what is not finite is nothing."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
