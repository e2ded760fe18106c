"""What a run's log folder says, also while the run still writes into it.

Half a line at the end of a log is a line that is being written; it is left out and read next time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.errors import UserError

METRICS = "metrics.jsonl"


class MetricsTail:
    """`metrics.jsonl` of a folder, read as it grows. lines: everything read so far."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS
        self.lines: list[dict[str, Any]] = []
        self._offset, self._inode = 0, -1

    def poll(self) -> list[dict[str, Any]]:
        """The lines that are new since the last call. A file that was replaced (a resumed run) is read from its beginning.

        Raises UserError for a complete line that is no record, once: the lines around it are in `lines`.
        """
        try:
            with self.path.open("rb") as file:
                stat = self.path.stat()
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self.lines, self._offset, self._inode = [], 0, stat.st_ino
                file.seek(self._offset)
                raw = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        found, damaged = [], []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                record["step"], record["kind"] = int(record["step"]), str(record["kind"])
            except (ValueError, KeyError, TypeError):
                damaged.append(line)
                continue
            found.append(record)
        self.lines += found
        if damaged:
            raise UserError(f"{self.path} holds a line that is no record of training: {damaged[0][:60]!r}")
        return found


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a run's `metrics.jsonl`; none when there is no such file. Raises UserError for a damaged one."""
    return MetricsTail(folder).poll()
