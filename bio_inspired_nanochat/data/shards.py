"""Parquet shards: the on-disk form of every corpus. One string column `text`, one document per row.

A corpus is a folder of shards in name order; the last one is the validation set. Shards written here are zstd with page
checksums, in row groups of at most 512 documents.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from bio_inspired_nanochat.errors import UserError

ROW_GROUP_ROWS = 512
_SAMPLE = 1 << 16
_FLUSH_CHARS = 4 << 20


class DamagedShard(Exception):
    """A shard, or a row group of it, that cannot be read. The message names the file and the reason."""


@dataclass(frozen=True)
class ShardPart:
    """Rows [start, stop) of one shard. Counts as a path (`os.fspath`), so that code which wants the file gets it.

    digest: identifies the content by size, footer and samples of the file, which is cheap for files of any size.
    """

    path: Path
    start: int
    stop: int
    groups: tuple[int, ...]  # rows of every row group of the whole file
    digest: str

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __len__(self) -> int:
        return self.stop - self.start

    def slice(self, start: int, stop: int) -> ShardPart:
        """Rows [start, stop) of the file."""
        return ShardPart(self.path, start, stop, self.groups, self.digest)


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder in order: `shard_*.parquet` where there are any, else every `*.parquet`. A file stands for itself.

    Numbers sort as numbers. Raises UserError when there are none.
    """
    if not folder.exists():
        raise UserError(
            f"data_dir={folder} does not exist: give a folder of parquet shards, or make one with python -m scripts.prepare_data"
        )
    if folder.is_file():
        if folder.suffix != ".parquet":
            raise UserError(
                f"data_dir={folder} is not a folder of parquet shards: convert it with python -m scripts.prepare_data --input={folder} --out=DIR"
            )
        return [folder]
    files = [path for path in folder.glob("*.parquet") if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.name.startswith("shard_")] or files
    if not files:
        raise UserError(
            f"data_dir={folder} has no *.parquet files: make shards with python -m scripts.prepare_data --input={folder} --out=DIR"
        )
    return sorted(files, key=lambda path: [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", path.name))])


def open_shard(path: Path, column: str = "text") -> ShardPart:
    """Inspect a shard's footer. Raises DamagedShard when it cannot be read, UserError when it has no such column of strings."""
    try:
        with pq.ParquetFile(path) as file:
            meta, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DamagedShard(f"{path} is not a readable parquet file ({_reason(error)})") from None
    check_column(path, schema, column)
    groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
    if sum(groups) != meta.num_rows:
        raise DamagedShard(f"{path} is not a readable parquet file (its footer says {meta.num_rows} rows, its row groups {sum(groups)})")
    return ShardPart(path, 0, meta.num_rows, groups, _digest(path))


def check_column(path: Path, schema: pa.Schema, column: str) -> None:
    """Raise UserError unless `schema` has exactly one column of that name and it holds text."""
    if schema.names.count(column) != 1:
        raise UserError(
            f"{path} has no column {column!r}, its columns are {', '.join(schema.names) or 'none'}: "
            f"make shards with python -m scripts.prepare_data --input {path} --text_column NAME --out DIR"
        )
    kind = schema.field(column).type
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text: choose a column of strings")


class ShardReader:
    """Reads row groups of shards; keeps the last one, so that neighbouring rows cost one read."""

    def __init__(self, column: str = "text") -> None:
        self._column = column
        self._file: tuple[Path, pq.ParquetFile] | None = None
        self._group: tuple[Path, int, list[str | None]] | None = None

    def group(self, path: Path, index: int) -> list[str | None]:
        """Texts of one row group; None for null rows. Raises DamagedShard."""
        if self._group is None or self._group[:2] != (path, index):
            self._group = (path, index, self._read(path, index))
        return self._group[2]

    def _read(self, path: Path, index: int) -> list[str | None]:
        try:
            if self._file is None or self._file[0] != path:
                self.close()
                self._file = (path, pq.ParquetFile(path, page_checksum_verification=True))
            table = self._file[1].read_row_group(index, columns=[self._column], use_threads=False)
            texts, rows = table.column(0).to_pylist(), self._file[1].metadata.row_group(index).num_rows
            if len(texts) != rows:
                raise DamagedShard(f"{path} row group {index} has {len(texts)} rows, its footer says {rows}")
            return texts
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DamagedShard(f"{path} row group {index} cannot be read ({_reason(error)})") from None

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file[1].close()
            self._file = None


def read_rows(part: ShardPart, column: str = "text") -> Iterator[str | None]:
    """The texts of a part in order, one row group in memory at a time. Raises DamagedShard."""
    reader, first = ShardReader(column), 0
    try:
        for index, rows in enumerate(part.groups):
            low, high = max(part.start, first), min(part.stop, first + rows)
            if low < high:
                yield from reader.group(part.path, index)[low - first : high - first]
            first += rows
    finally:
        reader.close()


def write_shard(path: Path, texts: Iterable[str]) -> tuple[int, int]:
    """Write one shard; returns its documents and characters."""
    with ShardWriter(path) as writer:
        for text in texts:
            writer.add(text)
    return writer.documents, writer.characters


class ShardWriter:
    """A shard being written, row group by row group. A context manager; the file is only complete after it.

    flush_chars: characters held in memory before a row group is written, however few documents they are.
    """

    def __init__(self, path: Path, flush_chars: int = _FLUSH_CHARS) -> None:
        self._flush_chars = flush_chars
        self._schema = pa.schema([("text", pa.large_string())])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True)
        self._texts: list[str] = []
        self._pending = 0
        self.documents = 0
        self.characters = 0

    def add(self, text: str) -> None:
        """Append one document."""
        self._texts.append(text)
        self._pending += len(text)
        self.documents += 1
        self.characters += len(text)
        if len(self._texts) >= ROW_GROUP_ROWS or self._pending >= self._flush_chars:
            self._flush()

    def _flush(self) -> None:
        if self._texts:
            self._writer.write_table(pa.table({"text": pa.array(self._texts, pa.large_string())}, schema=self._schema))
        self._texts, self._pending = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def fingerprint(parts: Sequence[ShardPart]) -> str:
    """Digest of a sequence of parts: the same for copies of the same files in another folder or under other names."""
    rows = [f"{part.digest} {part.start} {part.stop}" for part in parts]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Digest of the file's size, its footer (offsets, sizes and statistics of every page run) and samples of its bytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little") + 8
        places = [(0, _SAMPLE), (size // 3, _SAMPLE), (size * 2 // 3, _SAMPLE), (max(0, size - footer), footer)]
        for offset, length in places:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
