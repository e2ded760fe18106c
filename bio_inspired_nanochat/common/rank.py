"""This process among those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """This process among its peers, as torchrun announces it."""

    index: int
    local: int
    world: int

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.index == 0


def this_rank() -> Rank:
    """The rank from torchrun's environment, or the single process."""
    env = os.environ
    return Rank(int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0")), int(env.get("WORLD_SIZE", "1")))
