"""Experts of running sequences in the Rust extension: one call per layer routes the new tokens, runs the chosen and moves the state on.

Dimensions: B batch, t new tokens, D width, E slots.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import rust, rust_moe
from bio_inspired_nanochat.synaptic.snapshot import Snapshot
from bio_inspired_nanochat.synaptic.state import Chunk, LayerState

READ = ("alive", "lead", "child", "energy", "balance", "blend", "tie")  # buffers of the accounts that a route depends on
MAPS = ("gate_probe", "gate_cargo")  # large parameters, which are read where they are


class _Prepared(NamedTuple):
    """What the extension holds of a layer, and the small parameters and buffers that it was made from."""

    made_from: Snapshot
    site: Any


_PREPARED: WeakKeyDictionary[nn.Module, _Prepared] = WeakKeyDictionary()


def mix(layer: Any, x: Tensor, state: LayerState, chunk: Any) -> Tensor | None:
    """What the routed experts add for x [B, t, D], the next tokens of running sequences; `state.experts` advances in place.

    layer: a `SynapticMoE`; with backend='auto' it is served on a CPU when the tokens are few and the extension can. None, and nothing
    is changed, where the chunk is for PyTorch. Raises UserError where backend='rust' cannot serve it.
    """
    if layer.backend not in ("auto", "rust") or (layer.backend == "auto" and x.device.type != "cpu"):
        return None
    matrices = _matrices(layer)
    held = state.experts._asdict() if state.experts is not None else None
    probes = matrices["probes"]
    flat = [value for name, value in matrices.items() if name != "probes"] + probes + list((held or {}).values())
    obstacle = rust_moe.obstacle(layer.backend, x, *flat)
    if obstacle is None and (not isinstance(chunk, Chunk) or chunk.doc is not None):
        obstacle = "documents are kept apart" if isinstance(chunk, Chunk) else "the step is captured as a graph"
    if layer.backend == "rust" and obstacle is not None:
        raise UserError(f"backend='rust' cannot serve the experts of a layer: {obstacle}; use backend='auto'")
    if obstacle is not None or (layer.backend == "auto" and x.shape[0] * x.shape[1] > rust_moe.FEW_TOKENS):
        rust.notice()
        return None
    y, finite = rust_moe.mix(_prepare(layer), x, matrices, held, chunk.starts, chunk.lengths)
    if not finite:
        raise FloatingPointError("the demand for experts is not finite (NaN or infinity in the input of a layer)")
    return y


def _matrices(layer: Any) -> dict[str, Any]:
    synapse = layer.synapse
    probes = [getattr(synapse, name) for name in MAPS if hasattr(synapse, name)]
    return {"router": layer.router, "probes": probes, "w_in": layer.experts.w_in, "w_out": layer.experts.w_out}


def _prepare(layer: Any) -> Any:
    """The router as the extension holds it, made again whenever a small parameter or an account has another value."""
    values = [getattr(layer.accounts, name) for name in READ]
    if layer.synapse is not None:
        owners = (layer.synapse, *layer.synapse.children())
        values += [p for owner in owners for name, p in owner._parameters.items() if name not in MAPS]
    found = _PREPARED.get(layer)
    if found is None or not found.made_from.holds(values):
        found = _PREPARED[layer] = _Prepared(Snapshot(values), _make(layer))
    return found.site


@torch.no_grad()
def _make(layer: Any) -> Any:
    kept, synapse = layer.accounts, layer.synapse
    parts: dict[str, Any] = {name: getattr(kept, name) for name in READ if name != "energy"}
    parts |= {"bank": layer.kappa * (kept.energy - 0.5), "k": layer.k, "fair": layer.fair}
    parts |= {"codes": [], "lateral": None, "vesicle_gain": 0.0, "nmda": None, "tick": 1}
    if synapse is None:
        return rust_moe.router(parts, None, None)
    cfg = synapse.cfg
    parts["tick"] = cfg.tick
    codes = (("identity", "identity_gain", cfg.router_identity), ("snare", "snare_gain", cfg.snare_codes))
    parts["codes"] = [(getattr(synapse, gain).item(), F.normalize(getattr(synapse, name), dim=-1)) for name, gain, on in codes if on]
    if cfg.expert_lateral:
        parts["lateral"] = (synapse.expert_lateral * synapse.nearness(kept.lead)).contiguous()
    if cfg.nmda:
        parts["nmda"] = (synapse.nmda_gain.item(), math.exp(-cfg.tick / cfg.tau_nmda))
    kinetics = synapse.params() if cfg.expert_plasticity else None
    plain = None
    if kinetics is not None and cfg.vesicle_output:
        one = torch.ones_like(kinetics.gain_release)
        plain = kinetics._replace(gain_release=one, gain_depletion=one)
        parts["vesicle_gain"] = synapse.vesicle_gain.item()
    return rust_moe.router(parts, kinetics, plain)
