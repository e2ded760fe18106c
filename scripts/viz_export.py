"""Write the whole report of a run as static HTML.

    python -m scripts.viz_export --log=runs/d8-synaptic --out=run_report
    python -m scripts.viz_export runs/d8-synaptic

The last line of stdout is a JSON record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.neuroviz.export import ExportConfig, export


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the report, print the record. A first word without dashes is the run."""
    with exit_on_user_error():
        words = list(sys.argv[1:] if argv is None else argv)
        if words and not words[0].startswith("-"):
            words[0] = f"--log={words[0]}"
        config = parse(ExportConfig, words, prog="scripts.viz_export", description="The report of a run as static HTML.")
        print_json_line(export(config))


if __name__ == "__main__":
    main()
