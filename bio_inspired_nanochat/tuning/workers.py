"""Who trains the candidates: this process, local worker processes, or the ranks of a torchrun launch, each with a worker of its own.

A worker that dies or takes too long costs its candidates, which count as diverged, and is started anew. Each worker trains its share of
the candidates as one.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
import torch.distributed as dist

from bio_inspired_nanochat.common import pick_device, say, this_rank
from bio_inspired_nanochat.config import SynapticConfig, from_dict, to_dict
from bio_inspired_nanochat.tuning.objectives import LOST, ObjectiveConfig, Score, evaluate

Scores = list[list[Score]]
Evaluate = Callable[[ObjectiveConfig, Sequence[SynapticConfig], Sequence[int], torch.device], Scores]
POLL = 0.2  # seconds between looks at the mailbox


class Evaluator(Protocol):
    """Measures candidates."""

    def __call__(self, candidates: Sequence[SynapticConfig], seeds: Sequence[int]) -> Scores:
        """Scores [candidate][seed]."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def shares(count: int, workers: int) -> list[range]:
    """Candidates 0 ... count - 1 in `workers` runs of nearly equal length."""
    edges = [count * worker // workers for worker in range(workers + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


class Local:
    """Trains in this process."""

    def __init__(self, config: ObjectiveConfig, device: str) -> None:
        self.config, self.device = config, pick_device(device)

    def __call__(self, candidates: Sequence[SynapticConfig], seeds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        return evaluate(self.config, candidates, seeds, self.device)

    def close(self) -> None:
        """Nothing to end."""


class Pool:
    """Local worker processes. timeout: seconds that a share may take; work: what a worker calls."""

    def __init__(self, config: ObjectiveConfig, device: str, workers: int, timeout: float, work: Evaluate = evaluate) -> None:
        self.config, self.device, self.timeout, self.work = config, device, timeout, work
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Any, Connection] | None] = [None] * workers
        self.lost = 0

    def __call__(self, candidates: Sequence[SynapticConfig], seeds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        parts = shares(len(candidates), len(self.workers))
        waiting: dict[Connection, int] = {}
        for index, part in enumerate(parts):
            if part:
                connection = self._started(index)
                connection.send(([candidates[i] for i in part], list(seeds)))
                waiting[connection] = index
        found: Scores = [[LOST] * len(seeds) for _ in candidates]
        ends = time.monotonic() + self.timeout
        while waiting and (left := ends - time.monotonic()) > 0:
            ready: list[Any] = wait(list(waiting), left)
            for connection in ready:
                index = waiting.pop(connection)
                try:
                    scores = connection.recv()
                except (EOFError, OSError):
                    self._drop(index, parts[index], "died")
                    continue
                for i, score in zip(parts[index], scores, strict=True):
                    found[i] = score
        for index in waiting.values():
            self._drop(index, parts[index], f"took longer than {self.timeout:g} s")
        return found

    def _started(self, index: int) -> Connection:
        worker = self.workers[index]
        if worker is not None and worker[0].is_alive():
            return worker[1]
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.config, self.device, index, self.work), daemon=True)
        process.start()
        theirs.close()
        self.workers[index] = (process, ours)
        return ours

    def _drop(self, index: int, part: range, why: str) -> None:
        self.lost += len(part)
        say(f"notice: worker {index} {why}: candidates {', '.join(map(str, part))} are lost and rank worst")
        self._end(index)

    def _end(self, index: int) -> None:
        if (worker := self.workers[index]) is not None:
            worker[1].close()
            worker[0].kill()
            worker[0].join()
        self.workers[index] = None

    def close(self) -> None:
        """End the worker processes."""
        for index in range(len(self.workers)):
            self._end(index)


def _serve(connection: Connection, config: ObjectiveConfig, device: str, index: int, work: Evaluate) -> None:
    """A worker process: shares come in, scores go out, until the other end is closed."""
    torch.set_num_threads(1)
    place = pick_device(device)
    if place.type == "cuda" and "LOCAL_RANK" not in os.environ:  # under torchrun every rank has its own GPU already
        place = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(place)  # where Triton launches
    while True:
        try:
            candidates, seeds = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(work(config, candidates, seeds, place))


class Ranks:
    """Rank 0 of a torchrun launch: hands shares to the ranks through the launch's store, and takes none of them for granted.

    Every rank, this one included, trains in a worker process, because torchrun ends all ranks when one dies. A rank that is late is left
    out until it has answered.
    """

    def __init__(self, config: ObjectiveConfig, device: str, timeout: float, work: Evaluate = evaluate) -> None:
        self.store, _, self.world = _store()
        self.own, self.timeout, self.number = Pool(config, device, 1, timeout, work), timeout, 0
        self.late: dict[int, str] = {}

    def __call__(self, candidates: Sequence[SynapticConfig], seeds: Sequence[int]) -> Scores:
        """See `Evaluator`."""
        self.number += 1
        self.late = {rank: key for rank, key in self.late.items() if not self.store.check([key])}
        ranks = [rank for rank in range(self.world) if rank not in self.late]
        parts = dict(zip(ranks, shares(len(candidates), len(ranks)), strict=True))
        for rank in ranks[1:]:
            task = {"candidates": [to_dict(candidates[i]) for i in parts[rank]], "seeds": list(seeds), "key": f"done/{self.number}/{rank}"}
            self.store.set(f"task/{rank}/{int(self.store.add(f'sent/{rank}', 1))}", json.dumps(task))
        ends = time.monotonic() + self.timeout
        found: Scores = [[LOST] * len(seeds) for _ in candidates]
        for i, score in zip(parts[0], self.own([candidates[i] for i in parts[0]], seeds), strict=True):
            found[i] = score
        for rank in ranks[1:]:
            key = f"done/{self.number}/{rank}"
            while not self.store.check([key]) and time.monotonic() < ends + 5.0:
                time.sleep(POLL)
            if not self.store.check([key]):
                self.late[rank] = key
                say(f"notice: rank {rank} is late: candidates {', '.join(map(str, parts[rank]))} are lost and rank worst")
                continue
            for i, scores in zip(parts[rank], json.loads(self.store.get(key)), strict=True):
                found[i] = [Score(**score) for score in scores]
        return found

    def close(self) -> None:
        """Let the other ranks end."""
        for rank in range(1, self.world):
            self.store.set(f"task/{rank}/{int(self.store.add(f'sent/{rank}', 1))}", json.dumps(None))
        self.own.close()


def follow(config: ObjectiveConfig, device: str, timeout: float, work: Evaluate = evaluate) -> None:
    """A rank other than 0 of a torchrun launch: train what rank 0 sends until it says that it is over."""
    store, rank, _ = _store()
    pool, number = Pool(config, device, 1, timeout, work), 0
    try:
        while True:
            number += 1
            while not store.check([f"task/{rank}/{number}"]):
                time.sleep(POLL)
            task = json.loads(store.get(f"task/{rank}/{number}"))
            if task is None:
                return
            scores = pool([from_dict(SynapticConfig, one) for one in task["candidates"]], task["seeds"])
            store.set(task["key"], json.dumps([[asdict(score) for score in each] for each in scores]))
    finally:
        pool.close()


def _store() -> tuple[Any, int, int]:
    return next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))


def make_evaluator(config: Any) -> Evaluator:
    """The evaluator that a SearchConfig asks for, in a single process or on rank 0."""
    if this_rank().world > 1:
        return Ranks(config, config.device, config.eval_timeout)
    if config.workers:
        return Pool(config, config.device, config.workers, config.eval_timeout)
    return Local(config, config.device)
