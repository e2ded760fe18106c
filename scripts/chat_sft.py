"""Fine-tune a model on conversations, so that it answers.

    python -m scripts.chat_sft
    python -m scripts.chat_sft --source=models/synaptic --data=mine.jsonl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --data=mine.jsonl

Without --source the newest base model is taken, without --data the embedded conversations. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line, say, this_rank
from bio_inspired_nanochat.config.cli import parse_with_given
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard
from bio_inspired_nanochat.training import TuneConfig, tune


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, fine-tune, say how to talk to the model, print the record."""
    with exit_on_user_error():
        config, given = parse_with_given(
            TuneConfig, argv, prog="scripts.chat_sft", description="Fine-tune a model on conversations, so that it answers."
        )
        record = tune(config, [TensorBoard()], given)
        if record["checkpoint"] and not record["stopped"]:
            say(f"talk to it: python -m scripts.chat_cli --source={record['checkpoint']}")
        if this_rank().first:
            print_json_line(record)


if __name__ == "__main__":
    main()
