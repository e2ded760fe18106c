"""Time the fast weights of the postsynaptic density by rule and execution, beside plain attention of the same batch.

    python -m scripts.bench_memory --rows=16 --context=2048 --modes=16,64

All run in turns; ratios are to the attention of one layer. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks.memory import BenchMemoryConfig, bench_memory
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(BenchMemoryConfig, argv, prog="scripts.bench_memory", description="Speed and memory of the fast weights.")
        print_json_line(bench_memory(config))


if __name__ == "__main__":
    main()
