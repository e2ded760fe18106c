"""Pre-train a vanilla or synaptic GPT.

    python -m scripts.base_train --synapses=1 --depth=12
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --synapses=1 --depth=12

Without --data_dir the embedded demo corpus is prepared and used. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line, this_rank
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.config.cli import parse_with_given
from bio_inspired_nanochat.errors import UserError, exit_on_user_error
from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard
from bio_inspired_nanochat.training import TrainConfig, dry_run, print_config, train


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, print the record."""
    with exit_on_user_error():
        config, given = parse_with_given(
            TrainConfig,
            argv,
            prog="scripts.base_train",
            description="Pre-train a vanilla or synaptic GPT. --synapses=1 takes the default preset.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)},
        )
        unused = sorted(name for name in given if name.startswith(("syn_cfg.", "syn_preset")))
        if unused and not config.synapses and not config.resume:
            raise UserError(f"--{unused[0]} does nothing without synapses: add --synapses=1")
        if config.print_config:
            record = print_config(config, given)
        elif config.dry_run:
            record = dry_run(config, given)
        else:
            record = train(config, [TensorBoard()], given)
        if this_rank().first:
            print_json_line(record)


if __name__ == "__main__":
    main()
