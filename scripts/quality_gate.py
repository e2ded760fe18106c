"""Check what changed: lint, format, types, import directions, Rust, and the tests that belong to it.

    python -m scripts.quality_gate --mode=staged

Exit code 1 when a check fails or its tool is missing. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.upkeep.gate import GateConfig, gate
from bio_inspired_nanochat.upkeep.verdict import end_with


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check, print table and record."""
    with exit_on_user_error():
        config = parse(GateConfig, argv, prog="scripts.quality_gate", description="Checks of what changed, or of everything.")
        end_with(lambda: gate(config), "stopped by SIGINT before the end")


if __name__ == "__main__":
    main()
