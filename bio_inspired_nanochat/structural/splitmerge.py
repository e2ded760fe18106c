"""Decisions of the life cycle, from the accounts alone: who separates, dies, merges, splits and is born in one layer.

health = geometric mean of min(1, demand / 2 fair), the account, and, with `sm_use_neuroscore`, min(1, contribution / 2 average).
Twice the fair demand comes to 1, fair demand to one half, no demand to 0.

At most one event of a kind happens in a layer at a time. Nobody dies, merges or splits before `expert_youth` steps have passed since its
birth or last event. Every rank computes the same decisions from the same accounts.

Numbered equations are those of prompts/life_cycle.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.synaptic import SynapticMoE


@dataclass(frozen=True)
class Rules:
    """Bounds of a population: experts that compete, of which twins are one, never fall below `floor`, living ones never pass `ceiling`;
    while fewer than `target` live somebody is born.
    """

    floor: int
    target: int
    ceiling: int

    @classmethod
    def of(cls, layer: SynapticMoE) -> Rules:
        """Floor: half of the experts at birth, but always one more slot than a token visits; ceiling: the slots."""
        born = layer.accounts.born
        return cls(max(layer.k + 1, (born + 1) // 2), born, layer.slots)


@dataclass(frozen=True)
class Event:
    """One event in one layer. slots: those it touches (split: parent, child; merge: survivor, absorbed; separate: the leader, its twin;
    death, birth: the one); id: of the expert that it makes or ends; parents: ids; health: of the touched experts before.
    """

    event: str
    slots: tuple[int, ...]
    id: int
    parents: tuple[int, ...]
    health: tuple[float, ...]


def health(accounts: Any, use_contribution: bool) -> Tensor:
    """Health [E] in [0, 1] of every slot, 0 for empty ones. accounts: a layer's, or what is read of them. Equation (L13)."""
    factors = [(accounts.demand / 2).clamp(0, 1), accounts.energy]
    if use_contribution:
        gained = accounts.benefit.clamp(min=0)
        mean = gained.sum() / accounts.alive.sum()
        factors.append((gained / (2 * mean).clamp(min=1e-12)).clamp(max=1))
    return torch.stack(factors).prod(0) ** (1 / len(factors)) * accounts.alive


def decide(layer: SynapticMoE, cfg: SynapticConfig, rules: Rules | None = None) -> list[Event]:
    """The events of one layer, in the order in which they are to be carried out. Reads the accounts once; changes nothing."""
    return _Population(layer, cfg, rules or Rules.of(layer)).events()


class _Population:
    """A copy of one layer's accounts on the host, that follows the events as they are decided."""

    def __init__(self, layer: SynapticMoE, cfg: SynapticConfig, rules: Rules) -> None:
        kept = layer.accounts
        self.cfg, self.rules = cfg, rules
        self.alive, self.ids, self.age = (value.tolist() for value in (kept.alive, kept.ids, kept.age))
        self.lead, self.child, self.blend, self.both = (value.tolist() for value in (kept.lead, kept.child, kept.blend, kept.both))
        self.health = [round(value, 6) for value in health(kept, cfg.sm_use_neuroscore).tolist()]
        self.load = kept.load.tolist()
        self.next_id = int(kept.next_id)
        codes = layer.synapse.identity if layer.synapse is not None and hasattr(layer.synapse, "identity") else layer.router
        unit = F.normalize(codes.detach().float(), dim=-1)
        self.cosine = (unit @ unit.T).tolist()

    def events(self) -> list[Event]:
        found = [*self._separations(), *self._death(), *self._merge()]
        splits = self._split()
        found += splits
        return found if splits else found + self._birth()

    def _living(self) -> list[int]:
        return [slot for slot, alive in enumerate(self.alive) if alive]

    def _can_lose(self) -> bool:
        """Whether one expert less leaves enough of them; twins are one choice of a token."""
        return sum(self.lead[slot] == slot for slot in self._living()) > self.rules.floor

    def _single(self, slot: int) -> bool:
        return self.lead[slot] == slot and self.child[slot] == slot

    def _grown(self) -> list[int]:
        """Living experts on their own that are old enough for an event."""
        return [slot for slot in self._living() if self._single(slot) and self.age[slot] >= self.cfg.expert_youth]

    def _event(self, kind: str, slots: tuple[int, ...], number: int, parents: tuple[int, ...]) -> Event:
        for slot in slots:
            self.age[slot] = 0
        return Event(kind, slots, number, parents, tuple(self.health[slot] for slot in slots))

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _free(self, slot: int) -> None:
        self.alive[slot] = False

    def _separations(self) -> list[Event]:
        found = []
        for slot in self._living():
            child = self.child[slot]
            if child == slot or self.blend[slot] < 1 or self.both[slot] >= self.cfg.twin_overlap:
                continue
            self.child[slot], self.lead[child] = slot, child
            found.append(self._event("separate", (slot, child), self.ids[child], (self.ids[slot],)))
        return found

    def _death(self) -> list[Event]:
        weak = [slot for slot in self._grown() if self.health[slot] < self.cfg.death_health_max]
        if not weak or not self._can_lose():
            return []
        slot = min(weak, key=lambda weak: (self.health[weak], weak))
        self._free(slot)
        return [self._event("death", (slot,), self.ids[slot], ())]

    def _merge(self) -> list[Event]:
        poor = [slot for slot in self._grown() if self.health[slot] < self.cfg.merge_health_max]
        pairs = [(a, b) for a in poor for b in poor if a < b and self.cosine[a][b] >= self.cfg.merge_similarity]
        if not pairs or not self._can_lose():
            return []
        a, b = max(pairs, key=lambda pair: (self.cosine[pair[0]][pair[1]], -pair[0], -pair[1]))
        kept, gone = (a, b) if self.load[a] >= self.load[b] else (b, a)
        parents = (self.ids[kept], self.ids[gone])
        self._free(gone)
        self.ids[kept] = self._new_id()
        return [self._event("merge", (kept, gone), self.ids[kept], parents)]

    def _split(self) -> list[Event]:
        rich = [slot for slot in self._grown() if self.health[slot] >= self.cfg.split_health_min]
        empty = [slot for slot, alive in enumerate(self.alive) if not alive]
        if not rich or not empty or len(self._living()) >= self.rules.ceiling:
            return []
        slot, child = max(rich, key=lambda rich: (self.health[rich], -rich)), empty[0]
        self.alive[child] = True
        self.health[child] = 0.0
        self.ids[child] = self._new_id()
        return [self._event("split", (slot, child), self.ids[child], (self.ids[slot],))]

    def _birth(self) -> list[Event]:
        empty = [slot for slot, alive in enumerate(self.alive) if not alive]
        if not empty or len(self._living()) >= min(self.rules.target, self.rules.ceiling):
            return []
        self.alive[empty[0]] = True
        self.health[empty[0]] = 0.0
        self.ids[empty[0]] = self._new_id()
        return [self._event("birth", (empty[0],), self.ids[empty[0]], ())]


def record(event: Event, step: int, layer: int, before: float | None, after: float | None) -> dict[str, object]:
    """The event as a line of the lineage log."""
    values = dataclasses.asdict(event)
    return {"step": step, "layer": layer, **values, "loss_before": before, "loss_after": after}
