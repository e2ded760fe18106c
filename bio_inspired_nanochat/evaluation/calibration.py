"""Calibration: whether a model is right as often as it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError

BINS = 15


def calibration_error(logits: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1] of logits [..., V] for targets [...], -1 ignored; NaN for logits that are not finite.

    The gap between accuracy and mean confidence (the largest probability) in equal intervals of confidence, weighted by their share of the
    answers. Source: Naeini et al. 2015, Guo et al. 2017. Raises UserError without a target or a bin.
    """
    if bins < 1:
        raise UserError(f"bins={bins} is out of bounds [1, inf]")
    asked = targets >= 0
    chosen, wanted = logits[asked].double(), targets[asked]
    if not len(wanted):
        raise UserError("no target to compare with: all are -1")
    if not torch.isfinite(chosen).all():
        return float("nan")
    confidence, said = chosen.softmax(-1).max(-1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double, device=logits.device).index_add_(0, place, (said == wanted).double() - confidence)
    return (gaps.abs().sum() / len(wanted)).item()
