"""Time a training step of many small models that are trained as one, against the step of one of them.

    python -m scripts.bench_stack --models=2,10

All run in turns. The last line of stdout is a JSON record; `stack_ratio` says how many steps of a single model one of all costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.tuning.bench import BenchStackConfig, bench_stack


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(BenchStackConfig, argv, prog="scripts.bench_stack", description="Cost of a population trained as one.")
        print_json_line(bench_stack(config))


if __name__ == "__main__":
    main()
