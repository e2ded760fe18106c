"""Documents to a folder of shuffled shards, in bounded memory, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.data.shards import ShardWriter, open_shard, read_rows, write_shard
from bio_inspired_nanochat.errors import UserError

INFO = "info.json"
_BINS = 16
_BIN_CHARS = 1 << 19
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class CorpusInfo:
    """What was written: counts include the validation shard, which is the last one."""

    documents: int
    characters: int
    shards: int
    val_documents: int


def write_corpus(
    out: Path, documents: Iterable[tuple[str, bool]], *, shard_chars: int, seed: int = 0, about: dict[str, Any] | None = None
) -> CorpusInfo:
    """Write `(text, for validation)` pairs as shards of about `shard_chars` characters under `out`, which must be new or empty.

    Training documents are dealt at random over temporary files, which are then read one after the other and shuffled shard by
    shard: a full shuffle for a corpus of one shard, a good one for any other, with at most one shard in memory. Documents
    stay whole, and the order depends on nothing but the input and `seed`. `about` is added to `info.json`.
    The folder appears complete or not at all. Raises UserError without text on either side, for an `out` in use, or a full disk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not empty: choose a new folder, or remove it first")
    try:
        with _stage(out) as stage:
            info = _write(stage, documents, shard_chars, random.Random(seed))
            (stage / INFO).write_text(json.dumps({**asdict(info), **(about or {})}, indent=2) + "\n")
            _publish(stage, out)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise UserError(f"out={out} cannot be written ({error.strerror}): free space, or choose a writable folder") from None
        raise
    return info


def hold_out(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, bool]]:
    """Mark every (1/fraction)-th text for validation, beginning with the second, so that two texts are enough for both sides."""
    period = max(2, round(1 / fraction))
    for i, text in enumerate(texts):
        yield text, i % period == 1


def _write(stage: Path, documents: Iterable[tuple[str, bool]], shard_chars: int, rng: random.Random) -> CorpusInfo:
    val_path = stage / "val.tmp"
    bins = [stage / f"bin_{i}.tmp" for i in range(_BINS)]
    with contextlib.ExitStack() as stack:
        val = stack.enter_context(ShardWriter(val_path))
        writers = [stack.enter_context(ShardWriter(path, _BIN_CHARS)) for path in bins]
        for text, held_out in documents:
            (val if held_out else rng.choice(writers)).add(text)
    train_documents = sum(writer.documents for writer in writers)
    train_characters = sum(writer.characters for writer in writers)
    if not train_documents or not val.documents:
        found = train_documents + val.documents
        raise UserError(f"{found} document{'s' * (found != 1)} with text found: at least two are needed, one of them for validation")
    count = max(1, round(train_characters / shard_chars))
    batches = _batches(bins, train_characters / count)
    shards = 0
    for batch in batches:
        rng.shuffle(batch)
        write_shard(stage / f"shard_{shards:05d}.parquet", batch)
        shards += 1
    os.replace(val_path, stage / f"shard_{shards:05d}.parquet")
    for path in bins:
        path.unlink()
    return CorpusInfo(train_documents + val.documents, train_characters + val.characters, shards + 1, val.documents)


def _batches(bins: list[Path], size: float) -> Iterator[list[str]]:
    """Lists of texts of about `size` characters each."""
    batch: list[str] = []
    done, made = 0, 1
    for path in bins:
        for text in read_rows(open_shard(path)):
            assert text is not None, "only texts were written"
            if batch and done >= made * size:
                yield batch
                batch, made = [], int(done / size) + 1
            batch.append(text)
            done += len(text)
    if batch:
        yield batch


@contextlib.contextmanager
def _stage(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, removed at the end if it is still there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}): choose a writable folder") from None
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, out: Path) -> None:
    stage.chmod(0o755)
    try:
        os.replace(stage, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"out={out} was written by another process meanwhile: use that one, or choose a new folder") from None
