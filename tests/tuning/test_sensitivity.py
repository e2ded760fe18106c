"""Screening finds the knobs that matter, and rejects the one that does nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.config import OptimizeConfig, SanityConfig, SensitivityConfig
from bio_inspired_nanochat.tuning.objectives import Score
from bio_inspired_nanochat.tuning.report import sign_flip
from bio_inspired_nanochat.tuning.sanity import TOLERANCE, minimise, readiness, rosenbrock, sphere, spread
from bio_inspired_nanochat.tuning.sensitivity import JUMP, elementary_effects, morris_points, sensitivity
from tests.tuning.fakes import Fake


def test_trajectories_move_every_axis_once_by_one_jump_on_the_grid() -> None:
    points = morris_points(5, 40, seed=3)
    assert points.shape == (40, 6, 5) and points.min() == 0 and points.max() == 1
    assert np.allclose((points * 3) % 1 % 0.999999, 0, atol=1e-5)
    moved = np.abs(np.diff(points, axis=1))
    assert np.allclose(np.sort(moved.sum(1), axis=1), JUMP) and ((moved > 1e-9).sum(2) == 1).all()
    assert not np.allclose(points, morris_points(5, 40, seed=4))


def test_elementary_effects_are_the_slopes_of_a_plane() -> None:
    points = morris_points(3, 6, seed=0)
    effects = elementary_effects(points, points @ np.array([2.0, -1.0, 0.0]))
    assert [np.mean(one) for one in effects] == pytest.approx([2.0, -1.0, 0.0], abs=1e-9) and all(len(one) == 6 for one in effects)


@pytest.mark.parametrize("changes", [{}, {"trajectories": 0}, {"points": 0}])
def test_knobs_are_ranked_by_what_they_do_and_the_inert_one_is_rejected(tmp_path: Path, changes: dict) -> None:
    """In the bowl tau_rrp does nothing, and theta, whose minimum lies far from where the search begins, does most."""
    config = SensitivityConfig(knobs=("tau_rrp", "theta", "tau_c"), top=1, device="cpu", **changes)
    record = sensitivity(config, config.space(), Fake(), tmp_path)
    assert record["top"] == ["theta"] and record["ranking"] == ["theta", "tau_c"] and list(record["rejected"]) == ["tau_rrp"]
    assert json.loads((tmp_path / "sensitivity.json").read_text())["top"] == ["theta"]


def test_a_screening_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = {"knobs": ("theta", "tau_c"), "trajectories": 2, "points": 2, "stack": 6, "device": "cpu"}
    config = SensitivityConfig(**settings)
    whole, cut, further = Fake(), Fake(dies=3), Fake()
    expected = sensitivity(config, config.space(), whole, tmp_path)
    assert whole.calls == 5, "ten candidates under two seeds, two at a time beside the start"
    with pytest.raises(KeyboardInterrupt):
        sensitivity(config, config.space(), cut, tmp_path)
    with open(tmp_path / "measured.jsonl", "a") as file:
        file.write("[0.25, 0.")  # a line that was being written
    resumed = SensitivityConfig(**settings, resume=True)
    assert sensitivity(resumed, resumed.space(), further, tmp_path) == expected and further.calls == 3
    other = SensitivityConfig(**settings | {"steps": 7}, resume=True)
    with pytest.raises(UserError, match="other flags"):
        sensitivity(other, other.space(), Fake(), tmp_path)


def test_known_functions_are_minimised() -> None:
    for function in (sphere, rosenbrock):
        least, count = minimise(function, seed=0)
        assert least <= TOLERANCE and count < 4000


@pytest.mark.parametrize("gap, ready", [(0.5, False), (3.5, True), (-3.5, False), (float("nan"), False)])
def test_the_gate_wants_three_standard_deviations(gap: float, ready: bool) -> None:
    config = SanityConfig(device="cpu")

    def evaluator(candidates, seeds):
        return [[Score(answer_loss=5 + place * gap + noise) for noise in (-1.0, 1.0, -1.0, 1.0)] for place, _ in enumerate(candidates)]

    found = readiness(config, config.space(), evaluator)
    assert found["ready"] is ready and (math.isnan(gap) or found["noise"] == pytest.approx((4 / 3) ** 0.5))


def test_the_bad_setting_of_the_gate_is_one_that_a_search_meets() -> None:
    """Every knob of it lies within one and a half first step sizes of the start, and inside the bounds."""
    config, search = SanityConfig(device="cpu"), OptimizeConfig(device="cpu")
    space, asked = config.space(), []

    def evaluator(candidates, seeds):
        asked.extend(candidates)
        return [[Score(answer_loss=1.0)] * len(seeds) for _ in candidates]

    found = readiness(config, space, evaluator)
    assert not found["ready"], "all are alike"
    bad = found["bad_setting"]
    assert len(bad) == 2 and asked[0] == space.base and {name: getattr(asked[1], name) for name in bad} == bad
    for axis, start in zip(space.axes, space.start(), strict=True):
        assert axis.name not in bad or 0 < abs(axis.unit(bad[axis.name]) - start) < 1.5 * search.sigma0, axis.name


def test_by_default_only_fast_weights_bring_an_answer() -> None:
    config = SanityConfig(device="cpu")
    assert config.syn_cfg.hebb == "delta" and config.n_layer * (config.window - 1) < config.recall.distance


@pytest.mark.parametrize(
    "changes, bad", [({"knobs": ("rho_elig",)}, ["rho_elig"]), ({"knobs": ("barrier_strength",)}, ["barrier_strength"])]
)
def test_the_gate_takes_a_bad_value_of_what_is_searched(changes: dict, bad: list[str]) -> None:
    config = SanityConfig(device="cpu", **changes)
    assert list(readiness(config, config.space(), Fake())["bad_setting"]) == bad


def test_a_gate_without_a_bad_value_says_so() -> None:
    config = SanityConfig(device="cpu", knobs=("tau_c", "theta"))
    with pytest.raises(UserError, match="hebb_rate, rho_elig, barrier_strength, lambda_loge alone"):
        readiness(config, config.space(), Fake())


def test_the_spread_of_candidates_stands_beside_the_error_between_seeds() -> None:
    found = spread([[1.0, 3.0], [5.0, 7.0]])
    assert found == pytest.approx({"between": 8**0.5, "error": 1.0})
    assert spread([[1.0], [2.0]])["error"] is None and spread([[1.0, 2.0]]) == {"between": None, "error": None}


def test_the_paired_test_is_exact() -> None:
    assert sign_flip([-1.0] * 5) == 1 / 32 and sign_flip([1.0] * 5) == 1.0
    assert sign_flip([-1.0, -2.0, 0.5]) == 2 / 8
    assert sign_flip([-1.0, float("inf")]) == 1.0
    assert sign_flip([-1.0] * 40) < 0.01
    assert sign_flip([1.0, -1.0] * 20) > 0.3
