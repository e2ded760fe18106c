"""Muon: momentum whose matrices are orthogonalised before every step.

Letters: E matrices of one batch, R rows (out), C columns (in).

`torch.optim.Muon` handles one 2-D matrix after the other, always in bfloat16. On a GPU that is bound by launches, it cannot
take stacked experts, and a CPU without bfloat16 instructions crawls; so matrices of one shape are batched here, in bfloat16
on CUDA and float32 elsewhere.

Matrices whose rows FSDP has divided among ranks: each whole matrix goes to one rank, which orthogonalises it for all, so the work is
divided too; what travels is one and the same number of bytes there and back, a W-th of the matrices per rank. Stacked experts are
divided by experts, so nothing has to travel. Replicated matrices (one process, or DDP) are orthogonalised by every rank: sharing that
work would cost a gather of all updates, which between cards without NVLink takes about as long as the work.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from bio_inspired_nanochat.common import is_cut, local

# Odd quintic polynomials a*x + b*x^3 + c*x^5, one per iteration, each the best one for the interval that the previous leaves:
# Polar Express (Amsel et al., 2025, arXiv 2505.16932), lower bound 1e-3 on the singular values, safety 2e-2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Singular values that start in [SMALLEST, 1] of the Frobenius norm end in BAND; smaller ones end between 0 and BAND's lower edge.
SMALLEST = 1e-3
BAND = (0.85, 1.15)

# A batch of matrices needs about four copies of itself as scratch memory: this many elements at a time bound it.
_BATCH_ELEMENTS = 1 << 26


def orthogonalize(matrices: Tensor) -> Tensor:
    """The semi-orthogonal matrices nearest to [..., R, C], approximately: singular vectors kept, singular values moved into `BAND`.

    Equation (H12).
    Computes in the dtype of its input and returns it. A zero matrix stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x * (1.0 / (norm * 1.01 + 1e-20)).to(x.dtype)  # the 1 % keeps rounded singular values inside of the polynomials' interval
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


def step_scale(shape: Iterable[int]) -> float:
    """sqrt(max(1, R/C)) of [..., R, C]: makes the change of a layer's output independent of its shape."""
    rows, columns = list(shape)[-2:]
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for parameters [R, C] and stacked experts [E, R, C] (each expert is a matrix of its own).

    Equation (H11).
    Step: W <- W - lr * step_scale * orthogonalize(nesterov momentum), after the decay W <- W - lr * weight_decay * W. With `cautious`
    an entry decays only where the step shrinks it too. Parameters without a gradient are left alone, momentum included, and so is
    an expert whose gradient is zero in every entry (no token reached it): normalising its old momentum would move it at full speed.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, cautious: bool = True) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "cautious": cautious})
        for group in self.param_groups:
            for param in group["params"]:
                assert param.ndim in (2, 3), f"Muon takes matrices and stacks of matrices, not shape {tuple(param.shape)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """One step from the gradients in `.grad`."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            for params in _batches(param for param in group["params"] if param.grad is not None):
                self._step_batch(params, group)

    def _step_batch(self, batch: list[Parameter], group: dict[str, Any]) -> None:
        """Step parameters of one shape, dtype and device together; of cut ones this rank's rows. Collective for cut matrices."""
        shape, dtype, cut = batch[0].shape, batch[0].dtype, is_cut(batch[0])
        lr, momentum = group["lr"], group["momentum"]
        grads = [local(param.grad) for param in batch if param.grad is not None]
        averages = [local(self._average(param)) for param in batch]
        params: list[Tensor] = [local(param) for param in batch]
        if cut and len(shape) == 3 and not len(params[0]):
            return  # fewer experts than ranks
        touched = _touched(grads) if len(shape) == 3 else None
        if touched is None:
            torch._foreach_lerp_(averages, grads, 1 - momentum)
        else:
            torch._foreach_lerp_(averages, grads, [(1 - momentum) * mask for mask in touched])
        updates = torch._foreach_lerp(grads, averages, momentum)
        stacked = torch.stack(updates)
        stacked = stacked.to(torch.bfloat16) if stacked.is_cuda else stacked.float()
        stacked = _orthogonalize_rows(stacked, shape[0]) if cut and len(shape) == 2 else orthogonalize(stacked)
        updates = list((stacked * step_scale(shape)).to(dtype).unbind(0))
        if touched is not None:
            torch._foreach_mul_(updates, touched)
        _decay(params, updates, touched, lr * group["weight_decay"], group["cautious"])
        torch._foreach_add_(params, updates, alpha=-lr)

    def _average(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return state["momentum"]


def _orthogonalize_rows(rows: Tensor, whole: int) -> Tensor:
    """`orthogonalize` for n matrices of `whole` rows of which every rank holds a piece: rows [n, own, C] to rows [n, own, C]. Collective.

    The rows are divided as `torch.chunk` does. Rank r receives its share of the n matrices whole, and sends back to each rank its rows.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    n, own, columns = rows.shape
    held = [len(piece) for piece in torch.empty(whole).chunk(world)]  # rows by rank
    held += [0] * (world - len(held))
    shares = [len(piece) for piece in torch.empty(n).tensor_split(world)]  # matrices by rank
    there = [share * own * columns for share in shares]
    back = [shares[rank] * size * columns for size in held]
    received = rows.new_empty(sum(back))
    dist.all_to_all_single(received, rows.flatten(), back, there)
    pieces = [piece.view(shares[rank], size, columns) for piece, size in zip(received.split(back), held, strict=True)]
    done = torch.cat(pieces, dim=1)
    done = orthogonalize(done) if len(done) else done
    result = torch.empty_like(rows)
    dist.all_to_all_single(result.view(-1), torch.cat([piece.flatten() for piece in done.split(held, dim=1)]), there, back)
    return result


def _batches(params: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Parameters grouped by shape, dtype and device, in pieces of bounded size."""
    alike: dict[tuple[Any, ...], list[Parameter]] = {}
    for param in params:
        alike.setdefault((param.shape, param.dtype, param.device, is_cut(param)), []).append(param)
    for group in alike.values():
        piece = max(1, _BATCH_ELEMENTS // max(1, group[0].numel()))
        for start in range(0, len(group), piece):
            yield group[start : start + piece]


def _touched(grads: list[Tensor]) -> list[Tensor]:
    """Per [E, R, C] gradient a mask [E, 1, 1] in its dtype: 1 where an expert has any non-zero entry (NaN counts as one)."""
    return [grad.ne(0).any(-1, keepdim=True).any(-2, keepdim=True).to(grad.dtype) for grad in grads]


def _decay(params: list[Tensor], updates: list[Tensor], touched: list[Tensor] | None, rate: float, cautious: bool) -> None:
    """W <- W - rate * W in place, where `touched` and, if `cautious`, where W and its update have the same sign."""
    if rate == 0.0:
        return
    if cautious:
        same_sign = torch._foreach_mul(updates, params)
        torch._foreach_sign_(same_sign)
        torch._foreach_clamp_min_(same_sign, 0.0)
        torch._foreach_mul_(same_sign, params)
        torch._foreach_add_(params, same_sign, alpha=-rate)
    elif touched is None:
        torch._foreach_mul_(params, 1 - rate)
    else:
        torch._foreach_mul_(params, [1 - rate * mask for mask in touched])
