"""Tensors of several ranks: sums that do not depend on how messages travel, and parameters of which every rank keeps some rows.

A parameter that FSDP has cut is a `DTensor`, rows (dimension 0) divided among all ranks in order. Everything here takes whole tensors
just as well, and does nothing to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, of the shape of `values`, in the order of ranks: the same bits on every rank and in every run. Collective.

    Costs as many bytes as there are ranks times those of the values: meant for statistics, not for gradients.
    """
    if not several():
        return values
    parts = values.new_empty((dist.get_world_size(), *values.shape))
    dist.all_gather_into_tensor(parts.view(-1), values.contiguous().view(-1))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds only some rows of a tensor [rows, ...], as FSDP cuts it."""
    if not several():
        return False
    from torch.distributed.tensor import DTensor  # takes a second to import

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor [rows, ...] that this rank holds, sharing memory; possibly none."""
    return tensor.detach().to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor [rows, ...], on every rank. Collective where the tensor is cut; a tensor that is not comes back itself."""
    return tensor.detach().full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every rank holds whole, in the shape that `like` has: its rows of this rank where `like` is cut. No communication."""
    if not is_cut(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor in place with a whole value that every rank holds. No communication."""
    local(tensor).copy_(local(cut_like(value.to(tensor.device), tensor)))


def whole_tree(tree: Any) -> Any:
    """A tree of dictionaries and lists with every cut tensor made whole, as a copy in the CPU's memory on rank 0 and None elsewhere.

    Collective: every rank passes a tree of the same form. One tensor at a time is whole on the device.
    """
    if isinstance(tree, Mapping):
        return {name: whole_tree(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [whole_tree(value) for value in tree]
    if isinstance(tree, Tensor) and is_cut(tree):
        full = whole(tree)
        return full.cpu() if dist.get_rank() == 0 else None
    return tree
