"""The health of a mixture of experts on held-out text: how evenly it is used, how many experts are dead, how much they differ.

Dimensions: E slots for experts, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, NotApplicable, eager, text_batches
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural.neuroscore import gini, variation
from bio_inspired_nanochat.synaptic import Routing, SynapticMoE

DEAD = 0.01  # of the fair share, as in NeuroScore

METRICS = (
    Metric("gini", "", "lower", "inequality of the experts' loads, mean over layers: 0 where all are equal"),
    Metric("cv", "", "lower", "coefficient of variation of the loads, mean over layers"),
    Metric("dead", "", "lower", "share of living experts that get less than a hundredth of the fair load"),
    Metric("specialization", "", "higher", "1 - cosine between an expert's mean input and the mean input of all, over used experts"),
)


def health(model: GPT, setting: EvaluationSetting) -> Found:
    """Means over layers on `setting.tokens` tokens; each layer's own are in `details`. Reads the routing of these tokens alone."""
    layers = model.experts()
    if not layers:
        raise NotApplicable("experts needs a model with experts: train one with --num_experts=8")
    sums: list[list[Routing]] = [[] for _ in layers]
    with eager(model):
        for idx, _, _ in text_batches(model, setting, "experts"):
            for kept, route in zip(sums, model.run(idx, routing=True).routing or (), strict=True):
                kept.append(route)
    found = [layer_health(layer, kept) for layer, kept in zip(layers, sums, strict=True)]
    means = {name: sum(one[name] for one in found) / len(found) for name in ("gini", "cv", "dead", "specialization")}
    return Found(means, {"layers": found})


def layer_health(layer: SynapticMoE, routes: list[Routing]) -> dict[str, Any]:
    """The metrics of one layer from the routing of several batches, with its loads in units of the fair share."""
    alive = layer.accounts.alive
    load = torch.stack([route.load.double() for route in routes]).sum(0)[alive]
    inputs = torch.stack([route.inputs.double() for route in routes]).sum(0)[alive]
    common = torch.stack([route.common.double() for route in routes]).sum(0)
    share = load / load.mean().clamp_min(1e-12)
    different = 1 - F.cosine_similarity(inputs[load > 0], common[None], dim=-1)
    return {
        "gini": gini(load),
        "cv": variation(load),
        "dead": (share < DEAD).double().mean().item(),
        "specialization": different.mean().item(),
        "load": share.tolist(),
    }
