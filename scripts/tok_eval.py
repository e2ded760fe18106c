"""Compression and exactness of tokenizers: `python -m scripts.tok_eval --vocab_size=1024,4096`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.common import print_json_line, table
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.data import ensure_tokenizer, resolve_data
from bio_inspired_nanochat.data.compression import measure, samples
from bio_inspired_nanochat.errors import UserError, exit_on_user_error
from bio_inspired_nanochat.tokenizer import MAX_VOCAB, MIN_VOCAB, Tokenizer


@dataclass(frozen=True)
class TokEvalConfig:
    """Which tokenizers, on which text."""

    data_dir: str | None = knob(None, "folder of shards; demo is the embedded corpus", path="exists", none="demo")
    dataset: str | None = knob(None, "dataset of the datasets package, instead of data_dir", none="none")
    tokenizer: tuple[str, ...] = knob((), "tokenizer files to measure", path="file")
    vocab_size: tuple[int, ...] = knob((4096,), "sizes to measure without --tokenizer, trained where missing", lo=MIN_VOCAB, hi=MAX_VOCAB)
    max_chars: int = knob(2_000_000, "characters of each split to measure on", lo=1, hi=10_000_000_000, log=True)

    def __post_init__(self) -> None:
        validate(self)
        if not self.tokenizer and not self.vocab_size:
            raise UserError("nothing to measure: give --tokenizer=FILE,... or --vocab_size=N,...")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table of bytes per token, then the JSON line. Exit code 1 when a text does not come back exactly."""
    with exit_on_user_error():
        config = parse(TokEvalConfig, argv, prog="scripts.tok_eval", description="Measure bytes per token and exact round trips.")
        source = resolve_data(config.data_dir, config.dataset)
        if config.tokenizer:
            named = {path: Tokenizer.load(path) for path in config.tokenizer}
        else:
            named = {str(size): ensure_tokenizer(source, size) for size in config.vocab_size}
        texts = dict(samples(source, config.max_chars))
        results = {name: {kind: measure(tokenizer, part) for kind, part in texts.items()} for name, tokenizer in named.items()}
        rows = [[name, named[name].vocab_size, *(item.bytes_per_token for item in kinds.values())] for name, kinds in results.items()]
        table(["tokenizer", "ids", *texts], [["raw bytes", 256, *(1.0 for _ in texts)], *rows])
        exact = all(item.exact for kinds in results.values() for item in kinds.values())
        compression = {name: {kind: item.bytes_per_token for kind, item in kinds.items()} for name, kinds in results.items()}
        print_json_line({"bytes_per_token": compression, "vocab_size": {n: t.vocab_size for n, t in named.items()}, "exact": exact})
    if not exact:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
