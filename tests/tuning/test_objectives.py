"""Objectives: lower is better, a diverged candidate is the worst, the same seed is the same training."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.tasks.memory import Recall
from bio_inspired_nanochat.tuning.objectives import ObjectiveConfig, Score, curve_steps, evaluate, extrapolate, fitness

CPU = torch.device("cpu")
SMALL = {"steps": 4, "rows": 4, "eval_rows": 8, "n_layer": 1, "n_embd": 16, "head_dim": 8, "tasks": ("recall",)}
TASK = Recall(distance=8, spread=2, fillers=4, pairs=2, keys=6, values=4)
CONFIG = ObjectiveConfig(**SMALL, recall=TASK)


@pytest.fixture(autouse=True)
def base(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.getbasetemp() / "base"))


def test_a_candidate_scores_the_same_alone_and_among_others() -> None:
    one, other = SynapticConfig(), SynapticConfig(tau_c=5.0, lambda_loge=2.0)
    together, alone = evaluate(CONFIG, [one, other], [1, 2], CPU), evaluate(CONFIG, [other], [2], CPU)
    assert together[1][1].answer_loss == pytest.approx(alone[0][0].answer_loss, abs=1e-5)
    assert together[0][0].answer_loss != together[1][0].answer_loss != together[1][1].answer_loss
    assert together == evaluate(CONFIG, [one, other], [1, 2], CPU), "bit for bit"


@pytest.mark.parametrize("change", [{"tick": 4}, {"genome": "xi"}, {"beta_max": 2.0}])
def test_candidates_of_other_shapes_are_trained_beside(change: dict) -> None:
    mixed = evaluate(CONFIG, [SynapticConfig(), SynapticConfig(**change)], [0], CPU)
    assert all(math.isfinite(score.answer_loss) for row in mixed for score in row)


def test_a_diverged_candidate_is_infinitely_bad_and_does_not_touch_the_others() -> None:
    hot = dataclasses.replace(CONFIG, optim=OptimConfig(matrix_lr=1.0, embed_lr=10.0, head_lr=1.0, kinetics_lr=1.0))
    broken = Score(answer_loss=math.nan, diverged=True)
    assert fitness(CONFIG, broken, Score(answer_loss=1.0)) == math.inf
    assert all(math.isfinite(score.ece) or score.diverged for row in evaluate(hot, [SynapticConfig()], [0], CPU) for score in row)


def test_training_learns_the_task() -> None:
    easy = dataclasses.replace(CONFIG, steps=60, rows=16, eval_rows=64, recall=dataclasses.replace(TASK, pairs=1, spread=0, distance=1))
    (score,) = evaluate(easy, [SynapticConfig()], [0], CPU)[0]
    assert score.accuracy > 0.6 > easy.recall.chance and score.answer_loss < 1.0


def test_the_composite_weighs_quality_and_cost() -> None:
    config = ObjectiveConfig(objective="composite")
    reference = Score(answer_loss=1.0, accuracy=0.5, ece=0.1, lm_loss=3.0, lm_final=2.0, operations=100.0, state_bytes=50.0)
    assert fitness(config, reference, reference) == 0.0
    better = dataclasses.replace(reference, answer_loss=0.7, ece=0.0, lm_final=1.8)
    assert fitness(config, better, reference) == pytest.approx(0.7 * (-0.1 - 0.3 - 0.1) / 3)
    dear = dataclasses.replace(reference, operations=120.0, state_bytes=60.0)
    assert fitness(config, dear, reference) == pytest.approx(0.3 * 0.2)
    assert fitness(dataclasses.replace(config, cost_weight=0.0), dear, reference) == 0.0


def test_language_models_are_judged_by_the_end_of_their_learning_curve() -> None:
    config = ObjectiveConfig(**SMALL | {"steps": 12}, objective="composite", recall=TASK, context=16, vocab_size=270)
    (score,) = evaluate(config, [SynapticConfig()], [0], CPU)[0]
    assert not score.diverged and score.lm_final < score.lm_loss < math.log(270) and 0 <= score.ece <= 1
    assert score.operations > 0 and score.state_bytes > 0


def test_a_power_law_is_continued() -> None:
    steps = curve_steps(400)
    curve = [1.5 + 6.0 * s**-0.4 for s in steps]
    assert extrapolate(steps, curve, 4000) == pytest.approx(1.5 + 6.0 * 4000**-0.4, abs=0.02)
    assert extrapolate(steps, [2.0] * len(steps), 4000) == 2.0
    assert extrapolate(steps, [2.0 + 0.1 * i for i in range(len(steps))], 4000) == pytest.approx(2.65)
    assert math.isnan(extrapolate(steps, [math.nan, *curve[1:]], 4000))
