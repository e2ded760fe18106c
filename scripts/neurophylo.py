"""Draw the family tree of a run's experts as one interactive HTML file that opens without a network.

    python -m scripts.neurophylo --log=runs/d8-synaptic --out=family.html

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.neuroviz.phylo import PhyloConfig, draw_tree


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the page, print the record."""
    with exit_on_user_error():
        config = parse(PhyloConfig, argv, prog="scripts.neurophylo", description="The family tree of experts as an interactive page.")
        print_json_line(draw_tree(config))


if __name__ == "__main__":
    main()
