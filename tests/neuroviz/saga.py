"""A long family history in the format of the lineage log: splits, deaths, mergers and births of one layer, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.structural import LineageLog

FOUNDERS, MOST = 8, 12


def events(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` events after the founding, one every five steps."""
    rng = random.Random(seed)
    living, following = list(range(FOUNDERS)), FOUNDERS
    for number in range(1, count + 1):
        kind = rng.choice(
            ("split", "birth") if len(living) <= 4 else ("death", "merge") if len(living) >= MOST else ("split", "death", "merge")
        )
        parents: list[int] = []
        if kind == "death":
            about = living.pop(rng.randrange(len(living)))
        else:
            about, following = following, following + 1
            if kind == "split":
                parents = [rng.choice(living)]
            elif kind == "merge":
                parents = rng.sample(living, 2)
                living = [one for one in living if one not in parents]
            living.append(about)
        health = [round(rng.random(), 3) for _ in range(max(1, len(parents)))]
        yield {"step": 5 * number, "layer": 0, "event": kind, "id": about, "parents": parents, "slots": [0], "health": health}


def write(folder: Path, count: int) -> Path:
    """The log of such a history in a run folder; the folder."""
    log = LineageLog(folder)
    log.found([FOUNDERS])
    log.write(events(count))
    return folder
