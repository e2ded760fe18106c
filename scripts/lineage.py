"""Print the family tree of a run's experts.

    python -m scripts.lineage --log=runs/d8-synaptic

The last line of stdout is a JSON record: events by kind, and living experts per layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.common import print_json_line, say
from bio_inspired_nanochat.config import REQUIRED, knob, parse, validate
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.structural import NeuroPhylo, read_lineage


@dataclass(frozen=True)
class LineageConfig:
    """What to print."""

    log: str = knob(REQUIRED, "log folder of a run, or its lineage.jsonl", path="exists")
    layer: int | None = knob(None, "the layer to show; all shows every layer with events", lo=0, hi=255, none="all")

    def __post_init__(self) -> None:
        validate(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, print the trees and the record."""
    with exit_on_user_error():
        config = parse(LineageConfig, argv, prog="scripts.lineage", description="Print the family tree of a run's experts.")
        events = read_lineage(config.log)
        layers = sorted({event["layer"] for event in events}) if config.layer is None else [config.layer]
        trees = [NeuroPhylo(events, layer) for layer in layers]
        for tree in trees:
            for line in tree.render():
                say(line)
        counts = Counter(event["event"] for event in events if event["layer"] in layers and event["event"] != "founding")
        print_json_line({"events": dict(counts), "living": {str(tree.layer): len(tree.living()) for tree in trees}})


if __name__ == "__main__":
    main()
