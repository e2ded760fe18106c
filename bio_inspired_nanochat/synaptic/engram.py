"""Engrams: the fast weights that a session leaves behind, to be put into another one.

Dimensions: B batch, r modes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, device

from bio_inspired_nanochat.errors import UserError, damaged_file

FORMAT = "bio_inspired_nanochat.engram"
PARTS = ("weights", "camkii", "pp1", "bdnf")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Engram:
    """Per layer of the model the tensors `fast.<projection>.<part>`: weights [B, r, r], camkii, pp1 and bdnf [B].

    layout: the fingerprint of the model that they belong to: heads and head size of its keys, modes of each projection.
    """

    layout: str
    layers: list[dict[str, Tensor]]

    @classmethod
    def of(cls, layers: Sequence[Tensors]) -> Engram:
        """A copy out of the tensors of each layer's state, by the names of `LayerState.tensors`. UserError where no layer has fast weights."""
        parts = [
            {n: t.clone() for n, t in tensors.items() if n.startswith("fast.") and n.rpartition(".")[2] in PARTS} for tensors in layers
        ]
        if not any(parts):
            raise UserError("this model has no fast weights, so it leaves no engram: train one with --syn_cfg.hebb=delta")
        return cls(cls.layout_of(layers), parts)

    @staticmethod
    def layout_of(layers: Sequence[Tensors]) -> str:
        """The fingerprint of a model from the tensors of each layer's state: heads, head sizes and modes, as JSON that errors can compare."""
        weights = [{n.split(".")[1]: t.shape[1] for n, t in tensors.items() if n.endswith(".weights")} for tensors in layers]
        keys = [(tensors["k"].shape[1], tensors["k"].shape[3]) for tensors in layers]
        return json.dumps({"keys": keys, "modes": weights}, sort_keys=True)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return next(len(value) for tensors in self.layers for value in tensors.values())

    def check(self, layout: str, batch: int) -> None:
        """Raise UserError unless the engram fits `batch` sequences of a model with this layout."""
        if layout != self.layout:
            raise UserError(f"this engram belongs to another model: {_difference(self.layout, layout)}; use the model that wrote it")
        if self.batch_size not in (1, batch):
            raise UserError(f"an engram of {self.batch_size} sequences does not fit {batch}: it must have 1 or {batch}")

    def select(self, row: int) -> Engram:
        """The engram of one sequence. Raises UserError when there is no such row."""
        if not 0 <= row < self.batch_size:
            raise UserError(f"row {row} is out of bounds [0, {self.batch_size - 1}] of this engram")
        return Engram(self.layout, [{name: value[row : row + 1].clone() for name, value in tensors.items()} for tensors in self.layers])

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file. Raises UserError where that cannot be done."""
        tensors = {f"layers.{i}.{name}": value for i, parts in enumerate(self.layers) for name, value in parts.items()}
        write_tensors(path, tensors, {"format": FORMAT, "layout": self.layout})

    @classmethod
    def load(cls, path: str | Path, device: device | str = "cpu") -> Engram:
        """Read one. Raises UserError for a missing, damaged or foreign file."""
        meta, tensors = read_tensors(path, FORMAT, "an engram", "make one with state.save_engram")
        with damaged_file(path, "make another with state.save_engram"):
            layers: list[dict[str, Tensor]] = [{} for _ in json.loads(meta["layout"])["modes"]]
            for name, value in tensors.items():
                _, index, rest = name.split(".", 2)
                layers[int(index)][rest] = value.to(device)
            found = cls(meta["layout"], layers)
            modes = [check_shapes(parts, found.batch_size) for parts in layers]
            whole = [{f"fast.{key}.{part}" for key in keys for part in PARTS} for keys in modes]
            if modes != json.loads(found.layout)["modes"] or whole != [set(parts) for parts in layers]:
                raise ValueError("its tensors are not those of its layout")
            return found


def write_tensors(path: str | Path, tensors: Tensors, meta: dict[str, str]) -> None:
    """Write tensors of any device to one safetensors file. Raises UserError where that cannot be done."""
    try:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, str(path), metadata=meta)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}): name a file in a writable folder") from None


def read_tensors(path: str | Path, form: str, what: str, fix: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file whose metadata name `form`. Raises UserError for a missing or foreign file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            # copies: what the library hands out is mapped, and would change, or end the process, with the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as {what} ({error}): {fix}") from None
    if meta.get("format") != form:
        raise UserError(f"{path} is not {what}: {fix}")
    return meta, tensors


def check_shapes(layer: Tensors, batch: int) -> dict[str, int]:
    """Modes by projection of the fast weights among a layer's tensors. Raises ValueError unless they are square, and all of `batch` rows."""
    fast = {name: value for name, value in layer.items() if name.startswith("fast.")}
    modes = {name.split(".")[1]: value.shape[-1] for name, value in fast.items() if name.endswith(".weights")}
    for name, value in fast.items():
        side = modes[name.split(".")[1]]
        if value.shape != ((batch, side, side) if name.endswith(".weights") else (batch,)):
            raise ValueError(f"{name} is {list(value.shape)} beside fast weights of {batch} sequences and {side} modes")
    return modes


def _difference(mine: str, theirs: str) -> str:
    """Where two layouts differ, in words."""
    a, b = json.loads(mine), json.loads(theirs)
    if len(a["modes"]) != len(b["modes"]):
        return f"it has {len(a['modes'])} layers, this model {len(b['modes'])}"
    for index, (one, other) in enumerate(zip(a["modes"], b["modes"], strict=True)):
        if one != other:
            return f"in layer {index} it has fast weights {_modes(one)}, this model {_modes(other)}"
    return "its heads have another number or size"


def _modes(layer: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {modes} modes" for name, modes in layer.items()) or "nowhere"
