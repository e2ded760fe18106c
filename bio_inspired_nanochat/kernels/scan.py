"""Sequential sums over ticks and tokens as custom operators: opaque to torch.compile, so a compiled model has no graph break.

Dimensions: B batch, H query heads, N ticks, Tk keys, T tokens.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """Whether the Triton execution takes this tensor: CUDA, or anything under Triton's interpreter (float32 only).

    Kernels are opaque to `torch.func.vmap`, so what is batched by it takes PyTorch's own operators.
    """
    return HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and not torch._C._functorch.is_batchedtensor(x)


def _needs_operator() -> bool:
    """Whether a call must be visible to autograd or the compiler; decoding is neither and starts faster without an operator."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def for_inference(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton kernels that have no gradient may take x and the others: nothing is differentiated or compiled, Triton runs on
    x's device, and all are of one dtype, so that none is promoted.
    """
    return not _needs_operator() and on_triton(x) and all(other.dtype == x.dtype for other in others)


def linear_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """x[n+1] = a[n] x[n] + b[n] over dimension 2. Differentiable. Equation (H5).

    a: [B, H, N, Tk] or [B, H, N, 1]; b: [B, H, N, Tk]; start: x[0] [B, H, Tk]. Returns x[0..N], [B, H, N+1, Tk].
    """
    return linear_scan_op(a, b, start) if _needs_operator() else _linear_scan(a, b, start)


def running_sum(x: Tensor) -> Tensor:
    """Inclusive sum over the last dimension of x [..., n] in float64, so that differences of distant sums stay exact (float32 on MPS)."""
    return running_sum_op(x) if _needs_operator() else _running_sum(x)


def _linear_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    batch, heads, ticks, keys = b.shape
    x = b.new_empty(batch, heads, ticks + 1, keys)
    x[:, :, 0] = start
    for n in range(ticks):
        torch.addcmul(b[:, :, n], a[:, :, n], x[:, :, n], out=x[:, :, n + 1])
    return x


linear_scan_op = torch.library.custom_op("bio_inspired_nanochat::linear_scan", _linear_scan, mutates_args=())


@linear_scan_op.register_fake
def _(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    batch, heads, ticks, keys = b.shape
    return b.new_empty(batch, heads, ticks + 1, keys)


@torch.library.custom_op("bio_inspired_nanochat::linear_scan_adjoint", mutates_args=())
def linear_scan_adjoint(a: Tensor, grad: Tensor) -> Tensor:
    """Adjoint of the scan's states, [B, H, N+1, Tk]: g[n] = grad[n] + a[n] g[n+1]. Equation (H6)."""
    adjoint = grad.clone(memory_format=torch.contiguous_format)
    for n in range(a.shape[2] - 1, -1, -1):
        adjoint[:, :, n].addcmul_(a[:, :, n], adjoint[:, :, n + 1])
    return adjoint


@linear_scan_adjoint.register_fake
def _(a: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _linear_scan_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output)


def _linear_scan_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, x = ctx.saved_tensors
    adjoint = linear_scan_adjoint(a, grad)
    grad_b = adjoint[:, :, 1:]
    return (grad_b * x[:, :, :-1]).sum_to_size(a.shape), grad_b, adjoint[:, :, 0]


linear_scan_op.register_autograd(_linear_scan_backward, setup_context=_linear_scan_setup)


def _running_sum(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64).contiguous().cumsum(-1)


running_sum_op = torch.library.custom_op("bio_inspired_nanochat::running_sum", _running_sum, mutates_args=())


@running_sum_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


@torch.library.custom_op("bio_inspired_nanochat::running_sum_adjoint", mutates_args=())
def running_sum_adjoint(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [..., T] summed from the end over T: the adjoint of `running_sum`. Returned in `dtype`, that of the sum's input."""
    return grad.contiguous().flip(-1).cumsum(-1).flip(-1).to(dtype)


@running_sum_adjoint.register_fake
def _(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _running_sum_setup(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype


def _running_sum_backward(ctx, grad: Tensor) -> Tensor:
    return running_sum_adjoint(grad, ctx.dtype)


running_sum_op.register_autograd(_running_sum_backward, setup_context=_running_sum_setup)
