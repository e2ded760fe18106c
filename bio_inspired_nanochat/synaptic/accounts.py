"""What is kept about every expert of a layer between training steps. `forward` reads it; only `structural` changes it.

Dimensions: E slots for experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Accounts(nn.Module):
    """Buffers [E] unless said otherwise, all in the checkpoint.

    alive: bool; ids: int64 number in the lineage, -1 for an empty slot; next_id []: the next number, numbers never repeat;
    age: int64 steps since birth or the last event; energy in [0, 1]; balance: load-balancing bias of the selection.
    Twins compete as one slot, led by the elder: lead, child: int64 index of the slot's leader and of the leader's twin (itself where
    there is none); blend in [0, 1]: how much of the slot's score is that of the twin that serves the token; tie: bias between twins.
    Averages over steps: load and demand in units of the fair share, both: share of tokens that both twins would take, together [E, E]:
    share of the tokens of the row's expert that the column's takes too, inputs [E, D] and common [D]: mean inputs, benefit and
    benefit_square: contribution to the loss and its square (see `structural.neuroscore`).
    """

    def __init__(self, slots: int, born: int, width: int) -> None:
        super().__init__()
        self.slots, self.born = slots, born
        for name in ("energy", "balance", "blend", "tie", "load", "demand", "both", "benefit", "benefit_square"):
            self.register_buffer(name, torch.empty(slots))
        self.register_buffer("alive", torch.empty(slots, dtype=torch.bool))
        for name in ("ids", "age", "lead", "child"):
            self.register_buffer(name, torch.empty(slots, dtype=torch.long))
        self.register_buffer("next_id", torch.empty((), dtype=torch.long))
        self.register_buffer("together", torch.empty(slots, slots))
        self.register_buffer("inputs", torch.empty(slots, width))
        self.register_buffer("common", torch.empty(width))
        if self.energy.device.type != "meta":
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The first experts alive with half an account and fair demand; the other slots empty."""
        places = torch.arange(self.slots, device=self.energy.device)
        alive = places < self.born
        for buffer in self.buffers():
            buffer.zero_()
        self.alive.copy_(alive)
        self.ids.copy_(torch.where(alive, places, -1))
        self.next_id.fill_(self.born)
        self.lead.copy_(places)
        self.child.copy_(places)
        self.energy.fill_(0.5)
        self.load.copy_(alive)
        self.demand.copy_(alive)

    def leads(self) -> Tensor:
        """True [E] for the slots that compete: living experts that are not somebody's twin."""
        return self.alive & (self.lead == torch.arange(self.slots, device=self.lead.device))
