"""A corpus of a few hundred short documents and a configuration that trains in a second."""

import contextlib
import random
import tempfile
from functools import cache
from pathlib import Path

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.data.shards import write_shard
from bio_inspired_nanochat.training import TrainConfig

TEXT = "the king said to his old friend that a small bird sang near the river and nobody knew why it was so"
WORDS = TEXT.split()
SMALL = {
    "depth": 2,
    "n_embd": 32,
    "head_dim": 16,
    "max_seq_len": 32,
    "vocab_size": 280,
    "num_iterations": 6,
    "device_batch_size": 4,
    "eval_every": 0,
    "eval_tokens": 256,
    "sample_every": 0,
    "save_every": 0,
    "log_every": 2,
    "device": "cpu",
}


def _document(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) + "."


@cache
def corpus() -> Path:
    """A folder of two training shards and one for validation; the ranks of one test share it."""
    folder, rng = base_dir() / "tiny-corpus", random.Random(3)
    if folder.exists():
        return folder
    made = Path(tempfile.mkdtemp(dir=base_dir()))
    for number, documents in enumerate((150, 150, 60)):
        write_shard(made / f"shard_{number:05d}.parquet", [_document(rng) for _ in range(documents)])
    with contextlib.suppress(OSError):  # another rank was faster
        made.rename(folder)
    return folder


def small(folder: Path, **changes) -> TrainConfig:
    """A run that writes only under `folder`."""
    places = {"data_dir": str(corpus()), "checkpoint_dir": str(folder / "checkpoints"), "log_dir": str(folder / "runs")}
    return TrainConfig(**{**SMALL, **places, **changes})


def flags(folder: Path, **changes) -> list[str]:
    """The same run as a command line."""
    places = {"data_dir": corpus(), "checkpoint_dir": folder / "checkpoints", "log_dir": folder / "runs"}
    return [f"--{name}={value}" for name, value in {**SMALL, **places, **changes}.items()]
