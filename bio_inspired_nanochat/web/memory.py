"""Named memories: the fast weights that conversations leave behind, each under a name that its owner chose.

Whoever knows a name (and the server's key, where there is one) owns the memory, so the page draws long random ones. A memory
lives in the server's process; its owner can download and upload it.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import Engram

CONVERSATIONS = 16  # of one memory that can still be continued from where they began


@dataclass
class Memory:
    """One memory. turns: answers that it has seen; begun: what the conversations by their ids began with."""

    latest: Engram | None = None
    turns: int = 0
    over: bool = False  # forgotten or replaced: what answers that began with it leave behind is dropped
    begun: OrderedDict[str, Engram | None] = field(default_factory=OrderedDict)


class MemoryStore:
    """At most `most` memories. All methods may be called from any thread; one that was used least recently makes room."""

    def __init__(self, model: GPT, most: int) -> None:
        self._model, self._most = model, most
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._lock = threading.Lock()
        self.available = any(block.fast_layers() for block in model.blocks)  # pyrefly: ignore[not-callable]

    def begin(self, name: str, conversation: str | None) -> tuple[Engram | None, Memory]:
        """What a conversation starts with, and whose memory that is, for `keep`.

        For its first turn it is the memory as it is now, for later ones what it was then.
        """
        with self._lock:
            memory = self._touched(name)
            if conversation is None:
                return memory.latest, memory
            if conversation not in memory.begun:
                memory.begun[conversation] = memory.latest
                while len(memory.begun) > CONVERSATIONS:
                    memory.begun.popitem(last=False)
            return memory.begun[conversation], memory

    def keep(self, name: str, engram: Engram, begun: Memory) -> None:
        """Make `engram`, of one sequence, what the next conversation starts with. Of two answers at once the later one stays.

        Nothing is kept when the memory that the answer began with was forgotten or replaced meanwhile.
        """
        with self._lock:
            if begun.over:
                return
            memory = self._touched(name)
            memory.latest, memory.turns = engram, memory.turns + 1

    def _touched(self, name: str) -> Memory:
        memory = self._memories.setdefault(name, Memory())
        self._memories.move_to_end(name)
        while len(self._memories) > self._most:
            self._memories.popitem(last=False)
        return memory

    def _drop(self, name: str) -> None:
        memory = self._memories.pop(name, None)
        if memory is not None:
            memory.over = True

    def describe(self, name: str) -> dict:
        """turns: answers that the memory has seen; norm: Frobenius norm of its fast weights by layer and projection."""
        with self._lock:
            memory = self._memories.get(name)
        engram = None if memory is None else memory.latest
        norms = []
        for layer in engram.layers if engram else []:
            parts = {key.split(".")[1]: value for key, value in layer.items() if key.endswith(".weights")}
            norms.append({key: round(float(value.float().norm()), 5) for key, value in parts.items()})
        return {"memory": name, "available": self.available, "turns": memory.turns if memory else 0, "norm": norms}

    def forget(self, name: str) -> None:
        """Drop a memory; one that is not there is no error."""
        with self._lock:
            self._drop(name)

    def download(self, name: str) -> bytes:
        """The memory as the bytes of an engram file. Raises UserError when it is empty."""
        with self._lock:
            memory = self._memories.get(name)
        if memory is None or memory.latest is None:
            raise UserError(f"memory {name} is empty: have an answer made with it first")
        with tempfile.TemporaryDirectory() as folder:
            memory.latest.save(path := Path(folder) / "memory.safetensors")
            return path.read_bytes()

    def upload(self, name: str, content: bytes) -> None:
        """Replace a memory by an engram file. Raises UserError for a damaged file and for one of another model."""
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "memory.safetensors").write_bytes(content)
            try:
                engram = Engram.load(path, next(self._model.parameters()).device)
                self._model.init_state(1, 1, engram=engram)
            except UserError as error:
                raise UserError(str(error).replace(str(path), "that was sent")) from None
            except (KeyError, ValueError, IndexError, RuntimeError):
                raise UserError("the file is not a whole engram of this model: send one that this server gave") from None
        if not all(bool(torch.isfinite(value).all()) for layer in engram.layers for value in layer.values()):
            raise UserError("the engram holds values that are not finite: send one that this server gave")
        with self._lock:
            self._drop(name)
            self._touched(name).latest = engram
