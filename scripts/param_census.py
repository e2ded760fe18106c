"""Every knob of a synapse, with a measurement of what it changes.

    python -m scripts.param_census --markdown=census.md

Small models are trained with the mechanisms on, and each knob is moved within its bounds. A knob that changes nothing is
named on stderr, and the exit code is 1. The last line of stdout is a JSON record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.common import check_writable, pick_device, print_json_line, progress, say, table, write_atomic
from bio_inspired_nanochat.config import SynapticConfig, device_knob, knob, knobs_of, validate
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import UserError, exit_on_user_error, nearest
from bio_inspired_nanochat.evaluation.census import STEPS, USER_NAMES, Census, CensusRow, Liveness, census_rows, plan
from bio_inspired_nanochat.registry import markdown_table

USER_COLUMNS = ("name", "a higher value means", "liveness")


@dataclass(frozen=True)
class ParamCensusConfig:
    """What to measure, and where to write the table."""

    knobs: tuple[str, ...] = knob((), "knobs to measure, without syn_cfg in front; none given: all")
    steps: int = knob(STEPS, "training steps of each small model", lo=1, hi=1_000_000, unit="steps")
    markdown: str | None = knob(None, "file for the tables as Markdown", none="none")
    device: str = device_knob("cpu")

    def __post_init__(self) -> None:
        validate(self)
        valid = plan()
        for name in self.knobs:
            if name not in valid:
                raise UserError(f"knobs={name!r} is not a knob of a synapse{nearest(name, valid)}; --knobs=tick,... or none for all")


def take_census(config: ParamCensusConfig) -> list[Liveness]:
    """Train what the knobs need and measure them, in the order of their definition."""
    measured = plan()
    names = [name for name in knobs_of(SynapticConfig) if name in (config.knobs or measured)]
    census = Census(config.steps, pick_device(config.device))
    models = census.needed(names)
    for number, mechanisms in enumerate(models, 1):
        say(f"model {number}/{len(models)}: {', '.join(mechanisms)}")
        with progress(config.steps, "train") as bar:
            census.on_step = lambda _, step, loss, bar=bar: bar.advance(note=f"loss {loss:.3f}")
            census.model(mechanisms)
    census.on_step = None
    found = []
    with progress(len(names), "measure", "knobs") as bar:
        for name in names:
            found.append(census.measure(name))
            bar.advance(note=name)
    return found


def _user_rows(found: Sequence[Liveness]) -> list[tuple[str, str, str]]:
    """The names that users know, with what turning them up does."""
    return [(one.name, USER_NAMES[one.name], format(one.change, ".2g")) for one in found if one.name in USER_NAMES]


def _record(one: Liveness) -> dict[str, object]:
    return {
        "liveness": one.change,
        "of": one.how,
        "value": one.value,
        "mechanisms": one.mechanisms,
        "under": dict(one.under),
        "fault": one.fault or None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print tables and record. Exit code 1 when a knob changes nothing."""
    with exit_on_user_error():
        config = parse(ParamCensusConfig, argv, prog="scripts.param_census", description="What every knob of a synapse is and changes.")
        markdown = None if config.markdown is None else check_writable("markdown", config.markdown)
        found = take_census(config)
        rows, users = census_rows(found), _user_rows(found)
        table(CensusRow._fields, rows)
        if users:
            say("names from the background documents")
            table(USER_COLUMNS, users)
        if markdown is not None:
            shown = markdown_table(rows) + ("\n" + markdown_table(users, USER_COLUMNS) if users else "")
            write_atomic(markdown, shown)
        faults = {one.name: one.fault for one in found if one.fault}
        if faults:
            print("error: " + "; ".join(f"{name} {fault}" for name, fault in faults.items()), file=sys.stderr, flush=True)
        print_json_line({"knobs": {one.name: _record(one) for one in found}, "inert": list(faults), "steps": config.steps})
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
