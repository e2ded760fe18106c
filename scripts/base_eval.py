"""Evaluate a checkpoint: bits per byte on held-out text, and samples.

    python -m scripts.base_eval --zero_synapses=1

Without --checkpoint the newest one is taken. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.evaluation import BaseEvalConfig, evaluate_base


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the record."""
    with exit_on_user_error():
        config = parse(BaseEvalConfig, argv, prog="scripts.base_eval", description="Bits per byte and samples of a checkpoint.")
        print_json_line(evaluate_base(config))


if __name__ == "__main__":
    main()
