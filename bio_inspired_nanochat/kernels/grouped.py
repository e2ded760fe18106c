"""Dropless top-k dispatch: every token visits its k experts, whatever the others do; shapes are static and the host waits for nothing.

    chosen         = top_k(scores, k)                            stable: ties go to the lower index
    groups         = group_by_expert(chosen, experts)            where each (token, choice) pair stands once sorted by expert
    y              = grouped_linear(x_sorted, weight, groups)    one matrix per group

Backends of `grouped_linear`: `reference` multiplies every row with every matrix and keeps one product (the definition); `grouped` is
PyTorch's grouped matrix product; `blocked` pads every group to whole blocks, gathers one matrix per block and is one batched product,
for any dtype and device. `auto` takes `grouped` where it can serve the call without a host wait, else `blocked`.

Dimensions: S tokens, k choices, M = S k pairs, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError

BACKENDS = ("auto", "reference", "grouped", "blocked")
ALIGNMENT = 16  # bytes to which PyTorch's grouped product needs the rows of its operands aligned
BLOCKS_PER_EXPERT = 4  # of an even load: a quarter of the rows may be padding, five copies of the weights are gathered


class Groups(NamedTuple):
    """Pairs sorted by expert. order [M]: pair at each sorted place; place [M]: its inverse; expert [M]: non-decreasing; counts [E]."""

    order: Tensor
    place: Tensor
    expert: Tensor
    counts: Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of scores [..., E], largest first; equal scores by index, on every device."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def group_by_expert(chosen: Tensor, experts: int) -> Groups:
    """Sort the pairs (token, choice) of chosen [S, k] by expert, stably."""
    flat = chosen.flatten()
    expert, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=flat.device))
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)  # bincount would wait for the host
    return Groups(order, place, expert, counts)


class _Permute(torch.autograd.Function):
    """x[index] for a permutation: its gradient is a gather as well, where PyTorch's own would scatter with atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def dispatch(x: Tensor, groups: Groups, k: int) -> Tensor:
    """x [S, I] to the input of each pair, sorted by expert, [M, I]."""
    repeated = x[:, None].expand(-1, k, -1).reshape(-1, x.shape[1])
    return _Permute.apply(repeated, groups.order, groups.place)


def combine(y: Tensor, groups: Groups, gates: Tensor) -> Tensor:
    """Outputs of the sorted pairs y [M, O], weighted with gates [S, k] and summed per token: [S, O]."""
    pairs = _Permute.apply(y, groups.place, groups.order).view(*gates.shape, y.shape[1])
    return (pairs * gates[..., None].to(y.dtype)).sum(1)


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups, backend: str = "auto") -> Tensor:
    """Row m of x [M, I] times the matrix of its expert: weight [E, O, I] to [M, O]. Differentiable in x and weight.

    Raises UserError for an unknown backend and for an explicit one that cannot serve the call.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not valid for grouped_linear: one of {', '.join(BACKENDS)}")
    obstacle = _grouped_obstacle(x, weight)
    if backend == "auto":
        backend = "blocked" if obstacle else "grouped"
    if backend == "grouped":
        if obstacle:
            raise UserError(f"backend='grouped' cannot serve this grouped_linear call: {obstacle}; use backend='blocked' or 'auto'")
        return F.grouped_mm(x, weight.mT, offs=groups.counts.cumsum(0).to(torch.int32))
    return _reference(x, weight, groups) if backend == "reference" else _blocked(x, weight, groups)


def _grouped_obstacle(x: Tensor, weight: Tensor) -> str | None:
    """Why PyTorch's grouped product cannot serve a call without waiting for the host, or None."""
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    served = {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}.get(x.device.type, ())
    if x.dtype not in served or weight.dtype != x.dtype:
        return f"it takes {' or '.join(str(dtype) for dtype in served) or 'nothing'} on {x.device.type}, not {x.dtype}"
    if any(size * x.element_size() % ALIGNMENT for size in weight.shape[1:]):
        return f"sizes {weight.shape[2]} and {weight.shape[1]} are not multiples of {ALIGNMENT} bytes"
    return None


def _reference(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    every = torch.einsum("mi,eoi->meo", x, weight)
    return every.gather(1, groups.expert[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]


def _blocked(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Groups padded to whole blocks of `size` rows; M / size + E blocks always hold them."""
    pairs, experts = x.shape[0], weight.shape[0]
    size = max(1, pairs // (BLOCKS_PER_EXPERT * experts))
    count = pairs // size + experts
    blocks = (groups.counts + size - 1) // size
    ends = blocks.cumsum(0)
    owner = torch.searchsorted(ends, torch.arange(count, device=x.device), right=True).clamp(max=experts - 1)
    starts = groups.counts.cumsum(0) - groups.counts
    shift = (ends - blocks) * size - starts  # from the sorted place of a pair to its padded row
    row = torch.arange(pairs, device=x.device) + shift[groups.expert]
    padded = x.new_zeros(count * size, x.shape[1]).index_copy(0, row, x)
    y = torch.bmm(padded.view(count, size, -1), weight.index_select(0, owner).mT)
    return y.flatten(0, 1).index_select(0, row)
