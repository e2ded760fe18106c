"""The fused execution of a whole synaptic attention layer as one differentiable operator (kernels in `presyn_fused`).

Dimensions: B batch, H query heads, Hkv key heads, T tokens, N ticks, D head size.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from bio_inspired_nanochat.kernels.drive_triton import KINDS
from bio_inspired_nanochat.kernels.presyn_fused import LARGEST_LOGIT, Spec, kernels_for
from bio_inspired_nanochat.kernels.tiles import Tile, precision, tile_for
from bio_inspired_nanochat.kernels.types import PresynParams

LONGEST_TICK = 16  # of a tile of 64 queries a thread holds 16 consecutive times


def obstacle(p: PresynParams, largest: float | None) -> str | None:
    """Why the kernels cannot serve these terminals, or None. largest: bound on |logit|, see `attention`."""
    if not p.core:
        return "an optional part of the terminal is on"
    if p.tick > LONGEST_TICK or p.tick & (p.tick - 1):
        return f"a tick of {p.tick} tokens is not a power of two up to {LONGEST_TICK}"
    if p.beta_max <= 0 or largest is None or p.beta_max + largest > LARGEST_LOGIT:
        return f"without a running maximum |logit| and bias need a bound of at most {LARGEST_LOGIT:g} together"
    return None


def _spec(p: PresynParams) -> tuple[Spec, Tensor]:
    named = {name: value for name, value in zip(p._fields, p, strict=True) if isinstance(value, Tensor)}
    return Spec(p.tick, p.beta_max, p.epsilon, tuple(named)), torch.stack(list(named.values()))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    p: PresynParams,
    scale: float,
    largest: float,
    *,
    barrier: Tensor | None = None,
    strength: Tensor | None = None,
    kind: str = "phi",
) -> Tensor:
    """Attention of whole sequences whose terminals start at rest: drive, presyn and biased attention in one.

    q [B, H, T, D]; k, v [B, Hkv, T, D]; theta [H]; barrier: [B, H, T] float64 running sum of the gate's costs, which must not
    fall, with its strength [H] >= 0; largest: bound on |q . k * scale|. Returns y [B, H, T, D]. Differentiable.
    """
    spec, constants = _spec(p)
    if not torch.compiler.is_compiling():
        kernels_for(spec.text)  # here and not in the operator, below which autograd is excluded
    limit = (largest + p.beta_max) / math.log(2)
    return fused_op(q, k, v, theta, constants, barrier, strength, spec.text, scale, limit, kind)[0]


def _static(spec: Spec, q: Tensor, tile: Tile, kind: str) -> dict:
    return {
        "C": spec.tick, "D": q.shape[3], "M": tile.queries, "K": tile.keys, "KIND": KINDS[kind], "PRECISION": precision(q),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


@torch.library.custom_op("bio_inspired_nanochat::fused_attention", mutates_args=())
def fused_op(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, constants: Tensor, barrier: Tensor | None, strength: Tensor | None,
    text: str, scale: float, limit: float, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, log2-sum-exp2 [B, H, T] and the terminals' states at the start of every tile [tiles, 2, B, H, T]."""
    spec, kernels = Spec.parse(text), kernels_for(text)
    q, k, v, constants, theta = q.contiguous(), k.contiguous(), v.contiguous(), constants.contiguous(), theta.contiguous()
    batch, heads, tokens, dim = q.shape
    tile = tile_for("fused", dim, q.element_size(), spec.tick)
    y, lse = torch.empty_like(q), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    check = q.new_empty(triton.cdiv(tokens, tile.queries), 2, batch, heads, tokens, dtype=torch.float32)
    sizes = (scale, tokens, heads, heads // k.shape[1], batch * heads * tokens)
    static = _static(spec, q, tile, kind)
    kernels.states[(triton.cdiv(tokens, tile.keys), batch * heads)](q, k, theta, constants, check, *sizes, **static)
    gate = (q, q) if barrier is None else (barrier.contiguous(), strength.contiguous())
    kernels.attend[(triton.cdiv(tokens, tile.queries), batch * heads)](
        q, k, v, theta, constants, check, *gate, y, lse, limit, *sizes, BARRIER=barrier is not None, **static
    )
    return y, lse, check


@fused_op.register_fake
def _(q, k, v, theta, constants, barrier, strength, text, scale, limit, kind):
    batch, heads, tokens, dim = q.shape
    rows = triton.cdiv(tokens, tile_for("fused", dim, q.element_size(), Spec.parse(text).tick).queries)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, lse.new_empty(rows, 2, batch, heads, tokens)


@torch.library.custom_op("bio_inspired_nanochat::fused_attention_adjoint", mutates_args=())
def fused_adjoint(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, constants: Tensor, barrier: Tensor | None, strength: Tensor | None,
    y: Tensor, lse: Tensor, check: Tensor, text: str, scale: float, kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, theta, constants, barrier and strength (the last two empty without a barrier)."""
    spec, kernels = Spec.parse(text), kernels_for(text)
    q, k, v, constants, theta, grad = (x.contiguous() for x in (q, k, v, constants, theta, grad))
    batch, heads, tokens, dim = q.shape
    group, has_barrier = heads // k.shape[1], barrier is not None
    tile = tile_for("fused_backward", dim, q.element_size(), spec.tick)
    # the forward's states are stored per tile of queries, so both directions share that size
    assert tile.queries == tile_for("fused", dim, q.element_size(), spec.tick).queries
    grid = (triton.cdiv(tokens, tile.keys), batch * heads)
    ticks = triton.cdiv(tokens, spec.tick)
    delta = (grad.float() * y.float()).sum(-1)
    float32 = {"dtype": torch.float32, "device": q.device}
    beta, gu = torch.empty(2, batch, heads, ticks, tokens, **float32)
    wide = q.dtype if group == 1 else torch.float32
    gk, gv = (torch.empty(batch, heads, tokens, dim, device=q.device, dtype=wide) for _ in range(2))
    gtheta, gstrength = torch.empty(2, batch, heads, grid[0], **float32)
    gbarrier = torch.empty(batch, heads, tokens if has_barrier else 0, **float32)
    partial = torch.empty(kernels.derived, batch * heads, grid[0], **float32)
    gq, gconstants = torch.empty_like(q), torch.empty_like(constants)
    gate = (barrier.contiguous(), strength.contiguous()) if has_barrier else (q, q)
    sizes = (ticks, scale, tokens, heads, group, batch * heads * tokens)
    static = {**_static(spec, q, tile, kind), "BARRIER": has_barrier}
    kernels.keys[grid](
        q, k, v, theta, constants, check, *gate, grad, lse, delta, gk, gv, beta, gu, gtheta, gbarrier, gstrength, partial, *sizes, **static
    )
    kernels.queries[(triton.cdiv(tokens, tile.queries), batch * heads)](
        q, k, v, theta, *gate, grad, lse, delta, beta, gu, gq, *sizes, **static
    )
    kernels.finish[(heads,)](constants, partial, gconstants, batch, heads, grid[0], BLOCK=128)
    if group > 1:
        gk, gv = (g.view(batch, k.shape[1], group, tokens, dim).sum(2).to(k.dtype) for g in (gk, gv))
    of_strength = gstrength.sum((0, 2)) if has_barrier else gstrength.new_empty(0)
    return gq, gk, gv, gtheta.sum((0, 2)), gconstants, gbarrier.to(torch.float64), of_strength


@fused_adjoint.register_fake
def _(grad, q, k, v, theta, constants, barrier, strength, y, lse, check, text, scale, kind):
    same = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, theta, constants)]
    gbarrier = q.new_empty(*q.shape[:2], 0 if barrier is None else q.shape[2], dtype=torch.float64)
    return *same, gbarrier, theta.new_empty(0 if barrier is None else len(theta))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.text, ctx.scale, _, ctx.kind = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, *_):
    q, k, v, theta, constants, barrier, strength, y, lse, check = ctx.saved_tensors
    *grads, gbarrier, gstrength = fused_adjoint(
        grad, q, k, v, theta, constants, barrier, strength, y, lse, check, ctx.text, ctx.scale, ctx.kind
    )
    gate = (None, None) if barrier is None else (gbarrier, gstrength)
    return *grads, *gate, None, None, None, None


fused_op.register_autograd(_backward, setup_context=_setup)
