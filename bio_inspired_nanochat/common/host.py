"""Reading many small tensors of a device: one copy and one wait for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def to_host(tree: Any) -> Any:
    """A tree of dictionaries, lists and tuples with every tensor copied into the CPU's memory, dtype and shape kept.

    All tensors, which must be on one device, travel as one: a device is waited for once, and not once per number. Anything else in
    the tree comes back as it is. The copies share one block of memory, and none with the originals.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for leaf in _leaves(tree):
        by_type.setdefault(leaf.dtype, []).append(leaf.detach().reshape(-1))
    order = sorted(by_type, key=lambda dtype: -dtype.itemsize)  # wide ones first, so that each type begins at a multiple of its size
    if not order:
        return tree
    together = torch.cat([torch.cat(by_type[dtype]).view(torch.uint8) for dtype in order]).cpu()
    sizes = {dtype: [leaf.numel() for leaf in by_type[dtype]] for dtype in order}
    parts = together.split([sum(sizes[dtype]) * dtype.itemsize for dtype in order])
    copies = {dtype: iter(part.view(dtype).split(sizes[dtype])) for dtype, part in zip(order, parts, strict=True)}
    return _rebuilt(tree, copies)


def _leaves(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return (tree,)
    held = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return chain.from_iterable(map(_leaves, held))


def _rebuilt(tree: Any, copies: Mapping[torch.dtype, Any]) -> Any:
    """The tree with the next copy of its type in the place of every tensor."""
    if isinstance(tree, Tensor):
        return next(copies[tree.dtype]).view(tree.shape)
    if isinstance(tree, Mapping):
        return {name: _rebuilt(value, copies) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        held = [_rebuilt(value, copies) for value in tree]
        return type(tree)(*held) if hasattr(tree, "_fields") else type(tree)(held)
    return tree
