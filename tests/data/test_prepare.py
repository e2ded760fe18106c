"""Contracts of making shards from own files: nothing lost, nothing loaded whole, wrong input named by file and line."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.corpus import write_corpus
from bio_inspired_nanochat.data.documents import Tally, read_documents
from bio_inspired_nanochat.data.prepare import PrepareConfig, prepare
from bio_inspired_nanochat.data.split import split_text
from bio_inspired_nanochat.errors import UserError

TEXTS = [f"text number {i}\nwith a second line, ünïcode and 'quotes' \"too\"" for i in range(50)]


def _prepare(source: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The record and all texts of the shards in order of their names."""
    record = prepare(PrepareConfig(input=str(source), out=str(out), **options))
    texts = [text for path in sorted(out.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]
    assert record["documents"] == len(texts) and record["characters"] == sum(map(len, texts))
    assert record["shards"] == len(list(out.glob("*.parquet")))
    return record, texts


def _write(path: Path, texts: list[str]) -> Path:
    records = [{"id": i, "text": text} for i, text in enumerate(texts)]
    kind = "".join(path.suffixes).removesuffix(".gz")
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
        return path
    if kind == ".jsonl":
        content = "\n".join(map(json.dumps, records)) + "\n\n"
    elif kind == ".json":
        content = json.dumps(records, indent=1)
    else:
        separator = "\t" if kind == ".tsv" else ","
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        content = f"id{separator}text\n" + "".join(f"{i}{separator}{text}\n" for i, text in enumerate(quoted))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"])
def test_every_record_arrives_unchanged(tmp_path: Path, kind: str) -> None:
    record, texts = _prepare(_write(tmp_path / f"in{kind}", TEXTS), tmp_path / "out")
    assert sorted(texts) == sorted(TEXTS)
    assert record["val_documents"] == 1 and record["next"] == f"python -m scripts.base_train --data_dir={tmp_path / 'out'}"
    source = resolve_data(tmp_path / "out")
    assert sorted([*source.texts("train"), *source.texts("val")]) == sorted(TEXTS)


def test_json_file_of_one_record_per_line_is_read_as_such(tmp_path: Path) -> None:
    _, texts = _prepare(_write(tmp_path / "in.jsonl", TEXTS).rename(tmp_path / "in.json"), tmp_path / "out")
    assert sorted(texts) == sorted(TEXTS)


def test_long_text_is_split_at_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "Some words follow. " * (i % 9) for i in range(300)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8-sig")
    _, texts = _prepare(tmp_path / "book.txt", tmp_path / "out", doc_chars=500)
    assert max(map(len, texts)) <= 500
    assert sorted(part.strip() for text in texts for part in text.split("\n\n")) == sorted(part.strip() for part in paragraphs)


@given(st.lists(st.text("ab \n.é", max_size=60), max_size=12), st.integers(2, 40))
def test_splitting_loses_only_blank_ends_and_ignores_chunks(chunks: list[str], limit: int) -> None:
    text = "".join(chunks)
    pieces = list(split_text(chunks, limit))
    assert pieces == list(split_text([text], limit))
    assert all(len(piece) <= limit and not piece.isspace() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_folders_are_read_recursively_and_other_files_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    _write(folder / "a.jsonl", TEXTS[:5])
    _write(folder / "sub" / "b.csv", TEXTS[5:10])
    (folder / "sub" / "c.txt").write_text("plain text")
    (folder / "sub" / "d.TXT").write_text("shouted")
    (folder / "sub" / ".hidden" / "e.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text("")
    (folder / "blank.md").write_text("\n \n")
    record, texts = _prepare(folder, tmp_path / "out")
    assert sorted(texts) == sorted([*TEXTS[:10], "plain text", "shouted"])
    assert (record["files"], record["skipped_files"], record["empty_files"]) == (6, 1, 2)
    output = capsys.readouterr().out
    assert f"{folder / 'empty.txt'} has no text" in output and "1 files of other kinds" in output


def test_one_short_text_still_gives_both_splits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond line\nthird line\n")
    record, texts = _prepare(tmp_path / "a.txt", tmp_path / "out")
    assert record["documents"] == 2
    assert "".join("".join(sorted(texts)).split()) == "".join(sorted(texts)).replace("\n", "").replace(" ", "")


def test_order_is_shuffled_and_repeatable(tmp_path: Path) -> None:
    path = _write(tmp_path / "in.jsonl", [f"{i:04d}" for i in range(400)])
    _, first = _prepare(path, tmp_path / "a")
    _, again = _prepare(path, tmp_path / "b")
    _, other = _prepare(path, tmp_path / "c", seed=1)
    assert first == again != other
    assert sum(a > b for a, b in itertools.pairwise(first)) > 100, "dealing over files alone would leave sixteen rising runs"


def test_shards_have_the_asked_size_and_the_last_one_validates(tmp_path: Path) -> None:
    path = _write(tmp_path / "in.jsonl", [f"{i:0100d}" for i in range(1000)])
    record, _ = _prepare(path, tmp_path / "out", shard_chars=20_000, val_fraction=0.1)
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sizes[-1] == record["val_documents"] == 100
    assert len(sizes) == 5 and min(sizes[:-1]) > 150


def test_one_huge_document_does_not_make_the_next_shards_tiny(tmp_path: Path) -> None:
    write_corpus(tmp_path / "out", [("v", True), *((f"{i:0100d}", False) for i in range(200)), ("x" * 50_000, False)], shard_chars=2000)
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sorted(sizes[:-1])[2] > 5 and sum(sizes) == 202


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bio_inspired_nanochat.data.corpus._BIN_CHARS", 50_000)
    size = 12_000_000
    with open(tmp_path / "big.txt", "w") as file:
        file.writelines(f"line {i:020d} of a file that goes on{' and on' * 567}\n" for i in range(size // 4000))
    (tmp_path / "warm_up.txt").write_text("imports of\nthe libraries")
    _prepare(tmp_path / "warm_up.txt", tmp_path / "first")
    tracemalloc.start()
    record = prepare(PrepareConfig(input=str(tmp_path / "big.txt"), out=str(tmp_path / "out"), shard_chars=500_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert record["characters"] > 0.95 * size
    assert peak < 0.5 * size, peak


def test_a_line_longer_than_the_read_buffer_is_split_at_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bio_inspired_nanochat.data.documents._LINE_BYTES", 10)
    text = "naïve wörds ünd möre " * 50
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    _, texts = _prepare(tmp_path, tmp_path / "out", doc_chars=64)
    assert sorted(word for piece in texts for word in piece.split()) == sorted(text.split() * 2)


@pytest.mark.parametrize("length", [4, 5, 6])
def test_line_ends_of_two_characters_are_found_wherever_a_long_line_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr("bio_inspired_nanochat.data.documents._LINE_BYTES", 6)
    (tmp_path / "a.txt").write_bytes(b"a" * length + b"\r\nb\r\rc\r\n\r\nd\r")
    found = "".join(read_documents(tmp_path / "a.txt", "text", 1000, Tally()))
    assert found == "a" * length + "\nb\r\rc\n\nd"


def test_quotes_inside_and_lines_within_quotes_of_a_table_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,5" pipe\n\n2,"said ""x"""\n3,"two\nlines"')
    assert list(read_documents(tmp_path / "a.csv", "text", 1000, Tally())) == ['5" pipe', 'said "x"', "two\nlines"]
    (tmp_path / "b.csv").write_text("id,text\n")
    assert list(read_documents(tmp_path / "b.csv", "text", 1000, Tally())) == []


def test_lone_surrogates_in_json_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n"plain string"\n')
    _, texts = _prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert sorted(texts) == ["a\ufffd b", "plain string"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", "one\ntwo\nth\xe9\n".encode("latin1"), r"a\.txt line 3 is not UTF-8 \(byte 0xe9\).*iconv"),
        ("a.txt", b"one\ntwo \xe2\x82", r"a\.txt line 2 is not UTF-8"),
        ("a.txt", "one".encode("utf-16"), r"a\.txt is UTF-16"),
        ("a.txt", b"one\ntwo\0three", r"a\.txt line 2 contains a NUL byte"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', r"a\.jsonl line 2 has no column 'text' \(did you mean 'texts'\?\).*--text_column"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl line 1: the text is a int, not a string"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
        ("a.json", b'[{"text": "a"},\n{]', r"a\.json line 2 is not JSON"),
        ("a.json", b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", r"a\.json is not JSON"),
        ("a.json", b'[{"body": "a"}]', r"a\.json record 0 has no column 'text'.*body"),
        ("a.csv", b"id,body\n1,a\n", r"a\.csv line 2 has no column 'text'.*id, body"),
        ("a.csv", b'id,text\n1,a\n2,"open\n3,c\n4,d', r"a\.csv line 3 begins a text in quotes"),
        ("a.tsv", b'id\ttext\n1\ta\n2\t"open\n', r"a\.tsv line 3 begins a text in quotes"),
        ("a.parquet", b"junk", r"a\.parquet is not a readable parquet file"),
        ("a.txt.gz", b"junk", r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt", b"", "0 documents with text found: at least two"),
        ("a.txt", b"x", "1 document with text found: at least two"),
        ("a.jsonl", b'{"text": null}\n{"text": ""}\n', "0 documents with text"),
        ("a.doc", b"x", r"unknown kind '\.doc'.*\.txt"),
    ],
)
def test_wrong_input_is_one_line_with_file_and_fix(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        _prepare(tmp_path / name, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "nothing half-made is left"


def test_other_column_and_missing_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'text', its columns are body.*--text_column"):
        _prepare(tmp_path / "a.parquet", tmp_path / "out")
    _, texts = _prepare(tmp_path / "a.parquet", tmp_path / "out", text_column="body")
    assert sorted(texts) == sorted(TEXTS)
    with pytest.raises(UserError, match="does not exist"):
        _prepare(tmp_path / "none.txt", tmp_path / "other")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no files of a known kind"):
        _prepare(tmp_path / "folder", tmp_path / "other")


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    path = _write(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not empty"):
        _prepare(path, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        _prepare(path, out / "mine.txt" / "sub")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder in which even root can make nothing")
def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^out=/proc/out cannot be written \(.*\): choose a writable folder$"):
        _prepare(_write(tmp_path / "in.jsonl", TEXTS), Path("/proc/out"))


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> Any:
        yield "a", False
        yield "b", True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "out", documents(), shard_chars=1000)
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_writers_is_told(tmp_path: Path) -> None:
    def documents() -> Any:
        write_corpus(tmp_path / "out", [("first", False), ("writer", True)], shard_chars=1000)
        yield from [("second", False), ("writer", True)]

    with pytest.raises(UserError, match="written by another process meanwhile"):
        write_corpus(tmp_path / "out", documents(), shard_chars=1000)
    assert list(resolve_data(tmp_path / "out").texts("train")) == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
