"""Serve a model to the browser, and to programs through an API like OpenAI's.

    python -m scripts.chat_web
    python -m scripts.chat_web --source=models/synaptic --port=8080

Without --source the newest base model is taken. Ctrl-C stops the server. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.web import WebConfig, serve


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, serve until stopped, print the record."""
    with exit_on_user_error():
        config = parse(WebConfig, argv, prog="scripts.chat_web", description="Talk to a model in the browser, or through its API.")
        print_json_line(serve(config))


if __name__ == "__main__":
    main()
