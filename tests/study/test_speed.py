"""The speed of conditions, measured alone: what is measured once, what is left out, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study import speed
from bio_inspired_nanochat.study.speed import SpeedConfig, measure_speed, read_speeds
from tests.study.planned import plan

MATCHED = {"sets": ("anchors",), "conditions": ("vanilla", "default", "vanilla_flops_default"), "tokens": 16384}


def test_conditions_of_one_model_are_measured_once_and_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(tmp_path, **MATCHED)
    built = []

    class Counted(speed.Trainee):
        def __init__(self, plan, device) -> None:
            built.append(plan.model.synapses)
            super().__init__(plan, device)

    monkeypatch.setattr(speed, "Trainee", Counted)
    said = measure_speed(SpeedConfig(out=str(tmp_path), seconds=0.0))
    assert built == [False, True], "vanilla with as many FLOPs takes more steps of the same model"
    found = read_speeds(tmp_path)
    assert found is not None and said["measured"] == 3 and said["failed"] == {}
    own = found.found[2]
    assert own["vanilla"] == own["vanilla_flops_default"] and own["vanilla"].ratio == (1, 1, 1)
    assert own["default"].seconds_per_token == pytest.approx(own["vanilla"].seconds_per_token * own["default"].ratio[0])
    assert own["default"].gib > own["vanilla"].gib > 0 and own["vanilla"].seconds_per_token > 0
    assert measure_speed(SpeedConfig(out=str(tmp_path), seconds=0.0))["measured"] == 3 and len(built) == 2, "what is known stays"
    measure_speed(SpeedConfig(out=str(tmp_path), seconds=0.0, conditions=("default",)))
    assert len(built) == 4, "what is asked for is measured again"


def test_a_condition_that_fails_or_does_not_fit_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(tmp_path, conditions=("vanilla", "default"))
    whole = speed.Trainee

    def broken(plan, device):
        if plan.model.synapses:
            raise RuntimeError("out of memory\nand more")
        return whole(plan, device)

    monkeypatch.setattr(speed, "Trainee", broken)
    said = measure_speed(SpeedConfig(out=str(tmp_path), seconds=0.0))
    assert said["failed"] == {"default at depth 2": "out of memory and more"} and list(said["step_ratio"]["2"]) == ["vanilla"]
    monkeypatch.setattr(speed, "Trainee", whole)
    assert measure_speed(SpeedConfig(out=str(tmp_path), budget_minutes=1e-9))["left_out"] == 1
    assert measure_speed(SpeedConfig(out=str(tmp_path), seconds=0.0))["failed"] == {}


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no plan\.json"):
        measure_speed(SpeedConfig(out=str(tmp_path)))
    plan(tmp_path, conditions=("vanilla",))
    with pytest.raises(UserError, match=r"conditions='defalt' is not in the plan: one of vanilla"):
        measure_speed(SpeedConfig(out=str(tmp_path), conditions=("defalt",)))
    (tmp_path / "speed.json").write_text(json.dumps({"device": "a GPU", "git": None, "depths": {}}))
    with pytest.raises(UserError, match="was measured on a GPU, and this is cpu"):
        measure_speed(SpeedConfig(out=str(tmp_path)))
