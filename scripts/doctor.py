"""Say what this machine has, what is broken, and what training would run on: a text for bug reports without private paths.

    python -m scripts.doctor --depth=12

The last line of stdout is a JSON record; with --json it is the only one. Works, and ends with exit code 0, whatever is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from bio_inspired_nanochat.upkeep import doctor


class _Parser(argparse.ArgumentParser):
    """Of the standard library, because the project's own parser needs packages that may be what is broken."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def _whole(low: int, high: int):
    def convert(value: str) -> int:
        if not value.isdecimal() or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {low} to {high}")
        return int(value)

    return convert


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, examine, print report and record."""
    parser = _Parser(
        prog="python -m scripts.doctor", description="What this machine has, and what training would do with it.", allow_abbrev=False
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=1,
        default=0,
        type=_whole(0, 1),
        metavar="{0,1}",
        help="1: print nothing but the JSON record (default: 0; --json alone is 1)",
    )
    parser.add_argument(
        "--depth", default=12, type=_whole(1, 64), metavar="INT", help="layers of the model that is asked about (1 to 64; default: 12)"
    )
    parser.add_argument(
        "--context",
        default=0,
        type=_whole(0, 1 << 20),
        metavar="INT",
        help="its context length in tokens; 0 is training's (0 to 1048576; default: 0)",
    )
    parser.add_argument(
        "--timeout", default=120, type=_whole(1, 3600), metavar="INT", help="longest time for one probe (1 to 3600 seconds; default: 120)"
    )
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    flags = parser.parse_args(words)
    sections = doctor.examine(flags.depth, flags.context, flags.timeout)
    if not flags.json:
        print(doctor.text(sections))
    print(json.dumps({"ok": not doctor.problems(sections), "problems": doctor.problems(sections), **sections}), flush=True)


if __name__ == "__main__":
    main()
