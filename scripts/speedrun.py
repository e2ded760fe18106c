"""A vanilla and a synaptic model side by side in a few minutes: `bash speedrun.sh`, or, once installed,

    python -m scripts.speedrun --minutes=4

SPEEDRUN_DEPTH, SPEEDRUN_MINUTES and SPEEDRUN_DATA set the defaults. The last line of stdout is a JSON record.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> None:
    """Read flags and variables, run, print the record."""
    began = time.perf_counter()  # the imports below take seconds, which count towards the promised minutes

    from bio_inspired_nanochat.common import print_json_line
    from bio_inspired_nanochat.errors import exit_on_user_error
    from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard
    from bio_inspired_nanochat.training.speedrun import read_config, speedrun

    with exit_on_user_error():
        config = read_config(argv, os.environ, "scripts.speedrun")
        try:
            record = speedrun(config, lambda: [TensorBoard()], began)
        except KeyboardInterrupt:
            print("stopped by SIGINT before the end; checkpoints that were saved stay", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        print_json_line(record)
        if "stopped" in record:
            raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
