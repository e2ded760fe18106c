"""Contracts of named datasets: local files go through, an unreachable hub is one line at once."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.hf import prepare_dataset
from bio_inspired_nanochat.errors import UserError

TEXTS = [f"text {i}" for i in range(30)]


@pytest.fixture(autouse=True)
def _own_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, texts in (("a.jsonl", TEXTS[:10]), ("b.jsonl", TEXTS[10:])):
        (folder / name).write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return folder


@pytest.mark.parametrize("kind", ["folder", "parquet", "jsonl"])
def test_local_files_become_shards_once(files: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = files if kind == "folder" else files / f"c.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [*TEXTS, None, ""]}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = resolve_data(None, str(path))
    assert sorted([*source.texts("train"), *source.texts("val")]) == sorted(TEXTS)
    assert len(list(source.texts("val"))) == 1
    assert "preparing dataset" in capsys.readouterr().out
    assert resolve_data(None, str(path)).fingerprint == source.fingerprint
    assert "preparing dataset" not in capsys.readouterr().out


def test_changed_local_files_are_read_again(files: Path) -> None:
    first = prepare_dataset(str(files))
    (files / "a.jsonl").write_text('{"id": 0, "text": "new"}\n')
    os.utime(files / "a.jsonl", (1, 1))
    assert prepare_dataset(str(files)) != first


def test_a_long_stream_is_cut_and_says_so(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_dataset(str(files), max_chars=40)
    assert "is cut after 40 characters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/nosuch", "dataset=owner/nosuch cannot be read .*check the name and the network"),
        ("not a name!", "neither a local path nor a name"),
        ("a/b:c:d:e", "neither a local path nor a name"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_data(None, name)


def test_an_unreachable_hub_fails_before_the_packages_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="dataset=owner/name cannot be fetched, the hub does not answer.*--data_dir"):
        resolve_data(None, "owner/name")


@pytest.mark.parametrize(
    ("record", "message"), [({"body": "a"}, "has no column 'text', only body"), ({"text": 5}, "column 'text' holds a int")]
)
def test_a_wrong_column_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        prepare_dataset(str(tmp_path / "a.jsonl"))
    assert not any(path.is_dir() for path in (tmp_path / "base" / "data").iterdir())


def test_damaged_and_unknown_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"junk")
    (tmp_path / "a.doc").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.parquet", "a.parquet cannot be read"),
        ("a.doc", "unknown kind '.doc'"),
        ("empty", "no files of a known kind"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_dataset(str(tmp_path / name))


def test_a_missing_package_names_the_command(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare_dataset(str(files))


def test_a_server_that_drops_the_connection_is_one_line_and_leaves_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    import datasets

    class Dropped(Exception):
        """As the HTTP libraries have it: no OSError."""

    def stream(*_, **__):
        yield {"text": "one"}
        yield {"text": "two"}
        raise Dropped("peer closed connection without sending complete message body")

    monkeypatch.setitem(sys.modules, "httpx2", SimpleNamespace(HTTPError=Dropped))
    monkeypatch.setattr(datasets, "load_dataset", stream)
    with pytest.raises(UserError, match="cannot be read .*peer closed connection"):
        prepare_dataset(str(files))
    monkeypatch.undo()
    source = resolve_data(None, str(files))
    assert sorted([*source.texts("train"), *source.texts("val")]) == sorted(TEXTS), "the next try starts afresh"
