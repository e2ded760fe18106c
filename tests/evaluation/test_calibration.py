"""Calibration error: zero for a model that is right as often as it is sure, the gap otherwise."""

import math

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.calibration import calibration_error


def sure(confidence: float, count: int) -> torch.Tensor:
    """Logits [count, 2] that give the first word this probability."""
    return torch.log(torch.tensor([[confidence, 1 - confidence]])).expand(count, -1)


@pytest.mark.parametrize("confidence, right, gap", [(0.8, 80, 0.0), (0.8, 50, 0.3), (0.6, 100, 0.4), (1 - 1e-9, 0, 1.0)])
def test_the_error_is_the_gap_between_confidence_and_accuracy(confidence: float, right: int, gap: float) -> None:
    targets = torch.tensor([0] * right + [1] * (100 - right))
    assert calibration_error(sure(confidence, 100).double(), targets) == pytest.approx(gap, abs=1e-6)


def test_opposite_gaps_in_different_bins_do_not_cancel() -> None:
    logits = torch.cat([sure(0.9, 50), sure(0.6, 50)])
    targets = torch.tensor([0] * 30 + [1] * 20 + [0] * 45 + [1] * 5)  # 0.6 where 0.9 is claimed, 0.9 where 0.6 is
    assert calibration_error(logits, targets) == pytest.approx(0.3, abs=1e-6)
    assert calibration_error(logits, targets, bins=1) == pytest.approx(0.0, abs=1e-6)


def test_ignored_targets_do_not_count_and_none_at_all_is_an_error() -> None:
    logits, targets = sure(0.8, 4), torch.tensor([0, -1, -1, -1])
    assert calibration_error(logits, targets) == pytest.approx(0.2, abs=1e-6)
    assert math.isnan(calibration_error(logits * torch.nan, targets))
    with pytest.raises(UserError, match="no target"):
        calibration_error(logits, torch.full((4,), -1))
    with pytest.raises(UserError, match="bins=0"):
        calibration_error(logits, targets, bins=0)
