"""The search space is made from the knobs' own records, and a point of it is a valid configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bio_inspired_nanochat.config import PRESETS, SynapticConfig, knobs_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import active_mechanisms
from bio_inspired_nanochat.tuning.space import GROUPS, Axis, group_of, make_space, searchable, write_preset
from bio_inspired_nanochat.tuning.stack import STACKABLE

DELTA = SynapticConfig(hebb="delta", bdnf_gamma=1.0)


@pytest.mark.parametrize("name", sorted(STACKABLE))
def test_every_axis_stays_within_the_bounds_of_its_knob_and_comes_back(name: str) -> None:
    record, axis = knobs_of(SynapticConfig)[name], Axis.of(name)
    for u in (-3.0, 0.0, 0.25, 0.5, 1.0, 7.0):
        value = axis.value(u)
        assert record.lo <= value <= record.hi and value != record.off or record.off not in (record.lo, record.hi)
        assert axis.unit(value) == pytest.approx(min(max(u, 0.0), 1.0), abs=1e-9)
    middle = axis.value(0.5)
    assert middle == pytest.approx((axis.lo * axis.hi) ** 0.5 if record.log else (axis.lo + axis.hi) / 2)


@pytest.mark.parametrize("preset", [name for name in PRESETS if SynapticConfig.preset(name).presyn])
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_the_corners_of_the_space_have_the_mechanisms_of_its_start(preset: str, u: float) -> None:
    base = SynapticConfig.preset(preset)
    space = make_space(base)
    assert active_mechanisms(space.config([u] * len(space.axes))) == active_mechanisms(base)
    assert space.config(space.start()).tau_c == pytest.approx(base.tau_c)


def test_only_knobs_of_mechanisms_that_act_are_searched() -> None:
    assert "tau_c" in searchable(SynapticConfig()) and "tau_buf" not in searchable(SynapticConfig())
    assert "hebb_rate" in searchable(DELTA) and "hebb_rate" not in searchable(SynapticConfig())
    with pytest.raises(UserError, match="cannot be searched here"):
        make_space(SynapticConfig(), ["tau_buf"])
    with pytest.raises(UserError, match="did you mean 'tau_rrp'"):
        make_space(SynapticConfig(), ["tau_rpp"])
    with pytest.raises(UserError, match="twice"):
        make_space(SynapticConfig(), ["tau_c", "tau_c"])
    with pytest.raises(UserError, match="no knob that acts"):
        make_space(SynapticConfig(), group="postsynaptic")


def test_the_groups_share_out_all_knobs() -> None:
    names = [name for group in GROUPS for name in make_space(DELTA, group=group).names]
    assert sorted(names) == sorted(searchable(DELTA))
    assert {group_of(name) for name in STACKABLE} == set(GROUPS)


def test_winners_of_a_first_phase_stay_fixed_in_the_second(tmp_path: Path) -> None:
    from bio_inspired_nanochat.tuning.config import SearchConfig

    path = tmp_path / "phase1.json"
    write_preset(path, SynapticConfig(tau_c=20.0), {"searched": ["tau_c"]})
    config = SearchConfig(syn_preset=str(path), syn_cfg=SynapticConfig.preset(str(path)), group="calcium")
    assert "tau_c" not in config.space().names and "theta" in config.space().names
    assert config.space().config(config.space().start()).tau_c == 20.0


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[]", "has no object syn_cfg"),
        (json.dumps({"syn_cfg": {"tau_rpp": 1}}), "did you mean 'tau_rrp'"),
        (json.dumps({"syn_cfg": {"tau_rrp": -1}}), "out of bounds"),
    ],
)
def test_a_wrong_preset_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        SynapticConfig.preset(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        SynapticConfig.preset(str(tmp_path / "none.json"))
