"""The three attention operators of a synaptic layer and their executions.

    U           = tick_drive(q, k, theta, tick, scale, ...)             drive that each key collects per tick
    beta, state = presyn(U / tick, params, state, ...)                  biochemistry of every terminal over the ticks
    y           = tick_biased_attention(q, k, v, beta, tick, scale, ...)  attention whose logits carry the terminals' bias

and `fused_attention`, all three in one for whole sequences.

Backends: `reference` is the definition, `sdpa` the portable fast execution, `triton` the kernels for CUDA (with
TRITON_INTERPRET=1 also for the CPU), `rust` the CPU kernels without gradients; `auto` takes the fastest that can serve the call. An explicit backend that cannot serve
a call is a UserError, never a silent replacement.

Dimensions: B batch, H query heads, Hkv key heads, T tokens (Tq queries, Tk keys), N ticks, D head size, c tick length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import portable, reference, rust, scan
from bio_inspired_nanochat.kernels.masks import QStart, num_ticks
from bio_inspired_nanochat.kernels.noise import ReleaseNoise, ReleaseSampler
from bio_inspired_nanochat.kernels.reference import phi, presyn_bias, presyn_step, released
from bio_inspired_nanochat.kernels.scan import running_sum
from bio_inspired_nanochat.kernels.terminal import SHORTAGES, shortage
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

BACKENDS = ("auto", "reference", "sdpa", "triton", "rust")

__all__ = [
    "BACKENDS",
    "SHORTAGES",
    "PresynParams",
    "PresynState",
    "ReleaseNoise",
    "ReleaseSampler",
    "cannot_fuse",
    "fused_attention",
    "fused_obstacle",
    "fused_opening",
    "num_ticks",
    "phi",
    "presyn",
    "presyn_bias",
    "presyn_step",
    "released",
    "running_sum",
    "shortage",
    "tick_biased_attention",
    "tick_drive",
    "triton_obstacle",
]


def _choose(operator: str, backend: str, obstacles: dict[str, Callable[[], str | None]]) -> str:
    """Resolve `backend` for one call; `obstacles` says, preferred backend first, why it cannot serve the call (None: it can)."""
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not valid for {operator}: one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return next((name for name, obstacle in obstacles.items() if obstacle() is None), "reference")
    if backend in obstacles and (reason := obstacles[backend]()):
        raise UserError(f"backend={backend!r} cannot serve this {operator} call: {reason}; use backend='reference' or 'auto'")
    return backend


def _off_triton(x: Tensor) -> str | None:
    """Why Triton cannot take a tensor at all, or None."""
    if scan.on_triton(x):
        return None
    return (
        f"the tensors are on {x.device.type} (TRITON_INTERPRET=1 lets Triton take CPU tensors)"
        if scan.HAS_TRITON
        else "Triton is not installed"
    )


def triton_obstacle(q: Tensor, tick: int, rest: Tensor | None = None) -> str | None:
    """Why the tiled kernels cannot serve a call with queries q [B, H, T, D], or None. rest: theta or beta, which must be float32."""
    if obstacle := _off_triton(q):
        return obstacle
    from bio_inspired_nanochat.kernels import drive_triton, tiles  # imported late: a machine without Triton never gets here

    if rest is not None and rest.dtype != torch.float32:
        return f"thresholds and bias are {rest.dtype}, not float32"
    return tiles.head_obstacle(q) or drive_triton.obstacle(tick)


def tick_drive(
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    tick: int,
    scale: float,
    *,
    q_start: QStart = 0,
    window: int | None = None,
    doc: Tensor | None = None,
    q_len: Tensor | None = None,
    kind: str = "phi",
    backend: str = "auto",
) -> Tensor:
    """The drive U[n, j] = sum over queries t of tick n with t > j of phi(q_t . k_j * scale - theta), unmasked pairs only.

    Args:
        q: [B, H, Tq, D]; query i sits at absolute position q_start + i. k: [B, Hkv, Tk, D]; key j sits at position j.
        theta: [H] threshold on the logit. tick: c, tokens per tick. scale: factor of the logit.
        q_start: a common start, or one per row as an integer tensor [B].
        window: W, only pairs with t - j < W. doc: [B, T] document id per position, only pairs in one document.
        q_len: [B] real queries per row (the rest is right padding and drives nothing).
        kind: "phi" or "softplus".

    Returns:
        [B, H, N, Tk] in theta's dtype, over the N ticks that the queries touch. Differentiable in q, k and theta.
    """
    ragged = "rows start at different positions" if not isinstance(q_start, int) or q_len is not None else None
    if backend == "auto" and q.shape[2] == 1 and not ragged:
        backend = "sdpa"  # a single query leaves most of a tile idle
    obstacles = {
        "triton": lambda: ragged or triton_obstacle(q, tick, theta),
        "sdpa": lambda: ragged,
        "rust": lambda: rust.drive_obstacle(q, k, theta, doc),
    }
    chosen = _choose("tick_drive", backend, obstacles)
    if chosen == "rust":
        return rust.tick_drive(q, k, theta, tick, scale, q_start=q_start, window=window, q_len=q_len, kind=kind)
    if chosen == "triton":
        from bio_inspired_nanochat.kernels import drive_triton

        return drive_triton.tick_drive_op(q, k, theta, doc, tick, scale, q_start, window, kind)
    if chosen == "sdpa":
        return portable.tick_drive(q, k, theta, tick, scale, q_start=q_start, window=window, doc=doc, kind=kind)
    return reference.tick_drive(q, k, theta, tick, scale, q_start=q_start, window=window, doc=doc, q_len=q_len, kind=kind)


def presyn(
    drive: Tensor,
    params: PresynParams,
    state: PresynState | None = None,
    *,
    closed: int | Tensor | None = None,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    record: dict[str, Tensor] | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, PresynState]:
    """Run every terminal over N ticks, elementwise per (b, h, j) and sequential over n (lateral inhibition looks across j).

    Args:
        drive: [B, H, N, Tk] mean drive I per token of each tick (U / c), >= 0.
        state: terminals at the start of the first tick, with what that tick has collected before this call; None: at rest.
        closed: how many of the N ticks end inside this call, common or one per row [B] (None: all of them).
        doc: [B, >= Tk] document id per key; lateral inhibition stays inside a document.
        noise: draws for stochastic release with `params.sampler`; its first_tick is the absolute index of the first tick here.
        record: a dictionary to fill with the course of the terminals, [B, H, N, Tk] each: the state at the start of every tick
            (calcium, vesicles and the optional parts that exist), bias, and what was released during it.
        causal: the caller's promise that key j has no drive before tick j // c, as in a pass from position 0; saves half the work.

    Returns:
        beta [B, H, N, Tk], the bias of each tick from the state at its start, and the state at the start of the tick that
        is left open, with the drive collected in it. Differentiable in drive, params and state.
    """
    ragged = "rows close different numbers of ticks" if isinstance(closed, Tensor) else None
    obstacles = {
        "triton": lambda: ragged or _off_triton(drive) or portable.presyn_obstacle(params, noise, drive),
        "sdpa": lambda: ragged,
        "rust": lambda: rust.presyn_obstacle(drive, params, state, noise, record),
    }
    chosen = _choose("presyn", backend, obstacles)
    if chosen == "rust":
        return rust.presyn(drive, params, state, closed, causal=causal)
    if chosen == "reference":
        return reference.presyn(drive, params, state, closed, doc=doc, noise=noise, record=record)
    # which runs the kernel wherever it can
    return portable.presyn(drive, params, state, closed, doc=doc, noise=noise, record=record, causal=causal)


def tick_biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    tick: int,
    scale: float,
    *,
    q_start: QStart = 0,
    window: int | None = None,
    doc: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention with logits q_t . k_j * scale + beta[n(t), j].

    Args are those of `tick_drive`; v: [B, Hkv, Tk, D]; beta: [B, H, N, Tk], or None for plain attention.

    Returns:
        y: [B, H, Tq, D] in v's dtype. Differentiable in q, k, v and beta.
    """
    if (beta is None and backend == "triton") or (q.shape[2] == 1 and backend == "auto"):
        backend = "sdpa"  # plain attention is PyTorch's own flash kernel there; a single query leaves most of a tile idle
    obstacle = "plain attention" if beta is None else None if isinstance(q_start, int) else "rows start at different positions"
    obstacles = {
        "triton": lambda: obstacle or triton_obstacle(q, tick, beta),
        "sdpa": lambda: None,
        "rust": lambda: rust.attention_obstacle(q, k, v, beta, doc),
    }
    chosen = _choose("tick_biased_attention", backend, obstacles)
    if chosen == "rust":
        return rust.tick_biased_attention(q, k, v, beta, tick, scale, q_start=q_start, window=window)
    if chosen == "triton":
        from bio_inspired_nanochat.kernels import attention_triton

        return attention_triton.attention_op(q, k, v, beta, doc, tick, scale, q_start, window)[0]
    execution = portable if chosen == "sdpa" else reference
    return execution.tick_biased_attention(q, k, v, beta, tick, scale, q_start=q_start, window=window, doc=doc)


def cannot_fuse(obstacle: str) -> UserError:
    """The error of an explicit backend='fused' that has an obstacle."""
    return UserError(f"backend='fused' cannot serve this synaptic layer: {obstacle}; use backend='auto'")


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    params: PresynParams,
    scale: float,
    largest: float | None = None,
    *,
    cost: Tensor | None = None,
    strength: Tensor | None = None,
    window: int | None = None,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    kind: str = "phi",
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """Drive, presyn and biased attention of whole sequences in one operator that keeps nothing of its inner values.

    Args:
        q: [B, H, T, D]; k, v: [B, Hkv, T, D]; theta, scale, kind, window, doc: as in `tick_drive`; noise: as in `presyn`.
            Terminals start at rest.
        largest: bound on |q . k * scale|, which QK norm gives; it saves the running maximum of the softmax. None: unknown.
        cost: [B, H, T] float32 >= 0 of passing each token: with their running sum L the barrier adds -strength (L_t - L_j) to
            the logit of query t and key j; strength: [H] >= 0.
        record: a dictionary that gets the means of `SHORTAGES` over rows, heads, ticks and keys, 0-dim, of those that exist.

    Returns:
        y [B, H, T, D]. Differentiable in every tensor. UserError when the kernels cannot serve the call.
    """
    if obstacle := fused_obstacle(q, theta, params, noise):
        raise cannot_fuse(obstacle)
    from bio_inspired_nanochat.kernels import fused

    where = {"window": window, "doc": doc, "noise": noise, "kind": kind}
    return fused.attention(q, k, v, theta, params, scale, largest, cost=cost, strength=strength, record=record, **where)


def fused_opening(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, params: PresynParams, scale: float, largest: float | None = None, **where
) -> tuple[Tensor, PresynState, Tensor]:
    """`fused_attention` of the first tokens of sequences that will go on; same arguments, not differentiable.

    Returns:
        y [B, H, T, D]; the state at the start of the tick that is left open, with the drive collected in it; and the bias
        [B, H, Tk] that belongs to that state, without the barrier.
    """
    if obstacle := fused_obstacle(q, theta, params, where.get("noise")):
        raise cannot_fuse(obstacle)
    from bio_inspired_nanochat.kernels import fused

    return fused.opening(q, k, v, theta, params, scale, largest, **where)


def fused_obstacle(q: Tensor, theta: Tensor, params: PresynParams, noise: ReleaseNoise | None = None) -> str | None:
    """Why `fused_attention` cannot serve a call with q [B, H, T, D] and theta [H], as half a sentence for a message, or None."""
    if obstacle := triton_obstacle(q, params.tick, theta):
        return obstacle
    from bio_inspired_nanochat.kernels import fused  # imported late: a machine without Triton never gets here

    return fused.obstacle(params, noise, theta)
