"""The least that an operator must do: bytes between memory and chip, and matrix operations, at the device's peak.

A model of an ideal kernel, which reads each operand once, writes each result once and multiplies only unmasked pairs. A
whole synaptic layer needs no more than attention: it computes the logits once and keeps drive and bias on the chip.

Dimensions: D head size, T tokens, c tick length; all of it per pair of batch row and head.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bio_inspired_nanochat.training.hardware import peak_flops


class Floor(NamedTuple):
    """Forward and backward of one operator."""

    forward_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float

    def seconds(self, flops: float | None, bandwidth: float | None) -> float | None:
        """Forward and backward at a peak of operations and bytes per second; None where neither is known."""
        if flops is None and bandwidth is None:
            return None
        total = 0.0
        for moved, done in ((self.forward_bytes, self.forward_flops), (self.backward_bytes, self.backward_flops)):
            total += max(moved / bandwidth if bandwidth else 0.0, done / flops if flops else 0.0)
        return total


# Per operator, forward and backward: [T, D] operands in the model's dtype, [N, T] planes of drive or bias in float32, and
# products over the pairs of queries and keys. attention: q k v y, and q k v y dy dq dk dv; its backward forms the logits
# again. drive: q k U, and q k dU dq dk. presyn: U beta, and U dbeta dU.
_NEEDS = {
    "attention": ((4, 0, 2), (8, 0, 5)),
    "biased attention": ((4, 1, 2), (8, 2, 5)),
    "drive": ((2, 1, 1), (4, 1, 3)),
    "presyn": ((0, 2, 0), (0, 3, 0)),
    "layer": ((4, 0, 2), (8, 0, 5)),
}


def floor_of(operator: str, pairs: int, tokens: int, head_dim: int, tick: int, element_size: int) -> Floor:
    """What `operator` needs for `pairs` of (row, head). Planes and products count only what causality leaves. Equation (H10)."""
    seen = tokens * (tokens + 1) / 2
    ticks = -(-tokens // tick)
    plane = 4 * (tick * ticks * (ticks + 1) / 2)
    moved, flops = [], []
    for operands, planes, products in _NEEDS[operator]:
        moved.append(pairs * (operands * tokens * head_dim * element_size + planes * plane))
        flops.append(pairs * products * 2 * head_dim * seen)
    return Floor(*moved, *flops)


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float | None, float | None]:
    """Operations and bytes per second of a device, each None where it is not known."""
    return peak_flops(device, dtype), _bandwidth(device)


def _bandwidth(device: torch.device) -> float | None:
    """Bytes per second of a CUDA device's memory: two transfers per clock (the clock is given in kHz, the bus in bits)."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * clock * width / 8 or None
