"""Several processes that train one model: start, end, and steps that rank 0 takes first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bio_inspired_nanochat.common import Rank, this_rank
from bio_inspired_nanochat.errors import UserError

T = TypeVar("T")

# Rank 0 may prepare data, train a tokenizer or draw samples while the others wait at a collective.
_PATIENCE = timedelta(hours=2)
# What the libraries underneath say when a process that they talk to is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Socket Timeout")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Rank]:
    """The process group of a torchrun launch (gloo for CPU tensors, NCCL for CUDA tensors); nothing for a single process.

    Raises UserError where another process of the run has gone.
    """
    rank = this_rank()
    if rank.world == 1 or dist.is_initialized():
        yield rank
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield rank
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise UserError(
            "another process of this run has ended: what it said stands above, unless it was killed; the same command with --resume=auto "
            "goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks in order, on every rank."""
    if not _several():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def on_rank0(action: Callable[[], T], *, then_all: bool = False) -> T | None:
    """Run `action` on rank 0 while the others wait; with `then_all` the others run it after that.

    Returns the action's value where it ran, None elsewhere. A UserError on rank 0 is raised there and ends the other ranks
    silently, so that none of them waits for ever and the message is printed once.
    """
    if not _several():
        return action()
    value, failed = None, None
    if dist.get_rank() == 0:
        try:
            value = action()
        except UserError as error:
            failed = error
    trouble = broadcast(failed is not None)
    if failed is not None:
        raise failed
    if trouble:
        raise SystemExit(2)
    return action() if then_all and dist.get_rank() != 0 else value


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
