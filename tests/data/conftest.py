"""Small shards and a tokenizer for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bio_inspired_nanochat.tokenizer import Tokenizer

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at", "be", "from")
MakeShards = Callable[..., Path]


def document(i: int) -> str:
    """A text that names itself; lengths vary from a few to some hundred tokens."""
    return f"document {i}: " + " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + (i * 37) % 150))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small tokenizer."""
    return Tokenizer.train([document(i) for i in range(200)], 400)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write one shard per list of texts; returns the folder."""

    def make(*shards: Sequence[str | None], rows: int = 8, name: str = "shards") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i, texts in enumerate(shards):
            table = pa.table({"text": pa.array(list(texts), pa.string())})
            pq.write_table(table, folder / f"shard_{i:05d}.parquet", row_group_size=rows, compression="zstd", write_page_checksum=True)
        return folder

    return make
