"""Knob metadata: one record per configuration field.

A configuration is a frozen dataclass whose fields are made by `knob(...)`. From that one record come the command line,
validation, the documentation tables and the search space of a tuner.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.errors import UserError, nearest

REQUIRED: Any = dataclasses.MISSING  # the default of a field that has none


@dataclass(frozen=True)
class Knob:
    """What is known about one configuration field.

    lo, hi: inclusive bounds of a number (None: unbounded); choices: the valid values of a name;
    off: the value that switches the thing off (None: it has none); log: search and plot on a log scale;
    aliases: further names of its flag; path: what a path must be when the command line is read: "exists", "file" or "dir"
    (None: not a path, or one that is still to be made); none: the word that stands for None on the command line, for a field
    typed `... | None`; analogue: what it stands for in a neuron; source: where its meaning or equation comes from (empty: that of
    the mechanism that owns it); at_birth: the value of a learned quantity before training, which a trained model no longer
    shows; training_only: it acts on the loss and the gradient, never on the output.
    """

    doc: str
    lo: float | None = None
    hi: float | None = None
    choices: tuple[str, ...] | None = None
    off: Any = None
    log: bool = False
    unit: str = ""
    aliases: tuple[str, ...] = ()
    path: str | None = None
    none: str = "auto"
    analogue: str = ""
    source: str = ""
    at_birth: bool = False
    training_only: bool = False

    def bounds(self) -> str:
        """The valid values as text, for messages and tables: `[1, 64]`, `one of none, linear, gated`, `any`."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if self.path is not None:
            return _PATH_KINDS[self.path]
        if self.lo is None and self.hi is None:
            return "any"
        lo = "-inf" if self.lo is None else format_number(self.lo)
        hi = "inf" if self.hi is None else format_number(self.hi)
        return f"[{lo}, {hi}]"


_PATH_KINDS = {"exists": "an existing path", "file": "an existing file", "dir": "an existing folder"}


def format_number(value: float) -> str:
    """A number as a person writes it: 1048576 rather than 1.04858e+06, 0.1 rather than 0.10, 2^63 - 1 rather than 9223372036854775807."""
    for above in (0, 1):
        if isinstance(value, int) and value + above >= 1 << 31 and (value + above).bit_count() == 1:
            return f"2^{(value + above).bit_length() - 1}{' - 1' if above else ''}"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.12g}"


def knob(
    default: Any,
    doc: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    choices: tuple[str, ...] | None = None,
    off: Any = None,
    log: bool = False,
    unit: str = "",
    aliases: tuple[str, ...] = (),
    path: str | None = None,
    none: str = "auto",
    analogue: str = "",
    source: str = "",
    at_birth: bool = False,
    training_only: bool = False,
) -> Any:
    """A dataclass field with its Knob record.

    `default` may be a callable without arguments for a nested config, or REQUIRED for a field that must be given.
    """
    assert path is None or path in _PATH_KINDS, path
    assert not (at_birth and training_only), "one way to measure a knob"
    record = Knob(doc, lo, hi, choices, off, log, unit, aliases, path, none, analogue, source, at_birth, training_only)
    metadata = {"knob": record}
    if default is not REQUIRED and callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def device_knob(default: str = "auto", what: str = "where to run") -> Any:
    """The field that every `--device` is made from, for `common.pick_device`; what: what runs there."""
    return knob(default, f"{what}; auto takes CUDA, then MPS, then the CPU", choices=("auto", "cpu", "cuda", "mps"))


def dtype_knob(what: str = "activations") -> Any:
    """The field of a `--dtype` that may follow the device (`common.compute_dtype`); what: what has that dtype."""
    return knob("auto", f"{what}; auto is bfloat16 on GPUs that have it, else float32", choices=("auto", "float32", "bfloat16"))


def knobs_of(config: Any) -> dict[str, Knob]:
    """The Knob of every field of a config class or instance, section by section (`sections_of`), else in order of definition."""
    found = {f.name: f.metadata["knob"] for f in dataclasses.fields(config) if "knob" in f.metadata}
    return {name: found[name] for names in sections_of(config).values() for name in names if name in found}


def sections_of(config: Any) -> dict[str, list[str]]:
    """The names of all fields under the title of their section, one word, in the order in which people should read them.

    `SECTIONS` of the class names each title by the first field of its section and orders them; without it all stand under "".
    """
    titles: dict[str, str] = getattr(config, "SECTIONS", {})
    found: dict[str, list[str]] = {title: [] for title in ("", *titles.values())}
    title = ""
    for field in dataclasses.fields(config):
        title = titles.get(field.name, title)
        found[title].append(field.name)
    return found


@dataclass(frozen=True)
class Kind:
    """The type of a field: `base` (int, float, bool, str, Path or a config class), whether None is allowed, whether it is a tuple of them."""

    base: type
    optional: bool = False
    many: bool = False

    @property
    def nested(self) -> bool:
        """Whether the field is a config itself."""
        return dataclasses.is_dataclass(self.base)


@functools.cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """The Kind of every field of a config class. Annotations are `T`, `T | None`, `tuple[T, ...]` or `tuple[T, ...] | None`."""
    hints = typing.get_type_hints(cls)
    return {f.name: _kind(hints[f.name], f"{cls.__name__}.{f.name}") for f in dataclasses.fields(cls)}


def _kind(hint: Any, where: str) -> Kind:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(parts) == 1, f"{where}: a knob has one type, or one type and None"
        hint, optional = parts[0], len(parts) < len(typing.get_args(hint))
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    assert isinstance(hint, type), f"{where}: {hint} is not a type that a knob can have"
    return Kind(hint, optional, many)


def _show(value: Any) -> str:
    """A value in a message: its repr, on one line and not longer than a screen line."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number beyond 64 bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(record: Knob) -> str:
    bounds = record.bounds()
    return "" if bounds == "any" else f": {bounds}"


def check_value(name: str, value: Any, record: Knob, kind: type | None = None) -> None:
    """Raise UserError when `value` is outside of the record's bounds or of the wrong kind (a type: int, float, bool, str or Path)."""
    if record.choices is not None and value not in record.choices:
        raise UserError(f"{name}={_show(value)} is not valid: {record.bounds()}{nearest(str(value)[:60], record.choices)}")
    if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{name}={_show(value)} is not a number{_hint(record)}")
    if kind is int and not isinstance(value, int):
        raise UserError(f"{name}={_show(value)} is not a whole number{_hint(record)}")
    if kind is bool and not isinstance(value, bool) and value not in (0, 1):
        raise UserError(f"{name}={_show(value)} is a switch: 0 or 1")
    if kind in (str, Path) and not isinstance(value, (str, Path)):
        raise UserError(f"{name}={_show(value)} is not text{_hint(record)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if (isinstance(value, int) and abs(value) >= 1 << 64) or not math.isfinite(value):
            raise UserError(f"{name}={_show(value)} is not finite{_hint(record)}")
        if (record.lo is not None and value < record.lo) or (record.hi is not None and value > record.hi):
            raise UserError(f"{name}={value} is out of bounds {record.bounds()}")


def check_path(name: str, value: str | Path, record: Knob) -> None:
    """Raise UserError when a path is not what `record.path` asks for.

    Not part of `validate`: a stored config may name paths of another machine.
    """
    path = Path(value)
    if record.path is None or {"exists": os.path.exists, "file": os.path.isfile, "dir": os.path.isdir}[record.path](value):
        return
    if os.path.exists(value):
        raise UserError(f"{name}={_show(str(value))} is not {'a file' if record.path == 'file' else 'a folder'}")
    try:
        with os.scandir(path.parent) as entries:
            siblings = [entry.name for entry in itertools.islice(entries, 1000)]
    except (OSError, ValueError):
        siblings = []
    raise UserError(f"{name}={_show(str(value))} does not exist: give {record.bounds()}{nearest(path.name[:60], siblings)}")


def validate(config: Any, prefix: str = "") -> None:
    """Check every field of a config against its type and its Knob; nested configs check themselves when they are made.

    Raises UserError that names the field, its value and its bounds; prefix: what the name of a nested field begins with.
    """
    kinds = kinds_of(type(config))
    for name, record in knobs_of(config).items():
        kind, value, label = kinds[name], getattr(config, name), prefix + name
        if value is None and kind.optional:
            continue
        if kind.nested:
            if not isinstance(value, kind.base):
                raise UserError(f"{label}={_show(value)} is not a {kind.base.__name__}")
        elif kind.many:
            if not isinstance(value, (tuple, list)):
                raise UserError(f"{label}={_show(value)} is not a tuple")
            for item in value:
                check_value(label, item, record, kind.base)
        else:
            check_value(label, value, record, kind.base)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types: nested configs as dictionaries, tuples as lists, paths as text."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """The inverse of `to_dict`. Unknown names are a UserError; missing names take their defaults."""
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or cls.__name__}={_show(values)} is not a set of named values for {cls.__name__}")
    kinds = kinds_of(cls)
    unknown = [str(name) for name in values if name not in kinds]
    if unknown:
        raise UserError(f"unknown field {prefix}{unknown[0]} in {cls.__name__}{nearest(unknown[0], kinds)}")
    kwargs = {}
    for name, value in values.items():
        kind = kinds[name]
        if kind.nested and isinstance(value, dict):
            value = from_dict(kind.base, value, prefix=f"{prefix}{name}.")
        elif kind.base is Path and isinstance(value, str):
            value = Path(value)
        elif kind.many and isinstance(value, list):
            value = tuple(kind.base(item) if kind.base is Path else item for item in value)
        kwargs[name] = value
    return cls(**kwargs)
