"""Time the attention operators: forward, backward, memory, against PyTorch's own attention.

    python -m scripts.bench_kernels --head_dim=64,128 --context=2048 --tick=8

All competitors of a size run in turns; the ratio is that of a synaptic layer to flash attention. The last line of stdout is
a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks import BenchKernelsConfig, bench_kernels
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(BenchKernelsConfig, argv, prog="scripts.bench_kernels", description="Speed and memory of the attention operators.")
        print_json_line(bench_kernels(config))


if __name__ == "__main__":
    main()
