"""The registry: every field has an owner, and every mechanism can be switched on and off alone."""

from __future__ import annotations

import dataclasses

import pytest

from bio_inspired_nanochat.config import PRESETS, GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import (
    GENERAL,
    MECHANISMS,
    active_mechanisms,
    closure,
    config_with,
    config_without,
    knob_table,
    markdown_table,
    owners,
)

FIELDS = [field.name for field in dataclasses.fields(SynapticConfig)]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_belongs_to_a_mechanism_or_is_general(field: str) -> None:
    assert bool(owners(field)) != (field in GENERAL)


@pytest.mark.parametrize("name", MECHANISMS)
def test_records_name_real_fields_and_mechanisms(name: str) -> None:
    mechanism = MECHANISMS[name]
    assert mechanism.name == name and mechanism.doc and mechanism.source
    assert mechanism.fields <= set(FIELDS)
    assert set(mechanism.off) <= set(mechanism.on)  # whatever switches it off, `on` sets back
    assert set(mechanism.needs) <= set(MECHANISMS) - {name}
    assert not set(mechanism.knobs) & set(mechanism.on)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_comes_on_with_what_it_needs_and_nothing_else(name: str) -> None:
    config = config_with(name)
    assert active_mechanisms(config) == closure(name)
    assert name not in active_mechanisms(config_without(config, name))


def test_nothing_named_is_the_off_preset() -> None:
    config = config_with()
    assert active_mechanisms(config) == [] and not config.active
    assert active_mechanisms(SynapticConfig.preset("off")) == []


def test_the_switch_off_value_of_a_knob_is_that_of_its_mechanism() -> None:
    for field in dataclasses.fields(SynapticConfig):
        off = field.metadata["knob"].off
        for name in owners(field.name):
            if off is not None and field.name in MECHANISMS[name].off:
                assert MECHANISMS[name].off[field.name] == off


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_equals_the_sum_of_its_mechanisms_in_every_switch(preset: str) -> None:
    config = SynapticConfig.preset(preset)
    rebuilt = config_with(*active_mechanisms(config))
    assert active_mechanisms(rebuilt) == active_mechanisms(config)


def test_excluding_and_unknown_mechanisms_are_user_errors() -> None:
    with pytest.raises(UserError, match="barrier_linear and barrier_gated exclude each other"):
        config_with("barrier_gated", "barrier_linear")
    with pytest.raises(UserError, match="did you mean 'presyn'"):
        config_with("presin")
    with pytest.raises(UserError, match="is not valid"):
        config_without(SynapticConfig(), "nothing")


def test_overrides_go_on_top() -> None:
    assert config_with("presyn", tau_rrp=5.0).tau_rrp == 5.0


def test_the_knob_table_lists_every_field_as_markdown() -> None:
    rows = knob_table(GPTConfig)
    by_name = {row.name: row for row in rows}
    assert [f"syn_cfg.{name}" for name in FIELDS] == [row.name for row in rows if row.name.startswith("syn_cfg.")]
    assert by_name["synapses"][1:3] == ("0", "0 or 1")
    assert by_name["syn_cfg.tick"][1:4] == ("8", "[1, 1024]", "tokens")
    lines = markdown_table(rows).splitlines()
    assert lines[0] == "| name | default | bounds | unit | meaning |" and lines[1].startswith("| --- |")
    assert len(lines) == len(rows) + 2
    assert markdown_table([["a|b", "c\nd"]], ["x", "y"]) == "| x | y |\n| --- | --- |\n| a\\|b | c d |\n"
