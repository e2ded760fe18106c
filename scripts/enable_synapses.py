"""Give a trained vanilla checkpoint synapses whose gains are zero, or import a checkpoint of upstream nanochat.

    python -m scripts.enable_synapses --source=CHECKPOINT --out=FOLDER
    python -m scripts.base_train --resume=FOLDER --num_iterations=STEPS

The new model computes what the old one did; training goes on from there. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line, say
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse_with_given
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.injection import EnableConfig, enable_synapses
from bio_inspired_nanochat.registry import inert_fields
from bio_inspired_nanochat.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the checkpoint, print the record."""
    with exit_on_user_error():
        config, flags = parse_with_given(
            EnableConfig,
            argv,
            prog="scripts.enable_synapses",
            description="Turn a trained vanilla checkpoint, of this project or of upstream nanochat, into a synaptic one.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        for line in inert_fields(config.syn_cfg, flags) if config.synapses else []:
            say(f"notice: {line}")
        given = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
        tokenizer = None if given is None else (given.to_json().encode(), given.vocab_size, given.bos_id)
        print_json_line(enable_synapses(config, tokenizer))


if __name__ == "__main__":
    main()
