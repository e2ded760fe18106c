"""Packed batches: documents to rows of tokens that all start with BOS, with an exactly resumable position.

Every document is BOS and its tokens. A row of T+1 tokens takes the longest waiting document that still fits, again and again;
when none fits, the longest one fills the row and its remainder waits with a BOS of its own. The inputs are the first T tokens of
the row, the targets the last T.

Rank r of W reads rows r, r+W, r+2W, ... of all shards taken as one list: ranks are disjoint and together complete however few
shards or row groups there are.

B batch, T tokens.
"""

from __future__ import annotations

import bisect
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.data.shards import DamagedShard, ShardPart, ShardReader, fingerprint, open_shard
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

_STATE_VERSION = 1
_CHUNK = 64  # documents per call of the tokenizer: enough for its threads


@dataclass(order=True, frozen=True)
class _Piece:
    """A waiting document or remainder. Its length counts the BOS; the other keys make the order total and name its origin."""

    length: int
    epoch: int
    row: int
    offset: int
    ids: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows in one row group: the loader's row `first` is row `start` of the group and row `row` of the file."""

    first: int
    path: Path
    group: int
    start: int
    row: int


@dataclass(frozen=True)
class _Batch:
    inputs: Tensor
    targets: Tensor
    state: dict[str, Any]
    rows: tuple[int, ...]


class PackedLoader:
    """Batches of packed rows from shards.

    paths: parts of a `DataSource`, or files that are read whole. rank, world: this process among those that share the data.
    loop: start over at the end; with loop=False the rest is padded (targets -1) up to a full batch, then StopIteration.
    keep_remainder=False drops what a crop cuts off, as for web-scale data, and crops the shortest document instead.
    buffer_docs: documents waiting to be packed. prefetch: batches made ahead by a thread (0: none); the order of batches does not
    depend on it. threads: of the tokenizer.

    Raises UserError for settings out of bounds, shards that cannot be opened, and fewer documents than ranks.
    """

    def __init__(
        self,
        paths: Sequence[ShardPart | Path | str],
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world: int = 1,
        loop: bool = True,
        *,
        keep_remainder: bool = True,
        buffer_docs: int = 256,
        prefetch: int = 2,
        threads: int | None = None,
    ) -> None:
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("sequence_len", sequence_len, 1),
            ("world", world, 1),
            ("buffer_docs", buffer_docs, 1),
        ):
            if value < low:
                raise UserError(f"{name}={value} is out of bounds [{low}, inf]")
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} is out of bounds [0, {world - 1}]")
        self._parts = tuple(_as_part(path) for path in paths)
        self._runs = _runs(self._parts)
        self._total = sum(map(len, self._parts))
        if self._total < world:
            raise UserError(f"the data has {self._total} documents for {world} ranks: use fewer processes, or more documents")
        self._tokenizer, self._batch, self._columns = tokenizer, batch_size, sequence_len + 1
        self._rank, self._world, self._loop, self._keep = rank, world, loop, keep_remainder
        self._buffer_docs, self._prefetch = buffer_docs, prefetch
        self._threads = threads or max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self._fingerprint = fingerprint(self._parts)
        self._reader = ShardReader()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader") if prefetch else None
        self._ahead: deque[Future[_Batch | None]] = deque()
        self.wait_seconds = 0.0
        self._rewind()
        self._last = self._snapshot()
        self._rows: tuple[int, ...] = ()

    def _rewind(self) -> None:
        self._epoch, self._row, self._seen = 0, self._rank, False
        self._waiting: list[_Piece] = []
        self._counts = dict.fromkeys(("documents", "empty", "damaged_groups", "tokens", "dropped_tokens", "crops"), 0)
        self._damaged: set[tuple[Path, int]] = set()

    @property
    def epoch(self) -> int:
        """Completed passes over this rank's documents, as of the last batch handed out."""
        return self._last["epoch"]

    @property
    def counts(self) -> dict[str, int]:
        """As of the last batch: documents read, empty or null ones, row groups that could not be read, text tokens placed, tokens
        dropped and documents cut by crops."""
        return dict(self._last["counts"])

    @property
    def documents(self) -> list[str]:
        """The documents of the last batch handed out, in their order in the data: `shard_00000.parquet:17` is the file's 18th."""
        runs = [(row, self._run(row)) for row in sorted(set(self._rows))]
        return [f"{run.path.name}:{run.row + row - run.first}" for row, run in runs]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next inputs [B,T] and targets [B,T], int64 on the CPU. Raises StopIteration at the end when loop=False."""
        began = time.perf_counter()
        try:
            if self._pool is None:
                batch = self._produce()
            else:
                while len(self._ahead) < self._prefetch:
                    self._ahead.append(self._pool.submit(self._produce))
                batch = self._ahead.popleft().result()
                self._ahead.append(self._pool.submit(self._produce))
        finally:
            self.wait_seconds += time.perf_counter() - began
        if batch is None:
            raise StopIteration
        self._last, self._rows = batch.state, batch.rows
        return batch.inputs, batch.targets

    def __iter__(self) -> PackedLoader:
        return self

    __next__ = next_batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as JSON types. Each rank has its own.

        Waiting documents are named by row and offset and read again by `load_state_dict`, so the state stays small.
        """
        return {**self._last, "counts": dict(self._last["counts"]), "waiting": [list(item) for item in self._last["waiting"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; batch size and sequence length may differ.

        Raises UserError when the state is of other data, another tokenizer, or another place among the ranks.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            raise UserError(
                f"the loader state is not of format version {_STATE_VERSION}: start without it (--resume=... of a newer checkpoint)"
            )
        expected = {"fingerprint": self._fingerprint, "tokenizer": self._tokenizer.sha256, "world": self._world, "rank": self._rank}
        for name, value in expected.items():
            if state.get(name) != value:
                fix = (
                    "open it at the same place among as many" if name in ("world", "rank") else "give the same data and tokenizer as before"
                )
                raise UserError(f"the loader state has {name}={state.get(name)}, this run has {name}={value}: {fix}, or begin a new run")
        self._drain()
        self._rewind()
        try:
            self._epoch, self._row, self._seen = int(state["epoch"]), int(state["row"]), bool(state["seen"])
            self._counts.update({name: int(state["counts"][name]) for name in self._counts})
            self._waiting = self._reread([(int(epoch), int(row), int(offset)) for epoch, row, offset in state["waiting"]])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"the loader state is damaged ({type(error).__name__}: {error}): begin a new run, or resume an older checkpoint"
            ) from None
        self._last = self._snapshot()

    def close(self) -> None:
        """Stop the thread and close files. The loader gives no more batches."""
        self._drain()
        if self._pool is not None:
            self._pool.shutdown()
        self._reader.close()

    def _drain(self) -> None:
        for future in self._ahead:
            if not future.cancel():
                future.exception()
        self._ahead.clear()

    # Everything below runs in the prefetch thread when there is one.

    def _snapshot(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "tokenizer": self._tokenizer.sha256,
            "world": self._world,
            "rank": self._rank,
            "epoch": self._epoch,
            "row": self._row,
            "seen": self._seen,
            "counts": dict(self._counts),
            "waiting": [(piece.epoch, piece.row, piece.offset) for piece in self._waiting],
        }

    def _produce(self) -> _Batch | None:
        """One batch, or None at the end."""
        rows = np.full((self._batch, self._columns), self._tokenizer.bos_id, dtype=np.int64)
        lengths = np.zeros(self._batch, dtype=np.int64)
        self._placed: list[int] = []
        for i in range(self._batch):
            lengths[i] = self._fill_row(rows[i])
        if not lengths[0]:
            return None
        targets = rows[:, 1:].copy()
        targets[np.arange(1, self._columns) >= lengths[:, None]] = -1
        return _Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets), self._snapshot(), tuple(self._placed))

    def _fill_row(self, row: np.ndarray) -> int:
        """Pack one row in place; returns how many of its tokens are real."""
        used = 0
        while used < len(row):
            self._refill()
            if not self._waiting:
                break
            space = len(row) - used
            if space == 1:  # room for the BOS of the next document only, which is there already
                return len(row)
            fitting = bisect.bisect_right(self._waiting, space, key=lambda piece: piece.length)
            if fitting:
                longest = self._waiting[fitting - 1].length
                piece = self._waiting.pop(bisect.bisect_left(self._waiting, longest, key=lambda piece: piece.length))
            else:
                piece = self._waiting.pop(-1 if self._keep else 0)
            self._placed.append(piece.row)
            placed = min(space, piece.length) - 1  # text tokens; the BOS of the row is already there
            row[used + 1 : used + 1 + placed] = piece.ids[:placed]
            used += placed + 1
            self._counts["tokens"] += placed
            if placed < len(piece.ids):
                self._crop(piece, placed)
        return used

    def _crop(self, piece: _Piece, placed: int) -> None:
        self._counts["crops"] += 1
        if self._keep:
            rest = piece.ids[placed:]
            bisect.insort(self._waiting, _Piece(len(rest) + 1, piece.epoch, piece.row, piece.offset + placed, rest))
        else:
            self._counts["dropped_tokens"] += len(piece.ids) - placed

    def _refill(self) -> None:
        """Read documents until enough are waiting or, without loop, all are read."""
        while len(self._waiting) < self._buffer_docs:
            if self._row >= self._total:
                if not self._loop:
                    return
                if not self._seen:
                    raise UserError(
                        f"rank {self._rank} found no readable text in {self._total} documents of {len(self._parts)} shards: check the data"
                    )
                self._epoch, self._row, self._seen = self._epoch + 1, self._rank, False
            rows = []
            while self._row < self._total and len(rows) < _CHUNK:
                text = self._text(self._row)
                if text:
                    rows.append((self._row, text))
                elif text is not None:
                    self._counts["empty"] += 1
                self._row += self._world
            for (row, _), ids in zip(rows, self._tokenizer.encode_batch([text for _, text in rows], threads=self._threads), strict=True):
                self._seen = True
                self._counts["documents"] += 1
                bisect.insort(self._waiting, _Piece(len(ids) + 1, self._epoch, row, 0, np.array(ids, dtype=np.int32)))

    def _run(self, row: int) -> _Run:
        """The run that a row of all parts belongs to."""
        return self._runs[bisect.bisect_right(self._runs, row, key=lambda run: run.first) - 1]

    def _text(self, row: int) -> str | None:
        """Text of a row of all parts; empty for null, None in a row group that cannot be read."""
        run = self._run(row)
        if (run.path, run.group) in self._damaged:
            return None
        try:
            return self._reader.group(run.path, run.group)[run.start + row - run.first] or ""
        except DamagedShard as error:
            self._damaged.add((run.path, run.group))
            self._counts["damaged_groups"] += 1
            say(f"notice: {error}: its documents are left out")
            return None

    def _reread(self, origins: list[tuple[int, int, int]]) -> list[_Piece]:
        """The waiting pieces again, from their origins."""
        texts = {row: self._text(row) for row in sorted({row for _, row, _ in origins})}
        missing = [row for row, text in texts.items() if not text]
        if missing:
            raise UserError(f"document {missing[0]} of the loader state cannot be read any more: restore the data, or begin a new run")
        ids = dict(zip(texts, self._tokenizer.encode_batch([text or "" for text in texts.values()], threads=self._threads), strict=True))
        pieces = []
        for epoch, row, offset in origins:
            rest = np.array(ids[row][offset:], dtype=np.int32)
            pieces.append(_Piece(len(rest) + 1, epoch, row, offset, rest))
        return sorted(pieces)


def _runs(parts: Sequence[ShardPart]) -> list[_Run]:
    """Where every row is, in order of the parts."""
    runs, first = [], 0
    for part in parts:
        begin = 0
        for group, rows in enumerate(part.groups):
            low, high = max(part.start, begin), min(part.stop, begin + rows)
            if low < high:
                runs.append(_Run(first, part.path, group, low - begin, low))
                first += high - low
            begin += rows
    return runs


def _as_part(path: ShardPart | Path | str) -> ShardPart:
    if isinstance(path, ShardPart):
        return path
    try:
        return open_shard(Path(path))
    except DamagedShard as error:
        raise UserError(f"{error}: restore it or remove it") from None
