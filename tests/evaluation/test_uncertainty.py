"""Calibration of next tokens: planted predictors whose errors are known, and draws that disagree by a known amount."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation import uncertainty
from bio_inspired_nanochat.evaluation.calibration import auroc, equal_mass_error
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting
from bio_inspired_nanochat.evaluation.suite import evaluate
from tests.contract import make_model
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import Planted, guess, text


class Confident(Planted):
    """Gives word 0 the probability that belongs to the token just read."""

    def __init__(self, *confidences: float) -> None:
        super().__init__(guess, vocab_size=2)
        self.table = torch.tensor([[math.log(p), math.log(1 - p)] for p in confidences])

    def logits(self, idx: Tensor) -> Tensor:
        return self.table[idx]


class Wavering(Confident):
    """Its draws take turns between one opinion and the opposite one after token 0, and agree after token 1."""

    stochastic = True

    def run(self, idx: Tensor, noise_seed: int, noise_step: int, sequence_ids: Tensor) -> SimpleNamespace:
        logits = self.logits(idx)
        turned = logits.flip(-1) if noise_step % 2 else logits
        return SimpleNamespace(logits=torch.where((idx == 0)[..., None], turned, logits))


def measured(monkeypatch: pytest.MonkeyPatch, model: Planted, read: list[int], said: list[int], **changes) -> dict[str, float | None]:
    """The metrics on one row of these tokens and targets, reordered so that both halves are alike."""
    order = torch.arange(len(read)).view(-1, 2).T.flatten()
    batch = (torch.tensor([read])[:, order], torch.tensor([said])[:, order], torch.tensor([0]))
    monkeypatch.setattr(uncertainty, "text_batches", lambda *_: iter([batch]))
    return evaluate(model, ["calibration"], EvaluationSetting(**changes))


def outcomes(right: int, count: int) -> list[int]:
    return [0] * right + [1] * (count - right)


def test_a_calibrated_predictor_has_no_error_and_an_overconfident_one_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0] * 1000 + [1] * 1000
    good = measured(monkeypatch, Confident(0.8, 0.6), read, outcomes(800, 1000) + outcomes(600, 1000))
    assert good["calibration.ece"] == pytest.approx(0, abs=1e-6) and good["calibration.temperature"] == 1
    assert good["calibration.ece_tuned"] < 0.03 and good["calibration.accuracy"] == 0.7
    assert good["calibration.nll"] == pytest.approx(good["calibration.entropy"], abs=1e-6), "a calibrated model loses its entropy"
    bold = measured(monkeypatch, Confident(0.9, 0.9), read, outcomes(1500, 2000))
    assert bold["calibration.ece"] == pytest.approx(0.15, abs=1e-6)
    assert bold["calibration.temperature"] == 2, "log-odds of ln 9 where ln 3 are due"
    assert bold["calibration.ece_tuned"] < 0.03


def test_uncertainty_tells_errors_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0] * 100 + [1] * 100
    knows_itself = measured(monkeypatch, Confident(0.6, 0.9), read, [1] * 100 + [0] * 100)
    fools_itself = measured(monkeypatch, Confident(0.6, 0.9), read, [0] * 100 + [1] * 100)
    always_right = measured(monkeypatch, Confident(0.6, 0.9), read, [0] * 200)
    assert (knows_itself["calibration.auroc"], fools_itself["calibration.auroc"]) == (1, 0)
    assert always_right["calibration.auroc"] is None and always_right["calibration.mc_ece"] is None


def test_draws_that_disagree_carry_information(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0] * 100 + [1] * 100
    found = measured(monkeypatch, Wavering(0.9, 0.9), read, [1] * 100 + [0] * 100, draws=4)
    own = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert found["calibration.mc_entropy"] == pytest.approx((math.log(2) + own) / 2, abs=1e-5)
    assert found["calibration.mc_information"] == pytest.approx((math.log(2) - own) / 2, abs=1e-5)
    assert found["calibration.mc_nll"] == pytest.approx((math.log(2) - math.log(0.9)) / 2, abs=1e-5)
    assert found["calibration.mc_auroc_information"] == found["calibration.mc_auroc"] == 1
    assert found["calibration.auroc"] == 0.5, "its expectation is equally sure of both"


def test_bins_hold_equal_numbers_and_equal_confidences_stay_together() -> None:
    confidence = torch.tensor([0.1] * 50 + [0.2] * 50)
    right = torch.tensor([False] * 45 + [True] * 5 + [True] * 50)  # 0.1 where 0.1 is said, 1 where 0.2 is said
    assert equal_mass_error(confidence, right, bins=2) == pytest.approx(0.4, abs=1e-6)
    assert equal_mass_error(confidence, right, bins=1) == pytest.approx(0.4, abs=1e-6)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert equal_mass_error(torch.full((100,), 0.5), (torch.arange(100) % 2 == 0)[shuffled]) == pytest.approx(0, abs=1e-9)
    assert math.isnan(equal_mass_error(confidence * torch.nan, right))
    for bad in ({"bins": 0}, {"confidence": torch.empty(0), "right": torch.empty(0, dtype=torch.bool)}):
        with pytest.raises(UserError, match="bins=0|no answer"):
            equal_mass_error(**{"confidence": confidence, "right": right} | bad)


def test_the_area_under_the_curve_counts_pairs() -> None:
    uncertain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for wrong, area in (([0, 0, 1, 1], 1.0), ([1, 1, 0, 0], 0.0), ([0, 1, 0, 1], 0.75), ([1, 0, 0, 1], 0.5)):
        assert auroc(uncertain, torch.tensor(wrong).bool()) == area
    assert auroc(torch.ones(4), torch.tensor([0, 1, 0, 1]).bool()) == 0.5
    assert auroc(uncertain, torch.zeros(4).bool()) is None is auroc(uncertain, torch.ones(4).bool())


def test_draws_of_a_model_are_those_of_the_seed_and_not_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("full", vocab_size=tokenizer().vocab_size, bos_token_id=tokenizer().bos_id, sequence_len=32)
    setting = EvaluationSetting(tokenizer=tokenizer(), source=text(), tokens=96, draws=2, batch_size=3)
    once = evaluate(model, ["calibration"], setting)
    assert once == evaluate(model, ["calibration"], setting)
    single = evaluate(model, ["calibration"], dataclasses.replace(setting, batch_size=1))
    assert {name: pytest.approx(value, abs=1e-5) for name, value in once.items()} == single
    other = evaluate(model, ["calibration"], dataclasses.replace(setting, seed=5))
    assert once["calibration.mc_information"] != other["calibration.mc_information"] and once["calibration.mc_information"] > 0
    assert once["calibration.nll"] == other["calibration.nll"]
    run, seen = model.run, []
    monkeypatch.setattr(model, "run", lambda idx, **options: seen.append(options) or run(idx, **options))
    evaluate(model, ["calibration"], setting)
    drawn = {(int(row), one["noise_step"]) for one in seen for row in one["sequence_ids"]}
    assert drawn == {(row, draw) for row in range(3) for draw in range(2)}, "every row and draw has noise of its own"
