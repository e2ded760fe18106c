"""Fast weights: an associative memory F [r, r] per sequence, read strictly from the past and then written, token by token.

    z_t = F_{t-1} u_t
    hebb    F_t = F_{t-1} diag(gamma) + eta_t m_t u_t^T                          gamma [r], one decay per pre mode (column)
    delta   F_t = gamma F_{t-1} + eta_t (m_t - gamma F_{t-1} u_t) u_t^T          gamma a scalar

`hebb` is linear attention with decay, `delta` the gated delta rule (Yang, Kautz and Hatamizadeh, 2024). The recurrence is the
definition; the chunked form computes the same from matrix products over chunks of C tokens, see `_chunked`.

The delta rule is bounded, equation (D5): with |u_t| = 1, 0 <= eta_t <= 1 and 0 <= gamma <= 1, row i of F keeps its part orthogonal to u_t
(times gamma), and its part a along u_t becomes (1 - eta) gamma a + eta m_i, whose square is at most (1 - eta) (gamma a)^2 +
eta m_i^2 by convexity. Hence ||F_t||^2 <= gamma^2 ||F_{t-1}||^2 + eta_t |m_t|^2 in Frobenius norm, and for gamma < 1

    ||F_t|| <= max(||F_0||, max_s |m_s| sqrt(max_s eta_s / (1 - gamma^2)))

at all times, whatever the keys; with u_t orthogonal to the rows of F and eta = 1 the bound is attained. With gamma = 1 the
squares of the writes may add up, ||F_t||^2 <= ||F_0||^2 + sum_s eta_s |m_s|^2.

Dimensions: B batch, T tokens, r modes, N chunks, C tokens of a chunk.

Numbered equations are those of prompts/synaptic_unit.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import fast_fla
from bio_inspired_nanochat.kernels.decay import decayed_sums
from bio_inspired_nanochat.kernels.scan import on_triton

RULES = ("hebb", "delta")
BACKENDS = ("auto", "reference", "chunked", "triton", "fla")
CHUNK = 64
KERNEL_MODES = 64  # whose tiles fit into the registers and the shared memory of any card
MOST_MODES = 128  # whose factors fit beside each other into a GPU's registers


def fast_weights(
    u: Tensor,
    m: Tensor,
    eta: Tensor,
    gamma: Tensor,
    start: Tensor | None = None,
    *,
    rule: str,
    fresh: Tensor | None = None,
    live: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read and write the fast weights of whole sequences or of their next chunk.

    Args:
        u: [B, T, r] pre activity, unit length. m: [B, T, r] post activity. Either may be bfloat16: products then run in it,
            while decays, sums over chunks, the state and all of the delta rule stay float32.
        eta: [B, T] write strength in [0, 1].
        gamma: what a token leaves of the past, [r] for "hebb" and [] for "delta", in [exp(-1/4), 1] (decay times of at least
            four tokens; the chunked form splits a chunk's decay into two factors, which overflow in float32 below exp(-1.3)).
        start: [B, r, r] fast weights before the first token, rows post and columns pre modes; None: zero.
        fresh: [B, T] bool, True where a document begins: F is zero when that token reads.
        live: [B, T] bool, False for padding at the right end, which changes nothing and whose z means nothing.
        backend: "reference" (the recurrence), "chunked", "triton" (the same on CUDA, float32 products), "fla" (flash-linear-attention,
            on CUDA where it is installed), or "auto" (triton where it can, else chunked; a single token by the recurrence).

    Returns:
        z [B, T, r] in u's dtype, and the fast weights after the last token [B, r, r], float32 (float64 for float64 inputs).
        Differentiable in u, m, eta, gamma and start.

    Raises:
        UserError: for an unknown rule or backend, and for a backend that was asked for and cannot serve the call.
    """
    if rule not in RULES:
        raise UserError(f"rule={rule!r} is not valid for fast_weights: one of {', '.join(RULES)}")
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not valid for fast_weights: one of {', '.join(BACKENDS)}")
    if backend == "fla" and (obstacle := fast_fla.obstacle(u, rule, fresh, live)):
        raise UserError(f"backend='fla' cannot serve these fast weights: {obstacle}; use backend='auto'")
    if backend == "triton" and (obstacle := _triton_obstacle(u)):
        raise UserError(f"backend='triton' cannot serve these fast weights: {obstacle}; use backend='auto'")
    batch, length, modes = u.shape
    assert gamma.shape == ((modes,) if rule == "hebb" else ()), f"{rule} with gamma {tuple(gamma.shape)}"
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    eta, gamma = eta.to(state_dtype), gamma.to(state_dtype)
    start = u.new_zeros(batch, modes, modes, dtype=state_dtype) if start is None else start.to(state_dtype)
    if backend == "fla":
        return fast_fla.fast_weights(u, m, eta, gamma, start, rule)
    if backend == "triton" or (backend == "auto" and length > 1 and not _triton_obstacle(u)):
        from bio_inspired_nanochat.kernels import fast_triton  # imported late: a machine without Triton never gets here

        return fast_triton.fast_weights(u, m, eta, gamma, start, rule, fresh, live)
    if live is not None:
        u, m = (torch.where(live[:, :, None], x, torch.zeros_like(x)) for x in (u, m))
        eta = torch.where(live, eta, torch.zeros_like(eta))
        fresh = None if fresh is None else fresh & live
    if backend == "reference" or (backend == "auto" and length == 1):
        return _recurrence(u, m, eta, gamma, start, rule, fresh, live)
    return _chunked(u, m, eta, gamma, start, rule, fresh, live)


def _triton_obstacle(u: Tensor) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if not on_triton(u):
        return f"the tensors are on {u.device.type}"
    if u.dtype == torch.float64:
        return "they have no float64"
    return f"{u.shape[2]} modes are more than {KERNEL_MODES}" if u.shape[2] > KERNEL_MODES else None


def fast_weights_step(state: Tensor, u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """One token: read, then write. state [B, r, r]; u, m [B, r]; eta [B]; all of one dtype. Returns z [B, r] and F_t.

    Equations (D3) and (D4).
    """
    z = torch.matmul(state, u[:, :, None])[:, :, 0]
    error = m - gamma * z if rule == "delta" else m
    return z, state * gamma + (eta[:, None] * error)[:, :, None] * u[:, None, :]


def _recurrence(
    u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, state: Tensor, rule: str, fresh: Tensor | None, live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition."""
    dtype, reads = u.dtype, []
    u, m = u.to(state.dtype), m.to(state.dtype)
    for t in range(u.shape[1]):
        if fresh is not None:
            state = torch.where(fresh[:, t, None, None], torch.zeros_like(state), state)
        z, ahead = fast_weights_step(state, u[:, t], m[:, t], eta[:, t], gamma, rule)
        state = ahead if live is None else torch.where(live[:, t, None, None], ahead, state)
        reads.append(z)
    return torch.stack(reads, dim=1).to(dtype), state


def _chunked(
    u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, start: Tensor, rule: str, fresh: Tensor | None, live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Within a chunk that starts with F = S, token t writes e_t u_t^T, so that with D = diag(gamma), equation (D6),

        z_t = S D^t u_t + sum over s < t of (u_t D^(t-1-s) u_s) e_s

    where e_t = eta_t m_t for hebb. For delta e_t = eta_t (m_t - gamma z_t), a triangular system in e. The decay between two
    tokens is the product of two factors around the middle of the chunk, one on each side. A sum never leaves its document.
    """
    batch, length, _ = u.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // size)
    pad = chunks * size - length
    dtype, wide = u.dtype, start.dtype
    if rule == "delta":  # where keys repeat, z is a small difference of large sums of e, which bfloat16 would drown
        u, m = u.to(wide), m.to(wide)

    def split(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, pad)).view(batch, chunks, size, -1)

    u, m, eta = split(u), split(m), split(eta[:, :, None])
    segment = bound = None
    causal = torch.ones(size, size, dtype=torch.bool, device=u.device).tril(-1)
    if fresh is not None:
        segment = split(fresh.int()[:, :, None]).flatten(1).cumsum(1).view(batch, chunks, size)
        bound = F.pad(segment[:, :, -1], (1, 0))  # documents begun before each chunk, and before the end
        causal = causal & (segment[..., :, None] == segment[..., None, :])

    rates = gamma.reshape(-1)
    middle = size // 2
    place = torch.arange(size, device=u.device, dtype=wide)[:, None]
    reader = (u * torch.pow(rates, place - 1 - middle)).to(u.dtype)  # both [B, N, C, r]
    writer = (u * torch.pow(rates, middle - place)).to(u.dtype)
    scores = torch.where(causal, reader @ writer.transpose(-1, -2), 0)

    entering, leaving = reader, writer  # what reads the state before the chunk, and what reaches the state after it
    if segment is not None:
        entering = entering * (segment == bound[:, :-1, None])[..., None]
        leaving = leaving * (segment == bound[:, 1:, None])[..., None]
    since, until, whole = rates ** (middle + 1), rates ** (size - 1 - middle), rates**size
    if rule == "hebb":
        errors = (eta * m).to(u.dtype)
        summaries = (errors.transpose(-1, -2) @ leaving).to(wide) * until
        states = decayed_sums(torch.cat([start[:, None], summaries], dim=1), whole, bound)
    else:
        kept = None if bound is None else bound[:, 1:] == bound[:, :-1]
        errors, states = _delta_chunks(scores, entering * since, leaving * until, m, eta, gamma, start, whole, kept)
    z = scores @ errors + entering @ (states[:, :-1] * since).to(u.dtype).transpose(-1, -2)

    ended = torch.full((batch,), length, device=u.device) if live is None else live.sum(1)
    if live is None and not pad:
        final = states[:, -1]
    else:
        final = _state_after(ended, states, errors, writer, rates, segment, bound)
    return z.flatten(1, 2)[:, :length].to(dtype), final


def _delta_chunks(
    scores: Tensor,
    entering: Tensor,
    leaving: Tensor,
    m: Tensor,
    eta: Tensor,
    gamma: Tensor,
    start: Tensor,
    whole: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What each token writes, e [B, N, C, r], and the state before each chunk and after the last [B, N + 1, r, r]. Equation (D7).

    (I + L) e = eta m - eta gamma (u D^t) S^T with L = eta gamma scores, strictly lower triangular: e = V - Y S^T after one
    triangular solve, and S+ = S (gamma^C I - Y^T W) + V^T W with W the writes that reach the end of the chunk.

    scores: [B, N, C, C]; entering, leaving: [B, N, C, r] keys decayed from the chunk's start and to its end; m [B, N, C, r];
    eta [B, N, C, 1]; whole: decay over a chunk; kept: [B, N] whether the state before a chunk reaches its end.
    """
    modes = m.shape[-1]
    strength = eta * gamma
    system = torch.cat([eta * m, strength * entering], dim=-1)
    own, response = solve_unit_lower(strength * scores, system).split(modes, dim=-1)
    written = own.transpose(-1, -2) @ leaving
    carried = torch.eye(modes, dtype=m.dtype, device=m.device) * whole
    if kept is not None:
        carried = carried * kept[:, :, None, None]
    carried = carried - response.transpose(-1, -2) @ leaving
    states = _affine_states(start, carried, written)
    return own - response @ states[:, :-1].transpose(-1, -2), states


def solve_unit_lower(lower: Tensor, right: Tensor) -> Tensor:
    """X of (I + lower) X = right, for lower [..., C, C] strictly lower triangular with C a power of two; right [..., C, K].

    Differentiable once: the step of refinement gives both the last digits and the gradient from two matrix products.
    """
    inverse = _unit_lower_inverse(lower.detach())
    rough = inverse @ right.detach()
    return rough + inverse @ (right - rough - lower @ rough)


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1, with the inverses of diagonal blocks joined in pairs: [[A, 0], [M, D]]^-1 = [[A', 0], [-D' M A', D']]. Equation (D8).

    As stable as forward substitution, unlike the product (I - L)(I + L^2)(I + L^4)..., whose powers cancel where keys repeat.
    """
    *outer, size, _ = lower.shape
    inverse = lower.new_ones(*outer, size, 1, 1)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = lower.reshape(*outer, pairs, 2, width, pairs, 2, width)[..., 1, :, :, 0, :]
        blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = inverse.view(*outer, pairs, 2, width, width).unbind(-3)
        top = torch.cat([first, torch.zeros_like(first)], dim=-1)
        inverse = torch.cat([top, torch.cat([-(second @ blocks @ first), second], dim=-1)], dim=-2)
        width *= 2
    return inverse.view(*outer, size, size)


def _affine_states(start: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """S[n+1] = S[n] factor[n] + addend[n]: S[0..N], [B, N + 1, r, r]. factor: [B, N, r, r]."""
    if on_triton(factor) and factor.dtype == torch.float32 and factor.shape[-1] <= MOST_MODES:
        from bio_inspired_nanochat.kernels import affine_triton  # imported late: a machine without Triton never gets here

        return affine_triton.affine_states(start, factor, addend)
    states = [start]
    for step, write in zip(factor.unbind(1), addend.unbind(1), strict=True):
        states.append(torch.baddbmm(write, states[-1], step))
    return torch.stack(states, dim=1)


def _state_after(
    ended: Tensor, states: Tensor, errors: Tensor, writer: Tensor, rates: Tensor, segment: Tensor | None, bound: Tensor | None
) -> Tensor:
    """The fast weights after each row's `ended` [B] tokens, from the state before the chunk in which it ends."""
    size, wide = errors.shape[2], states.dtype
    rows = torch.arange(len(ended), device=ended.device)
    chunk, rest = ended // size, ended % size
    last = chunk.clamp(max=errors.shape[1] - 1)
    state, held = states[rows, chunk], torch.arange(size, device=ended.device) < rest[:, None]
    if segment is not None:
        state = state * (bound[rows, chunk] == bound[:, -1])[:, None, None]
        held = held & (segment[rows, last] == bound[:, -1:])
    fade = torch.pow(rates, (rest - 1 - size // 2)[:, None].to(wide))[:, None]
    writes = (errors[rows, last] * held[..., None]).transpose(-1, -2) @ writer[rows, last]
    return state * torch.pow(rates, rest[:, None].to(wide))[:, None] + writes.to(wide) * fade
