"""Training data as streams, so that a step's batch does not depend on how many processes share its forwards.

Stream s of S packs documents s, s + S, s + 2 S, ... (a `PackedLoader` of place s among S). Of the W processes, number r takes the streams
r, r + W, r + 2 W, ... in turn, one batch each. A step of M forwards hence reads the same batches whichever W divides M and S, and a run
that continues with another number of processes continues every stream where it was left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.errors import UserError

MOST_STREAMS = 16  # each has documents waiting and reads row groups of its own


def count_streams(forwards: int, world: int, documents: int) -> int:
    """Streams of a run whose steps have `forwards` forwards on `world` processes: as many as forwards, where that is not too many.

    world divides forwards. Fewer documents than streams leave one stream for every process.
    """
    fitting = (n for n in range(min(forwards, max(MOST_STREAMS, world), documents), world - 1, -1) if forwards % n == 0 and n % world == 0)
    return next(fitting, world)


def check_shared(streams: int, world: int) -> None:
    """UserError when `world` processes cannot share the streams alike."""
    if streams % world:
        raise UserError(
            f"the data of this run are read as {streams} streams, which {world} processes cannot share: start it with a number of "
            f"processes that divides {streams}"
        )


class StreamLoader:
    """The batches of one process among `world`: those of its streams in turn, with an exactly resumable position.

    make: opens stream number s of S. Raises UserError when `world` does not divide `streams`.
    """

    def __init__(self, make: Callable[[int, int], PackedLoader], streams: int, rank: int, world: int) -> None:
        check_shared(streams, world)
        self._streams, self._world, self._turn = streams, world, 0
        self._loaders = [make(index, streams) for index in range(rank, streams, world)]
        self._last = self._loaders[0]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next inputs [B,T] and targets [B,T]; see `PackedLoader.next_batch`."""
        self._last = self._loaders[self._turn]
        batch = self._last.next_batch()
        self._turn = (self._turn + 1) % len(self._loaders)
        return batch

    @property
    def wait_seconds(self) -> float:
        """Time that `next_batch` has waited for data."""
        return sum(loader.wait_seconds for loader in self._loaders)

    @property
    def epoch(self) -> int:
        """Passes that every stream of this process has completed."""
        return min(loader.epoch for loader in self._loaders)

    @property
    def counts(self) -> dict[str, int]:
        """Sums of `PackedLoader.counts`; a damaged row group counts once for every stream that met it."""
        return {name: sum(loader.counts[name] for loader in self._loaders) for name in self._last.counts}

    @property
    def documents(self) -> list[str]:
        """The documents of the last batch; see `PackedLoader.documents`."""
        return self._last.documents

    def state_dict(self) -> dict[str, Any]:
        """This process's part of the position: `of` streams in all, the batches of the current round over all of them that all processes
        have taken, and the state of every stream of this process by its number."""
        taken = self._turn * self._world
        return {
            "of": self._streams,
            "taken": taken,
            "streams": {str(s["rank"]): s for s in (loader.state_dict() for loader in self._loaders)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; see `join_states` for one of several processes. Raises UserError as `PackedLoader` does, and
        where the streams were others."""
        if not isinstance(state, dict) or not isinstance(state.get("streams"), dict) or state.get("of") != self._streams:
            raise UserError(f"the loader state is not of {self._streams} streams: begin a new run, or resume a checkpoint of this version")
        taken = state.get("taken")
        if not isinstance(taken, int) or not 0 <= taken < self._streams or taken % self._world:
            raise UserError(f"the loader state was taken after {taken} of {self._streams} streams: resume with as many processes as before")
        if missing := [number for number in map(str, range(self._streams)) if number not in state["streams"]]:
            raise UserError(f"the loader state has no stream {missing[0]} of {self._streams}: the checkpoint is not whole")
        for loader in self._loaders:
            loader.load_state_dict(state["streams"][str(loader.state_dict()["rank"])])
        self._turn = taken // self._world

    def close(self) -> None:
        """Stop the threads and close files."""
        for loader in self._loaders:
            loader.close()


def join_states(states: Sequence[Any]) -> dict[str, Any]:
    """The position of a whole run from the `state_dict` of each of its processes; what is no such state is handed on for its error."""
    if not all(isinstance(state, dict) and isinstance(state.get("streams"), dict) for state in states):
        return states[0]
    return {**states[0], "streams": _merged(state["streams"] for state in states)}


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {number: state for part in parts for number, state in part.items()}
