"""The states between the chunks of the delta rule on CUDA: S[n+1] = S[n] A[n] + W[n] in one launch instead of one per chunk.

Rows of S are independent, so a program takes some rows of one sequence through all chunks.

Dimensions: B batch, N chunks, r modes; R the next power of two, M rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import FEWEST, launch


@triton.jit
def _affine(start_ptr, factor_ptr, addend_ptr, state_ptr, chunks, modes, M: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr):
    """BACK: from the last chunk to the first with transposed factors, and addend holds N + 1 values, of which the last is the start."""
    batch = tl.program_id(1).to(tl.int64)
    row, column, line = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R), tl.arange(0, R)
    own = row[:, None] * modes + column[None, :]
    live = (row < modes)[:, None] & (column < modes)[None, :]
    whole = line[:, None] * modes + column[None, :]
    inside = (line < modes)[:, None] & (column < modes)[None, :]
    size = modes * modes
    states, factors = state_ptr + batch * (chunks + 1) * size, factor_ptr + batch * chunks * size
    if BACK:
        addends = addend_ptr + batch * (chunks + 1) * size
        s = tl.load(addends + chunks * size + own, mask=live, other=0.0)
        tl.store(states + chunks * size + own, s, mask=live)
        for back in range(chunks):
            n = chunks - 1 - back
            a = tl.load(factors + n * size + whole, mask=inside, other=0.0)
            s = tl.dot(s, tl.trans(a), input_precision="ieee") + tl.load(addends + n * size + own, mask=live, other=0.0)
            tl.store(states + n * size + own, s, mask=live)
    else:
        addends = addend_ptr + batch * chunks * size
        s = tl.load(start_ptr + batch * size + own, mask=live, other=0.0)
        tl.store(states + own, s, mask=live)
        for n in range(chunks):
            a = tl.load(factors + n * size + whole, mask=inside, other=0.0)
            s = tl.dot(s, a, input_precision="ieee") + tl.load(addends + n * size + own, mask=live, other=0.0)
            tl.store(states + (n + 1) * size + own, s, mask=live)


def affine_scan(start: Tensor, factor: Tensor, addend: Tensor, back: bool) -> Tensor:
    """S[0..N] [B, N + 1, r, r], see `affine_states`; back: G[0..N], see `affine_adjoint`, with N + 1 addends, the last of them G[N]."""
    batch, chunks, modes, _ = factor.shape
    start, factor, addend = start.contiguous(), factor.contiguous(), addend.contiguous()
    states = torch.empty(batch, chunks + 1, modes, modes, device=factor.device)
    width = max(FEWEST, triton.next_power_of_2(modes))
    launch(
        _affine, (triton.cdiv(modes, FEWEST), batch), start, factor, addend, states, chunks, modes, M=FEWEST, R=width, BACK=back, num_warps=4
    )  # fmt: skip
    return states


@torch.library.custom_op("bio_inspired_nanochat::affine_states", mutates_args=())
def affine_states(start: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """S[0..N] [B, N + 1, r, r] float32 from S[0] = start [B, r, r], factor and addend [B, N, r, r]; differentiable."""
    return affine_scan(start, factor, addend, False)


@affine_states.register_fake
def _(start: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    return factor.new_empty(factor.shape[0], factor.shape[1] + 1, *factor.shape[2:])


@torch.library.custom_op("bio_inspired_nanochat::affine_adjoint", mutates_args=())
def affine_adjoint(factor: Tensor, grad: Tensor) -> Tensor:
    """G[n] = grad[n] + G[n + 1] A[n]^T from the end, [B, N + 1, r, r]."""
    return affine_scan(grad, factor, grad, True)


@affine_adjoint.register_fake
def _(factor: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factor, states = ctx.saved_tensors
    total = affine_adjoint(factor, grad)
    return total[:, 0], states[:, :-1].transpose(-1, -2) @ total[:, 1:], total[:, 1:]


affine_states.register_autograd(_backward, setup_context=_setup)
