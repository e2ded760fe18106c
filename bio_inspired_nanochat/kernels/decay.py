"""Sums that decay at constant rates, as matrix products instead of a loop over time.

Dimensions: B batch, N steps, M values per rate, K rates.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # longest sequence that one matrix of decays covers; longer ones go block by block, and over the blocks again


def decayed_sums(values: Tensor, gamma: Tensor, segment: Tensor | None = None) -> Tensor:
    """y[n] = sum over j <= n of gamma^(n - j) values[j], over the steps j of n's segment only. Equation (H7).

    values: [B, N, M, K]; gamma: [K] in [0, 1], one decay per rate; segment: [B, N] non-decreasing integers, or None for one
    segment. Returns [B, N, M, K]; differentiable in values and gamma.
    """
    batch, steps, width, rates = values.shape
    if steps > BLOCK:
        return _over_blocks(values, gamma, segment)
    distance = _distances(steps, values)
    decay = torch.pow(gamma[:, None, None], distance.clamp(min=0)) * (distance >= 0)
    if segment is None:
        flat = values.permute(3, 1, 0, 2).reshape(rates, steps, batch * width)
        return torch.bmm(decay, flat).view(rates, steps, batch, width).permute(2, 1, 3, 0)
    decay = decay * (segment[:, None, :, None] == segment[:, None, None, :])
    return torch.matmul(decay, values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _distances(steps: int, like: Tensor) -> Tensor:
    """n - j, [N, N]."""
    places = torch.arange(steps, device=like.device, dtype=like.dtype)
    return places[:, None] - places


def _over_blocks(values: Tensor, gamma: Tensor, segment: Tensor | None) -> Tensor:
    batch, steps, width, rates = values.shape
    blocks = -(-steps // BLOCK)
    pad = blocks * BLOCK - steps
    values = F.pad(values, (0, 0, 0, 0, 0, pad)).view(batch * blocks, BLOCK, width, rates)
    if segment is not None:
        segment = torch.cat([segment, segment[:, -1:].expand(-1, pad)], dim=1).view(batch * blocks, BLOCK)
    inside = decayed_sums(values, gamma, segment).view(batch, blocks, BLOCK, width, rates)
    last = None if segment is None else segment.view(batch, blocks, BLOCK)[:, :, -1]
    carried = decayed_sums(inside[:, :, -1], gamma**BLOCK, last)[:, :-1]
    fade = torch.pow(gamma, torch.arange(1, BLOCK + 1, device=gamma.device, dtype=gamma.dtype)[:, None])[:, None]
    incoming = F.pad(carried[:, :, None] * fade, (0, 0, 0, 0, 0, 0, 1, 0))
    if segment is not None:
        known = segment.view(batch, blocks, BLOCK) == F.pad(last[:, :-1], (1, 0), value=-1)[:, :, None]
        incoming = incoming * known[..., None, None]
    return (inside + incoming).reshape(batch, blocks * BLOCK, width, rates)[:, :steps]
