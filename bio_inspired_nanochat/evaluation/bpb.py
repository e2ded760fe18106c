"""Bits per byte: a loss that does not depend on the tokenizer.

    bpb = Σ nats over targets that are text / (ln 2 · Σ their UTF-8 bytes)

Special tokens stand for no bytes, so they enter neither sum; targets of -1 are ignored altogether.
B batch, T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bio_inspired_nanochat.errors import UserError


class Batches(Protocol):
    """What a loader must offer: [B,T] inputs and targets, StopIteration at the end."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next inputs and targets, [B, T] each, on the host; targets of -1 do not count. StopIteration when there are no more."""
        ...


@dataclass(frozen=True)
class Bpb:
    """One measurement. `nats_per_token` is over all targets that are not ignored, specials included, as the training loss is."""

    bpb: float
    nats_per_token: float
    tokens: int
    bytes: int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the previous mode comes back even when the evaluation fails."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Stopped(Exception):
    """An evaluation ended before its end, on every rank alike."""


def bits_per_byte(
    model: nn.Module,
    loader: Batches,
    batches: int,
    token_bytes: Sequence[int],
    max_rows: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Bpb:
    """Measure `model` on up to `batches` batches of `loader`, summed over all ranks.

    model: offers `token_losses(idx, targets) -> [B,T]` in nats. token_bytes: UTF-8 bytes of each token id, 0 for specials.
    max_rows: stop after this many rows of this rank, in the middle of a batch if need be, so that runs with different batch
    sizes see the same tokens. Every rank must call it: the sums are reduced together at the end.
    stop: asked before every batch, equally often on every rank even where one has less data, so it may be collective.
    Raises UserError when no rank saw a byte of text, Stopped when `stop` says so.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor(list(token_bytes), dtype=torch.int64, device=device)
    nats = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    rows_left = math.inf if max_rows is None else max_rows
    with evaluating(model):
        for _ in range(batches):
            if stop is not None and stop():
                raise Stopped
            if rows_left <= 0:
                continue
            try:
                idx, targets = loader.next_batch()
            except StopIteration:
                rows_left = 0
                continue
            if idx.shape[0] > rows_left:
                idx, targets = idx[: int(rows_left)], targets[: int(rows_left)]
            rows_left -= idx.shape[0]
            idx, targets = idx.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            _add_batch(model.token_losses(idx, targets), targets, lengths, nats, counts)  # pyrefly: ignore[not-callable]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(nats)
        dist.all_reduce(counts)
    text_nats, all_nats = nats.tolist()
    total_bytes, tokens = counts.tolist()
    if total_bytes == 0:
        raise UserError(f"bits per byte needs at least one byte of text, the validation data gave {tokens} targets without any: add text")
    return Bpb(text_nats / (math.log(2) * total_bytes), all_nats / tokens, tokens, total_bytes)


def _add_batch(losses: Tensor, targets: Tensor, lengths: Tensor, nats: Tensor, counts: Tensor) -> None:
    """Add one batch to the sums on the device: nats of (text, all valid) targets, counts of (bytes, valid targets)."""
    valid = targets >= 0
    target_bytes = torch.where(valid, lengths[targets.clamp_min(0)], 0)
    losses = torch.where(valid, losses, 0).to(nats.dtype)
    nats += torch.stack([torch.where(target_bytes > 0, losses, 0).sum(), losses.sum()])
    counts += torch.stack([target_bytes.sum(), valid.sum()])
