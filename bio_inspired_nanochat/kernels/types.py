"""Typed records of the presynaptic operators.

Dimensions: B batch, H query heads, T tokens (Tq queries, Tk keys), N ticks, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PresynParams(NamedTuple):
    """Kinetics of the terminals. Tensors are [H] float (per query head); times in tokens, rates per token.

    syt_mix is None for a single sensor (then `k_slow` is unused and None too).
    """

    tick: int
    tau_c: Tensor
    tau_rrp: Tensor
    alpha_ca: Tensor
    k_fast: Tensor
    k_slow: Tensor | None
    syt_mix: Tensor | None
    syt_gain: Tensor
    release_bias: Tensor
    release_rate: Tensor
    gain_release: Tensor
    gain_depletion: Tensor
    beta_max: float
    epsilon: float


class PresynState(NamedTuple):
    """State of every terminal (one per batch row, query head and key): all tensors are [B, H, Tk] float32.

    calcium >= 0 and vesicles in [0, 1] hold at the start of the open tick; open_drive is the drive that the open tick
    has collected so far (already divided by the tick length).
    """

    calcium: Tensor
    vesicles: Tensor
    open_drive: Tensor

    @classmethod
    def rest(cls, *shape: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> PresynState:
        """Terminals at birth, which is also their fixed point without drive: no calcium, a full pool."""
        zeros = torch.zeros(shape, device=device, dtype=dtype)
        return cls(zeros, torch.ones_like(zeros), torch.zeros_like(zeros))
