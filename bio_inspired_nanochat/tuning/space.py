"""The search space: knobs of a synapse as axes from 0 to 1, made from their own records."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import write_atomic
from bio_inspired_nanochat.config import SynapticConfig, check_value, knobs_of, to_dict
from bio_inspired_nanochat.config.knobs import kinds_of
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.registry import MECHANISMS, owners
from bio_inspired_nanochat.tuning.stack import DENSITY_KNOBS, STACKABLE

CALCIUM = ("theta", "tau_c", "alpha_ca", "syt_fast_kd", "syt_slow_kd", "syt_mix", "syt_gain", "tau_buf", "buf_kd", "doc2_threshold")
STRUCTURAL = ("barrier_strength", "lateral_strength")
GROUPS = ("calcium", "vesicle", "postsynaptic", "structural")
INSIDE = 1e-3  # how far from a bound that switches a mechanism off, as a share of the axis


@dataclass(frozen=True)
class Axis:
    """One knob: value = lo + (hi - lo) u, or in logarithms where the knob says so."""

    name: str
    lo: float
    hi: float
    log: bool

    @classmethod
    def of(cls, name: str) -> Axis:
        """The axis of a SynapticConfig field; its ends stay clear of a value that switches something off."""
        record = knobs_of(SynapticConfig)[name]
        assert record.lo is not None and record.hi is not None, f"{name} has no bounds to search within"
        lo, hi = float(record.lo), float(record.hi)
        room = INSIDE * (hi - lo)
        return cls(name, lo + room if record.off == lo else lo, hi - room if record.off == hi else hi, record.log)

    def value(self, u: float) -> float:
        """The value at u, which is clipped to [0, 1]."""
        u = min(max(float(u), 0.0), 1.0)
        if self.log:
            return min(max(self.lo * (self.hi / self.lo) ** u, self.lo), self.hi)
        return self.lo + (self.hi - self.lo) * u

    def unit(self, value: float) -> float:
        """The u of a value."""
        u = math.log(value / self.lo) / math.log(self.hi / self.lo) if self.log else (value - self.lo) / (self.hi - self.lo)
        return min(max(u, 0.0), 1.0)


@dataclass(frozen=True)
class Space:
    """Axes around a configuration, whose other fields stay as they are."""

    base: SynapticConfig
    axes: tuple[Axis, ...]

    @property
    def names(self) -> list[str]:
        """The searched knobs."""
        return [axis.name for axis in self.axes]

    def start(self) -> list[float]:
        """The point of the base configuration."""
        return [axis.unit(getattr(self.base, axis.name)) for axis in self.axes]

    def values(self, point: Sequence[float]) -> dict[str, Any]:
        """Knob values at a point."""
        return {axis.name: axis.value(u) for axis, u in zip(self.axes, point, strict=True)}

    def config(self, point: Sequence[float]) -> SynapticConfig:
        """The configuration at a point."""
        return dataclasses.replace(self.base, **self.values(point))


def group_of(name: str) -> str:
    """The part of a synapse that a knob belongs to: one of `GROUPS`."""
    if name in CALCIUM:
        return "calcium"
    if name in DENSITY_KNOBS or any(MECHANISMS[owner].any_of for owner in owners(name)):
        return "postsynaptic"
    if name in STRUCTURAL or any(MECHANISMS[owner].experts for owner in owners(name)):
        return "structural"
    return "vesicle"


def searchable(base: SynapticConfig) -> list[str]:
    """Knobs that act in a configuration and that the models of one stack may differ in, in the order of their definition.

    Whole numbers, switches and choices are not searched: they make models of other shapes.
    """
    kinds = kinds_of(SynapticConfig)
    return [
        name
        for name in knobs_of(SynapticConfig)
        if name in STACKABLE and kinds[name].base is float and any(MECHANISMS[owner].is_on(base) for owner in owners(name))
    ]


def make_space(base: SynapticConfig, knobs: Sequence[str] = (), group: str = "all", fixed: Sequence[str] = ()) -> Space:
    """The space of the named knobs, or of all of a group that act in `base`, without those in `fixed`.

    Raises UserError for a name that is no knob, is none that can be searched here, or is named twice, and for an empty space.
    """
    valid = searchable(base)
    for name in knobs:
        if name not in knobs_of(SynapticConfig):
            raise UserError(f"knobs={name!r} is not a knob of a synapse{nearest(name, valid)}")
        if name not in valid:
            raise UserError(
                f"knobs={name!r} cannot be searched here: its mechanism is off or it makes models of another shape; one of {', '.join(valid)}"
            )
        if list(knobs).count(name) > 1:
            raise UserError(f"knobs={','.join(knobs)} names {name} twice: name each once")
    names = list(knobs) or [name for name in valid if group in ("all", group_of(name)) and name not in fixed]
    if not names:
        raise UserError(f"group={group} has no knob that acts in these synapses: turn its mechanism on by --syn_cfg.*, or use --group=all")
    return Space(base, tuple(Axis.of(name) for name in names))


def write_preset(path: Path, config: SynapticConfig, about: dict[str, Any]) -> None:
    """A preset file that `--syn_preset=FILE` takes; `about` says where it comes from."""
    default = to_dict(SynapticConfig())
    changed = {name: value for name, value in to_dict(config).items() if value != default[name]}
    for name, value in changed.items():
        if isinstance(value, float):
            check_value(f"syn_cfg.{name}", value, knobs_of(SynapticConfig)[name])
    write_atomic(path, json.dumps(about | {"syn_cfg": changed}, indent=1) + "\n")


def winners_of(preset: str) -> list[str]:
    """The knobs that an earlier search has set in a preset file; none for a preset by name."""
    if not preset.endswith(".json"):
        return []
    searched = json.loads(Path(preset).expanduser().read_text(encoding="utf-8")).get("searched", [])
    return [str(name) for name in searched] if isinstance(searched, list) else []
