"""Downloads a set of shards that a manifest pins by size and sha256.

A manifest is a JSON file of the user's:

    {"format": "bio_inspired_nanochat.manifest", "version": 1,
     "base_url": "https://HOST/FOLDER/{name}",
     "files": [{"name": "shard_00000.parquet", "size": 1234, "sha256": "64 hexadecimal digits"}, ...]}

`{name}` stands for a file's name; without it the name is appended. Files are listed in shard order: the last one validates.
A file appears under its own name only after its size and digest agree; what an interrupted run has left is continued.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bio_inspired_nanochat.common import progress, say, sha256_file, write_atomic
from bio_inspired_nanochat.config import REQUIRED, knob, validate
from bio_inspired_nanochat.data.shards import list_shards
from bio_inspired_nanochat.errors import UserError

_FORMAT = "bio_inspired_nanochat.manifest"
_VERSION = 1
_PIECE = 1 << 18
_LONGEST_WAIT = 60.0
_LASTING = {400, 401, 403, 404, 405, 410, 451}  # answers that asking again does not change


@dataclass(frozen=True)
class DownloadConfig:
    """Either fetch the shards of a manifest into a folder, or make the manifest of a local folder."""

    manifest: str = knob(REQUIRED, "manifest file to fetch from, or to write with --make_manifest")
    out: str = knob("", "folder for the shards, needed unless a manifest is made")
    num_shards: int = knob(
        0,
        "training shards to fetch, from the first on, and the last of the manifest, which validates; 0 or -1: all",
        lo=-1,
        hi=1_000_000,
        off=0,
    )
    workers: int = knob(4, "files fetched at the same time", lo=1, hi=64)
    base_url: str = knob("", "address of the files, {name} standing for the name; empty takes the manifest's")
    make_manifest: str = knob("", "local folder of shards to write a manifest for", off="")
    timeout: float = knob(30.0, "longest wait for an answer or the next bytes", lo=0.1, hi=600.0, log=True, unit="seconds")
    attempts: int = knob(5, "attempts without progress before a file is given up", lo=1, hi=100)
    pause: float = knob(1.0, "pause before the second attempt, doubled each time", lo=0.0, hi=60.0, off=0.0, unit="seconds")

    def __post_init__(self) -> None:
        validate(self)
        if not self.make_manifest and not self.out:
            raise UserError("--out is missing: the folder for the shards")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a manifest; size in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Where files come from and what they must be."""

    base_url: str
    files: tuple[RemoteFile, ...]

    def url(self, file: RemoteFile) -> str:
        """The address of a file."""
        name = urllib.parse.quote(file.name)
        return self.base_url.replace("{name}", name) if "{name}" in self.base_url else self.base_url.rstrip("/") + "/" + name

    def first(self, count: int) -> Manifest:
        """The first `count` files and the last one, which validates; all for count < 1."""
        if count < 1 or count >= len(self.files) - 1:
            return self
        return Manifest(self.base_url, (*self.files[:count], self.files[-1]))


@dataclass(frozen=True)
class Patience:
    """How long to insist: seconds without a byte, attempts without progress, first pause in seconds (doubled each time)."""

    timeout: float = 30.0
    attempts: int = 5
    pause: float = 1.0


class _Failed(Exception):
    """An attempt failed. `lasting`: another one would fail as well."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


def make_manifest(folder: Path, base_url: str) -> dict[str, Any]:
    """The manifest of a local folder of shards, as a JSON record."""
    files = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in list_shards(folder)]
    return {"format": _FORMAT, "version": _VERSION, "base_url": base_url, "files": files}


def write_manifest(folder: Path, base_url: str, path: Path) -> int:
    """Store `make_manifest` as a file; returns the number of shards."""
    record = make_manifest(folder, base_url)
    write_atomic(path, json.dumps(record, indent=1) + "\n")
    return len(record["files"])


def read_manifest(path: Path, base_url: str = "") -> Manifest:
    """Read and check a manifest; `base_url` replaces its own. Raises UserError naming what is wrong."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"manifest={path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"manifest={path} is not JSON ({error}): make one with --make_manifest DIR") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise UserError(f'manifest={path} is not a manifest: "format": "{_FORMAT}", "version": {_VERSION} expected')
    base_url = base_url or content.get("base_url") or ""
    if urllib.parse.urlsplit(str(base_url)).scheme not in ("http", "https"):
        raise UserError(f"manifest={path} has base_url={base_url!r}: an http or https address is needed, also as --base_url")
    entries = content.get("files")
    if not isinstance(entries, list) or not entries:
        raise UserError(f'manifest={path} lists no files: "files" is a list of name, size and sha256')
    files = tuple(_checked_entry(path, i, entry) for i, entry in enumerate(entries))
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"manifest={path} lists {twice} twice: names must differ")
    return Manifest(base_url, files)


def _checked_entry(path: Path, index: int, entry: Any) -> RemoteFile:
    name, size, sha256 = (entry.get(key) for key in ("name", "size", "sha256")) if isinstance(entry, dict) else (None, None, None)
    where = f"manifest={path} files[{index}]"
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name.isprintable():
        raise UserError(f"{where} has name={name!r}: a plain file name is needed, without folders")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{where} ({name}) has size={size!r}: a number of bytes is needed")
    if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise UserError(f"{where} ({name}) has sha256={sha256!r}: 64 hexadecimal digits are needed")
    return RemoteFile(name, size, sha256.lower())


def download(manifest: Manifest, out: Path, workers: int = 4, patience: Patience = Patience()) -> dict[str, Any]:
    """Fetch what is missing or wrong under `out`. One file that fails does not stop the others.

    Returns files, downloaded, already_there, bytes and `failed`: a list of {name, reason}. Raises UserError when `out` cannot be
    made or another download into it is running.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".download.lock", timeout=0):
            return _download(manifest, out, workers, patience)
    except Timeout:
        raise UserError(f"out={out} is being filled by another download: wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}") from None


def _download(manifest: Manifest, out: Path, workers: int, patience: Patience) -> dict[str, Any]:
    failed: list[dict[str, str]] = []
    fetched: list[RemoteFile] = []
    stop = threading.Event()
    lock = threading.Lock()
    with progress(sum(file.size for file in manifest.files), "download", "bytes") as bar:

        def advance(count: int) -> None:
            with lock:
                bar.advance(count)

        def work(file: RemoteFile) -> None:
            try:
                if _Fetch(manifest.url(file), file, out, patience, advance, stop).run():
                    fetched.append(file)
            except (_Failed, OSError) as error:
                failed.append({"name": file.name, "reason": str(error)})
                say(f"notice: {file.name} failed: {error}")

        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in [pool.submit(work, file) for file in manifest.files]:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    there = len(manifest.files) - len(fetched) - len(failed)
    size = sum(file.size for file in fetched)
    order = {file.name: i for i, file in enumerate(manifest.files)}
    failed.sort(key=lambda item: order[item["name"]])
    return {"files": len(manifest.files), "downloaded": len(fetched), "already_there": there, "bytes": size, "failed": failed}


class _Fetch:
    """The download of one file."""

    def __init__(
        self, url: str, file: RemoteFile, out: Path, patience: Patience, advance: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.url, self.file, self.patience, self.advance, self.stop = url, file, patience, advance, stop
        self.path, self.part = out / file.name, out / f".{file.name}.part"

    def run(self) -> bool:
        """Whether bytes had to be fetched. Raises _Failed after the last attempt."""
        if self.path.exists():
            if self._is_right(self.path):
                self.advance(self.file.size)
                return False
            say(f"notice: {self.path} differs from the manifest and is fetched again")
        self.advance(self._size())
        failures, pause = 0, self.patience.pause
        while True:
            before = self._size()
            try:
                self._attempt()
                break
            except _Failed as error:
                grown = self._size() > before
                failures = 1 if grown else failures + 1
                pause = self.patience.pause if grown else pause * 2
                if error.lasting or failures >= self.patience.attempts:
                    raise
            # Jitter keeps workers that failed together from asking again together.
            if self.stop.wait(min(_LONGEST_WAIT, pause) * random.uniform(0.5, 1.0)):
                raise _Failed("interrupted", lasting=True)
        self.part.replace(self.path)
        return True

    def _attempt(self) -> None:
        """Complete and check the partial file, or raise _Failed. Bytes that turn out wrong are removed."""
        if self._size() > self.file.size:
            self._discard()
        if self._size() < self.file.size:
            try:
                self._receive()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 416:
                    self._discard()
                raise _Failed(f"HTTP {error.code} {error.reason}", lasting=error.code in _LASTING) from None
            except (OSError, http.client.HTTPException) as error:
                local = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
                raise _Failed(f"{type(error).__name__}: {error}", lasting=local) from None
        size = self._size()
        if size < self.file.size:
            raise _Failed(f"ended after {size} of {self.file.size} bytes")
        if not self._is_right(self.part):
            self._discard()
            raise _Failed("content differs from the manifest (size or sha256)")

    def _receive(self) -> None:
        start = self._size()
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=self.patience.timeout) as answer:
            if start and not (answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
                self._discard()  # the server sends the file from its beginning
                start = 0
            with open(self.part, "ab") as file:
                while piece := answer.read1(_PIECE):
                    file.write(piece)
                    self.advance(len(piece))
                    start += len(piece)
                    if start > self.file.size:
                        break
                    if self.stop.is_set():
                        raise _Failed("interrupted", lasting=True)

    def _size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.part.stat().st_size
        return 0

    def _discard(self) -> None:
        self.advance(-self._size())
        self.part.unlink(missing_ok=True)

    def _is_right(self, path: Path) -> bool:
        return path.stat().st_size == self.file.size and sha256_file(path) == self.file.sha256
