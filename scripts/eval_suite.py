"""Evaluate a checkpoint: likelihood, copies, needles, calibration, diversity, experts, CORE, minimal pairs, lm-eval.

    python -m scripts.eval_suite --tasks=bpb,calibration

Without --checkpoint the newest one is taken. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.evaluation.report import SuiteConfig, evaluate_suite


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print the record."""
    with exit_on_user_error():
        config = parse(SuiteConfig, argv, prog="scripts.eval_suite", description="All evaluations of a checkpoint, or some of them.")
        print_json_line(evaluate_suite(config))


if __name__ == "__main__":
    main()
