"""Time decoding and reading of prompts on a CPU: the Rust extension against PyTorch, synaptic against vanilla.

    python -m scripts.bench_cpu --depth=12 --context=2048 --threads=2

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks import BenchCpuConfig, bench_cpu
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(
            BenchCpuConfig,
            argv,
            prog="scripts.bench_cpu",
            description="Speed of a CPU, Rust against PyTorch.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        print_json_line(bench_cpu(config))


if __name__ == "__main__":
    main()
