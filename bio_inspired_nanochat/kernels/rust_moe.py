"""Experts in the Rust extension: routing and top-k dispatch of a few tokens, statistics of a route, and the accounts between steps.

See `kernels.rust`, whose conditions hold here. Dimensions: B batch, t new tokens, S = B t, E slots, k choices, D width, F hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels import rust
from bio_inspired_nanochat.kernels.rust import array
from bio_inspired_nanochat.kernels.types import PresynParams

# Up to here an even spread of the pairs leaves each expert so few rows that reading its matrices is the cost; above, PyTorch's products win.
FEW_TOKENS = 32


def obstacle(backend: str, x: Tensor, *others: Tensor) -> str | None:
    """Why the extension may not or cannot take these tensors of experts, or None. x may be bfloat16, the others are float32 or indices."""
    if torch.compiler.is_compiling():
        return "it does not run inside of a compiled graph"
    if backend not in ("auto", "rust"):
        return f"backend={backend!r} was asked for"
    if found := rust.obstacle(x):
        return found
    for other in others:
        if other.device.type != "cpu":
            return f"the tensors are on {other.device.type}, not on cpu"
        if other.is_floating_point() and other.dtype != torch.float32:
            return f"parameters and state are {str(other.dtype).removeprefix('torch.')}, not float32"
        if not other.is_contiguous():
            return "parameters or state are not contiguous"
        if other.requires_grad and torch.is_grad_enabled():
            return "it computes no gradients (use torch.no_grad())"
    return None


def router(parts: Mapping[str, Any], kinetics: PresynParams | None, plain: PresynParams | None) -> Any:
    """What does not change from token to token of one layer, for `mix`.

    parts: k, tick, fair; alive, lead, child, bank, balance, blend, tie [E]; codes, a list of (gain, unit vectors [E, d]);
    lateral [E, E] or None; vesicle_gain; nmda, (gain, decay) or None. kinetics: experts as terminals, or None; plain: the same with
    gains of 1, where the release scales the output. Raises UserError for sizes that do not fit.
    """
    given: dict[str, Any] = {name: array(value) if isinstance(value, Tensor) else value for name, value in parts.items()}
    given["codes"] = [(gain, array(units.contiguous())) for gain, units in parts["codes"]]
    for name, value in (("terminals", kinetics), ("plain", plain)):
        given[name] = None if value is None else rust.terminals(value)
    return rust._call("Router", given)


def mix(
    site: Any, x: Tensor, matrices: Mapping[str, Any], state: Mapping[str, Tensor] | None, starts: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, bool]:
    """What the routed experts add for new tokens of running sequences.

    site: a `router`; x [B, t, D] float32 or bfloat16; matrices: router [E, D], probes, a list of [d, D] in the order of the codes,
    w_in [E, F, D], w_out [E, D, F], all float32; state: calcium, vesicles, open_drive, slow [B, E] float32, or None; all contiguous.
    starts, counts: position of the first new token and number of real ones, per row.

    Returns y [B, t, D] in x's dtype (zero for padding) and whether all demand was finite; the state advances in place. With bfloat16
    the router rounds as PyTorch's does, the experts compute in float32.
    """
    y = torch.empty(x.shape)
    given = {name: [array(one) for one in value] if isinstance(value, list) else array(value) for name, value in matrices.items()}
    held = None if state is None else {name: array(value) for name, value in state.items()}
    tokens = {"x": rust._contiguous(x, torch.float32), "y": array(y), "starts": list(starts), "counts": list(counts)}
    tokens["brief"] = x.dtype == torch.bfloat16
    finite = rust._call("mix_experts", site, given, held, tokens, torch.get_num_threads())
    return y.to(x.dtype), finite


def sums(x: Tensor, route: Mapping[str, Tensor], child: Tensor) -> dict[str, Tensor]:
    """Statistics of where tokens x [S, D] went: route has expert, gates [S, k] and bare, separate, winner [S, E]; child [E].

    Returns float32 load, demand, gates, both [E], together [E, E], inputs [E, D] and common [D], as in `synaptic.moe.Routing`.
    """
    slots, width = len(child), x.shape[1]
    found = {name: torch.empty(slots) for name in ("load", "demand", "gates", "both")}
    found |= {"together": torch.empty(slots, slots), "inputs": torch.empty(slots, width), "common": torch.empty(width)}
    given = {name: rust._contiguous(value, torch.float32 if value.is_floating_point() else None) for name, value in route.items()}
    given |= {"x": rust._contiguous(x, torch.float32), "child": array(child)}
    rust._call("routing_sums", given, {name: array(value) for name, value in found.items()}, torch.get_num_threads())
    return found


def settle(
    kept: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    identity: Tensor | None,
    rows: Tensor,
    knobs: Mapping[str, float],
) -> None:
    """Apply the statistics of a training step to accounts `kept`, identities [E, d] and router rows [E, D], all in place.

    kept: buffers of `synaptic.Accounts` by name; found: tokens [], and sums as `sums` returns them; knobs: see `structural.metabolism`.
    """
    given = {name: value.item() if name == "tokens" else rust._contiguous(value, torch.float32) for name, value in found.items()}
    rust._call("settle_accounts", {name: array(value) for name, value in kept.items()}, given, array(identity), array(rows), dict(knobs))
