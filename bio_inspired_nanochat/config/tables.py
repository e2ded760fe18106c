"""Knob tables: what is known about every field of a config, as rows and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from bio_inspired_nanochat.config.knobs import Knob, format_number, kinds_of, knobs_of


class KnobRow(NamedTuple):
    """One line of a knob table, all text."""

    name: str
    default: str
    bounds: str
    unit: str
    meaning: str
    analogue: str


def knob_table(cls: type, prefix: str = "") -> list[KnobRow]:
    """A row for every field of a config class, nested configs included under their dotted names."""
    rows: list[KnobRow] = []
    records, kinds = knobs_of(cls), kinds_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, record in records.items():
        if kinds[name].nested:
            rows += knob_table(kinds[name].base, f"{prefix}{name}.")
            continue
        factory = fields[name].default_factory
        made = factory() if factory is not dataclasses.MISSING else fields[name].default
        bounds = "0 or 1" if kinds[name].base is bool else record.bounds()
        rows.append(KnobRow(prefix + name, default_text(made, record), bounds, record.unit, record.doc, record.analogue))
    return rows


def default_text(value: Any, record: Knob) -> str:
    """A value as it is written on the command line."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return record.none
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return format_number(value) if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Sequence[str]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table that ends with a newline. Without `columns` the rows must be named tuples, whose fields head it."""
    if columns is None:
        assert rows and hasattr(rows[0], "_fields"), "columns are missing"
        columns = rows[0]._fields  # type: ignore[attr-defined]
    lines = [list(columns), ["---"] * len(columns), *([_escape(str(cell)) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
