"""Contracts of a corpus: the last shard validates, bad shards are named, one of several may be lost."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.data import ensure_tokenizer, resolve_data
from bio_inspired_nanochat.data.shards import list_shards
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

from .conftest import MakeShards, document

DOCS = [document(i) for i in range(100)]


def _damage_pages(path: Path) -> None:
    """Change bytes of the first row group, leaving the footer readable."""
    raw = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    middle = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 3
    raw[middle : middle + 20] = bytes(byte ^ 0x55 for byte in raw[middle : middle + 20])
    path.write_bytes(raw)


def test_last_shard_validates_and_splits_are_disjoint(make_shards: MakeShards) -> None:
    source = resolve_data(make_shards(DOCS[:40], DOCS[40:80], DOCS[80:]))
    assert [os.path.basename(part) for part in source.train_paths] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert os.path.basename(source.val_path) == "shard_00002.parquet"
    assert list(source.texts("train")) == DOCS[:80]
    assert list(source.texts("val")) == DOCS[80:]
    with pytest.raises(UserError, match="split='test' is not valid"):
        list(source.texts("test"))


def test_shards_sort_by_number_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("shard_10.parquet", "shard_9.parquet", "other.parquet", ".shard_1.parquet", "shard_2.parquet.part"):
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / name)
    assert [path.name for path in list_shards(tmp_path)] == ["shard_9.parquet", "shard_10.parquet"]
    (folder := tmp_path / "other").mkdir()
    for name in ("²10.parquet", "²9.parquet"):
        pq.write_table(pa.table({"text": ["x"]}), folder / name)
    assert [path.name for path in list_shards(folder)] == ["²9.parquet", "²10.parquet"], "no number, though Unicode calls it a digit"


def test_fingerprint_follows_content_not_place(make_shards: MakeShards, tmp_path: Path) -> None:
    first = resolve_data(make_shards(DOCS[:50], DOCS[50:]))
    copy = resolve_data(make_shards(DOCS[:50], DOCS[50:], name="copy"))
    other = resolve_data(make_shards(DOCS[:50], [*DOCS[50:-1], DOCS[-1][:-1] + "X"], name="other"))
    assert first.fingerprint == copy.fingerprint != other.fingerprint


def _plain_shard(path: Path, texts: list[str]) -> None:
    pq.write_table(
        pa.table({"text": texts}), path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )


def test_fingerprint_sees_a_change_of_one_letter_at_the_same_size(make_shards: MakeShards) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    found = set()
    for letter in "xy":
        _plain_shard(folder / "shard_00000.parquet", ["a", f"m{letter}m", "z"])
        found.add((resolve_data(folder).fingerprint, (folder / "shard_00000.parquet").stat().st_size))
    assert len(found) == 2 and len({size for _, size in found}) == 1


def test_a_changed_letter_is_damage_not_text(make_shards: MakeShards) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    _plain_shard(folder / "shard_00000.parquet", ["some hidden words"])
    raw = (folder / "shard_00000.parquet").read_bytes()
    (folder / "shard_00000.parquet").write_bytes(raw.replace(b"hidden", b"bidden", 1))
    assert list(resolve_data(folder).texts("train")) == []


@pytest.mark.parametrize(("rows", "held"), [(8, 4), (2, 2), (100, 5), (50, 5)])
def test_single_shard_holds_out_its_last_rows(make_shards: MakeShards, capsys: pytest.CaptureFixture[str], rows: int, held: int) -> None:
    source = resolve_data(make_shards(DOCS, rows=rows))
    assert list(source.texts("train")) + list(source.texts("val")) == DOCS
    assert list(source.texts("val")) == DOCS[-held:]
    assert f"its last {held} of 100 documents" in capsys.readouterr().out


def test_two_documents_are_enough(make_shards: MakeShards) -> None:
    source = resolve_data(make_shards(DOCS[:2]))
    assert (list(source.texts("train")), list(source.texts("val"))) == (DOCS[:1], DOCS[1:2])
    with pytest.raises(UserError, match="only shard and has 1 documents"):
        resolve_data(make_shards(DOCS[:1], name="one"))


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all", None])
def test_unreadable_training_shard_is_left_out_with_a_notice(
    make_shards: MakeShards, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    folder = make_shards(DOCS[:40], DOCS[40:80], DOCS[80:])
    bad = folder / "shard_00000.parquet"
    bad.write_bytes(bad.read_bytes()[:-50] if damage is None else damage)
    source = resolve_data(folder)
    assert list(source.texts("train")) == DOCS[40:80]
    assert len(source.quarantined) == 1 and str(bad) in source.quarantined[0]
    assert str(bad) in capsys.readouterr().out


@pytest.mark.parametrize("pages", [False, True])
def test_unreadable_validation_shard_is_an_error(make_shards: MakeShards, pages: bool) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    bad = folder / "shard_00001.parquet"
    _damage_pages(bad) if pages else bad.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"shard_00001\.parquet.*restore it"):
        resolve_data(folder)


@pytest.mark.parametrize("pages", [False, True])
def test_unreadable_only_shard_is_an_error(make_shards: MakeShards, pages: bool) -> None:
    folder = make_shards(DOCS)
    bad = folder / "shard_00000.parquet"
    _damage_pages(bad) if pages else bad.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"shard_00000\.parquet.*restore it"):
        resolve_data(folder)


@pytest.mark.parametrize("table", [{"content": ["a"]}, {"text": [1]}, {"text": [["a"]]}])
def test_wrong_column_is_an_error_that_names_the_file(make_shards: MakeShards, table: dict) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    pq.write_table(pa.table(table), folder / "shard_00000.parquet")
    with pytest.raises(UserError, match=r"shard_00000\.parquet.*column 'text'"):
        resolve_data(folder)


def test_dictionary_and_large_strings_are_text(make_shards: MakeShards) -> None:
    folder = make_shards(DOCS[:50], DOCS[50:])
    pq.write_table(pa.table({"id": [1, 2], "text": pa.array(["a", "b"]).dictionary_encode()}), folder / "shard_00000.parquet")
    assert list(resolve_data(folder).texts("train")) == ["a", "b"]


@pytest.mark.parametrize("shards", [([], ["a"]), (["a"], []), (["a"], ["", None])])
def test_a_split_without_text_is_an_error(make_shards: MakeShards, shards: tuple[list[str | None], ...]) -> None:
    with pytest.raises(UserError, match="no training documents|no text in its validation"):
        resolve_data(make_shards(*shards))


def test_wrong_places_are_errors_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist.*prepare_data"):
        resolve_data(tmp_path / "none")
    with pytest.raises(UserError, match="no \\*.parquet files.*prepare_data"):
        resolve_data(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="not a folder of parquet shards.*prepare_data"):
        resolve_data(tmp_path / "a.txt")
    with pytest.raises(UserError, match="both given"):
        resolve_data(str(tmp_path), "name")


def test_damaged_pages_end_a_shard_early_with_a_notice(make_shards: MakeShards, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_shards(DOCS[:40], DOCS[40:80], DOCS[80:])
    _damage_pages(folder / "shard_00000.parquet")
    assert list(resolve_data(folder).texts("train")) == DOCS[40:80]
    assert "row group 0 cannot be read" in capsys.readouterr().out


def test_text_limits_count_characters(make_shards: MakeShards) -> None:
    source = resolve_data(make_shards(["aaaa", "bbbb", "cccc"], ["v"]))
    assert list(source.texts("train", max_chars=6)) == ["aaaa", "bb"]
    assert list(source.texts("train", document_chars=1)) == ["a", "b", "c"]


def test_tokenizer_is_trained_once_per_corpus_and_size(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    source = resolve_data(make_shards(DOCS[:80], DOCS[80:]))
    made = ensure_tokenizer(source, 300)
    assert (base_dir() / "tokenizers" / f"{source.fingerprint[:16]}-300" / "tokenizer.json").exists()
    monkeypatch.setattr(Tokenizer, "train", None)
    assert ensure_tokenizer(source, 300).sha256 == made.sha256


def test_tokenizer_of_a_small_corpus_says_how_small(make_shards: MakeShards, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ensure_tokenizer(resolve_data(make_shards(["abc abc"], ["abc"])), 4096)
    assert tokenizer.vocab_size < 300
    assert f"supports only {tokenizer.vocab_size} of 4096" in capsys.readouterr().out


def test_given_tokenizer_counts(make_shards: MakeShards, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = resolve_data(make_shards(DOCS[:80], DOCS[80:]))
    tokenizer.save(tmp_path / "mine.json")
    assert ensure_tokenizer(source, 4096, tmp_path / "mine.json").sha256 == tokenizer.sha256
    assert "has 400 ids, not vocab_size=4096" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        ensure_tokenizer(source, 4096, tmp_path / "none.json")


def test_runs_that_start_together_train_one_tokenizer(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    source = resolve_data(make_shards(DOCS[:80], DOCS[80:]))
    trained = []
    train = Tokenizer.train

    def slow_train(*args: Any) -> Tokenizer:
        trained.append(args)
        time.sleep(0.2)
        return train(*args)

    monkeypatch.setattr(Tokenizer, "train", slow_train)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: ensure_tokenizer(source, 300).sha256, range(3)))
    assert len(set(made)) == 1 and len(trained) == 1
