"""Paths, atomic files, digests and the JSON line that ends every script."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.errors import UserError


def base_dir() -> Path:
    """Where artefacts live: $NANOCHAT_BASE_DIR, by default ~/.cache/bio_inspired_nanochat. Created on first use.

    Raises UserError when it cannot be created.
    """
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "bio_inspired_nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"NANOCHAT_BASE_DIR={path} cannot be created ({error.strerror}): set it to a writable folder") from None
    return path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary file beside it, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(flag: str, path: str | Path) -> Path:
    """The path of a file that a flag names, its folder made; to be asked before the work whose outcome goes there.

    Raises UserError when no file can be written there, which is tried.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{flag}={str(path)!r} is a folder: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise UserError(f"{flag}={str(path)!r} cannot be written ({error.strerror}): give a file in a writable folder") from None
    return path


def _umask() -> int:
    """The process's file mode mask; reading it means setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def print_json_line(record: dict[str, Any]) -> None:
    """The last line of every script's stdout: one JSON object (NaN and infinity become null, so that any parser reads it)."""
    from bio_inspired_nanochat.common import console  # imported late: console uses this package's other modules

    console.write(json.dumps(finite(record)) + "\n")


def finite(value: Any) -> Any:
    """A copy of a tree of dicts and sequences for JSON: None for NaN and infinity, which JSON does not have; paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, in order; none without the file. What a crash has cut off is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
