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
    inert_fields,
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau_buf": 3.0}, "tau_buf has no effect while buffer is off: add --syn_cfg.buffer=1"),
        ({"tau_buf": 4.0}, "tau_buf has no effect while buffer is off: add --syn_cfg.buffer=1"),  # given, though it is the default
        ({"rab": True}, "rab has no effect while reserve and endocytosis are off: add --syn_cfg.reserve=1 --syn_cfg.endo_delay=24"),
        (
            {"tau_rab5": 4.0, "reserve": True},
            "tau_rab5 has no effect while endocytosis and rab are off: add --syn_cfg.endo_delay=24 --syn_cfg.rab=1",
        ),
        ({"genome": "proteins", "xi_dim": 3}, "xi_dim has no effect while genome_xi is off: add --syn_cfg.genome=xi"),
        ({"genome": "xi", "presyn": False}, "genome has no effect while presyn is off: add --syn_cfg.presyn=1"),
        (
            {"barrier": "none", "barrier_strength": 2.0},
            (
                "barrier_strength has no effect while barrier_linear and barrier_gated are off: "
                "add --syn_cfg.barrier=linear or --syn_cfg.barrier=gated"
            ),
        ),
    ],
)
def test_a_given_field_whose_mechanisms_are_off_is_named_with_what_turns_them_on(changes: dict[str, object], said: str) -> None:
    config = dataclasses.replace(SynapticConfig(), **changes)
    given = {f"syn_cfg.{name}" for name in changes} | {"syn_preset", "depth"}
    (line,) = inert_fields(config, given)
    assert line == f"--syn_cfg.{said}"
    field, flags = line.removeprefix("--syn_cfg.").split()[0], said.partition("add ")[2].split(" or ")[0]
    values = dict(flag.removeprefix("--syn_cfg.").split("=") for flag in flags.split())
    typed = {name: type(getattr(config, name))(value if value != "1" else 1) for name, value in values.items()}
    assert inert_fields(dataclasses.replace(config, **typed), {f"syn_cfg.{field}"}) == []  # the advice helps


@pytest.mark.parametrize(
    "changes", [{"tick": 4, "epsilon": 1e-3}, {"tau_rrp": 9.0}, {"buffer": False, "drive": "phi", "complexin_bias": 0.0}]
)
def test_nothing_is_said_of_fields_that_act_or_that_switch_off(changes: dict[str, object]) -> None:
    assert inert_fields(dataclasses.replace(SynapticConfig(), **changes), {f"syn_cfg.{name}" for name in changes}) == []


def test_knobs_of_experts_ask_for_experts() -> None:
    given = {"syn_cfg.nmda", "syn_cfg.split_health_min"}
    lines = inert_fields(dataclasses.replace(SynapticConfig(), nmda=True), given, experts=False)
    assert lines == [f"--syn_cfg.{name} has no effect without experts: add --num_experts=8" for name in ("nmda", "split_health_min")]
    assert inert_fields(dataclasses.replace(SynapticConfig(), nmda=True), given) == []


def test_nothing_is_said_of_fields_that_were_not_given() -> None:
    assert inert_fields(SynapticConfig.preset("off"), {"tau_c", "optim.tau_buf"}) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_nothing_that_has_no_effect(preset: str) -> None:
    assert inert_fields(SynapticConfig.preset(preset), {f"syn_cfg.{name}" for name in PRESETS[preset]}) == []


def test_the_knob_table_lists_every_field_as_markdown() -> None:
    rows = knob_table(GPTConfig)
    by_name = {row.name: row for row in rows}
    assert sorted(f"syn_cfg.{name}" for name in FIELDS) == sorted(row.name for row in rows if row.name.startswith("syn_cfg."))
    assert by_name["synapses"][1:3] == ("0", "0 or 1")
    assert by_name["syn_cfg.tick"][1:4] == ("16", "[1, 1024]", "tokens")
    assert (by_name["syn_cfg.tau_nsf"].analogue, by_name["syn_cfg.tick"].analogue) == ("NSF", "")
    lines = markdown_table(rows).splitlines()
    assert lines[0] == "| name | default | bounds | unit | meaning | analogue |" and lines[1].startswith("| --- |")
    assert len(lines) == len(rows) + 2
    assert markdown_table([["a|b", "c\nd"]], ["x", "y"]) == "| x | y |\n| --- | --- |\n| a\\|b | c d |\n"
