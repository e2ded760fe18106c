"""The whole report of a run as static HTML: a folder that opens from a file and needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.common import say, write_atomic
from bio_inspired_nanochat.config import REQUIRED, knob, validate
from bio_inspired_nanochat.engine import load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.gallery import draw
from bio_inspired_nanochat.neuroviz.phylo import PAGE, in_page, read_family, write_page
from bio_inspired_nanochat.neuroviz.summary import RunFolder
from bio_inspired_nanochat.structural.lineage import FILE as LINEAGE


@dataclass(frozen=True)
class ExportConfig:
    """Which run, and where its report goes."""

    log: str = knob(REQUIRED, "log folder of a run", path="dir")
    out: str = knob("run_report", "folder for the report; index.html is its first page")
    checkpoint: str | None = knob(None, "checkpoint for the pictures; auto is the newest that the log names", path="exists")

    def __post_init__(self) -> None:
        validate(self)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the report; the script's last line. Raises UserError for a damaged log and for a folder that cannot be written."""
    run = RunFolder(config.log)
    out = Path(config.out)
    record = run.summary()
    if record["message"]:
        say(f"notice: {record['message']}")
    pictures, why = _pictures(run, config.checkpoint, out)
    family = None
    if (Path(config.log) / LINEAGE).exists():
        family = write_page(read_family(config.log), out / "family.html")
        say(f"written {family}")
    record |= {"pictures": pictures, "no_pictures": why, "family": family.name if family else None}
    page = (PAGE / "report.html").read_text(encoding="utf-8")
    for name, text in {"STYLE": _page("charts.css"), "CHARTS": _page("charts.js"), "DATA": in_page(record)}.items():
        page = page.replace(f"/*{name}*/", text, 1)
    try:
        write_atomic(out / "index.html", page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
    say(f"written {out / 'index.html'}")
    return {
        "out": str(out / "index.html"),
        "state": record["state"],
        "step": record["step"],
        "charts": len(record["charts"]),
        "pictures": len(pictures),
        "experts": len(record["experts"]),
        "family": str(family) if family else None,
    }


def _pictures(run: RunFolder, checkpoint: str | None, out: Path) -> tuple[dict[str, str], str]:
    """Names and relative paths of the pictures, and why there are none."""
    found = checkpoint or run.checkpoint()
    if found is None:
        return {}, "No pictures: the run has saved no checkpoint that is still there."
    drawn = draw(load(found, torch.device("cpu")), out / "pictures")
    return {name: f"pictures/{path.name}" for name, path in drawn.items()}, "No pictures: the model has neither synapses nor experts."


def _page(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
