"""The data commands as a user types them: one JSON object last, exit codes, one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bio_inspired_nanochat.data.shards import write_shard
from bio_inspired_nanochat.tokenizer import Tokenizer
from scripts import download_data, prepare_data, tok_eval, tok_train

from .conftest import MakeShards, document
from .test_download import CONTENT, Server, server  # noqa: F401

DOCS = [document(i) for i in range(60)]


def _last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def _refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_own_text_to_shards_to_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(DOCS))
    out = tmp_path / "shards"
    prepare_data.main([f"--input={tmp_path / 'notes.txt'}", "--out", str(out), "--doc-chars=500"])
    record = _last(capsys)
    assert record["out"] == str(out) and record["shards"] == 2 and record["next"].endswith(f"--data_dir={out}")
    tok_train.main([f"--data_dir={out}", "--vocab_size=300", f"--out={tmp_path / 'tok.json'}", "--max_chars=5000"])
    record = _last(capsys)
    assert record["vocab_size"] == 300 and Tokenizer.load(record["out"]).sha256 == record["sha256"]
    tok_eval.main([f"--data_dir={out}", f"--tokenizer={tmp_path / 'tok.json'}"])
    record = _last(capsys)
    assert record["exact"] is True
    (compression,) = record["bytes_per_token"].values()
    assert compression["train"] > 1.5 and set(compression) == {"train", "val", "code", "unicode"}


def test_tokenizers_of_several_sizes_are_compared(make_shards: MakeShards, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    tok_eval.main([f"--data_dir={folder}", "--vocab_size=265,320"])
    record = _last(capsys)
    assert record["bytes_per_token"]["265"]["val"] == 1.0 < record["bytes_per_token"]["320"]["val"]


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (prepare_data.main, ["--out=x"], "--input is required"),
        (prepare_data.main, ["--input=/nonexistent", "--out=x"], "does not exist"),
        (tok_train.main, ["--vocab_size=100"], r"out of bounds [265, 1048576]"),
        (tok_train.main, ["--data_dir=/nonexistent"], "does not exist"),
        (tok_eval.main, ["--vocab_size="], "nothing to measure"),
        (download_data.main, ["--out=x"], "--manifest is required"),
        (download_data.main, ["--manifest=/nonexistent.json"], "--out is missing"),
        (download_data.main, ["--manifest=/nonexistent.json", "--out=x"], "cannot be read"),
        (download_data.main, ["--manifest=m", "--make_manifest=/nonexistent"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(main: Any, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in _refused(capsys)


def test_shards_travel_by_manifest(
    server: Server,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    for i in range(3):
        write_shard(folder / f"shard_{i:05d}.parquet", DOCS[i * 20 : i * 20 + 20])
        monkeypatch.setitem(CONTENT, f"shard_{i:05d}.parquet", (folder / f"shard_{i:05d}.parquet").read_bytes())
    manifest = tmp_path / "manifest.json"
    download_data.main([f"--make_manifest={folder}", f"--manifest={manifest}", f"--base_url=http://127.0.0.1:{server.server_address[1]}/x"])
    assert _last(capsys) == {"manifest": str(manifest), "files": 3}
    command = [f"--manifest={manifest}", f"--out={tmp_path / 'here'}", "--num_shards=1", "--attempts=2", "--pause=0"]
    server.faults = {"shard_00002.parquet": ["503"] * 2}
    with pytest.raises(SystemExit) as stopped:
        download_data.main(command)
    assert stopped.value.code == 1
    record = _last(capsys)
    assert record["downloaded"] == 1 and [item["name"] for item in record["failed"]] == ["shard_00002.parquet"]
    download_data.main(command)
    record = _last(capsys)
    assert (record["downloaded"], record["already_there"], record["failed"]) == (1, 1, [])
    assert (tmp_path / "here" / "shard_00002.parquet").read_bytes() == CONTENT["shard_00002.parquet"]
