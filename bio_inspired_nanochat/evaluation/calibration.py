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


def equal_mass_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1] of confidences [N] for answers that were right or not [N], in bins of equal numbers of answers.

    Equal confidences stay in one bin, so that a constant confidence is compared with the accuracy once. NaN for confidences that are
    not finite. Source: Nixon et al. 2019. Raises UserError without an answer or a bin.
    """
    if bins < 1:
        raise UserError(f"bins={bins} is out of bounds [1, inf]")
    if not len(confidence):
        raise UserError("no answer to compare with: give at least one")
    if not torch.isfinite(confidence).all():
        return float("nan")
    ordered, order = confidence.double().sort()
    place = torch.searchsorted(ordered, ordered) * bins // len(ordered)
    gaps = torch.zeros(bins, dtype=torch.double, device=confidence.device).index_add_(0, place, right[order].double() - ordered)
    return (gaps.abs().sum() / len(ordered)).item()


def auroc(uncertainty: Tensor, wrong: Tensor) -> float | None:
    """Probability that a wrong answer is more uncertain than a right one, ties counting half; None when all are right or all wrong.

    uncertainty: [N]; wrong: [N] bool. NaN for an uncertainty that is not finite. Source: the Mann-Whitney statistic.
    """
    if not torch.isfinite(uncertainty).all():
        return float("nan")
    errors, rest = uncertainty[wrong].double(), uncertainty[~wrong].double().sort().values
    if not len(errors) or not len(rest):
        return None
    below, up_to = torch.searchsorted(rest, errors), torch.searchsorted(rest, errors, right=True)
    return ((below + up_to).double().mean() / (2 * len(rest))).item()
