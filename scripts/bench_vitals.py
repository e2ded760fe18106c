"""Time what a run's logs of synapses and experts cost beside its training steps.

    python -m scripts.bench_vitals --depth=4

Pictures are not in it: a run draws them only while they take less than half a percent of its time. The last line of stdout is a JSON
record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks.vitals import BenchVitalsConfig, bench_vitals
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(
            BenchVitalsConfig, argv, prog="scripts.bench_vitals", description="Cost of looking at synapses and experts while they train."
        )
        print_json_line(bench_vitals(config, lambda: [TensorBoard()]))


if __name__ == "__main__":
    main()
