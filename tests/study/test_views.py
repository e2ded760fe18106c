"""Where two runs have spent the same: losses read from their curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bio_inspired_nanochat.study.views import Curve, meet, read_curve, step_variances


def curve(points: dict[float, float], speed: float = 1.0, flops: float = 1.0) -> Curve:
    tokens = tuple(points)
    return Curve(tokens, tuple(t * flops for t in tokens), tuple(t / speed for t in tokens), tuple(points.values()))


def test_between_evaluations_the_loss_is_linear_in_the_logarithm() -> None:
    one = curve({100.0: 4.0, 400.0: 2.0})
    assert one.at("tokens", 200.0) == pytest.approx(3.0)  # the geometric middle
    assert (one.at("tokens", 100.0), one.at("tokens", 400.0)) == (4.0, 2.0)
    assert one.at("tokens", 99.0) is None and one.at("tokens", 401.0) is None, "nothing is extrapolated"


def test_a_slow_model_is_compared_where_its_rival_had_the_same_time() -> None:
    fast, slow = curve({100.0: 4.0, 200.0: 3.0, 400.0: 2.5}, speed=2.0), curve({100.0: 3.5, 200.0: 2.6, 400.0: 2.2})
    assert meet("tokens", slow, fast) == (400.0, 2.2, 2.5)
    budget, ours, theirs = meet("seconds", slow, fast)
    assert budget == 200.0 and ours == 2.6 and theirs == 2.5, "at equal time the order turns round"
    heavy = curve({100.0: 3.5, 400.0: 2.2}, flops=4.0)
    assert meet("flops", heavy, fast) == (400.0, 3.5, 2.5)
    assert meet("flops", curve({400.0: 2.2}, flops=4.0), fast) is None


def test_a_curve_is_read_from_a_log_without_the_time_of_evaluations(tmp_path: Path) -> None:
    events = [
        {"kind": "step", "step": 10, "tokens": 1000, "tok_per_s": 100.0, "loss": 4.0, "grad_norm": 1.0},
        {"kind": "eval", "step": 10, "val_loss": 4.1},
        {"kind": "step", "step": 20, "tokens": 2000, "tok_per_s": 50.0, "loss": 3.0, "grad_norm": 1.0},
        {"kind": "eval", "step": 15, "val_loss": 3.5},
        {"kind": "eval", "step": 20, "val_loss": None},
        {"kind": "eval", "step": 20, "val_loss": 3.1},
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, events)) + '\n{"kind": "eval", "st')
    found = read_curve(log, 6.0)
    assert found == Curve((1000.0, 1500.0, 2000.0), (6000.0, 9000.0, 12000.0), (10.0, 20.0, 30.0), (4.1, 3.5, 3.1))
    assert read_curve(tmp_path / "none.jsonl", 6.0).loss == ()


def test_a_trend_is_no_variance_but_jumps_are(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"

    def variance(losses: list[float]) -> float:
        lines = [json.dumps({"kind": "step", "step": i, "loss": loss, "grad_norm": 1.0}) for i, loss in enumerate(losses)]
        log.write_text("\n".join(lines))
        return step_variances(log)["train.loss_variance"]

    falling = variance([4 - 0.01 * i for i in range(100)])
    jumping = variance([4 + (-1) ** i for i in range(100)])
    assert math.isclose(falling, 0.01**2 / 2, rel_tol=1e-6) and jumping == pytest.approx(2.0)
    assert step_variances(tmp_path / "none.jsonl") == {"train.loss_variance": None, "train.grad_norm_variance": None}
