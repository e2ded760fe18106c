"""Compare what several processes train per second with what one trains, in one run.

    torchrun --standalone --nproc_per_node=2 -m scripts.bench_scaling -- --depth=12

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks import BenchScalingConfig, bench_scaling
from bio_inspired_nanochat.common import print_json_line, this_rank
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record on rank 0."""
    with exit_on_user_error():
        config = parse(
            BenchScalingConfig,
            argv,
            prog="scripts.bench_scaling",
            description="Scaling of training over several processes, vanilla and synaptic, by ddp and fsdp. Start it by torchrun.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        record = bench_scaling(config)
        if this_rank().first:
            print_json_line(record)


if __name__ == "__main__":
    main()
