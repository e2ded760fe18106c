"""The operators that `bench_kernels` times: for each execution a forward and what its backward differentiates.

Dimensions: B batch, H query heads, T tokens, N ticks, D head size, c tick length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.benchmarks.timing import Competitor, Mark
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import PresynParams, fused_attention, num_ticks, presyn, running_sum, tick_biased_attention, tick_drive
from bio_inspired_nanochat.synaptic import Presynaptic
from bio_inspired_nanochat.synaptic.glue import QK_SCALE, rms_norm
from bio_inspired_nanochat.synaptic.presynaptic import GATE_BIAS

MOST_HEADS = 16
REFERENCE_TICKS = 256
_REFERENCE_PLANES = 40  # [N, T] tensors per pair that the reference's loop over ticks keeps for its backward
_REFERENCE_SQUARES = 10  # [T, T] tensors per pair that its drive and attention keep
_CPU_ROOM = 1 << 30
BACKENDS = ("flash", "cudnn", "flex", "fused", "triton", "sdpa", "reference")
# Every row of the table: the operator and its execution. Where time runs short, the last ones are left out.
ROWS = (
    ("attention", "flash"),
    ("attention", "cudnn"),
    ("layer", "fused"),
    ("layer", "triton"),
    ("layer", "sdpa"),
    ("biased attention", "triton"),
    ("biased attention", "sdpa"),
    ("drive", "triton"),
    ("drive", "sdpa"),
    ("presyn", "triton"),
    ("presyn", "sdpa"),
    ("biased attention", "flex"),
    ("biased attention", "reference"),
    ("layer", "reference"),
)


# The tiles that it chooses itself do not fit into a GPU's shared memory beside the bias and its gradient.
_FLEX_TILES = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 1,
}


class Cell(NamedTuple):
    """One size: D, T, c, and the number of (row, head) pairs."""

    head_dim: int
    tokens: int
    tick: int
    pairs: int

    def __str__(self) -> str:
        return f"D={self.head_dim} T={self.tokens} c={self.tick}"


class Operator(NamedTuple):
    """A forward without arguments, the tensors that its backward reaches, and the gradient of its result."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    grad: Tensor

    def competitor(self) -> Competitor:
        """Forward, mark, backward."""

        def run(mark: Mark) -> None:
            y = self.forward()
            mark()
            torch.autograd.grad(y, self.leaves, self.grad, allow_unused=True)

        return Competitor(run)


@dataclass
class Inputs:
    """What all operators of a cell share. q, k, v, grad: [B, H, T, D]; plane: [B, H, N, T] float32 >= 0, drive or bias; gate: what
    the barrier takes, its costs [B, H, T] and its strength [H], or nothing.
    """

    cell: Cell
    cfg: SynapticConfig
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    theta: Tensor
    params: PresynParams
    plane: Tensor
    gate: dict[str, Any]
    module: Presynaptic

    @classmethod
    def make(cls, cell: Cell, cfg: SynapticConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        """Random operands with QK norm, and terminals as they are at birth."""
        generator = torch.Generator(device).manual_seed(seed)
        heads = math.gcd(cell.pairs, MOST_HEADS)
        shape = (cell.pairs // heads, heads, cell.tokens, cell.head_dim)
        q, k, v, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
        q, k = (rms_norm(side) * QK_SCALE for side in (q, k))
        q, k, v = (side.to(dtype).requires_grad_() for side in (q, k, v))
        cfg = dataclasses.replace(cfg, tick=cell.tick)
        module = Presynaptic(GPTConfig(n_head=heads, n_kv_head=heads, n_embd=heads * cell.head_dim, synapses=True, syn_cfg=cfg))
        module.init_weights()
        module.to(device)
        theta = module.theta_value().detach().requires_grad_()
        made: list[Any] = [value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value for value in module.params()]
        params = PresynParams(*made)
        plane = torch.rand((*shape[:2], num_ticks(0, cell.tokens, cell.tick), cell.tokens), generator=generator, device=device)
        gate = {}
        if cfg.barrier != "none":  # a gate at birth lets 98 % pass, more or less
            cost = F.softplus(torch.randn(shape[:3], generator=generator, device=device) - GATE_BIAS)
            gate = {"cost": cost.requires_grad_(), "strength": module.strength().detach().requires_grad_()}
        return cls(cell, cfg, q, k, v, grad.to(dtype), theta, params, plane.requires_grad_(), gate, module)

    @property
    def scale(self) -> float:
        """Factor of the logit."""
        return self.cell.head_dim**-0.5

    @property
    def kinetics(self) -> list[Tensor]:
        """The terminals' constants that a backward reaches, [H] each."""
        return [value for value in self.params if isinstance(value, Tensor)]

    def drive(self, backend: str) -> Tensor:
        """U of q and k, [B, H, N, T]."""
        return tick_drive(self.q, self.k, self.theta, self.cell.tick, self.scale, kind=self.cfg.drive, backend=backend)

    def biased(self, beta: Tensor, backend: str) -> Tensor:
        """Attention [B, H, T, D] with a bias beta [B, H, N, T] per tick."""
        return tick_biased_attention(self.q, self.k, self.v, beta, self.cell.tick, self.scale, backend=backend)

    def bias(self, drive: Tensor, backend: str, causal: bool = False) -> Tensor:
        """beta [B, H, N, T] of a mean drive per token [B, H, N, T]; causal: no key has a drive before its own tick."""
        return presyn(drive, self.params, closed=self.cell.tokens // self.cell.tick, causal=causal, backend=backend)[0]

    def layer(self, backend: str) -> Tensor:
        """All three, as a synaptic layer runs them: [B, H, T, D]."""
        if backend == "fused":
            largest = QK_SCALE**2 * self.cell.head_dim * self.scale  # of a logit, which QK norm gives
            return fused_attention(self.q, self.k, self.v, self.theta, self.params, self.scale, largest, **self.gate, kind=self.cfg.drive)
        beta = self.bias(self.drive(backend) / self.cell.tick, backend, causal=True)
        if self.gate:
            first = torch.arange(0, self.cell.tokens, self.cell.tick, device=beta.device)[None]
            total = running_sum(self.gate["cost"]) if self.cfg.barrier == "gated" else None
            beta = beta + self.module.barrier_bias(total, first, self.cell.tokens)
        return self.biased(beta, backend)


def operator(name: str, backend: str, inputs: Inputs) -> Operator:
    """The row (name, backend) for these inputs. Raises UserError when it cannot run here, with the reason."""
    if backend == "reference":
        _check_reference(inputs)
    qkv = (inputs.q, inputs.k, inputs.v)
    plane_grad = inputs.plane.detach()
    if name == "attention":
        return Operator(_plain(inputs, backend), qkv, inputs.grad)
    if name == "biased attention":
        forward = _flex(inputs) if backend == "flex" else lambda: inputs.biased(inputs.plane, backend)
        return Operator(forward, (*qkv, inputs.plane), inputs.grad)
    if name == "drive":
        return Operator(lambda: inputs.drive(backend), (inputs.q, inputs.k, inputs.theta), plane_grad)
    if name == "presyn":
        return Operator(lambda: inputs.bias(inputs.plane, backend), (inputs.plane, *inputs.kinetics), plane_grad)
    assert name == "layer", name
    return Operator(lambda: inputs.layer(backend), (*qkv, inputs.theta, *inputs.kinetics, *inputs.gate.values()), inputs.grad)


def _plain(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
    """Attention without bias by one of PyTorch's own kernels and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend == "cudnn" and not inputs.q.is_cuda:
        raise UserError(f"cuDNN runs on CUDA only, not on {inputs.q.device.type}")
    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def only() -> AbstractContextManager:
        return sdpa_kernel(kernel)

    def forward() -> Tensor:
        with only():
            return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True, scale=inputs.scale)

    return forward


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    """FlexAttention with the same bias, compiled for this size alone."""
    if not inputs.q.is_cuda:
        raise UserError(f"FlexAttention has no backward on {inputs.q.device.type}")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled, with every logit in memory
    compiled = torch.compile(flex_attention, dynamic=False)
    tick, tokens, plane = inputs.cell.tick, inputs.cell.tokens, inputs.plane

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + plane[batch, head, query // tick, key]

    mask = create_block_mask(causal, None, None, tokens, tokens, device=inputs.q.device)
    options: dict[str, Any] = {"score_mod": biased, "block_mask": mask, "scale": inputs.scale, "kernel_options": _FLEX_TILES}
    return lambda: compiled(inputs.q, inputs.k, inputs.v, **options)


def _check_reference(inputs: Inputs) -> None:
    """UserError for sizes that the definition would take too long for or would not fit."""
    cell, plane = inputs.cell, inputs.plane
    if plane.shape[2] > REFERENCE_TICKS:
        raise UserError(f"{plane.shape[2]} ticks one after another take too long (at most {REFERENCE_TICKS})")
    need = plane.nbytes * _REFERENCE_PLANES + 4 * cell.pairs * cell.tokens**2 * _REFERENCE_SQUARES
    room = torch.cuda.mem_get_info(plane.device)[0] if plane.is_cuda else _CPU_ROOM
    if need > room:
        raise UserError(f"it needs about {need / 2**30:.1f} GiB of {room / 2**30:.1f} GiB")
