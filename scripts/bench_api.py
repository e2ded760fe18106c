"""Time the chat server against the engine alone: first token, tokens per second, fairness among several clients.

    python -m scripts.bench_api --source=sft --clients=8

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.web.benchmark import BenchApiConfig, bench_api


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(BenchApiConfig, argv, prog="scripts.bench_api", description="Speed of the chat server against the engine alone.")
        print_json_line(bench_api(config))


if __name__ == "__main__":
    main()
