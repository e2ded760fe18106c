"""A needle in a haystack: one short statement somewhere in a long text of distraction, asked for at the end.

B rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bio_inspired_nanochat.config.knobs import knob
from bio_inspired_nanochat.tasks.memory import ASK, IS, Episodes, MemoryTask, Page

DEPTHS = ("early", "middle", "late")


@dataclass(frozen=True)
class Needle(MemoryTask):
    """`... name IS value ... ASK name -> value`. The needle lies anywhere in the haystack; the groups are thirds of it.

    `distance` is the length of the haystack, so attention that is shorter than it sees some needles and not others.
    """

    names: int = knob(8, "words that can be names", lo=1, hi=1 << 16)
    values: int = knob(8, "words that can be values", lo=2, hi=1 << 16)

    name: ClassVar[str] = "needle"
    groups: ClassVar[tuple[str, ...]] = DEPTHS

    @property
    def vocab_size(self) -> int:
        """See `MemoryTask`."""
        return self._words + self.names + self.values

    @property
    def length(self) -> int:
        """See `MemoryTask`."""
        return 1 + self.spread + self.distance + 3 + 2

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """See `MemoryTask`."""
        page, last = Page(generator, rows, self.length, self.fillers), self.length - 5
        place = torch.randint(1, last + 1, (rows,), generator=generator, device=generator.device)
        name = self._words + torch.randint(self.names, (rows, 1), generator=generator, device=generator.device)
        value = self._words + self.names + torch.randint(self.values, (rows, 1), generator=generator, device=generator.device)
        told = page.write(place, torch.stack([name, torch.full_like(name, IS), value], dim=-1))[..., -1]
        group = (place - 1) * len(DEPTHS) // last
        page.ask(self.length - 2, torch.stack([torch.full_like(name, ASK), name], dim=-1), value, told, group[:, None])
        return page.episodes()
