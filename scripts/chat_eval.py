"""Evaluate a chat model offline: arithmetic, counting, spelling and copying in its own words, three tasks by choice, and whether
its answers end.

    python -m scripts.chat_eval
    python -m scripts.chat_eval --source=base --tasks=larger,kinds --prompts=0

Without --source the newest fine-tuned model is taken. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.evaluation import ChatEvalConfig, evaluate_chat


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, ask, print table and record."""
    with exit_on_user_error():
        config = parse(ChatEvalConfig, argv, prog="scripts.chat_eval", description="Ask a chat model questions with known answers.")
        print_json_line(evaluate_chat(config))


if __name__ == "__main__":
    main()
