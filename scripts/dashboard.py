"""Follow a run in the browser: curves, experts, family tree, samples, and a look into the synapses of its newest checkpoint.

    python -m scripts.dashboard --log=runs/d8-synaptic

Ctrl-C stops the server. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.web.config import DashboardConfig
from bio_inspired_nanochat.web.dashboard import serve_dashboard


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, serve until stopped, print the record."""
    with exit_on_user_error():
        config = parse(DashboardConfig, argv, prog="scripts.dashboard", description="Follow a run in the browser.")
        print_json_line(serve_dashboard(config))


if __name__ == "__main__":
    main()
