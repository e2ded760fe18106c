"""Time decoding of a vanilla and a synaptic model: to the first token, and per token after it.

    python -m scripts.bench_decode --depth=12 --context=512,4096 --batch=1,8

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.benchmarks import BenchDecodeConfig, bench_decode
from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print table and record."""
    with exit_on_user_error():
        config = parse(
            BenchDecodeConfig,
            argv,
            prog="scripts.bench_decode",
            description="Speed of decoding, synaptic against vanilla.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        print_json_line(bench_decode(config))


if __name__ == "__main__":
    main()
