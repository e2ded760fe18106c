"""The family tree of experts: an append-only log, one JSON object per line.

{"step": 1000, "layer": 3, "event": "split", "id": 9, "parents": [2], "slot": 8, "health": 0.91, "loss_before": 3.1, "loss_after": 3.1, ...}

Events: founding (with the number of `experts` that a layer begins with, numbered from 0), split, merge, birth, death, separate (twins become two slots) and resume, which says that a run went on from a step: what was logged
after that step by the run that ended is not part of the tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.errors import UserError

FILE = "lineage.jsonl"
ENDS = ("death",)


class LineageLog:
    """Appends events to `lineage.jsonl` in a folder; every line is flushed. A disk that is full ends the log, with a notice, not the run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._ended = False

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records in order."""
        if self._ended:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._ended = True
            say(f"notice: {self.path} cannot be written ({error.strerror}): the family tree ends here")

    def found(self, experts: Iterable[int]) -> None:
        """Note with how many experts every layer begins."""
        self.write({"step": 0, "layer": layer, "event": "founding", "experts": count} for layer, count in enumerate(experts))

    def resume(self, step: int) -> None:
        """Note that a run goes on from `step`."""
        self.write([{"step": step, "event": "resume"}])


def read_lineage(path: str | Path) -> list[dict[str, Any]]:
    """The events of a log (a file, or the folder of a run) that belong to the run as it went on. Raises UserError for a bad file."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"lineage log {path} cannot be read: {error.strerror}; give a run's log folder or its {FILE}") from None
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, event = int(record["step"]), str(record["event"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # a process that was killed leaves half a line
            raise UserError(f"{path}:{number} is not a lineage event: restore the file from a backup") from None
        if event == "resume":
            events = [earlier for earlier in events if earlier["step"] <= step]
        else:
            events.append(record)
    return events


class NeuroPhylo:
    """The tree of one layer's experts. Founders are the experts without a recorded parent."""

    def __init__(self, events: Iterable[dict[str, Any]], layer: int) -> None:
        self.layer = layer
        self.parents: dict[int, list[int]] = {}
        self.born: dict[int, tuple[int, str]] = {}
        self.ended: dict[int, tuple[int, str]] = {}
        for record in (event for event in events if event.get("layer") == layer):
            step, event = record["step"], record["event"]
            if event == "founding":
                self.parents = {founder: [] for founder in range(record["experts"])} | self.parents
                continue
            number = record["id"]
            for parent in record["parents"]:
                self.parents.setdefault(parent, [])
            if event in ("split", "merge", "birth"):
                assert number not in self.born, f"expert {number} of layer {layer} was born twice"
                self.parents[number] = list(record["parents"])
                self.born[number] = (step, event)
            if event in ENDS:
                self.parents.setdefault(number, [])
                self.ended[number] = (step, event)
            if event == "merge":
                self.ended |= dict.fromkeys(record["parents"], (step, event))

    def children(self, number: int) -> list[int]:
        """Experts that name this one as their first parent; a merged expert hangs under the first of its two."""
        return sorted(child for child, parents in self.parents.items() if parents[:1] == [number])

    def living(self) -> list[int]:
        """Ids of the experts that neither died nor merged."""
        return sorted(set(self.parents) - set(self.ended))

    def render(self) -> list[str]:
        """The tree as lines of text, founders first."""
        lines = [f"layer {self.layer}: {len(self.living())} living, {len(self.ended)} ended"]
        for root in sorted(number for number, parents in self.parents.items() if not parents):
            lines += self._branch(root, 1)
        return lines

    def _branch(self, number: int, depth: int) -> list[str]:
        step, how = self.born.get(number, (0, "founder"))
        text = f"{'  ' * depth}#{number} {how}" + (f" at {step}" if step else "")
        if len(self.parents[number]) > 1:
            text += " of " + " and ".join(f"#{parent}" for parent in self.parents[number])
        if number in self.ended:
            text += f", {'merged' if self.ended[number][1] == 'merge' else 'died'} at {self.ended[number][0]}"
        return [text, *(line for child in self.children(number) for line in self._branch(child, depth + 1))]
