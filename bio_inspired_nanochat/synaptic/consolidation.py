"""Consolidation ("sleep"): what running sequences hold in their fast weights becomes part of the slow weights, and can be taken back.

Per token a layer with fast weights adds r_t n_t F (A^T x_t) / |A^T x_t| through O. With r and n / |A^T x| replaced by their means
over the tokens of the running document, that is a matrix: W + strength * O (r n F) A^T, averaged over the sequences and ranks.

Source: the two time scales of the background (AMPA fast, NMDA and CaMKII slow), as one explicit, reversible call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bio_inspired_nanochat.common import several, sum_over_ranks
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic.state import SynapseState


@dataclass(frozen=True)
class Consolidation:
    """What `consolidate` did. By parameter name: `added`, the sum that joined each weight, and `before`, the weight without it."""

    strength: float
    added: dict[str, Tensor] = field(repr=False)
    before: dict[str, Tensor] = field(repr=False)

    def norm(self) -> float:
        """Frobenius norm of all that was added, relative to that of the weights before."""
        parts = [math.sqrt(sum(float(value.double().square().sum()) for value in of.values())) for of in (self.added, self.before)]
        return parts[0] / parts[1] if parts[1] else math.inf if parts[0] else 0.0


@torch.no_grad()
def consolidate(model: nn.Module, state: SynapseState, strength: float = 1.0) -> Consolidation:
    """Add strength times the mean fast weights of `state` to the slow weights of `model` (a GPT), and return what `rollback` needs.

    The state is not changed. In a distributed run every rank must call it; all add the mean over the ranks.
    Raises UserError for a strength that is not finite, a model without fast weights and a state of another model.
    """
    if not math.isfinite(strength):
        raise UserError(f"strength={strength} is not finite: 0 adds nothing, 1 all that the fast weights hold")
    if len(model.blocks) != len(state.layers) or not all(b.fits(s) for b, s in zip(model.blocks, state.layers, strict=True)):
        raise UserError("this state belongs to another model: make one with model.init_state")
    added, before = {}, {}
    for index, (block, layer_state) in enumerate(zip(model.blocks, state.layers, strict=True)):
        names = {layer: name for name, layer in block.named_modules()}
        for key, layer in block.fast_layers().items():
            name = f"blocks.{index}.{names[layer]}.weight"
            change = strength * layer.density.as_matrix(layer_state.fast[key])
            if several():
                change = sum_over_ranks(change) / dist.get_world_size()
            before[name] = layer.weight.detach().clone()
            added[name] = change.to(layer.weight.dtype)
            layer.weight += added[name]
    if not added:
        raise UserError("this model has no fast weights to consolidate: train one with --syn_cfg.hebb=delta")
    return Consolidation(strength, added, before)


@torch.no_grad()
def rollback(model: nn.Module, done: Consolidation) -> None:
    """Restore the exact weights from before `done`.

    Raises UserError, and changes nothing, when the weights are no longer those that `consolidate` left: another model, or one that was
    trained or consolidated again since (take back the last consolidation first).
    """
    weights = dict(model.named_parameters())
    for name, value in done.before.items():
        mine = weights.get(name)
        if mine is None or mine.shape != value.shape or not torch.equal(mine, (value + done.added[name]).to(mine.device)):
            raise UserError(f"{name} has changed since this consolidation: only the last one can be taken back, before further training")
    for name, value in done.before.items():
        weights[name].copy_(value)


def sleep(model: nn.Module, idx: Tensor, strength: float = 1.0) -> Consolidation:
    """Read token ids [B, T] into a fresh state of `model` (a GPT) and consolidate it: what training calls every so many steps."""
    state = model.init_state(*idx.shape)
    model.step(idx, state)
    return consolidate(model, state, strength)
