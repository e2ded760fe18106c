"""Contracts of the downloader against a local server that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bio_inspired_nanochat.data.download import Manifest, Patience, RemoteFile, download, read_manifest, write_manifest
from bio_inspired_nanochat.errors import UserError

from .conftest import MakeShards, document

QUICK = Patience(timeout=0.5, attempts=3, pause=0.0)
CONTENT = {f"shard_{i:05d}.parquet": bytes((i * 31 + j * 7) % 256 for j in range(300_000 + i)) for i in range(5)}


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `faults[name]` is a list of faults, one per request, after which it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        self.release = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    @property
    def manifest(self) -> Manifest:
        files = tuple(RemoteFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items())
        return Manifest(f"http://127.0.0.1:{self.server_address[1]}/data/{{name}}", files)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        data = CONTENT[name]
        self.server.requests[name] += 1
        self.server.ranges.append(self.headers.get("Range"))
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "hang":
            self.server.release.wait()
            return
        if fault == "drop":
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "no range" else 0
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if fault == "wrong bytes":
            body = bytes(byte ^ 1 for byte in body)
        if fault == "too long":
            body += b"more"
        if fault == "wrong length":
            body = body[:1000]
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("truncated", "no length"):
            body = body[: len(body) // 2]
        if fault == "no bytes":
            body = b""
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def _all_right(out: Path) -> bool:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")} == CONTENT


def test_everything_is_fetched_once(server: Server, tmp_path: Path) -> None:
    result = download(server.manifest, tmp_path / "out", workers=3, patience=QUICK)
    assert result == {"files": 5, "downloaded": 5, "already_there": 0, "bytes": sum(map(len, CONTENT.values())), "failed": []}
    assert _all_right(tmp_path / "out")
    again = download(server.manifest, tmp_path / "out", patience=QUICK)
    assert again["already_there"] == 5 and again["downloaded"] == 0
    assert set(server.requests.values()) == {1}


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "truncated", "no length", "wrong length", "wrong bytes", "too long", "no bytes", "hang", "drop"]
)
def test_one_hiccup_is_mended(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = {name: [fault] for name in list(CONTENT)[:2]}
    result = download(server.manifest, tmp_path, workers=2, patience=QUICK)
    assert result["failed"] == [] and _all_right(tmp_path)
    assert server.requests["shard_00000.parquet"] == 2


def test_interrupted_bytes_are_continued_not_repeated(server: Server, tmp_path: Path) -> None:
    name = "shard_00001.parquet"
    (tmp_path / f".{name}.part").write_bytes(CONTENT[name][:1234])
    server.faults = {"shard_00002.parquet": ["truncated", "truncated"]}
    assert download(server.manifest, tmp_path, workers=1, patience=QUICK)["failed"] == []
    size = len(CONTENT["shard_00002.parquet"])
    assert [asked for asked in server.ranges if asked] == [
        "bytes=1234-",
        f"bytes={size // 2}-",
        f"bytes={size // 2 + (size - size // 2) // 2}-",
    ]
    assert _all_right(tmp_path)


def test_progress_renews_the_patience(server: Server, tmp_path: Path) -> None:
    server.faults = {"shard_00000.parquet": ["truncated"] * 8}
    assert download(server.manifest, tmp_path, patience=QUICK)["failed"] == []


@pytest.mark.parametrize("left", [b"wrong start", b"x" * 400_000])
def test_a_wrong_partial_file_is_thrown_away(server: Server, tmp_path: Path, left: bytes) -> None:
    (tmp_path / ".shard_00000.parquet.part").write_bytes(left)
    assert download(server.manifest, tmp_path, patience=QUICK)["failed"] == []
    assert _all_right(tmp_path)


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    name = "shard_00000.parquet"
    (tmp_path / f".{name}.part").write_bytes(CONTENT[name][:1000])
    server.faults = {name: ["no range"]}
    assert download(server.manifest, tmp_path, patience=QUICK)["failed"] == []
    assert server.requests[name] == 1
    assert _all_right(tmp_path)


def test_a_damaged_file_is_fetched_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shard_00003.parquet").write_bytes(bytes(len(CONTENT["shard_00003.parquet"])))
    assert download(server.manifest, tmp_path, patience=QUICK)["failed"] == []
    assert _all_right(tmp_path)
    assert "shard_00003.parquet differs from the manifest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("404", "HTTP 404", 1),
        ("403", "HTTP 403", 1),
        ("500", "HTTP 500", 3),
        ("wrong bytes", "differs from the manifest", 3),
        ("no bytes", "ended after 0", 3),
    ],
)
def test_one_bad_file_does_not_stop_the_others(server: Server, tmp_path: Path, fault: str, reason: str, requests: int) -> None:
    name = "shard_00001.parquet"
    server.faults = {name: [fault] * 9}
    result = download(server.manifest, tmp_path, workers=2, patience=QUICK)
    assert [item["name"] for item in result["failed"]] == [name] and reason in result["failed"][0]["reason"]
    assert result["downloaded"] == 4 and not (tmp_path / name).exists()
    assert server.requests[name] == requests


def test_no_server_is_a_list_of_failures_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    manifest = Manifest("http://127.0.0.1:9/", (RemoteFile("a.parquet", 1, "0" * 64),))
    assert "refused" in download(manifest, tmp_path, patience=QUICK)["failed"][0]["reason"]


def test_first_shards_bring_the_validation_shard(server: Server) -> None:
    names = [file.name for file in server.manifest.first(2).files]
    assert names == ["shard_00000.parquet", "shard_00001.parquet", "shard_00004.parquet"]
    assert server.manifest.first(0) == server.manifest.first(-1) == server.manifest.first(4) == server.manifest.first(99) == server.manifest


def test_two_downloads_into_one_folder_are_refused(server: Server, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".download.lock"), pytest.raises(UserError, match="being filled by another download"):
        download(server.manifest, tmp_path)


def test_a_manifest_of_a_folder_reads_back(make_shards: MakeShards, tmp_path: Path) -> None:
    folder = make_shards([document(1)], [document(2)])
    assert write_manifest(folder, "https://example.org/x", tmp_path / "m.json") == 2
    manifest = read_manifest(tmp_path / "m.json")
    assert [file.name for file in manifest.files] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert manifest.url(manifest.files[0]) == "https://example.org/x/shard_00000.parquet"
    assert (
        read_manifest(tmp_path / "m.json", "http://other/{name}?raw=1").url(manifest.files[1]) == "http://other/shard_00001.parquet?raw=1"
    )
    assert manifest.files[0].size == (folder / "shard_00000.parquet").stat().st_size


GOOD = {"name": "a.parquet", "size": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "is not a manifest"),
        ({"version": 2}, "is not a manifest"),
        ({"base_url": ""}, "base_url=''.*--base_url"),
        ({"base_url": "file:///etc/{name}"}, "http or https"),
        ({"files": []}, "lists no files"),
        ({"files": [GOOD, GOOD]}, "lists a.parquet twice"),
        ({"files": ["a"]}, r"files\[0\] has name=None"),
        ({"files": [{**GOOD, "name": "../a"}]}, "plain file name"),
        ({"files": [{**GOOD, "name": ".hidden"}]}, "plain file name"),
        ({"files": [GOOD, {**GOOD, "name": "/etc/b"}]}, r"files\[1\] has name='/etc/b'"),
        ({"files": [{**GOOD, "size": "3"}]}, "size='3'"),
        ({"files": [{**GOOD, "size": 0}]}, "size=0"),
        ({"files": [{**GOOD, "sha256": "abc"}]}, "64 hexadecimal"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"format": "bio_inspired_nanochat.manifest", "version": 1, "base_url": "http://h/", "files": [GOOD]}
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content))
    read_manifest(path)
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=message):
        read_manifest(path)


def test_an_unreadable_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "none.json")
    for content in ("{", "[" * 100_000):
        (tmp_path / "m.json").write_text(content)
        with pytest.raises(UserError, match="is not JSON"):
            read_manifest(tmp_path / "m.json")
