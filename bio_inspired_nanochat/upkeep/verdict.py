"""How a script of upkeep ends: record on the last line, exit code 1 for a bad one, 130 for one that was stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from bio_inspired_nanochat.common import print_json_line

INTERRUPTED = 130  # 128 + SIGINT


def end_with(work: Callable[[], dict[str, Any]], stopped: str) -> None:
    """Print the record of `work` and exit by its `ok`; `stopped` is what a Ctrl-C makes it say instead."""
    try:
        record = work()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    print_json_line(record)
    if not record["ok"]:
        raise SystemExit(1)
