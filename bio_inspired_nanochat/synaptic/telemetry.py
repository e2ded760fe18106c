"""What the terminals of a layer did in one pass: means and histograms per head, and the losses that keep them in range.

Dimensions: B batch, H query heads, N ticks, Tk keys.

Numbered equations are those of prompts/presynapse.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.synaptic.state import SynapseState

BINS = 20
# Range of the histogram of each quantity; what lies outside counts in the outermost bin.
RANGES = {"calcium": (0.0, 5.0), "bias": (-8.0, 8.0), "bias_abs": (0.0, 8.0)}
LOW_ENERGY, LOW_POOL = 0.5, 0.25


class LayerTelemetry(NamedTuple):
    """Statistics over all terminals that exist, by quantity: mean [H]; histogram [H, BINS], shares that sum to one.

    Quantities are those of `kernels.presyn`'s record: calcium, vesicles, bias, released, and the optional parts that are on;
    bias_abs is the absolute bias.
    fast: by projection with fast weights, means over the batch, 0-d: fast_weight_norm (Frobenius), camkii_mean, pp1_mean and
    bdnf_mean after the last token, eta_mean over all tokens.
    """

    mean: dict[str, Tensor]
    histogram: dict[str, Tensor]
    fast: dict[str, dict[str, Tensor]]


def summarise(record: dict[str, Any], tick: int) -> LayerTelemetry:
    """Reduce a layer's record ([B, H, N, Tk] each) over batch, ticks and keys; terminals that are not born yet do not count.

    The entry `fast` of the record holds what the projections say of their fast weights and is handed on.
    """
    means, histograms = {}, {}
    if "bias" in record:
        record = record | {"bias_abs": record["bias"].abs()}
    for name, value in record.items():
        if name == "fast":
            continue
        ticks, keys = value.shape[2:]
        born = torch.arange(keys, device=value.device) < tick * torch.arange(1, ticks + 1, device=value.device)[:, None]
        value = value.detach().float()
        count = born.sum() * value.shape[0]
        means[name] = (value * born).sum((0, 2, 3)) / count
        low, high = RANGES.get(name, (0.0, 1.0))
        bins = ((value - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        heads = torch.arange(value.shape[1], device=value.device)[:, None, None] * BINS
        weight = born.expand_as(value).float().flatten()
        total = torch.zeros(value.shape[1] * BINS, device=value.device).index_add_(0, (bins + heads).flatten(), weight)
        histograms[name] = total.view(-1, BINS) / count
    return LayerTelemetry(means, histograms, record.get("fast", {}))


def auxiliary_loss(record: dict[str, Tensor], energy_weight: float, pool_weight: float) -> Tensor:
    """Hinge losses of the background, weighted: mean of max(0, 1/2 - E) and of max(0, 1/4 - R) over all terminals and ticks.

    Equation (P24).
    """
    loss = record["vesicles"].new_zeros(())
    if energy_weight and "energy" in record:
        loss = loss + energy_weight * (LOW_ENERGY - record["energy"]).clamp(min=0).mean()
    if pool_weight:
        loss = loss + pool_weight * (LOW_POOL - record["vesicles"]).clamp(min=0).mean()
    return loss


VITALS = ("calcium", "vesicles", "energy")


@torch.no_grad()
def vitals(state: SynapseState, row: int = 0) -> list[dict[str, Any]]:
    """What the synapses of one running sequence hold now, a dictionary per layer, ready for JSON.

    calcium, vesicles, energy: a list over heads, means over the terminals that exist (fractions of full, calcium in its own
    unit); only those that the model has. fast: Frobenius norm of the fast weights by projection, where there are any.
    """
    born, layers = max(1, int(state.pos[row])), []
    for layer in state.layers:
        held = {name: getattr(layer, name) for name in VITALS if getattr(layer, name) is not None}
        told: dict[str, Any] = {name: _rounded(value[row, :, :born].float().mean(-1)) for name, value in held.items()}
        if layer.fast:
            told["fast"] = {key: _rounded(fast.weights[row].float().norm()) for key, fast in layer.fast.items()}
        layers.append(told)
    return layers


def _rounded(value: Tensor) -> Any:
    numbers = value.tolist()
    return [round(number, 5) for number in numbers] if isinstance(numbers, list) else round(numbers, 5)
