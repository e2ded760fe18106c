"""Train small models on memory tasks, several variants and seeds, and say which ones remember.

    python -m scripts.memory_study --tasks=recall,facts --variants=vanilla,full,delta --seeds=0,1

Finished runs are kept in a file and skipped when the study is started again. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.study import MemoryStudyConfig, memory_study


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, do the runs, print table and record."""
    with exit_on_user_error():
        config = parse(
            MemoryStudyConfig,
            argv,
            prog="scripts.memory_study",
            description="Accuracy on memory tasks that windowed attention alone cannot solve, by variant.",
        )
        print_json_line(memory_study(config))


if __name__ == "__main__":
    main()
