"""Conversations as rows of tokens: several in a row, each from its own BOS on, and targets only where there is something to learn.

A row of T+1 tokens takes the longest waiting conversation that still fits, again and again. Each begins at a multiple of `align`
tokens (the tick of a synaptic model), so that a model that keeps documents apart computes for it what it would compute for the
conversation alone. What is left between and behind them is filled with BOS tokens, documents of their own without a target.
Conversations longer than a row keep their first T+1 tokens; those without a target in there are left out.

B batch, T tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import operator
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.errors import UserError

WAITING = 256  # conversations that are looked at for one that fits
IGNORED = -1  # target where nothing is learned


class Transcript(NamedTuple):
    """A conversation as token ids, the first of them BOS, and which of them are learned."""

    ids: Sequence[int]
    learned: Sequence[bool]


class RowLoader:
    """Batches of packed conversations, the same ones for a seed.

    rank, world: this process takes every world-th batch. loop: shuffle and start over at the end of a pass, for ever; with
    loop=False one pass in the given order, whose last batch may have fewer rows, then StopIteration. `left_out`: conversations without a
    target in their first T+1 tokens; `cut`: those that lost their end. Raises UserError when none is left.
    """

    wait_seconds = 0.0

    def __init__(
        self,
        transcripts: Sequence[Transcript],
        bos_id: int,
        batch_size: int,
        length: int,
        *,
        align: int = 1,
        rank: int = 0,
        world: int = 1,
        loop: bool = True,
        seed: int = 0,
    ) -> None:
        columns = length + 1
        usable = [transcript for transcript in transcripts if any(transcript.learned[1:columns])]
        if not usable:
            raise UserError(
                f"none of {len(transcripts)} conversations has a word of the assistant within {length} tokens: use a longer --max_seq_len"
            )
        self.left_out = len(transcripts) - len(usable)
        self.cut = sum(len(transcript.ids) > columns for transcript in usable)
        self._ids = [np.array(transcript.ids[:columns], dtype=np.int64) for transcript in usable]
        self._learned = [np.array(transcript.learned[:columns], dtype=bool) for transcript in usable]
        self._bos, self._batch, self._columns, self._align = bos_id, batch_size, columns, align
        self._rank, self._world, self._loop, self._seed = rank, world, loop, seed
        self._passes: list[list[list[int]]] = []  # rows of each pass: the conversations in them
        self._row, self._epoch = 0, 0  # of all ranks together
        self._digest = self._fingerprint()

    @property
    def epoch(self) -> int:
        """Completed passes over the conversations."""
        return self._epoch

    @property
    def rows(self) -> int:
        """Rows of the first pass."""
        return len(self._pass(0))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next inputs [B,T] and targets [B,T], int64 on the CPU. Raises StopIteration at the end when loop=False."""
        first = self._row + self._rank * self._batch
        rows = [self._find(number) for number in range(first, first + self._batch)]
        made = [self._make(members) for members in rows if members is not None]
        if not made:
            raise StopIteration
        self._row += self._world * self._batch
        while self._loop and self._row >= sum(map(len, self._passes[: self._epoch + 1])):
            self._epoch += 1
            self._pass(self._epoch)
        tokens, targets = (torch.from_numpy(np.stack(side)) for side in zip(*made, strict=True))
        return tokens[:, :-1].contiguous(), targets[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON types."""
        return {"row": self._row, "epoch": self._epoch, "digest": self._digest, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises UserError when it is of other conversations, another seed or length."""
        if (state.get("digest"), state.get("seed")) != (self._digest, self._seed):
            raise UserError(
                "the checkpoint was tuned on other conversations, or with another --seed or --max_seq_len: give the same, or start anew"
            )
        self._row, self._epoch = int(state["row"]), int(state["epoch"])

    def _find(self, number: int) -> list[int] | None:
        """The conversations in row `number`, counted over all passes; None behind the end."""
        for epoch in range(1 << 30 if self._loop else 1):
            rows = self._pass(epoch)
            if number < len(rows):
                return rows[number]
            number -= len(rows)
        return None

    def _pass(self, epoch: int) -> list[list[int]]:
        while len(self._passes) <= epoch:
            order, rng = list(range(len(self._ids))), random.Random(stable_hash(self._seed, "conversations", len(self._passes)))
            if self._loop:
                rng.shuffle(order)
            rows = pack([len(ids) for ids in self._ids], order, self._columns, self._align)
            if self._loop:  # packing puts long ones first
                rng.shuffle(rows)
            self._passes.append(rows)
        return self._passes[epoch]

    def _make(self, members: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """One row [T+1] of tokens, and the same with IGNORED where nothing is learned."""
        tokens = np.full(self._columns, self._bos, dtype=np.int64)
        targets = np.full(self._columns, IGNORED, dtype=np.int64)
        start = 0
        for member in members:
            ids, learned = self._ids[member], self._learned[member]
            tokens[start : start + len(ids)] = ids
            targets[start : start + len(ids)] = np.where(learned, ids, IGNORED)
            start = aligned(start + len(ids), self._align)
        return tokens, targets

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._columns} {self._align} {self._bos}".encode())
        for ids, learned in zip(self._ids, self._learned, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + learned.tobytes())
        return digest.hexdigest()


def pack(lengths: Sequence[int], order: Sequence[int], columns: int, align: int) -> list[list[int]]:
    """Rows of at most `columns` tokens from items of the given lengths, taken in about this order; each starts at a multiple of `align`.

    Of WAITING items the longest that fits comes next. No length may exceed `columns`.
    """
    rows: list[list[int]] = []
    waiting: list[tuple[int, int, int]] = []
    coming = iter(enumerate(order))
    start = 0
    while True:
        while len(waiting) < WAITING and (taken := next(coming, None)) is not None:
            bisect.insort(waiting, (lengths[taken[1]], -taken[0], taken[1]))
        if not waiting:
            return rows
        fitting = bisect.bisect_right(waiting, columns - start, key=operator.itemgetter(0))
        if not rows or not fitting:
            rows.append([])
            start, fitting = 0, len(waiting)
        length, _, item = waiting.pop(fitting - 1)
        rows[-1].append(item)
        start = aligned(start + length, align)


def aligned(place: int, align: int) -> int:
    """The next multiple of `align` from `place` on."""
    return -(-place // align) * align
