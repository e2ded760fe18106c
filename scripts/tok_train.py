"""Train a tokenizer on a corpus: `python -m scripts.tok_train --vocab_size=8192`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.common import check_writable, print_json_line
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.source import TOKENIZER_CHARS, tokenizer_path, train_tokenizer
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.tokenizer import MAX_VOCAB, MIN_VOCAB


@dataclass(frozen=True)
class TokTrainConfig:
    """The text and the size of a tokenizer."""

    data_dir: str | None = knob(None, "folder of shards; demo is the embedded corpus", path="exists", none="demo")
    dataset: str | None = knob(None, "dataset of the datasets package, instead of data_dir", none="none")
    vocab_size: int = knob(4096, "number of token ids, bytes and special tokens included", lo=MIN_VOCAB, hi=MAX_VOCAB, log=True)
    max_chars: int = knob(TOKENIZER_CHARS, "characters of the training split to learn from", lo=1, hi=100_000_000_000, log=True)
    out: str | None = knob(None, "file to write; without it the place where base_train looks for this corpus and size", none="auto")

    def __post_init__(self) -> None:
        validate(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, store, print where and how large."""
    with exit_on_user_error():
        config = parse(TokTrainConfig, argv, prog="scripts.tok_train", description="Train a byte-pair tokenizer.")
        wanted = None if config.out is None else check_writable("out", config.out)
        source = resolve_data(config.data_dir, config.dataset)
        out = wanted or tokenizer_path(source, config.vocab_size)
        began = time.perf_counter()
        tokenizer = train_tokenizer(source, config.vocab_size, config.max_chars)
        seconds = time.perf_counter() - began
        tokenizer.save(out)
        print_json_line({"vocab_size": tokenizer.vocab_size, "seconds": round(seconds, 3), "out": str(out), "sha256": tokenizer.sha256})


if __name__ == "__main__":
    main()
