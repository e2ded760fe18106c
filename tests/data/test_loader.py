"""Contracts of packing and of the position: nothing lost, rows begin with BOS, ranks are disjoint, resuming is exact."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

from .conftest import MakeShards, document
from .test_source import _damage_pages

DOCS = [document(i) for i in range(60)]


def _all(loader: PackedLoader) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def _rows(batches: list[tuple[Tensor, Tensor]], bos: int) -> list[list[int]]:
    """The packed rows of T+1 tokens without padding."""
    rows = []
    for inputs, targets in batches:
        for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
            real = [token for token in y if token >= 0]
            assert all(token >= 0 for token in y[: len(real)]), "padding is at the end"
            assert x[1 : len(real)] == real[:-1]
            if real or x[0] != bos:
                rows.append([x[0], *real])
    return rows


def _pieces(rows: list[list[int]], bos: int) -> list[list[int]]:
    pieces: list[list[int]] = []
    for row in rows:
        for token in row:
            if token == bos:
                pieces.append([])
            else:
                pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def _loader(folder: Path, tokenizer: Tokenizer, **options: Any) -> PackedLoader:
    options = {"batch_size": 3, "sequence_len": 32, "loop": False, "buffer_docs": 8, **options}
    return PackedLoader(sorted(folder.glob("*.parquet")), tokenizer, **options)


def _same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize("sequence_len", [2, 7, 32, 100, 5000])
def test_every_token_is_packed_exactly_once(make_shards: MakeShards, tokenizer: Tokenizer, sequence_len: int) -> None:
    loader = _loader(make_shards(DOCS[:40], DOCS[40:]), tokenizer, sequence_len=sequence_len)
    batches = _all(loader)
    assert all(x.shape == y.shape == (3, sequence_len) and x.dtype == y.dtype == torch.int64 for x, y in batches)
    rows = _rows(batches, tokenizer.bos_id)
    assert {row[0] for row in rows} == {tokenizer.bos_id}
    packed = Counter(token for piece in _pieces(rows, tokenizer.bos_id) for token in piece)
    assert packed == Counter(token for text in DOCS for token in tokenizer.encode(text))
    assert loader.counts["tokens"] == sum(packed.values()) and loader.counts["dropped_tokens"] == 0


def test_pieces_of_a_document_join_to_the_document(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    long = " ".join(str(i) for i in range(400))
    rows = _rows(_all(_loader(make_shards([long]), tokenizer, sequence_len=16)), tokenizer.bos_id)
    assert tokenizer.decode([token for piece in _pieces(rows, tokenizer.bos_id) for token in piece]) == long


def test_whole_documents_stay_whole_where_they_fit(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer, sequence_len=1000, buffer_docs=100)
    pieces = _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id)
    whole = {tuple(tokenizer.encode(text)) for text in DOCS}
    assert sum(tuple(piece) in whole for piece in pieces) >= len(DOCS) - loader.counts["crops"] >= len(DOCS) - 8


def test_rows_are_full_until_the_last(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    rows = _rows(_all(_loader(make_shards(DOCS), tokenizer)), tokenizer.bos_id)
    assert all(len(row) == 33 for row in rows[:-1])


def test_dropping_remainders_counts_them(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer, keep_remainder=False)
    pieces = _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id)
    encoded = [tokenizer.encode(text) for text in DOCS]
    assert all(any(ids[: len(piece)] == piece for ids in encoded) for piece in pieces)
    counts = loader.counts
    assert counts["dropped_tokens"] > 0
    assert counts["tokens"] + counts["dropped_tokens"] == sum(map(len, encoded))


@pytest.mark.parametrize("keep", [True, False])
def test_a_last_free_place_takes_no_document(make_shards: MakeShards, tokenizer: Tokenizer, keep: bool) -> None:
    size = len(tokenizer.encode(DOCS[5]))
    loader = _loader(make_shards([DOCS[5]] * 4), tokenizer, sequence_len=size + 1, keep_remainder=keep)
    _, targets = loader.next_batch()
    assert (targets[:, -1] == tokenizer.bos_id).all()
    assert _all(loader)
    assert loader.counts["tokens"] == 4 * size and loader.counts["crops"] == 0


@pytest.mark.parametrize("world", [1, 2, 3, 7, 60])
def test_ranks_are_disjoint_and_together_complete(make_shards: MakeShards, tokenizer: Tokenizer, world: int) -> None:
    folder = make_shards(DOCS[:40], DOCS[40:], rows=64)
    packed: Counter[int] = Counter()
    documents = []
    for rank in range(world):
        loader = _loader(folder, tokenizer, rank=rank, world=world)
        packed.update(token for piece in _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id) for token in piece)
        documents.append(loader.counts["documents"])
    assert packed == Counter(token for text in DOCS for token in tokenizer.encode(text))
    assert max(documents) - min(documents) <= 1


def test_more_ranks_than_documents_is_an_error_on_every_rank(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    folder = make_shards(DOCS[:3])
    for rank in range(4):
        with pytest.raises(UserError, match="3 documents for 4 ranks"):
            _loader(folder, tokenizer, rank=rank, world=4)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("loop", [False, True])
def test_resuming_at_any_point_is_exact(
    make_shards: MakeShards, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, prefetch: int, loop: bool
) -> None:
    monkeypatch.setattr("bio_inspired_nanochat.data.loader._CHUNK", 3)
    folder = make_shards(DOCS[:20], DOCS[20:30])
    options = {"prefetch": prefetch, "loop": loop, "rank": 1, "world": 2}
    loader = _loader(folder, tokenizer, **options)
    states, batches = [json.dumps(loader.state_dict())], []
    for _, batch in zip(range(40), loader, strict=False):  # zip takes one batch more than it gives when loop is on
        batches.append(batch)
        wait(loader._ahead)  # the thread is as far ahead as it gets
        states.append(json.dumps(loader.state_dict()))
    if loop:
        batches, states = batches[:39], states[:40]
        assert json.loads(states[-1])["epoch"] >= 2, "the epoch wraps on the way"
    for i, state in list(enumerate(states))[::3]:
        again = _loader(folder, tokenizer, **options)
        again.load_state_dict(json.loads(state))
        assert json.dumps(again.state_dict()) == state
        rest = [again.next_batch() for _ in batches[i:]]
        assert _same(rest, batches[i:])
        assert again.epoch == loader.epoch if not loop else True


def test_a_used_loader_can_go_back(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer)
    state = loader.state_dict()
    first = _all(loader)
    with pytest.raises(StopIteration):
        loader.next_batch()
    loader.load_state_dict(state)
    assert _same(_all(loader), first)


def test_state_does_not_change_behind_its_owner(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer)
    loader.next_batch()
    state = loader.state_dict()
    before = json.dumps(state)
    _all(loader)
    assert json.dumps(state) == before


def test_batches_do_not_depend_on_threads_batch_size_or_prefetch(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    folder = make_shards(DOCS)
    reference = _rows(_all(_loader(folder, tokenizer, prefetch=0, threads=1)), tokenizer.bos_id)
    for options in ({"prefetch": 4}, {"threads": 4}, {"batch_size": 5}):
        assert _rows(_all(_loader(folder, tokenizer, **options)), tokenizer.bos_id) == reference


def test_a_state_of_something_else_is_refused(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    folder = make_shards(DOCS)
    state = _loader(folder, tokenizer, world=2).state_dict()
    other_data = _loader(make_shards(DOCS[1:], name="other"), tokenizer, world=2)
    other_tokenizer = _loader(folder, Tokenizer.train(DOCS, 300), world=2)
    cases = [
        (other_data, "fingerprint="),
        (other_tokenizer, "tokenizer="),
        (_loader(folder, tokenizer, world=3), "world=2, this run has world=3"),
        (_loader(folder, tokenizer, world=2, rank=1), "rank=0, this run has rank=1"),
    ]
    for loader, message in cases:
        with pytest.raises(UserError, match=message):
            loader.load_state_dict(state)
    loader = _loader(folder, tokenizer, world=2)
    for broken in ({}, {**state, "version": 9}, {**state, "waiting": [[0]]}, {**state, "waiting": [[0, 10**6, 0]]}, {**state, "row": None}):
        with pytest.raises(UserError, match="loader state"):
            loader.load_state_dict(broken)


def test_empty_and_null_documents_are_counted_and_skipped(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(["", None, DOCS[0], None, "", DOCS[1]]), tokenizer)
    pieces = _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id)
    assert sum(map(len, pieces)) == sum(len(tokenizer.encode(text)) for text in DOCS[:2])
    assert loader.counts["empty"] == 4 and loader.counts["documents"] == 2


@pytest.mark.parametrize("prefetch", [0, 2])
def test_looping_over_nothing_is_an_error_not_a_hang(make_shards: MakeShards, tokenizer: Tokenizer, prefetch: int) -> None:
    folder = make_shards(["", None, ""])
    with pytest.raises(UserError, match="no readable text in 3 documents"):
        _loader(folder, tokenizer, loop=True, prefetch=prefetch).next_batch()
    with pytest.raises(StopIteration):
        _loader(folder, tokenizer, loop=False, prefetch=prefetch).next_batch()


def test_damaged_row_group_is_left_out_with_a_notice(
    make_shards: MakeShards, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards(DOCS[:16], DOCS[16:32], rows=8)
    _damage_pages(folder / "shard_00000.parquet")
    loader = _loader(folder, tokenizer)
    packed = sum(len(piece) for piece in _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id))
    assert packed == sum(len(tokenizer.encode(text)) for text in DOCS[8:32])
    assert loader.counts["damaged_groups"] == 1
    assert capsys.readouterr().out.count("row group 0 cannot be read") == 1


def test_damage_that_appears_after_saving_is_an_error(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    folder = make_shards(DOCS[:32], rows=8)
    loader = _loader(folder, tokenizer)
    loader.next_batch()
    state = loader.state_dict()
    parts = loader._parts
    _damage_pages(folder / "shard_00000.parquet")
    with pytest.raises(UserError, match="cannot be read any more"):
        PackedLoader(parts, tokenizer, 3, 32).load_state_dict(state)


def test_targets_are_the_inputs_shifted_by_one(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer, loop=True)
    for _ in range(5):
        inputs, targets = loader.next_batch()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert (inputs[:, 0] == tokenizer.bos_id).all() and inputs.is_contiguous() and targets.is_contiguous()


def test_a_split_of_a_source_is_read_from_its_own_rows(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    source = resolve_data(make_shards(DOCS, rows=60))
    for split, expected in (("train", DOCS[:-3]), ("val", DOCS[-3:])):
        loader = source.loader(split, tokenizer, 2, 40, loop=False)
        packed = sum(len(piece) for piece in _pieces(_rows(_all(loader), tokenizer.bos_id), tokenizer.bos_id))
        assert packed == sum(len(tokenizer.encode(text)) for text in expected)


def test_waiting_time_is_counted_and_close_ends_the_thread(make_shards: MakeShards, tokenizer: Tokenizer) -> None:
    loader = _loader(make_shards(DOCS), tokenizer)
    loader.next_batch()
    assert np.isfinite(loader.wait_seconds) and loader.wait_seconds > 0
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_len": 0}, "sequence_len=0"),
        ({"rank": 2, "world": 2}, r"rank=2 is out of bounds \[0, 1\]"),
        ({"world": 0}, "world=0"),
        ({"buffer_docs": 0}, "buffer_docs=0"),
    ],
)
def test_settings_out_of_bounds_are_refused(make_shards: MakeShards, tokenizer: Tokenizer, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _loader(make_shards(DOCS), tokenizer, **options)


def test_unreadable_file_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable parquet file"):
        PackedLoader([tmp_path / "a.parquet"], tokenizer, 1, 8)
