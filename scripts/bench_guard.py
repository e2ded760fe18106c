"""Run benchmarks of the working tree and of a git revision in turns, and tell whether a ratio became worse.

    python -m scripts.bench_guard --against=main --run="bench_decode --context=512; bench_train"

Exit code 1 when one is worse beyond --tolerance, or a benchmark of the working tree fails. The last line of stdout is a JSON record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.upkeep.guard import GuardConfig, guard

INTERRUPTED = 130  # 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, print table and record."""
    with exit_on_user_error():
        config = parse(GuardConfig, argv, prog="scripts.bench_guard", description="The working tree's benchmarks against a revision's.")
        try:
            record = guard(config)
        except KeyboardInterrupt:
            print("stopped by a signal before the end; the temporary working tree is removed", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        print_json_line(record)
    if not record["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
