"""Draw what the synapses and experts of a checkpoint do and have learned, as PNG files.

    python -m scripts.neuroviz --checkpoint=models/synaptic --out=pictures

The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.neuroviz.gallery import GalleryConfig, draw_gallery


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, draw, print the record."""
    with exit_on_user_error():
        config = parse(GalleryConfig, argv, prog="scripts.neuroviz", description="Pictures of a checkpoint's synapses and experts.")
        print_json_line(draw_gallery(config))


if __name__ == "__main__":
    main()
