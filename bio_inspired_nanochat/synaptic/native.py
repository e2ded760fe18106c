"""Attention of running sequences in the Rust extension: one call per layer reads the new tokens and moves the terminals on.

Dimensions: B batch, H query heads, D head size, t new tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import rust
from bio_inspired_nanochat.synaptic.snapshot import Snapshot
from bio_inspired_nanochat.synaptic.state import Chunk, LayerState

HELD = ("k", "v", "calcium", "vesicles", "open_drive", "beta", "barrier")


class _Prepared(NamedTuple):
    """What the extension holds of a layer, the parameters that it was made from, and why the terminals cannot run, or None."""

    made_from: Snapshot
    site: Any
    obstacle: str | None


_PREPARED: WeakKeyDictionary[nn.Module, _Prepared] = WeakKeyDictionary()


def attend(layer: Any, x: Tensor, q: Tensor, state: LayerState, chunk: Chunk) -> Tensor | None:
    """Attention output [B, H, t, D] of a chunk whose keys and values are in the cache; the terminals in `state` advance in place.

    layer: a `CausalSelfAttention`; with backend='auto' it is served if it is synaptic, on a CPU, and the extension can. None,
    and nothing is changed, where the chunk is for another execution. Raises UserError where backend='rust' cannot serve it.
    """
    synapse = getattr(layer, "synapse", None)
    if layer.backend != "rust" and (layer.backend != "auto" or synapse is None or q.device.type != "cpu"):
        return None
    held = {name: getattr(state, name) for name in HELD}
    obstacle = _obstacle(layer, q, held, chunk)
    prepared = _prepare(layer, synapse) if obstacle is None else None
    if prepared is None or prepared.obstacle is not None:
        obstacle = obstacle or prepared.obstacle
        if layer.backend == "rust":
            raise UserError(f"backend='rust' cannot serve layer {layer.layer}: {obstacle}; use backend='auto'")
        rust.notice()
        return None
    gate = None
    if state.barrier is not None:
        gate = synapse.gate_drive(x).float() + synapse.gate_bias.float()
    y, finite = rust.advance(prepared.site, q, held, chunk.starts, chunk.lengths, gate)
    if not finite and state.beta is not None:
        raise FloatingPointError(f"layer {layer.layer}: the presynaptic drive is not finite (NaN or infinity in q or k)")
    return y


def _obstacle(layer: Any, q: Tensor, held: dict[str, Tensor | None], chunk: Chunk) -> str | None:
    if chunk.doc is not None:
        return "documents are kept apart"
    if obstacle := rust.obstacle(q, held["k"]):
        return obstacle
    if unknown := layer.state_fields.difference(HELD):
        return f"the terminals have optional parts ({', '.join(sorted(unknown))})"
    if not all(value is None or value.is_contiguous() for value in held.values()):
        return "tensors of the state are not contiguous"
    return "release is drawn at random" if chunk.noise is not None else None


def _prepare(layer: Any, synapse: Any) -> _Prepared:
    """The layer as the extension holds it, made again whenever a parameter has another value."""
    owners = () if synapse is None else (synapse,) if synapse.genome is None else (synapse, synapse.genome)
    now = [p for owner in owners for name, p in owner._parameters.items() if name != "gate_weight"]
    found = _PREPARED.get(layer)
    if found is None or not found.made_from.holds(now):
        found = _PREPARED[layer] = _Prepared(Snapshot(now), *_make(layer, synapse))
    return found


def _make(layer: Any, synapse: Any) -> tuple[Any, str | None]:
    shape = {"heads": layer.n_head, "kv_heads": layer.n_kv_head, "dim": layer.head_dim, "tick": layer.tick, "scale": layer.scale}
    shape |= {"window": layer.window, "soft": False, "barrier": "none"}
    if synapse is None:
        return rust.layer(shape), None
    cfg = layer.cfg
    theta, params = (synapse.theta_value(), synapse.params()) if cfg.presyn else (None, None)
    if params is not None and (obstacle := rust.terminal_obstacle(params, random=False)):
        return None, obstacle
    strength = None if cfg.barrier == "none" else synapse.strength()
    if cfg.barrier == "linear":
        strength = strength * synapse._slopes(strength.device)
    return rust.layer(shape | {"soft": cfg.drive == "softplus", "barrier": cfg.barrier}, theta, params, strength), None
