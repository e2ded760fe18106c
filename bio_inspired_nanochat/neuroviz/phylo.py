"""The family tree of experts as one HTML file that needs nothing else: plotly inside, no network.

Every layer is a page of lanes, one expert at a time in a lane, time to the right. Colour is health and width is load, from the looks
that training took (`metrics.jsonl`); without them lines are grey. The script in the page draws, and says who an expert was.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say, write_atomic
from bio_inspired_nanochat.config import REQUIRED, knob, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.rundir import read_metrics
from bio_inspired_nanochat.structural import NeuroPhylo, read_lineage

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class PhyloConfig:
    """Whose family tree, and where the page goes."""

    log: str = knob(REQUIRED, "log folder of a run", path="dir")
    out: str = knob("family.html", "HTML file to write")

    def __post_init__(self) -> None:
        validate(self)


def draw_tree(config: PhyloConfig) -> dict[str, Any]:
    """Write the page; the script's last line. Raises UserError for a run without experts or without the package plotly."""
    family = read_family(config.log)
    path = write_page(family, Path(config.out))
    counts = {str(layer["layer"]): len(layer["experts"]) for layer in family["layers"]}
    say(f"family tree of {sum(counts.values())} experts in {path}")
    return {"out": str(path), "experts": counts, "events": family["events"], "bytes": path.stat().st_size}


def read_family(folder: str | Path) -> dict[str, Any]:
    """What the page shows of a run's log folder: see `family`. Raises UserError for a missing or damaged lineage log."""
    looks = [line for line in read_metrics(folder) if line["kind"] == "vitals"]
    return family(read_lineage(folder), looks, Path(folder).resolve().name)


def family(events: Sequence[dict[str, Any]], looks: Iterable[Mapping[str, Any]] = (), title: str = "") -> dict[str, Any]:
    """The experts of all layers, ready for JSON. events: of `read_lineage`; looks: lines of kind `vitals` (see `training.vitals`).

    An expert: id, parents, born and end [step, how] (end is null for the living), lane, track: [step, health, load] at looks, and
    events: [step, kind, health] of its life. Raises UserError when there are no events.
    """
    if not events:
        raise UserError("the lineage log has no events: train with --num_experts=8 --splitmerge_every=1000")
    tracks: dict[tuple[int, int], list[list[float]]] = {}
    last = max(event["step"] for event in events)
    for seen in looks:
        last = max(last, seen["step"])
        for row in seen["experts"]:
            tracks.setdefault((row["layer"], row["id"]), []).append([seen["step"], row["health"], row["load"]])
    layers = []
    for layer in sorted({event["layer"] for event in events}):
        own = [event for event in events if event["layer"] == layer]
        layers.append({"layer": layer, "experts": _experts(own, layer, tracks)})
    counted = sum(event["event"] != "founding" for event in events)
    return {"title": title, "last": last, "events": counted, "layers": layers}


def _experts(events: Sequence[dict[str, Any]], layer: int, tracks: Mapping[tuple[int, int], list]) -> list[dict[str, Any]]:
    tree = NeuroPhylo(events, layer)
    told: dict[int, list[list[Any]]] = {number: [] for number in tree.parents}
    for event in events:
        if event["event"] == "founding":
            continue
        healths = event.get("health") or []
        told[event["id"]].append([event["step"], event["event"], None])
        for parent, health in zip(event["parents"], [*healths, None, None], strict=False):
            told[parent].append([event["step"], f"{event['event']} parent {event['id']}", health])
    lanes = _lanes(tree)
    return [
        {
            "id": number,
            "parents": tree.parents[number],
            "born": list(tree.born.get(number, (0, "founder"))),
            "end": list(tree.ended[number]) if number in tree.ended else None,
            "lane": lanes[number],
            "track": tracks.get((layer, number), []),
            "events": told[number],
        }
        for number in sorted(tree.parents)
    ]


def _lanes(tree: NeuroPhylo) -> dict[int, int]:
    """A lane for every expert, the free one that is nearest to its first parent's; a lane is free once its last owner has ended."""
    lanes: dict[int, int] = {}
    free: set[int] = set()
    ends: list[tuple[int, int]] = []  # (step, lane) of those who live, soonest first
    used = 0
    for number in sorted(tree.parents, key=lambda one: (tree.born.get(one, (0, ""))[0], one)):
        step = tree.born.get(number, (-1, ""))[0]
        while ends and ends[0][0] <= step:
            free.add(heapq.heappop(ends)[1])
        near = lanes.get(tree.parents[number][0], used) if tree.parents[number] else used
        if free:
            lane = min(free, key=lambda one: (abs(one - near), one))
            free.remove(lane)
        else:
            lane, used = used, used + 1
        lanes[number] = lane
        if number in tree.ended:
            heapq.heappush(ends, (tree.ended[number][0], lane))
    return lanes


def write_page(found: dict[str, Any], path: Path) -> Path:
    """Write the page of a `family`; the path. Raises UserError without plotly, or when the file cannot be written."""
    page = (PAGE / "phylo.html").read_text(encoding="utf-8")
    parts = {
        "PLOTLY": plotly_script(),
        "SCRIPT": (PAGE / "phylo.js").read_text(encoding="utf-8"),
        "DATA": in_page(found),
    }
    for name, text in parts.items():
        page = page.replace(f"/*{name}*/", text, 1)
    try:
        write_atomic(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another --out") from None
    return path


def plotly_script() -> str:
    """Plotly's own JavaScript, to be put into a page. Raises UserError where the package is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the family tree needs the package plotly: install it with  pip install plotly") from None
    return get_plotlyjs().replace("</script", "<\\/script")


def in_page(data: Any) -> str:
    """Data as JSON that cannot end the script element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
