"""What the terminals of a layer did in one pass: means and histograms per head, and the losses that keep them in range.

Dimensions: B batch, H query heads, N ticks, Tk keys.

Numbered equations are those of prompts/presynapse.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels import SHORTAGES, shortage
from bio_inspired_nanochat.synaptic.state import SynapseState

BINS = 20
# Range of the histogram of each quantity; what lies outside counts in the outermost bin.
RANGES = {"calcium": (0.0, 5.0), "bias": (-8.0, 8.0), "bias_abs": (0.0, 8.0)}


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


def summarise(records: Sequence[dict[str, Any]], tick: int) -> list[LayerTelemetry]:
    """Reduce the records of layers of one shape ([B, H, N, Tk] each) over batch, ticks and keys; terminals that are not born yet do not
    count. All layers at once: what this costs on a GPU is launches.

    The entry `fast` of a record holds what the projections say of their fast weights and is handed on.
    """
    found = [LayerTelemetry({}, {}, record.get("fast", {})) for record in records]
    born, count = None, torch.ones(())
    for name in dict.fromkeys(name for record in records for name in record if name != "fast"):
        layers = [layer for layer, record in enumerate(records) if name in record]
        value = torch.stack([records[layer][name].detach() for layer in layers]).float()
        if born is None or born.shape != value.shape[-2:]:
            ticks, keys = (torch.arange(size, device=value.device) for size in value.shape[-2:])
            born = keys < tick * (ticks + 1)[:, None]
            count = born.sum() * value.shape[1]
        measured = {name: value} if name != "bias" else {name: value, "bias_abs": value.abs()}
        for quantity, values in measured.items():
            means = (values * born).sum((1, 3, 4)) / count
            shares = _histogram(values, born, *RANGES.get(quantity, (0.0, 1.0))) / count
            for layer, mean, histogram in zip(layers, means.unbind(), shares.unbind(), strict=True):
                found[layer].mean[quantity], found[layer].histogram[quantity] = mean, histogram
    return found


def _histogram(values: Tensor, born: Tensor, low: float, high: float) -> Tensor:
    """How many of values [L, B, H, N, Tk] are born and in each bin, [L, H, BINS]."""
    layers, _, heads = values.shape[:3]
    bins = ((values - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    bins += torch.arange(0, layers * heads * BINS, BINS, device=values.device).view(layers, 1, heads, 1, 1)
    total = torch.zeros(layers * heads * BINS, device=values.device)
    return total.index_add_(0, bins.flatten(), born.expand_as(values).float().flatten()).view(layers, heads, BINS)


def auxiliary_loss(record: dict[str, Tensor], energy_weight: float, pool_weight: float) -> Tensor:
    """Hinge losses of the background, weighted: mean of max(0, 1/2 - E) and of max(0, 1/4 - R) over all terminals and ticks, one
    number, from the course of the terminals or from these means. Equation (P24).
    """
    weights = {"low_energy": energy_weight, "low_pool": pool_weight}
    lacking = {name: record[name] for name in weights if name in record}
    if not lacking:
        lacking = {name: shortage(name, record[part]).mean() for name, (part, _) in SHORTAGES.items() if part in record}
    return torch.stack([weights[name] * mean for name, mean in lacking.items()]).sum()


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
