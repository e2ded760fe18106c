"""Experts during training: accounts after every step, the life cycle every few steps, the lineage log on rank 0."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.common import sum_over_ranks
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import Ledger, LineageLog, Moments, decide, health, metabolise, operate
from bio_inspired_nanochat.structural.splitmerge import Event, record
from bio_inspired_nanochat.synaptic import Probe, Routing, SynapticMoE
from bio_inspired_nanochat.training.ranks import gather

MOST_BALLOTS = 5000


class Ballot(NamedTuple):
    """One living expert at one life cycle: its health before, and whether it was split, or ended by death or merger."""

    health: float
    split: bool
    ended: bool


class Ballots:
    """The newest decisions about experts of the whole run, over all its processes."""

    def __init__(self) -> None:
        self.cast: deque[Ballot] = deque(maxlen=MOST_BALLOTS)

    def state_dict(self) -> dict[str, Any]:
        """As JSON types: health, split and ended of each."""
        return {"cast": [[ballot.health, int(ballot.split), int(ballot.ended)] for ballot in self.cast]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.cast = deque((Ballot(health, bool(split), bool(ended)) for health, split, ended in state["cast"]), maxlen=MOST_BALLOTS)


class ExpertKeeper:
    """Applies what the forwards of one optimizer step say of the experts, between steps and alike on every rank.

    every: steps between life cycles, 0 for none; log: of rank 0, or None; ballots: where decisions are kept. events counts those of this
    process.
    """

    def __init__(
        self, model: GPT, optimizer: Moments, every: int, seed: int, log: LineageLog | None = None, ballots: Ballots | None = None
    ) -> None:
        self.model, self.optimizer, self.every, self.seed, self.log = model, optimizer, every, seed, log
        self.ledger = Ledger(model)
        self.events = 0
        self.ballots = Ballots() if ballots is None else ballots

    def probes(self) -> list[Probe]:
        """Instruments for the next forward, one per layer."""
        return self.ledger.probes()

    def taps(self) -> list[Tensor]:
        """One [E, 2] per layer, at whose `grad` the backward of a forward with `probes` adds up, see `Ledger`."""
        return self.ledger.taps

    def add(self, routing: Sequence[Routing]) -> None:
        """Take the statistics of one forward."""
        self.ledger.add(routing)

    def after_step(self, step: int, idx: Tensor, targets: Tensor, make_room: Callable[[], object] = lambda: None) -> list[Event]:
        """After optimizer step number `step`. Collective.

        idx, targets: a batch of this rank, on which losses around an event are measured; make_room: called before, for memory.
        """
        routing, taps = self.ledger.settle()
        metabolise(self.model, routing, taps)
        if self.every == 0 or step % self.every:
            return []
        cfg, lines, done = self.model.config.syn_cfg, [], []
        decided = [decide(layer, cfg) for layer in self.model.experts()]
        said = repr(decided)
        assert all(other == said for other in gather(said)), "ranks decide differently about experts: their weights have come apart"
        for layer, events in zip(self.model.experts(), decided, strict=True):
            self.ballots.cast.extend(_ballots(layer, events))
        if any(decided):
            make_room()
        loss = self._loss(idx, targets) if any(decided) else None
        for index, (layer, events) in enumerate(zip(self.model.experts(), decided, strict=True)):
            for event in events:
                prefix = f"blocks.{index}.mlp"
                operate(layer, event, cfg, prefix=prefix, seed=self.seed, step=step, optimizer=self.optimizer)
                before, loss = loss, self._loss(idx, targets)
                lines.append(record(event, step, index, before, loss))
                done.append(event)
        self.events += len(done)
        if self.log is not None and lines:
            self.log.write(lines)
        return done

    def discard(self) -> None:
        """Forget what the forwards of a step said that is not taken."""
        self.ledger.discard()

    def rollback(self, step: int) -> None:
        """The model went back to `step`: so does the log."""
        if self.log is not None:
            self.log.resume(step)

    @torch.no_grad()
    def _loss(self, idx: Tensor, targets: Tensor) -> float:
        """Mean loss of a batch over ranks; the events are rare enough to wait for it."""
        total = torch.stack([self.model.token_losses(idx, targets).sum().double(), (targets >= 0).sum().double()])
        total = sum_over_ranks(total)
        return float(total[0] / total[1])

    def living(self) -> list[int]:
        """Number of living experts per layer."""
        return [int(layer.accounts.alive.sum()) for layer in self.model.experts()]


def _ballots(layer: SynapticMoE, events: Sequence[Event]) -> list[Ballot]:
    """What was decided about every living expert of a layer, before it is carried out."""
    split = {event.slots[0] for event in events if event.event == "split"}
    ended = {slot for event in events if event.event in ("death", "merge") for slot in event.slots}
    healths = health(layer.accounts, False).tolist()
    return [Ballot(round(healths[slot], 6), slot in split, slot in ended) for slot in layer.accounts.alive.nonzero().flatten().tolist()]
