"""Texts of a user's own files: .txt, .md, .jsonl, .json, .csv, .tsv and .parquet, plain or .gz, one by one or in folders.

Every reader streams: a file of any size is read line by line or row group by row group (a .json array is the exception).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bio_inspired_nanochat.data.shards import DamagedShard, open_shard, read_rows
from bio_inspired_nanochat.data.split import split_text
from bio_inspired_nanochat.errors import UserError, nearest

_LINE_BYTES = 1 << 20  # a longer line arrives in pieces
_RECORD_CHARS = 1 << 28
_JSON_BYTES = 1 << 30


@dataclass
class Tally:
    """What was met on the way: files read, files of other kinds, files and documents without text."""

    files: int = 0
    skipped_files: int = 0
    empty_files: list[str] = field(default_factory=list)
    empty_documents: int = 0


def input_files(path: Path, tally: Tally) -> list[Path]:
    """The readable files under `path` in name order, hidden ones left out. Raises UserError when there are none."""
    known = ", ".join(_READERS)
    if not path.exists():
        raise UserError(f"input={path} does not exist: give a file ({known}) or a folder of them")
    if path.is_file():
        if _kind(path) is None:
            raise UserError(f"input={path} is of an unknown kind {path.suffix!r}: one of {known}, optionally with .gz")
        return [path]
    visible = [file for file in sorted(path.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in visible if file.is_file() and _kind(file)]
    tally.skipped_files = sum(file.is_file() for file in visible) - len(files)
    if not files:
        raise UserError(f"input={path} has no files of a known kind: {known}")
    return files


def read_documents(path: Path, column: str, limit: int, tally: Tally) -> Iterator[str]:
    """Documents of one file, long ones split into pieces of at most `limit` characters. Raises UserError for what cannot be read."""
    kind = _kind(path)
    assert kind is not None, "input_files gives known kinds only"
    found = False
    try:
        for document in _READERS[kind](path, column, tally):
            for piece in split_text(document, limit):
                found = True
                yield piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): compress it again, or give the plain file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    tally.files += 1
    if not found:
        tally.empty_files.append(str(path))


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """`(line number, text)` of a UTF-8 file with or without a byte order mark; very long lines in several pieces of one number."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, fresh = 1, True
    with _open(path) as file:
        while raw := file.readline(_LINE_BYTES):
            if number == 1 and fresh:
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(
                        f"{path} is UTF-16, not UTF-8: convert it, for example iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
                    )
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None
            if "\0" in text:
                raise UserError(f"{path} line {number} contains a NUL byte: it is no text file, or UTF-16; convert it to UTF-8")
            fresh = raw.endswith(b"\n")
            yield number, text
            number += fresh
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from None


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{path} line {number} is not UTF-8 (byte 0x{byte:02x}): convert the file, for example iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _text_file(path: Path, column: str, tally: Tally) -> Iterator[Iterator[str]]:
    """The whole file as one document, in pieces."""
    yield _unix_ends(text for _, text in _lines(path))


def _unix_ends(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces with line ends of one character; those of two may be cut between pieces."""
    held = ""
    for piece in pieces:
        piece = held + piece
        held = "\r" if piece.endswith("\r") else ""
        yield piece.removesuffix("\r").replace("\r\n", "\n")
    yield held


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`_lines` with the pieces of a line joined."""
    pending: list[str] = []
    size, number = 0, 1
    for number, text in _lines(path):
        pending.append(text)
        size += len(text)
        if size > _RECORD_CHARS:
            raise UserError(f"{path} line {number} has more than {_RECORD_CHARS} characters: one record per line is expected")
        if text.endswith("\n"):
            yield number, "".join(pending)
            pending, size = [], 0
    if pending:
        yield number, "".join(pending)


def _jsonl_file(path: Path, column: str, tally: Tally) -> Iterator[list[str]]:
    for number, line in _whole_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error}): one JSON object per line is expected") from None
            yield from _field(f"{path} line {number}", record, column, tally)


def _json_file(path: Path, column: str, tally: Tally) -> Iterator[list[str]]:
    """An array of records, or one record; a file of one record per line is read as such."""
    if path.stat().st_size > _JSON_BYTES:
        yield from _jsonl_file(path, column, tally)
        return
    text = "".join(piece for _, piece in _lines(path))
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl_file(path, column, tally)
            return
        raise UserError(f"{path} line {error.lineno} is not JSON ({error.msg}): an array of objects is expected") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): an array of objects is expected") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: an array of objects is expected") from None
    records = content if isinstance(content, list) else [content]
    for i, record in enumerate(records):
        yield from _field(f"{path} record {i}", record, column, tally)


def _csv_file(path: Path, column: str, tally: Tally) -> Iterator[list[str]]:
    csv.field_size_limit(_RECORD_CHARS)
    separator = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    taken: list[str] = []  # lines of the record that is being read
    last: list[str] = []  # and those of the one before
    reader = csv.DictReader((taken.append(line) or line for _, line in _whole_lines(path)), delimiter=separator)
    try:
        for record in reader:
            last, taken[:] = list(taken), []
            yield from _field(f"{path} line {reader.line_num}", record, column, tally)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error}): quote the text, or convert the file to .jsonl") from None
    if list(csv.reader([*last, "end"], delimiter=separator))[-1] != ["end"]:
        raise UserError(
            f"{path} line {reader.line_num - len(last) + 1} begins a text in quotes that does not end, so all that follows would be part "
            "of it: close it, or double a quote that is meant as one"
        )


def _parquet_file(path: Path, column: str, tally: Tally) -> Iterator[list[str]]:
    try:
        for text in read_rows(open_shard(path, column), column):
            if text:
                yield [text]
            else:
                tally.empty_documents += 1
    except DamagedShard as error:
        raise UserError(f"{error}: restore it or remove it") from None


def _field(where: str, record: Any, column: str, tally: Tally) -> Iterator[list[str]]:
    """The text of a record: the record itself if it is a string, else its `column`."""
    if isinstance(record, dict):
        if column not in record:
            names = [str(name) for name in record]
            raise UserError(
                f"{where} has no column {column!r}{nearest(column, names)}, only {', '.join(names[:20])}: give --text_column NAME"
            )
        record = record[column]
    if record is not None and not isinstance(record, str):
        raise UserError(f"{where}: the text is a {type(record).__name__}, not a string: give --text_column of a column of text")
    if record:
        yield [record.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
    else:
        tally.empty_documents += 1


_Reader = Callable[[Path, str, Tally], Iterator[Any]]
_READERS: dict[str, _Reader] = {
    ".txt": _text_file,
    ".md": _text_file,
    ".jsonl": _jsonl_file,
    ".json": _json_file,
    ".csv": _csv_file,
    ".tsv": _csv_file,
    ".parquet": _parquet_file,
}
