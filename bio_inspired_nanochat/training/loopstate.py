"""What a checkpoint holds beside weights and optimizer, so that a run continues bit for bit."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch

from bio_inspired_nanochat.errors import UserError

RECENT = 20


@dataclass
class Progress:
    """Counters of the whole run, over all its processes. seconds: wall time in the loop; recent: losses of the last steps, newest last;
    owed: what is still to be done at this step ("eval", "sample"); faults, skipped, rollbacks: steps that went wrong, and what was done.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    val_bpb: float | None = None
    val_loss: float | None = None
    owed: list[str] = field(default_factory=list)
    faults: int = 0
    skipped: int = 0
    rollbacks: int = 0

    def add_losses(self, losses: list[float]) -> None:
        """Append the losses of steps, in order."""
        self.recent = (self.recent + losses)[-RECENT:]

    def final_loss(self) -> float | None:
        """Mean training loss of the last steps, at most RECENT; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; counters that are not there keep their values. Raises UserError for another format."""
        if not isinstance(values, Mapping) or not {"step", "tokens", "recent"} <= set(values):
            raise UserError("the checkpoint's loop state has no step, tokens and recent losses: it was not written by base_train")
        for name in {f.name for f in fields(self)} & set(values):
            setattr(self, name, values[name])


class Stateful(Protocol):
    """Something that continues from what it said of itself, in JSON types."""

    def state_dict(self) -> dict[str, Any]:
        """What to continue from, in JSON types."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from what `state_dict` said."""
        ...


class Registry:
    """Everything of a run that has state beside its weights and its optimizer, each registered once, by name.

    A part is of the run (equal on all ranks, stored once) or of a rank (each its own). What follows from the step, such as
    schedules and the positions of logs, is no state; accounts of experts are buffers of the model.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Stateful, bool]] = {}

    def add(self, name: str, part: Stateful, *, per_rank: bool = False) -> None:
        """Register a part under a name of its own."""
        assert name not in self._parts, f"{name} is registered twice"
        self._parts[name] = (part, per_rank)

    def parts(self) -> list[Stateful]:
        """All parts in order of registration."""
        return [part for part, _ in self._parts.values()]

    def of_run(self) -> dict[str, Any]:
        """The states that all ranks share, by name."""
        return {name: part.state_dict() for name, (part, per_rank) in self._parts.items() if not per_rank}

    def of_rank(self) -> dict[str, Any]:
        """The states of this rank, by name."""
        return {name: part.state_dict() for name, (part, per_rank) in self._parts.items() if per_rank}

    def load(self, run: Mapping[str, Any], rank: Mapping[str, Any]) -> None:
        """Continue every part from `of_run` and `of_rank`. UserError, before anything is changed, for a state that is missing."""
        for name, (_, per_rank) in self._parts.items():
            if name not in (rank if per_rank else run):
                raise UserError(f"the checkpoint has no state of the {name}: it was not written by base_train")
        for name, (part, per_rank) in self._parts.items():
            part.load_state_dict((rank if per_rank else run)[name])


class Generators:
    """torch's default random generators of this process as a part of the registry."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, str]:
        """See `rng_state`."""
        return rng_state(self._device)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """See `restore_rng`."""
        restore_rng(state, self._device)


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
