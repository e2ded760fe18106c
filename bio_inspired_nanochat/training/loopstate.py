"""What a checkpoint holds beside weights and optimizer, so that a run continues bit for bit."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from bio_inspired_nanochat.errors import UserError

RECENT = 20


@dataclass
class Progress:
    """Counters of the whole run, over all its processes. seconds: wall time in the loop; recent: losses of the last steps, newest last."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    val_bpb: float | None = None
    val_loss: float | None = None

    def add_losses(self, losses: list[float]) -> None:
        """Append the losses of steps, in order."""
        self.recent = (self.recent + losses)[-RECENT:]

    def final_loss(self) -> float | None:
        """Mean training loss of the last steps, at most RECENT; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def to_meta(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_meta(cls, values: Mapping[str, Any]) -> Progress:
        """The inverse of `to_meta`. Raises UserError for another format."""
        names = {f.name for f in fields(cls)}
        if not names <= set(values):
            raise UserError(f"the checkpoint's loop state lacks {min(names - set(values))}: it was not written by base_train")
        return cls(**{name: values[name] for name in names})


def rng_state(device: torch.device) -> dict[str, str]:
    """States of torch's default generators of this process, base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_rng(states: Mapping[str, str], device: torch.device) -> None:
    """Continue the generators where `rng_state` left them; one of another device type is left alone."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.cuda.set_rng_state(state, device)
