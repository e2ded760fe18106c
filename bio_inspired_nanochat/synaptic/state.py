"""SynapseState: everything that belongs to running sequences and not to the model.

Dimensions: B batch, H query heads, Hkv key heads, L cache length, D head size, r modes of fast weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.common import pick_device
from bio_inspired_nanochat.errors import UserError, damaged_file
from bio_inspired_nanochat.kernels import ReleaseNoise
from bio_inspired_nanochat.synaptic.engram import Engram, check_shapes, read_tensors, write_tensors

FORMAT = "bio_inspired_nanochat.state"
FAST, EXPERTS = "fast.", "experts."  # begin the names of the tensors of fast weights and of experts


class FastState(NamedTuple):
    """Fast weights of one projection and what governs them, float32.

    weights: [B, r, r], rows post and columns pre modes; camkii, pp1, bdnf, open_calcium: [B] as in `kernels.density`;
    norm_sum, gate_sum, tokens: [B] sums over the tokens of the running document of the normalisations, of the read gate and of one,
    which `consolidate` needs.
    """

    weights: Tensor
    camkii: Tensor
    pp1: Tensor
    bdnf: Tensor
    open_calcium: Tensor
    norm_sum: Tensor
    gate_sum: Tensor
    tokens: Tensor

    def copy_(self, other: FastState) -> None:
        """Take over the values of another, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)


class ExpertState(NamedTuple):
    """Experts of running sequences at the start of the open tick, [B, E] float32 each.

    calcium, vesicles, open_drive: as in `kernels.PresynState`; slow: the trace of the NMDA term, in units of the fair share.
    """

    calcium: Tensor
    vesicles: Tensor
    open_drive: Tensor
    slow: Tensor

    @classmethod
    def rest(cls, batch: int, experts: int, device: torch.device, dtype: torch.dtype) -> ExpertState:
        """Experts that nobody has asked for."""
        empty = torch.zeros(3, batch, experts, device=device, dtype=dtype)
        return cls(empty[0], torch.ones_like(empty[0]), empty[1], empty[2])

    def copy_(self, other: ExpertState) -> None:
        """Take over the values of another, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)


class Place(NamedTuple):
    """Where tokens stand. first: position of the first one, common or [B]; fresh [B, T]: True where a document begins behind another
    one; live [B, T]: False for padding at the right end; None for never and always.
    """

    first: int | Tensor = 0
    fresh: Tensor | None = None
    live: Tensor | None = None

    @classmethod
    def whole(cls, doc: Tensor | None) -> Place:
        """Whole sequences from position 0 with document ids doc [B, T], or None."""
        return cls(0, None if doc is None else F.pad(doc[:, 1:] != doc[:, :-1], (1, 0)))


@dataclass
class LayerState:
    """State of one layer. k, v: [B, Hkv, L, D] cache; the synaptic tensors are None in a vanilla layer.

    calcium to energy: [B, H, L] (ring: [B, H, L, d]) terminals at the start of the open tick, as in `kernels.PresynState`;
    beta: [B, H, L] bias of the open tick (before the barrier); barrier: [B, H, L] float64 running sum of the gate's costs;
    fast: by projection (one of `config.synaptic.FAST_LAYERS`), where there are fast weights; experts: where they follow a sequence.
    """

    k: Tensor
    v: Tensor
    calcium: Tensor | None = None
    vesicles: Tensor | None = None
    open_drive: Tensor | None = None
    buffer: Tensor | None = None
    clamp: Tensor | None = None
    primed: Tensor | None = None
    spent: Tensor | None = None
    reserve: Tensor | None = None
    ring: Tensor | None = None
    early: Tensor | None = None
    late: Tensor | None = None
    resynthesis: Tensor | None = None
    energy: Tensor | None = None
    beta: Tensor | None = None
    barrier: Tensor | None = None
    fast: dict[str, FastState] = field(default_factory=dict)
    experts: ExpertState | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by name; those of fast weights as `fast.<projection>.<part>`, of experts as `experts.<part>`."""
        own = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if self.experts is not None:
            own |= {f"{EXPERTS}{part}": value for part, value in self.experts._asdict().items()}
        return own | {f"{FAST}{key}.{part}": value for key, fast in self.fast.items() for part, value in fast._asdict().items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> LayerState:
        """The state with these tensors (not copies), named as by `tensors`. KeyError when a part of fast weights is missing."""
        keys = dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith(FAST))
        fast = {key: FastState(*(tensors[f"{FAST}{key}.{part}"] for part in FastState._fields)) for key in keys}
        parts = [tensors[f"{EXPERTS}{part}"] for part in ExpertState._fields if f"{EXPERTS}{part}" in tensors]
        own = {name: value for name, value in tensors.items() if not name.startswith((FAST, EXPERTS))}
        return cls(**own, fast=fast, experts=ExpertState(*parts) if parts else None)


class Extras:
    """What a pass over whole sequences hands to a layer beside its input.

    doc: [B, T] document id per position, or None; noise: this layer's draws of stochastic release, or None;
    record: a dictionary for the layer to fill with the course of its terminals, or None (brief: what `kernels.SHORTAGES` are on average
    will do); routing: a list that gets what the layer's
    experts did, a `synaptic.moe.Routing`, or None; probe: instruments of the experts, a `synaptic.moe.Probe`, or None.
    """

    # A plain class and not a tuple: FSDP rebuilds the containers among a layer's arguments, and what is written into them would be lost.
    __slots__ = ("brief", "doc", "noise", "probe", "record", "routing")

    def __init__(
        self,
        doc: Tensor | None = None,
        noise: ReleaseNoise | None = None,
        record: dict[str, Tensor] | None = None,
        routing: list[Any] | None = None,
        probe: Any = None,
        brief: bool = False,
    ) -> None:
        self.doc, self.noise, self.record, self.routing, self.probe, self.brief = doc, noise, record, routing, probe, brief


class Arrival(Protocol):
    """New tokens of running sequences, and how a layer reads them: a `Chunk`, or what reads the same tokens otherwise."""

    def attend(self, layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> Tensor:
        """Attention output [B, H, t, D] of the new tokens, whose keys and values [B, Hkv, t, D] join `state`; x [B, t, n_embd]."""
        ...

    def place(self, device: torch.device) -> Place:
        """Where the new tokens stand, for layers with fast weights or experts."""
        ...

    def standing(self, layer: Any) -> Any:
        """What the experts of a layer take from its parameters and accounts (`moe.Standing`), or None to work it out anew."""
        ...


@dataclass
class Chunk:
    """Where a chunk of new tokens sits: what every layer of one `step` shares.

    starts: position of the first new token of each row; lengths: real tokens per row (the rest is right padding);
    start: the common start, or a tensor [B] when the rows differ; stop: one past the last written position of any row;
    doc: [B, stop] document id per position, or None; fresh: [B, size] True where a document begins behind another one, with doc;
    noise: draws of stochastic release, or None.
    """

    starts: list[int]
    lengths: list[int]
    size: int
    start: int | Tensor
    stop: int
    doc: Tensor | None = None
    fresh: Tensor | None = None
    noise: ReleaseNoise | None = None

    @classmethod
    def of(cls, starts: list[int], lengths: list[int], size: int, device: torch.device) -> Chunk:
        """Build from per-row starts and lengths."""
        common = len(set(starts)) == 1
        start = starts[0] if common else torch.tensor(starts, device=device)
        stop = max(a + n for a, n in zip(starts, lengths, strict=True))
        return cls(starts, lengths, size, start, stop)

    @property
    def full(self) -> bool:
        """Whether no row is padded."""
        return all(n == self.size for n in self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all rows start together and none is padded."""
        return isinstance(self.start, int) and self.full

    def write(self, cache: Tensor, values: Tensor, dim: int = 2) -> None:
        """Store the real tokens' `values` at their positions of `cache`; both have the batch first and time at `dim`."""
        if self.uniform:
            cache.narrow(dim, self.starts[0], self.size).copy_(values)
            return
        for row, (begin, count) in enumerate(zip(self.starts, self.lengths, strict=True)):
            cache[row].narrow(dim - 1, begin, count).copy_(values[row].narrow(dim - 1, 0, count))

    def attend(self, layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> Tensor:
        """See `Arrival`."""
        self.write(state.k, k)
        self.write(state.v, v)
        return layer.attend_step(x, q, state, self)

    def place(self, device: torch.device) -> Place:
        """See `Arrival`."""
        live = None
        if not self.full:
            live = torch.arange(self.size, device=device) < torch.tensor(self.lengths, device=device)[:, None]
        return Place(self.start, self.fresh, live)

    def standing(self, layer: Any) -> None:
        """See `Arrival`."""

    def closed(self, tick: int, device: torch.device) -> int | Tensor:
        """How many ticks end inside this chunk: one number, or [B] where the rows are at different positions."""
        counts = [(a + n) // tick - a // tick for a, n in zip(self.starts, self.lengths, strict=True)]
        return counts[0] if isinstance(self.start, int) and len(set(counts)) == 1 else torch.tensor(counts, device=device)


@dataclass
class SynapseState:
    """KV cache and all synapse state of B sequences. `pos` [B] counts the tokens that each has read (kept on the CPU).

    doc: [B, L] document id per position, when the model keeps documents apart; noise_key: [B, 2] key of each sequence's random
    release, when it is wanted; tick: tokens per tick of the model's synapses, None without any. A state belongs to its sequences alone: nothing in it is shared with the model or with
    another state.
    """

    pos: Tensor
    layers: list[LayerState]
    max_len: int
    doc: Tensor | None = None
    noise_key: Tensor | None = None
    tick: int | None = None

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.pos)

    def _map(self, change) -> SynapseState:
        layers = [LayerState.of({name: change(value) for name, value in layer.tensors().items()}) for layer in self.layers]
        doc, key = (None if value is None else change(value) for value in (self.doc, self.noise_key))
        return SynapseState(change(self.pos), layers, self.max_len, doc, key, self.tick)

    def clone(self) -> SynapseState:
        """An independent copy."""
        return self._map(torch.clone)

    def copy_(self, other: SynapseState) -> SynapseState:
        """Take over the contents of a state of the same layout and batch size, in place. Raises UserError for another one."""
        if not _same_layout(self, other) or self.batch_size != other.batch_size:
            raise UserError("a state can only take over one of the same model, max_len and batch size")
        theirs = other._tensors()
        for name, mine in self._tensors().items():  # by name: a file keeps its tensors in another order
            mine.copy_(theirs[name])
        return self

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by the name that they have in a file."""
        own = {"pos": self.pos, "doc": self.doc, "noise_key": self.noise_key}
        named = {f"layers.{index}.{name}": value for index, layer in enumerate(self.layers) for name, value in layer.tensors().items()}
        return {name: value for name, value in own.items() if value is not None} | named

    def select(self, rows: list[int] | Tensor) -> SynapseState:
        """A copy with the given rows, in that order; a row may be taken several times. Raises UserError for none, and for one that it has not."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.ndim != 1 or not len(index):
            raise UserError(f"rows of shape {list(index.shape)} choose nothing: give a list of at least one of the {self.batch_size} rows")
        bad = index[(index < 0) | (index >= self.batch_size)]
        if len(bad):
            raise UserError(f"row {int(bad[0])} is out of bounds [0, {self.batch_size - 1}] of this state")
        return self._map(lambda value: value.index_select(0, index.to(value.device)))

    @classmethod
    def cat(cls, states: list[SynapseState]) -> SynapseState:
        """One state with the rows of all `states`. Raises UserError for none, and where model or max_len differ."""
        if not states:
            raise UserError("cat needs at least one state")
        first = states[0]
        shapes = [_shapes(state) for state in states]
        if any(shape != shapes[0] for shape in shapes):
            raise UserError("states of different models or max_len cannot be joined")
        layers = []
        for group in zip(*(state.layers for state in states), strict=True):
            layers.append(LayerState.of({name: torch.cat([layer.tensors()[name] for layer in group]) for name in group[0].tensors()}))
        doc = None if first.doc is None else torch.cat([state.doc for state in states])
        key = None if first.noise_key is None else torch.cat([state.noise_key for state in states])
        return cls(torch.cat([state.pos for state in states]), layers, first.max_len, doc, key, first.tick)

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file. Raises UserError where that cannot be done."""
        meta = {"format": FORMAT, "shape": json.dumps({"max_len": self.max_len, "layers": len(self.layers), "tick": self.tick})}
        write_tensors(path, self._tensors(), meta)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SynapseState:
        """Read a state written by `save`. Raises UserError for a missing, damaged or foreign file, and for a device that is not there."""
        device = pick_device(device) if isinstance(device, str) else device
        meta, tensors = read_tensors(path, FORMAT, "a state", "make one with state.save")
        with damaged_file(path, "make another with state.save"):
            shape = json.loads(meta["shape"])
            layers = []
            for index in range(shape["layers"]):
                prefix = f"layers.{index}."
                layers.append(LayerState.of({n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}))
            doc, key = (tensors[name].to(device) if name in tensors else None for name in ("doc", "noise_key"))
            state = cls(tensors["pos"], layers, shape["max_len"], doc, key, shape["tick"])
            state._check()
            return state

    def _check(self) -> None:
        """Raise ValueError where the parts of a state that was read from a file contradict each other."""
        batch, length, pos = len(self.pos), self.max_len, self.pos
        if pos.dtype != torch.long or pos.shape != (batch,) or not batch or pos.min() < 0 or pos.max() > length:
            raise ValueError(f"pos are not numbers of tokens within max_len={length}")
        if self.tick is not None and (type(self.tick) is not int or self.tick < 1):
            raise ValueError(f"tick={self.tick!r} is no number of tokens")
        alike = _shapes(self)[4:]
        if not alike or any(layer != alike[0] for layer in alike):
            raise ValueError("its layers do not have the shapes of one model")
        k, v = self.layers[0].k, self.layers[0].v
        if k.ndim != 4 or k.shape != v.shape or k.shape[2] != length:
            raise ValueError(f"keys are {list(k.shape)} beside values {list(v.shape)} and max_len={length}")
        check_shapes(self.layers[0].tensors(), batch)
        if any(len(value) != batch for value in self._tensors().values()):
            raise ValueError(f"not all of it is of {batch} sequences")
        if any(not value.is_floating_point() for layer in self.layers for value in layer.tensors().values()):
            raise ValueError("its layers hold other than real numbers")
        for name, value, width in (("doc", self.doc, length), ("noise_key", self.noise_key, 2)):
            if value is not None and (value.dtype != torch.long or value.shape != (batch, width)):
                raise ValueError(f"{name} is not [{batch}, {width}] of integers")

    def engram(self) -> Engram:
        """A copy of the fast weights and molecules of these sequences. Raises UserError for a model without fast weights."""
        return Engram.of([layer.tensors() for layer in self.layers])

    def save_engram(self, path: str | Path) -> None:
        """Write the fast weights and molecules alone to one safetensors file; `model.init_state(..., engram=path)` reads it."""
        self.engram().save(path)

    @staticmethod
    def load_engram(path: str | Path, device: torch.device | str = "cpu") -> Engram:
        """Read what `save_engram` wrote. Raises UserError for a missing, damaged or foreign file."""
        return Engram.load(path, device)

    def implant(self, engram: Engram) -> None:
        """Put an engram into these sequences, in place: its only row into all, or row by row.

        Raises UserError for an engram of another model or another number of rows.
        """
        engram.check(Engram.layout_of([layer.tensors() for layer in self.layers]), self.batch_size)
        for layer, parts in zip(self.layers, engram.layers, strict=True):
            mine = layer.tensors()
            for name, value in parts.items():
                mine[name].copy_(value)


def _shapes(state: SynapseState) -> list:
    """What must agree for two states to be joined: everything but the batch size."""
    layers = [{name: (value.shape[1:], value.dtype) for name, value in layer.tensors().items()} for layer in state.layers]
    return [state.max_len, state.doc is None, state.noise_key is None, state.tick, *layers]


def _same_layout(a: SynapseState, b: SynapseState) -> bool:
    """Whether two states come from models of one shape and have one max_len."""
    return _shapes(a) == _shapes(b)


__all__ = ["Arrival", "Chunk", "ExpertState", "Extras", "FastState", "LayerState", "Place", "SynapseState"]
