"""Turn your own text files into training shards: `python -m scripts.prepare_data --input notes.txt --out data/notes`."""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.data.prepare import PrepareConfig, prepare
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, write the shards, print what was written and the command to go on with."""
    with exit_on_user_error():
        config = parse(PrepareConfig, argv, prog="scripts.prepare_data", description="Turn text files into training shards.")
        print_json_line(prepare(config))


if __name__ == "__main__":
    main()
