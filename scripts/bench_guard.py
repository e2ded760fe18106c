"""Run benchmarks of the working tree and of a git revision in turns, and tell whether a ratio became worse.

    python -m scripts.bench_guard --against=main --run="bench_decode --context=512; bench_train"

Exit code 1 when one is worse beyond --tolerance, or a benchmark of the working tree fails. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.upkeep.guard import GuardConfig, guard
from bio_inspired_nanochat.upkeep.verdict import end_with


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, print table and record."""
    with exit_on_user_error():
        config = parse(GuardConfig, argv, prog="scripts.bench_guard", description="The working tree's benchmarks against a revision's.")
        end_with(lambda: guard(config), "stopped by a signal before the end; the temporary working tree is removed")


if __name__ == "__main__":
    main()
