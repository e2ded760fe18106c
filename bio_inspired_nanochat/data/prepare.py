"""Your own text to shards: the library side of `python -m scripts.prepare_data`."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import progress, say
from bio_inspired_nanochat.config import REQUIRED, knob, validate
from bio_inspired_nanochat.data.corpus import hold_out, write_corpus
from bio_inspired_nanochat.data.documents import Tally, input_files, read_documents
from bio_inspired_nanochat.data.split import split_text


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, where to write, and how documents are cut and held out."""

    input: str = knob(REQUIRED, "file (.txt .md .jsonl .json .csv .tsv .parquet, also .gz) or folder of such files", path="exists")
    out: str = knob(REQUIRED, "new folder for the shards")
    text_column: str = knob("text", "field of .jsonl, .json, .csv and .parquet records that holds the text")
    val_fraction: float = knob(
        0.02, "share of documents for validation; the pieces of a long one count one by one", lo=0.0001, hi=0.5, log=True
    )
    shard_chars: int = knob(32_000_000, "characters per shard; one shard at a time is held in memory", lo=1000, hi=1_000_000_000, log=True)
    doc_chars: int = knob(
        16_000, "longer documents are split, at paragraphs where possible", lo=64, hi=10_000_000, log=True, unit="characters"
    )
    seed: int = knob(0, "order of the documents", lo=0, hi=(1 << 31) - 1)

    def __post_init__(self) -> None:
        validate(self)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Read, split, shuffle and write; returns the record that the script prints. Raises UserError for wrong input."""
    tally = Tally()
    files = input_files(Path(config.input).expanduser(), tally)
    out = Path(config.out).expanduser()
    with progress(None, "prepare", "documents") as bar:

        def documents() -> Iterator[str]:
            for file in files:
                for text in read_documents(file, config.text_column, config.doc_chars, tally):
                    bar.advance(1, note=file.name)
                    yield text

        info = write_corpus(
            out, hold_out(_at_least_two(documents()), config.val_fraction), shard_chars=config.shard_chars, seed=config.seed
        )
    for name in tally.empty_files:
        say(f"notice: {name} has no text")
    if tally.skipped_files:
        say(f"notice: {tally.skipped_files} files of other kinds were left out")
    return {
        "documents": info.documents,
        "characters": info.characters,
        "shards": info.shards,
        "val_documents": info.val_documents,
        "files": tally.files,
        "skipped_files": tally.skipped_files,
        "empty_files": len(tally.empty_files),
        "empty_documents": tally.empty_documents,
        "out": str(out),
        "next": f"python -m scripts.base_train --data_dir={shlex.quote(str(out))}",
    }


def _at_least_two(texts: Iterator[str]) -> Iterator[str]:
    """A single text is cut in two, so that something is left for validation."""
    first = list(itertools.islice(texts, 2))
    if len(first) == 1 and len(first[0]) > 1:
        first = list(split_text(first, max(1, len(first[0]) * 9 // 10)))
    yield from first
    yield from texts
