"""Fast weights by chunks on CUDA: `fast_weights._chunked` in three launches forward and three backward.

A program has one chunk of C tokens of one sequence in registers. With D = diag(gamma), t and s counted from the chunk's start,
n its number of real tokens, S the state before it and S+ the state after it:

    P_ts = u_t D^(t-1-s) u_s, s < t         Q_t = D^t u_t         K_s = D^(n-1-s) u_s
    delta   (I + L) e = eta m - eta gamma Q S^T,  L = diag(eta gamma) P          hebb   e = eta m
    z = P e + Q S^T         S+ = S D^n + e^T K

P, Q, K and S D^n leave out what belongs to another document. First A and W of S+ = S A + W for every chunk (`_transfer`), then
the states one after the other (`affine_triton`), then z (`_read`). The backward pass is the same in reverse: A and what z
brings to each state's gradient, the states' gradients G, and with those the gradients of the inputs. It keeps the inputs and
states and computes everything else again. All products are of float32 values (three tf32 products each where the card has them).

Dimensions: B batch, T tokens, r modes, N chunks, C tokens of a chunk; R the next power of two from r.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels import affine_triton
from bio_inspired_nanochat.kernels.tiles import FEWEST, launch

CHUNK = 32  # half of the PyTorch form's: twice that does not fit into the registers
PRECISION = "tf32x3"


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _chunk(u_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, length, modes, C: tl.constexpr, R: tl.constexpr, DOC: tl.constexpr):
    """Where the chunk lies, its keys decayed in four ways, and which of its tokens see each other, the past and the end."""
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, column = tl.arange(0, C), tl.arange(0, R)
    held = tl.minimum(tl.maximum(tl.load(count_ptr + batch) - chunk * C, 0), C)
    live = place < held
    row = batch * length + chunk * C + place
    inside = live[:, None] & (column < modes)[None, :]
    stored = (chunk * C + place < length)[:, None] & (column < modes)[None, :]
    own = row[:, None] * modes + column[None, :]
    u = tl.load(u_ptr + own, mask=inside, other=0.0).to(tl.float32)
    eta = tl.load(eta_ptr + row, mask=live, other=0.0)
    rate = tl.load(gamma_ptr + column, mask=column < modes, other=1.0)
    rate = tl.log2(rate)
    past = tl.full([C], 1.0, tl.float32)
    ahead = past
    seen = place[:, None] > place[None, :]
    kept = 1.0
    if DOC:
        doc = tl.load(document_ptr + row, mask=live, other=-1)
        first = tl.load(document_ptr + batch * length + chunk * C - 1, mask=chunk > 0, other=0)
        last = tl.load(document_ptr + batch * length + chunk * C + held - 1, mask=chunk * C + held > 0, other=0)
        past = tl.where(doc == first, 1.0, 0.0)
        ahead = tl.where(doc == last, 1.0, 0.0)
        seen = seen & (doc[:, None] == doc[None, :])
        kept = tl.where(first == last, 1.0, 0.0)
    return own, inside, stored, row, held, u, eta, rate, past, ahead, seen, kept


@triton.jit
def _decayed(u, rate, power):
    """u_t D^power_t."""
    return u * tl.exp2(rate[None, :] * power[:, None].to(tl.float32))


@triton.jit
def _inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1, inverses X of diagonal blocks joined in pairs: X - X M X with M the blocks that lie between the two of a pair."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    x = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -lower, 0.0))
    for level in range(1, LEVELS):
        between = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), lower, 0.0)
        x = x - _dot(_dot(x, between, PRECISION), x, PRECISION)
    return x


@triton.jit
def _solve(x, lower, right, PRECISION: tl.constexpr):
    """(I + lower)^-1 right with the inverse x, and one step of refinement."""
    rough = _dot(x, right, PRECISION)
    return rough + _dot(x, right - rough - _dot(lower, rough, PRECISION), PRECISION)


@triton.jit
def _square(modes, R: tl.constexpr):
    row, column = tl.arange(0, R), tl.arange(0, R)
    return row[:, None] * modes + column[None, :], (row < modes)[:, None] & (column < modes)[None, :]


@triton.jit
def _transfer(
    u_ptr, m_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, grad_ptr, factor_ptr, addend_ptr, final_ptr, length, modes, chunks,
    C: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, DOC: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A [B, N, r, r] and W [B, N, r, r]; BACK: A and what z brings to the gradient of S, [B, N + 1, r, r], the last of them `final`."""
    own, inside, _stored, _row, held, u, eta, rate, past, ahead, seen, kept = _chunk(
        u_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, length, modes, C, R, DOC
    )
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, C)
    entering = _decayed(u, rate, place) * past[:, None]
    leaving = _decayed(u, rate, held - 1 - place) * ahead[:, None]
    square, within = _square(modes, R)
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    factor = tl.where(i == j, tl.exp2(rate * held.to(tl.float32))[None, :] * kept, 0.0)
    scores = tl.where(seen, _dot(_decayed(u, rate, place - 1 - C // 2), tl.trans(_decayed(u, rate, C // 2 - place)), PRECISION), 0.0)
    if BACK:
        reach = tl.load(grad_ptr + own, mask=inside, other=0.0).to(tl.float32)
        addend = _dot(tl.trans(reach), entering, PRECISION)
    else:
        written = tl.load(m_ptr + own, mask=inside, other=0.0).to(tl.float32) * eta[:, None]
    if DELTA:
        strength = eta * tl.load(gamma_ptr)
        lower = scores * strength[:, None]
        x = _inverse(lower, C, LEVELS, PRECISION)
        response = _solve(x, lower, entering * strength[:, None], PRECISION)
        factor -= _dot(tl.trans(response), leaving, PRECISION)
        if BACK:
            addend -= _dot(tl.trans(_dot(tl.trans(scores), reach, PRECISION)), response, PRECISION)
        else:
            written = _solve(x, lower, written, PRECISION)
    tl.store(factor_ptr + (batch * chunks + chunk) * modes * modes + square, factor, mask=within)
    if BACK:
        place_of = (batch * (chunks + 1) + chunk) * modes * modes + square
        tl.store(addend_ptr + place_of, addend, mask=within)
        if chunk == chunks - 1:
            last = tl.load(final_ptr + batch * modes * modes + square, mask=within, other=0.0)
            tl.store(addend_ptr + place_of + modes * modes, last, mask=within)
    else:
        addend = _dot(tl.trans(written), leaving, PRECISION)
        tl.store(addend_ptr + (batch * chunks + chunk) * modes * modes + square, addend, mask=within)


@triton.jit
def _read(
    u_ptr, m_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, state_ptr, z_ptr, length, modes, chunks,
    C: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own, inside, stored, _row, _held, u, eta, rate, past, _ahead, seen, _kept = _chunk(
        u_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, length, modes, C, R, DOC
    )
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, C)
    square, within = _square(modes, R)
    state = tl.load(state_ptr + (batch * (chunks + 1) + chunk) * modes * modes + square, mask=within, other=0.0)
    old = _dot(_decayed(u, rate, place) * past[:, None], tl.trans(state), PRECISION)
    scores = tl.where(seen, _dot(_decayed(u, rate, place - 1 - C // 2), tl.trans(_decayed(u, rate, C // 2 - place)), PRECISION), 0.0)
    error = tl.load(m_ptr + own, mask=inside, other=0.0).to(tl.float32) * eta[:, None]
    if DELTA:
        strength = eta * tl.load(gamma_ptr)
        lower = scores * strength[:, None]
        error = _solve(_inverse(lower, C, LEVELS, PRECISION), lower, error - old * strength[:, None], PRECISION)
    tl.store(z_ptr + own, _dot(scores, error, PRECISION) + old, mask=stored)


@triton.jit
def _adjoint(
    u_ptr, m_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, grad_ptr, state_ptr, total_ptr, du_ptr, dm_ptr, deta_ptr, dgamma_ptr,
    length, modes, chunks,
    C: tl.constexpr, R: tl.constexpr, LEVELS: tl.constexpr, DELTA: tl.constexpr, DOC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of u, m, eta and of gamma by chunk [B, N, r], from those of z and of every state."""
    own, inside, stored, row, held, u, eta, rate, past, ahead, seen, kept = _chunk(
        u_ptr, eta_ptr, gamma_ptr, count_ptr, document_ptr, length, modes, C, R, DOC
    )
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, column = tl.arange(0, C), tl.arange(0, R)
    square, within = _square(modes, R)
    before = (batch * (chunks + 1) + chunk) * modes * modes + square
    state = tl.load(state_ptr + before, mask=within, other=0.0)
    total = tl.load(total_ptr + before + modes * modes, mask=within, other=0.0)
    m = tl.load(m_ptr + own, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(grad_ptr + own, mask=inside, other=0.0).to(tl.float32)
    entering = _decayed(u, rate, place) * past[:, None]
    leaving = _decayed(u, rate, held - 1 - place) * ahead[:, None]
    reader, writer = _decayed(u, rate, place - 1 - C // 2), _decayed(u, rate, C // 2 - place)
    scores = tl.where(seen, _dot(reader, tl.trans(writer), PRECISION), 0.0)

    dright = _dot(tl.trans(scores), dz, PRECISION) + _dot(leaving, tl.trans(total), PRECISION)
    dold = dz
    error = m * eta[:, None]
    if DELTA:
        gamma = tl.load(gamma_ptr)
        strength = eta * gamma
        lower = scores * strength[:, None]
        old = _dot(entering, tl.trans(state), PRECISION)
        x = _inverse(lower, C, LEVELS, PRECISION)
        error = _solve(x, lower, error - old * strength[:, None], PRECISION)
        dright = _solve(tl.trans(x), tl.trans(lower), dright, PRECISION)
        dold -= dright * strength[:, None]
    dscores = _dot(dz, tl.trans(error), PRECISION)
    deta = tl.sum(dright * m, axis=1)
    dgamma = tl.exp2(-rate) * held.to(tl.float32) * tl.exp2(rate * held.to(tl.float32)) * kept * tl.sum(total * state, axis=0)
    if DELTA:
        dlower = -_dot(dright, tl.trans(error), PRECISION)
        dscores += dlower * strength[:, None]
        dstrength = tl.sum(dlower * scores, axis=1) - tl.sum(dright * old, axis=1)
        deta += dstrength * gamma
        dgamma += tl.where(column == 0, tl.sum(dstrength * eta), 0.0)
    dscores = tl.where(seen, dscores, 0.0)
    tl.store(dm_ptr + own, dright * eta[:, None], mask=stored)
    tl.store(deta_ptr + row, deta, mask=chunk * C + place < length)

    part = _decayed(_dot(dscores, writer, PRECISION), rate, place - 1 - C // 2)
    du, moved = part, part * (place - 1 - C // 2)[:, None]
    part = _decayed(_dot(tl.trans(dscores), reader, PRECISION), rate, C // 2 - place)
    du, moved = du + part, moved + part * (C // 2 - place)[:, None]
    part = _decayed(_dot(dold, state, PRECISION), rate, place) * past[:, None]
    du, moved = du + part, moved + part * place[:, None]
    part = _decayed(_dot(error, total, PRECISION), rate, held - 1 - place) * ahead[:, None]
    du, moved = du + part, moved + part * (held - 1 - place)[:, None]
    tl.store(du_ptr + own, du, mask=stored)
    dgamma += tl.exp2(-rate) * tl.sum(u * moved, axis=0)
    tl.store(dgamma_ptr + (batch * chunks + chunk) * modes + column, dgamma, mask=column < modes)


def static(modes: int, delta: bool, documents: Tensor | None) -> dict[str, Any]:
    """Compile-time arguments and options of a launch. documents: [B, T] where there are some, else None."""
    width = max(FEWEST, triton.next_power_of_2(modes))
    return {
        "C": CHUNK, "R": width, "LEVELS": CHUNK.bit_length() - 1, "DELTA": delta, "DOC": documents is not None,
        "PRECISION": PRECISION, "num_warps": 4 if width < 32 else 8, "num_stages": 1,
    }  # fmt: skip


def _inputs(u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, count: Tensor, documents: Tensor | None) -> tuple[Tensor, ...]:
    return u, m, eta, gamma, count, count if documents is None else documents


@torch.library.custom_op("bio_inspired_nanochat::fast_chunks", mutates_args=())
def fast_chunks(
    u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, start: Tensor, count: Tensor, documents: Tensor | None, delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads z [B, T, r] in u's dtype, the state after each row's last token and all states [B, N + 1, r, r], float32.

    u, m: [B, T, r], contiguous; eta [B, T] and gamma [r] (all alike for delta) float32; start [B, r, r] float32; count: [B] int32,
    real tokens of each row; documents: [B, T] int32, documents begun until each token. Differentiable but for the states.
    """
    batch, length, modes = u.shape
    chunks = triton.cdiv(length, CHUNK)
    given, fixed = _inputs(u, m, eta, gamma, count, documents), static(modes, delta, documents)
    factor, addend = (torch.empty(batch, chunks, modes, modes, device=u.device) for _ in range(2))
    launch(_transfer, (chunks, batch), *given, u, factor, addend, start, length, modes, chunks, BACK=False, **fixed)
    states = affine_triton.affine_scan(start, factor, addend, back=False)
    z = torch.empty_like(u)
    launch(_read, (chunks, batch), *given, states, z, length, modes, chunks, **fixed)
    return z, states[:, -1].clone(), states


@fast_chunks.register_fake
def _(u, m, eta, gamma, start, count, documents, delta):
    chunks = -(-u.shape[1] // CHUNK)
    return torch.empty_like(u), torch.empty_like(start), start.new_empty(start.shape[0], chunks + 1, *start.shape[1:])


@torch.library.custom_op("bio_inspired_nanochat::fast_chunks_adjoint", mutates_args=())
def fast_chunks_adjoint(
    grad: Tensor, final: Tensor, states: Tensor, u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, count: Tensor, documents: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, m, eta, gamma and start from those of z [B, T, r] and of the state after the last token [B, r, r]."""
    batch, length, modes = u.shape
    chunks = triton.cdiv(length, CHUNK)
    given, fixed = _inputs(u, m, eta, gamma, count, documents), static(modes, delta, documents)
    grad, final = grad.contiguous(), final.contiguous()
    factor = torch.empty(batch, chunks, modes, modes, device=u.device)
    addend = torch.empty_like(states)
    launch(_transfer, (chunks, batch), *given, grad, factor, addend, final, length, modes, chunks, BACK=True, **fixed)
    total = affine_triton.affine_scan(addend, factor, addend, back=True)
    du, dm, deta = torch.empty_like(u), torch.empty_like(m), torch.empty_like(eta)
    dgamma = torch.empty(batch, chunks, modes, device=u.device)
    launch(_adjoint, (chunks, batch), *given, grad, states, total, du, dm, deta, dgamma, length, modes, chunks, **fixed)
    return du, dm, deta, dgamma.sum((0, 1)), total[:, 0].clone()


@fast_chunks_adjoint.register_fake
def _(grad, final, states, u, m, eta, gamma, count, documents, delta):
    return torch.empty_like(u), torch.empty_like(m), torch.empty_like(eta), torch.empty_like(gamma), torch.empty_like(final)


def _setup(ctx, inputs, output) -> None:
    u, m, eta, gamma, _start, count, documents, ctx.delta = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, m, eta, gamma, count, documents, output[2])


def _backward(ctx, grad: Tensor | None, final: Tensor | None, _: Tensor | None):
    u, m, eta, gamma, count, documents, states = ctx.saved_tensors
    if grad is None and final is None:
        return (None,) * 8
    grad = torch.zeros_like(u) if grad is None else grad
    final = torch.zeros_like(states[:, 0]) if final is None else final
    return *fast_chunks_adjoint(grad, final, states, u, m, eta, gamma, count, documents, ctx.delta), None, None, None


fast_chunks.register_autograd(_backward, setup_context=_setup)


def fast_weights(
    u: Tensor, m: Tensor, eta: Tensor, gamma: Tensor, start: Tensor, rule: str, fresh: Tensor | None, live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.fast_weights.fast_weights`; eta, gamma and start in float32, r at most 64."""
    batch, length, modes = u.shape
    count = torch.full((batch,), length, dtype=torch.int32, device=u.device) if live is None else live.sum(1, dtype=torch.int32)
    documents = None if fresh is None else fresh.cumsum(1, dtype=torch.int32)
    gamma = gamma.expand(modes).contiguous()
    u, m, eta, start = u.contiguous(), m.contiguous(), eta.contiguous(), start.contiguous()
    z, final, _ = fast_chunks(u, m, eta, gamma, start, count, documents, rule == "delta")
    return z, final
