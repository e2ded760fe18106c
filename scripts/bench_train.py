"""Time one optimizer step of a vanilla and a synaptic model, in turns on one device.

    python -m scripts.bench_train --depth=12 --max_seq_len=2048 --device_batch_size=16

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks import BenchTrainConfig, bench_train
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(
            BenchTrainConfig,
            argv,
            prog="scripts.bench_train",
            description="Speed and memory of a training step, synaptic against vanilla.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        print_json_line(bench_train(config))


if __name__ == "__main__":
    main()
