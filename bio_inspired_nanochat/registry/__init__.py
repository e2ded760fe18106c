"""The list of synaptic mechanisms: contract tests, parameter census, ablation study and the tables in docs/ all read it from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from bio_inspired_nanochat.config.knobs import REQUIRED, Knob
from bio_inspired_nanochat.config.mechanisms import BETWEEN_STEPS, LIFE_CYCLE
from bio_inspired_nanochat.config.synaptic import SynapticConfig
from bio_inspired_nanochat.config.tables import default_text, knob_table, markdown_table
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.registry.extra import add_gate_drive, check_extra
from bio_inspired_nanochat.registry.mechanisms import FAST_RULES, GENERAL, MECHANISMS, Mechanism

__all__ = [
    "BETWEEN_STEPS",
    "GENERAL",
    "MECHANISMS",
    "Mechanism",
    "active_mechanisms",
    "add_gate_drive",
    "check_extra",
    "closure",
    "config_with",
    "config_without",
    "inert_fields",
    "knob_table",
    "markdown_table",
    "owners",
]


def closure(*names: str) -> list[str]:
    """The named mechanisms and everything that they need, in the order of `MECHANISMS`. Raises UserError for an unknown name."""
    wanted: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in MECHANISMS:
            raise UserError(f"mechanism={name!r} is not valid: one of {', '.join(MECHANISMS)}{nearest(name, MECHANISMS)}")
        if name not in wanted:
            wanted.add(name)
            queue += MECHANISMS[name].needs
        if not queue:  # all that is asked for is known now
            queue += [MECHANISMS[name].any_of[0] for name in wanted if MECHANISMS[name].any_of and not wanted & {*MECHANISMS[name].any_of}]
    return [name for name in MECHANISMS if name in wanted]


def config_with(*names: str, **overrides: Any) -> SynapticConfig:
    """A config with only the named mechanisms on (and those that they need), all others off, and `overrides` on top.

    Raises UserError for an unknown name and for two that exclude each other.
    """
    values: dict[str, Any] = {}
    for mechanism in MECHANISMS.values():
        values |= mechanism.off
    setter: dict[str, str] = {}
    for name in closure(*names):
        for field, value in MECHANISMS[name].on.items():
            other = setter.setdefault(field, name)
            if isinstance(value, tuple):  # names: each mechanism adds its own
                value = (*values[field], *value)
            elif MECHANISMS[other].on[field] != value:
                raise UserError(f"mechanisms {other} and {name} exclude each other: both set {field}")
            values[field] = value
    return dataclasses.replace(SynapticConfig(), **(values | overrides))


def config_without(config: SynapticConfig, name: str) -> SynapticConfig:
    """The ablation of one mechanism: `config` with its off values. Raises UserError for an unknown name."""
    closure(name)
    own = MECHANISMS[name]
    values: dict[str, Any] = dict(own.off)
    for field, off in own.off.items():
        if isinstance(off, tuple):
            values[field] = tuple(one for one in getattr(config, field) if one not in own.on[field])
    return dataclasses.replace(config, **values)


def active_mechanisms(config: SynapticConfig) -> list[str]:
    """Names of the mechanisms that act in a config, in the order of `MECHANISMS`. Raises UserError for an unknown name in `extra`."""
    check_extra(config)
    return [name for name, mechanism in MECHANISMS.items() if mechanism.is_on(config)]


def owners(field: str) -> list[str]:
    """Names of the mechanisms that a SynapticConfig field belongs to; empty for a general field."""
    return [name for name, mechanism in MECHANISMS.items() if field in mechanism.fields]


def inert_fields(config: SynapticConfig, given: Collection[str], experts: bool = True) -> list[str]:
    """One line for every given field that does nothing because all its mechanisms are off: which ones, and the flags that help.

    given: dotted names as of `parse_with_given`; those that do not begin with `syn_cfg.` are passed over, and so is a field that
    switches its mechanism off. experts: whether the model has any. Raises UserError for an unknown name in `extra`.
    """
    check_extra(config)
    lines = []
    for field in (f.name for f in dataclasses.fields(config)):
        names = owners(field)
        lonely = field in LIFE_CYCLE or any(MECHANISMS[name].experts for name in names)
        if lonely and not experts and f"syn_cfg.{field}" in given:
            lines.append(f"--syn_cfg.{field} has no effect without experts: add --num_experts=8")
            continue
        if f"syn_cfg.{field}" not in given or not names or any(MECHANISMS[name].is_on(config) for name in names):
            continue
        if any(MECHANISMS[name].off.get(field, REQUIRED) == getattr(config, field) for name in names):
            continue
        chosen = [rule for rule in FAST_RULES if MECHANISMS[rule].is_set(config)]
        ways = [[MECHANISMS[need] for need in closure(name, *chosen) if not MECHANISMS[need].is_set(config)] for name in names]
        ways = [way for way in ways if len(way) == min(map(len, ways))]  # two choices of one switch serve alike
        missing = list(dict.fromkeys(mechanism.name for way in ways for mechanism in way))
        flags = [" ".join(f"--syn_cfg.{name}={default_text(m.on[name], Knob(''))}" for m in way for name in m.off) for way in ways]
        are = f"{missing[0]} is" if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]} are"
        lines.append(f"--syn_cfg.{field} has no effect while {are} off: add {' or '.join(flags)}")
    return lines
