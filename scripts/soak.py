"""Train one small model undisturbed and again with kills and signals at random times; both must end with the same loss, bit for bit.

    python -m scripts.soak --minutes=20

Exit code 1 when they differ, or when memory grows. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.training.soak import SoakConfig, soak


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, soak, print the record."""
    with exit_on_user_error():
        config = parse(SoakConfig, argv, prog="scripts.soak", description="Kill, stop and resume a small run at random times.")
        record = soak(config)
        print_json_line(record)
    if not (record["same"] and record["memory_bounded"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
