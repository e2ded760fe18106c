"""Talk to a model in the terminal.

    python -m scripts.chat_cli --prompt="Once upon a time"
    python -m scripts.chat_cli

Without --prompt it asks for messages until /quit or the end of the input; /help lists the commands. Ctrl-C stops an answer,
not the program. Without --checkpoint the newest one is taken. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.engine.terminal import ChatConfig, chat
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the model, answer, print the record."""
    with exit_on_user_error():
        config = parse(ChatConfig, argv, prog="scripts.chat_cli", description="Talk to a model in the terminal.")
        print_json_line(chat(config))


if __name__ == "__main__":
    main()
