"""Streams: a step reads the same batches whichever processes share them, and goes on with another number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.data.streams import StreamLoader, count_streams, join_states
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

MakeShards = Callable[[Sequence[str | None]], Path]
DOCS = [f"document {number} " + "of some length " * (number % 7) for number in range(120)]
FORWARDS = 4


@pytest.fixture
def make(make_shards: MakeShards, tokenizer: Tokenizer) -> Callable[[int, int], PackedLoader]:
    folder = make_shards(DOCS)
    return lambda index, streams: PackedLoader(sorted(folder.glob("*.parquet")), tokenizer, 2, 24, index, streams, prefetch=1)


def processes(make, world: int, streams: int = FORWARDS) -> list[StreamLoader]:
    return [StreamLoader(make, streams, rank, world) for rank in range(world)]


def steps(loaders: list[StreamLoader], count: int, forwards: int = FORWARDS) -> list[list[Tensor]]:
    """The rows of each step, forward m of rank r at place m W + r."""
    world = len(loaders)
    return [[loader.next_batch()[0] for _ in range(forwards // world) for loader in loaders] for _ in range(count)]


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(torch.cat(x), torch.cat(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("streams", [4, 2])
def test_a_step_reads_the_same_batches_whichever_processes_share_it(make, streams):
    alone = steps(processes(make, 1, streams), 9)
    assert same(alone, steps(processes(make, 2, streams), 9))
    assert streams < 4 or same(alone, steps(processes(make, 4), 9))
    assert len({tuple(batch.flatten().tolist()) for batch in alone[0]}) == FORWARDS, "the forwards of a step read different text"


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (1, 4)])
def test_a_run_goes_on_with_another_number_of_processes(make, before, after):
    whole = steps(processes(make, 1), 10)
    first = processes(make, before)
    assert same(whole[:4], steps(first, 4))
    state = join_states(json.loads(json.dumps([loader.state_dict() for loader in first])))
    second = processes(make, after)
    for loader in second:
        loader.load_state_dict(state)
    assert same(whole[4:], steps(second, 6))
    epochs = min(loader.epoch for loader in processes(make, 1)), min(loader.epoch for loader in second)
    assert epochs[0] == 0 < epochs[1], "the runs passed the end of the data"
    assert sum(loader.counts["documents"] for loader in second) > len(DOCS)


def test_a_round_that_is_not_over_goes_on_where_it_was(make):
    """Three forwards of a step over four streams: the turn is part of the position."""
    whole = steps(processes(make, 1), 4, forwards=3)
    (first,) = processes(make, 1)
    assert same(whole[:2], steps([first], 2, forwards=3))
    (second,) = processes(make, 1)
    second.load_state_dict(first.state_dict())
    assert same(whole[2:], steps([second], 2, forwards=3))
    pair = processes(make, 2)
    pair[0].load_state_dict(first.state_dict())
    first.next_batch()
    with pytest.raises(UserError, match="after 3 of 4 streams: resume with as many processes as before"):
        pair[0].load_state_dict(first.state_dict())


def test_streams_are_as_many_as_the_forwards_where_that_is_not_too_many():
    assert [count_streams(n, 1, 1000) for n in (1, 2, 7, 16, 24, 17)] == [1, 2, 7, 16, 12, 1]
    assert [count_streams(48, world, 1000) for world in (1, 2, 4, 8, 16, 48)] == [16, 16, 16, 16, 16, 48]
    assert count_streams(8, 2, 5) == 4 and count_streams(8, 4, 3) == 4, "a stream needs a document; the loader refuses what has none"


def test_what_cannot_be_shared_or_continued_is_refused(make):
    with pytest.raises(UserError, match="as 4 streams, which 3 processes cannot share"):
        StreamLoader(make, 4, 0, 3)
    (alone,) = processes(make, 1)
    state = alone.state_dict()
    (other,) = processes(make, 1, 2)
    for broken in (
        state,
        {},
        None,
        {**alone.state_dict(), "of": 2, "taken": "x"},
        {"of": 2, "taken": 0, "streams": {}},
        {**other.state_dict(), "streams": {"0": {}}},
    ):
        with pytest.raises(UserError, match="loader state"):
            other.load_state_dict(broken)
    assert join_states([{"row": 3}, {"row": 3}]) == {"row": 3}, "a loader that all processes share keeps its own form"
