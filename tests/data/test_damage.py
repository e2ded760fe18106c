"""Shards with any byte changed or the end missing: an error in one line, or a part that is left out and counted; never other text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.data.shards import write_shard
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training import train
from tests.training.tiny import corpus, small

from .conftest import document

DOCS = [document(i) for i in range(40)]
STEP = 11  # bytes from one change to the next; coprime to the sizes of the fields


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, part in enumerate((DOCS[:20], DOCS[20:35], DOCS[35:])):
        write_shard(tmp_path / f"shard_{number:05d}.parquet", part)
    return tmp_path


def check(folder: Path, tokenizer: Tokenizer, seen: Counter[str]) -> None:
    """One pass over the training text: documents as they were written, each once, those of whole row groups missing and counted."""
    try:
        source = resolve_data(folder)
        loader = PackedLoader(source.train_paths, tokenizer, 2, 64, loop=False, prefetch=0)
        batches = list(loader)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        seen["error"] += 1
        return
    texts = list(source.texts("train"))
    assert set(texts) <= set(DOCS) and len(set(texts)) == len(texts), "nothing is changed or repeated"
    assert loader.counts["documents"] == len(texts) and batches
    lost = loader.counts["damaged_groups"] + len(source.quarantined)
    assert len(texts) == (15 if lost else 35)
    seen["left out" if lost else "whole"] += 1


@pytest.mark.parametrize("which", [0, 2])
def test_any_changed_byte_is_found(shards: Path, tokenizer: Tokenizer, which: int) -> None:
    path, seen = shards / f"shard_{which:05d}.parquet", Counter()
    good = path.read_bytes()
    for offset in range(0, len(good), STEP):
        bad = bytearray(good)
        bad[offset] ^= 1 << (offset % 8)
        path.write_bytes(bad)
        check(shards, tokenizer, seen)
    assert seen["left out" if which == 0 else "error"] > 20, seen


def test_a_row_group_of_another_length_than_its_footer_says_is_left_out(shards: Path, tokenizer: Tokenizer) -> None:
    path, seen = shards / "shard_00000.parquet", Counter()
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for offset in range(footer, len(good)):
        if good[offset] == 40:  # 20 rows as the footer writes them
            path.write_bytes(good[:offset] + b"\x3c" + good[offset + 1 :])
            check(shards, tokenizer, seen)
    assert seen["left out"] + seen["error"] >= 1, seen


def test_any_truncation_is_found(shards: Path, tokenizer: Tokenizer) -> None:
    path, seen = shards / "shard_00000.parquet", Counter()
    good = path.read_bytes()
    for size in range(0, len(good), 5 * STEP):
        path.write_bytes(good[:size])
        check(shards, tokenizer, seen)
    assert set(seen) == {"left out"}


def test_training_goes_on_without_a_damaged_row_group_and_says_how_many(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in corpus().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "shard_00001.parquet"
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 4] ^= 255
    path.write_bytes(bad)
    record = train(small(tmp_path, data_dir=str(folder), num_iterations=60, max_seq_len=64, device_batch_size=8, log_every=0))
    assert record["data"]["damaged_groups"] >= 1 and record["data"]["documents"] > 150, record["data"]


def test_a_document_longer_than_the_context_is_read_whole_and_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = " ".join(document(i) for i in range(60))
    write_shard(tmp_path / "a.parquet", [long])
    loader = PackedLoader([tmp_path / "a.parquet"], tokenizer, 2, 32, loop=False, prefetch=0)
    pieces = []
    for inputs, targets in loader:
        for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
            pieces += [token for token in [x[0], *(t for t in y if t >= 0)] if token != tokenizer.bos_id]
    assert tokenizer.decode(pieces) == long
