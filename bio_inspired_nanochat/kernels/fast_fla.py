"""Fast weights on CUDA by flash-linear-attention (package `fla-core`, optional).

fla keeps the state as F^T and reads after its write: o_t = F_t q_t. With the keys of the next token as queries, o_t is that
token's strictly past read z_{t+1}; the first one reads the state that it starts with. `chunk_gated_delta_rule` is the delta rule,
`chunk_gla` with a constant gate per pre mode is hebb (Yang et al., 2024).

Dimensions: B batch, T tokens, r modes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re

import torch
from torch import Tensor

LEAST_MODES = 16
MISCOMPILING = ((3, 4), (3, 7, 1))  # Triton from, to: fla's own check


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "the package fla-core is not installed (pip install 'bio-inspired-nanochat[fla]')"
    return None


def obstacle(u: Tensor, rule: str, fresh: Tensor | None, live: Tensor | None) -> str | None:
    """Why fla cannot serve a call with keys u [B, T, r], or None. The arguments are those of `fast_weights`."""
    if u.device.type != "cuda":
        return f"the tensors are on {u.device.type}"
    if u.dtype == torch.float64:
        return "it has no float64"
    if fresh is not None or live is not None:
        return "documents and padding are kept apart"
    if u.shape[2] < LEAST_MODES or u.shape[2] & (u.shape[2] - 1):
        return f"{u.shape[2]} modes are not a power of two from {LEAST_MODES} on"
    if missing := _missing():
        return missing
    if rule == "delta" and torch.cuda.get_device_capability(u.device)[0] == 9 and MISCOMPILING[0] <= _triton() < MISCOMPILING[1]:
        return "fla stops in its backward pass of the delta rule on Hopper cards with Triton 3.4 to 3.7.0, which compile it wrongly"
    return None


def _triton() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("triton"))[:3])


def fast_weights(u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, start: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """See `kernels.fast_weights.fast_weights`."""
    queries = torch.cat([u[:, 1:], torch.zeros_like(u[:, :1])], dim=1)[:, :, None]
    state, decay = start.transpose(1, 2).contiguous()[:, None], torch.log(gamma)
    keep = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if rule == "delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        fade = decay.expand(u.shape[:2])[..., None]
        reads, final = chunk_gated_delta_rule(queries, u[:, :, None], m[:, :, None].to(u.dtype), fade, eta[:, :, None].to(u.dtype), **keep)
    else:
        from fla.ops.gla import chunk_gla

        writes = (eta[..., None] * m).to(u.dtype)[:, :, None]
        reads, final = chunk_gla(queries, u[:, :, None], writes, decay.expand(u.shape)[:, :, None], **keep)
    first = torch.matmul(start, u[:, 0, :, None].to(start.dtype))[:, None, :, 0].to(reads.dtype)
    return torch.cat([first, reads[:, :-1, 0]], dim=1).to(u.dtype), final[:, 0].transpose(1, 2)
