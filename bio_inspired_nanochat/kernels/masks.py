"""Who may attend to whom: causal order, sliding window and documents, in one place for every operator."""

from __future__ import annotations

import torch
from torch import Tensor

QStart = int | Tensor


def query_positions(q_start: QStart, length: int, device: torch.device) -> Tensor:
    """Absolute positions of a chunk's queries: [1, Tq] for a common start, [B, Tq] for a start per row."""
    steps = torch.arange(length, device=device)
    if isinstance(q_start, int):
        return (q_start + steps)[None]
    return q_start.to(device)[:, None] + steps


def local_ticks(q_start: QStart, positions: Tensor, tick: int) -> Tensor:
    """Tick index of each query counted from its row's first touched tick, of the shape of `positions` (see `query_positions`)."""
    first = q_start // tick if isinstance(q_start, int) else (q_start.to(positions.device) // tick)[:, None]
    return positions // tick - first


def num_ticks(q_start: QStart, length: int, tick: int) -> int:
    """How many ticks a chunk of `length` queries touches; for a start per row the most that any start could touch."""
    if isinstance(q_start, int):
        return (q_start + length - 1) // tick - q_start // tick + 1
    return (length + tick - 2) // tick + 1


def allowed(positions: Tensor, keys: Tensor, *, window: int | None = None, doc: Tensor | None = None, diagonal: bool = True) -> Tensor:
    """Boolean mask [B or 1, 1, Tq, Tk]: query at `positions` [B or 1, Tq] may read the key at `keys` [Tk].

    t - j must be at least 0 (1 without `diagonal`) and, with a window W, less than W; with `doc` [B, T] (one id per
    position, at least as long as the largest position) query and key must lie in the same document.
    """
    distance = positions[:, :, None] - keys
    mask = distance >= (0 if diagonal else 1)
    if window is not None:
        mask &= distance < window
    if doc is not None:
        last = doc.shape[1] - 1
        rows = positions.clamp(max=last).expand(doc.shape[0], -1)
        mask = mask & (doc.gather(1, rows)[:, :, None] == doc[:, keys][:, None, :])
    return mask[:, None]
