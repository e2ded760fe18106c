"""A dataset by name, or local files, through the `datasets` package: streamed once into shards of this project.

The package is optional and imported here only.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from bio_inspired_nanochat.common import base_dir, progress, say, stable_hash
from bio_inspired_nanochat.data.corpus import INFO, hold_out, write_corpus
from bio_inspired_nanochat.data.split import split_text
from bio_inspired_nanochat.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import IterableDataset

MAX_CHARS = 1_000_000_000
SHARD_CHARS = 64_000_000
DOC_CHARS = 16_000
VAL_FRACTION = 0.01
_PROBE_SECONDS = 10.0
_HTTP_ERRORS = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"))
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def prepare_dataset(name: str, max_chars: int = MAX_CHARS) -> Path:
    """The folder of shards of a dataset, written on the first call; at most `max_chars` characters, which is said.

    name: `OWNER/DATASET[:CONFIG[:COLUMN]]` of the Hugging Face hub, or a local file or folder of parquet, JSON or CSV
    files. The split `train` is read; the column is `text` unless named. Raises UserError for an unknown name, a missing column,
    a hub that does not answer, and the missing package.
    """
    files = _local_files(Path(name).expanduser())
    out = base_dir() / "data" / _slug(name, files)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if not (out / INFO).exists():
            say(f"preparing dataset {name} under {out}")
            stream, column = _open(name, files)
            info = write_corpus(
                out, hold_out(_texts(name, stream, column, max_chars), VAL_FRACTION), shard_chars=SHARD_CHARS, about={"dataset": name}
            )
            say(f"dataset {name}: {info.documents} documents, {info.characters / 1e6:.1f} M characters, {info.shards} shards")
    return out


def _local_files(path: Path) -> list[Path]:
    """The files of one kind under a local path, in name order; none when the path does not exist."""
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise UserError(f"dataset={path} is of an unknown kind {path.suffix!r}: one of {', '.join(_BUILDERS)}")
        return [path]
    for suffix in _BUILDERS:
        if path.is_dir() and (found := sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())):
            return found
    if path.is_dir():
        raise UserError(f"dataset={path} has no files of a known kind: {', '.join(_BUILDERS)}")
    return []


def _slug(name: str, files: list[Path]) -> str:
    """Folder name of the cached shards; local files that change get a new one."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._") or "dataset"
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{plain[-80:]}-{stable_hash(name, stats):016x}"


def _open(name: str, files: list[Path]) -> tuple[IterableDataset, str]:
    """The stream of records and the column of text."""
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset needs the package datasets: pip install datasets, or give --data_dir") from None
    address, config, column = (name, "", "text") if files else _parts(name)
    if not files:
        _probe(address)
    try:
        if files:
            builder = _BUILDERS[files[0].suffix]
            stream = datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
        else:
            stream = datasets.load_dataset(address, config or None, split="train", streaming=True)
    except _troubles() as error:
        raise _unusable(name, error) from None
    return stream, column


def _parts(name: str) -> tuple[str, str, str]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}", name):
        raise UserError(f"dataset={name!r} is neither a local path nor a name OWNER/DATASET[:CONFIG[:COLUMN]]")
    address, config, column = [*name.split(":"), "", ""][:3]
    return address, config, column or "text"


def _probe(address: str) -> None:
    """Fail at once when the hub cannot be reached: the packages would try for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer, if not a friendly one
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"dataset={address} cannot be fetched, the hub does not answer ({reason}): connect, or give --data_dir with local shards"
        ) from None


def _texts(name: str, stream: IterableDataset, column: str, max_chars: int) -> Iterator[str]:

    left = max_chars
    with progress(None, "dataset", "documents") as bar:
        try:
            for record in stream:
                for piece in split_text([_text_of(name, record, column)], DOC_CHARS):
                    left -= len(piece)
                    yield piece
                bar.advance(1)
                if left <= 0:
                    say(f"notice: dataset {name} is cut after {max_chars} characters")
                    return
        except UserError:
            raise
        except _troubles() as error:
            raise _unusable(name, error) from None


def _text_of(name: str, record: dict[str, Any], column: str) -> str:
    if column not in record:
        raise UserError(
            f"dataset={name} has no column {column!r}{nearest(column, record)}, only {', '.join(record)}: write OWNER/DATASET:CONFIG:COLUMN"
        )
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"dataset={name}: column {column!r} holds a {type(text).__name__}, not text: write OWNER/DATASET:CONFIG:COLUMN")
    return text or ""


def _troubles() -> tuple[type[Exception], ...]:
    """What reading a dataset may raise: its own errors, and those of the HTTP libraries in use, some of which are no OSError."""
    import datasets

    loaded = [(sys.modules.get(library), error) for library, error in _HTTP_ERRORS]
    return (OSError, ValueError, datasets.exceptions.DatasetsError, *(getattr(module, error) for module, error in loaded if module))


def _unusable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"dataset={name} cannot be read ({type(error).__name__}: {reason}): check the name and the network, or give --data_dir"
    )
