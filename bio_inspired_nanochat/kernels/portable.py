"""The `sdpa` backend: the three operators from PyTorch's own fast parts, on any device.

tick_drive walks the queries in blocks and recomputes the logits in its backward, so no T x T tensor outlives a block.
presyn is one generated Triton kernel on CUDA; elsewhere the core evaluates everything elementwise over all ticks at once and
leaves only two linear recurrences sequential.
tick_biased_attention adds the bias inside scaled_dot_product_attention by a one-hot tick augmentation:
q' = [q, onehot(n)], k' = [k, beta / scale], in blocks of queries whose ticks fit beside the head.

Dimensions: B batch, H query heads, T tokens (Tq queries, Tk keys), N ticks, D head size, c tick length.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bio_inspired_nanochat.kernels import reference
from bio_inspired_nanochat.kernels.masks import QStart, allowed, local_ticks, num_ticks, query_positions
from bio_inspired_nanochat.kernels.noise import ReleaseNoise
from bio_inspired_nanochat.kernels.reference import expand_heads
from bio_inspired_nanochat.kernels.scan import linear_scan, on_triton
from bio_inspired_nanochat.kernels.terminal import calcium_step, pool_step, release_logit, terminal_bias, terminal_step
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

DRIVE_TICKS = 32
CPU_DRIVE_QUERIES = 64
CPU_TICKS = 32
WIDEST_FLASH_HEAD = 256


def _ticks_per_block(q: Tensor) -> int:
    """Ticks in one attention call: on CUDA as many as flash attention's head size leaves room for, which saves calls."""
    return max(8, WIDEST_FLASH_HEAD - q.shape[-1]) if q.is_cuda else CPU_TICKS


def _query_blocks(q_start: QStart, length: int, tick: int, ticks: int) -> list[tuple[int, int]]:
    """Ranges of queries that touch at most `ticks` ticks each; whole ticks where all rows start together."""
    if isinstance(q_start, int):
        first, size = tick * ticks - q_start % tick, tick * ticks
    else:
        first = size = tick * (ticks - 1) + 1
    edges = [0, *range(first, length, size), length]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _key_range(q_start: QStart, begin: int, end: int, keys: int, window: int | None) -> tuple[int, int]:
    """The keys that queries [begin, end) can see at all. Rows with their own starts keep every key (no host sync)."""
    if not isinstance(q_start, int):
        return 0, keys
    low = 0 if window is None else max(0, q_start + begin - window + 1)
    return low, min(keys, q_start + end)


def _drive_ticks(q: Tensor, tick: int) -> int:
    """Ticks in one block of queries: on a CPU few, so that little above the diagonal is computed and a block stays in its caches."""
    return DRIVE_TICKS if q.is_cuda else max(1, CPU_DRIVE_QUERIES // tick)


class _Drive(torch.autograd.Function):
    """tick_drive for a common integer start; blocks are whole ticks, so a tick's sum is one reshape.

    With h = (x + 1) / 2 and s = h limited to 0 ... 1 the drive is phi(x) = s (2 h - s) and its derivative s, so a pass over the pairs is a
    few operations in place.
    """

    @staticmethod
    def _block(args, q, k, theta, begin, end):
        """h (x for softplus), -inf where masked, of queries [begin, end) against the keys that they can see at all; these keys, their range."""
        _, scale, q_start, window, doc, kind = args
        low, high = _key_range(q_start, begin, end, k.shape[2], window)
        keys = k[:, :, low:high]
        factor, offset = (1.0, 0.0) if kind == "softplus" else (0.5, 0.5)
        shift = offset - factor * theta
        if q.dtype == theta.dtype:
            rows, columns = q[:, :, begin:end].flatten(0, 1), keys.flatten(0, 1).mT
            x = torch.baddbmm(shift.repeat(q.shape[0])[:, None, None], rows * (factor * scale), columns).unflatten(0, q.shape[:2])
        else:
            x = torch.matmul(q[:, :, begin:end], keys.mT).to(theta.dtype).mul_(factor * scale).add_(shift[:, None, None])
        first = (
            low if window is not None or doc is not None else max(low, q_start + begin)
        )  # all keys before are in the past of all queries
        positions = query_positions(q_start + begin, end - begin, q.device)
        mask = allowed(positions, torch.arange(first, high, device=q.device), window=window, doc=doc, diagonal=False)
        x[..., first - low :].masked_fill_(~mask, float("-inf"))
        return x, keys, slice(low, high)

    @staticmethod
    def _tick_span(q_start: int, begin: int, end: int, tick: int) -> tuple[slice, int, int]:
        """(local ticks, padding in front and behind that make them whole) of queries [begin, end)."""
        base, first, last = q_start // tick, (q_start + begin) // tick, (q_start + end - 1) // tick
        front = q_start + begin - first * tick
        return slice(first - base, last + 1 - base), front, (last + 1 - first) * tick - front - (end - begin)

    @staticmethod
    def forward(ctx, q, k, theta, tick, scale, q_start, window, doc, kind):
        args = (tick, scale, q_start, window, doc, kind)
        batch, heads, length, _ = q.shape
        total = theta.new_zeros(batch, heads, num_ticks(q_start, length, tick), k.shape[2])
        for begin, end in _query_blocks(q_start, length, tick, _drive_ticks(q, tick)):
            x, _, span = _Drive._block(args, q, k, theta, begin, end)
            if kind == "softplus":
                drive = F.softplus(x)
            else:
                slope = x.relu_().clamp(max=1)
                drive = x.mul_(2).sub_(slope).mul_(slope)
            ticks, front, back = _Drive._tick_span(q_start, begin, end, tick)
            if front or back:
                drive = F.pad(drive, (0, 0, front, back))
            total[:, :, ticks, span] = drive.unflatten(2, (-1, tick)).sum(3)
        ctx.save_for_backward(q, k, theta)
        ctx.args = args
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, theta = ctx.saved_tensors
        tick, scale, q_start, *_, kind = ctx.args
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k, dtype=theta.dtype)
        grad_theta = torch.zeros_like(theta)
        grad = grad * scale  # of q and k; theta's is divided by it again
        for begin, end in _query_blocks(q_start, q.shape[2], tick, _drive_ticks(q, tick)):
            x, keys, span = _Drive._block(ctx.args, q, k, theta, begin, end)
            slope = x.sigmoid_() if kind == "softplus" else x.clamp_(0, 1)
            ticks, front, back = _Drive._tick_span(q_start, begin, end, tick)
            if front or back:
                slope *= grad[:, :, ticks, span].repeat_interleave(tick, dim=2)[:, :, front : front + end - begin]
            else:
                slope.unflatten(2, (-1, tick)).mul_(grad[:, :, ticks, None, span])
            grad_theta -= slope.sum((0, 2, 3))
            slope = slope.to(q.dtype)
            grad_q[:, :, begin:end] = torch.matmul(slope, keys)
            grad_k[:, :, span] += torch.matmul(slope.mT, q[:, :, begin:end])
        return grad_q, grad_k.to(k.dtype), grad_theta / scale, *[None] * 6


def tick_drive(
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    tick: int,
    scale: float,
    *,
    q_start: int = 0,
    window: int | None = None,
    doc: Tensor | None = None,
    kind: str = "phi",
) -> Tensor:
    """See `kernels.tick_drive`; takes a common start of all rows."""
    return _Drive.apply(q, expand_heads(k, q.shape[1]), theta, tick, scale, q_start, window, doc, kind)


def presyn(
    drive: Tensor,
    p: PresynParams,
    state: PresynState | None,
    closed: int | None = None,
    *,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    record: dict[str, Tensor] | None = None,
    causal: bool = False,
) -> tuple[Tensor, PresynState]:
    """See `kernels.presyn`; takes a common number of closed ticks of all rows.

    On CUDA a generated kernel runs every set of parts. Elsewhere the core alone is two linear scans over ticks, and what
    has optional parts or noise runs as the reference does.
    """
    batch, heads, ticks, keys = drive.shape
    young = causal and state is None and record is None
    closed = ticks if closed is None else closed
    if state is None:
        state = PresynState.rest(batch, heads, keys, device=drive.device, dtype=drive.dtype, params=p)
    elif ticks:  # what the first tick has collected before; a fresh state has nothing, and the drive is not copied
        drive = torch.cat([drive[:, :, :1] + state.open_drive[:, :, None], drive[:, :, 1:]], dim=2)
        state = state._replace(open_drive=torch.zeros_like(state.open_drive))
    if ticks and on_triton(drive) and presyn_obstacle(p, noise, drive) is None:
        return _presyn_kernel(drive, p, state, closed, doc, noise, record, young)
    if not p.core or noise is not None:
        return reference.presyn(drive, p, state, closed, doc=doc, noise=noise, record=record)
    return _presyn_core(drive, p, state, closed, record)


def _presyn_triton() -> ModuleType:
    from bio_inspired_nanochat.kernels import presyn_triton  # imported late: a machine without Triton never gets here

    return presyn_triton


def presyn_obstacle(p: PresynParams, noise: ReleaseNoise | None, drive: Tensor) -> str | None:
    """Why the generated kernel cannot serve a call with a drive [B, H, N, Tk] where there is Triton, or None."""
    return _presyn_triton().obstacle(p, noise, drive)


def _presyn_kernel(
    drive: Tensor,
    p: PresynParams,
    state: PresynState,
    closed: int,
    doc: Tensor | None,
    noise: ReleaseNoise | None,
    record: dict[str, Tensor] | None,
    young: bool,
) -> tuple[Tensor, PresynState]:
    """Ticks that end here advance the state; a tick left open is one more run whose end is thrown away."""
    run = _presyn_triton().run
    recorded = [name for name in reference.RECORDED if getattr(state, name) is not None]
    outputs = ["bias", *(["activity"] if p.lateral_strength is not None else []), *([*recorded, "released"] if record is not None else [])]
    pieces = []
    if closed:
        made, state = run(drive[:, :, :closed], p, state, outputs, noise, young)
        pieces.append(made)
    if closed < drive.shape[2]:
        later = None if noise is None else noise.at(noise.layer, noise.first_tick + closed)
        pieces.append(run(drive[:, :, closed:], p, state, outputs, later)[0])
        state = state._replace(open_drive=drive[:, :, closed])
    else:
        state = state._replace(open_drive=torch.zeros_like(state.open_drive))
    made = pieces[0] if len(pieces) == 1 else {name: torch.cat([piece[name] for piece in pieces], dim=2) for name in outputs}
    if p.lateral_strength is not None:
        made["bias"] = made["bias"] - reference.neighbours(made.pop("activity"), p.broadcast(2), doc)
    if record is not None:
        record |= made
    return made["bias"], state


def _presyn_core(
    drive: Tensor, p: PresynParams, state: PresynState, closed: int, record: dict[str, Tensor] | None
) -> tuple[Tensor, PresynState]:
    ticks = drive.shape[2]
    p = p.broadcast(2)
    decay, influx = calcium_step(p)
    calcium = linear_scan(decay.expand(*drive.shape[:3], 1), influx * drive, state.calcium)
    course = PresynState(calcium[:, :, :-1], calcium[:, :, :-1], drive)  # the pool follows below; neither logit nor rates read it
    logit = release_logit(course, p)
    pool_decay, pool_target, _ = pool_step(p.release_rate * torch.sigmoid(logit) * drive, 1 / p.tau_rrp, p)
    vesicles = linear_scan(pool_decay, pool_target * (1 - pool_decay), state.vesicles)
    course = course._replace(vesicles=vesicles[:, :, :-1])
    beta = terminal_bias(course, p, logit)
    if record is not None:
        record |= {"calcium": course.calcium, "vesicles": course.vesicles, "bias": beta, "released": terminal_step(course, drive, p)[1]}
    left = drive[:, :, closed] if closed < ticks else torch.zeros_like(state.open_drive)
    return beta, PresynState(calcium[:, :, closed], vesicles[:, :, closed], left)


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
) -> Tensor:
    """See `kernels.tick_biased_attention`. Equation (H4)."""
    heads, length, head_dim = q.shape[1:]
    k, v = expand_heads(k, heads), expand_heads(v, heads)
    plain = window is None and doc is None and isinstance(q_start, int)
    if beta is None:
        return _attend(q, k, v, scale, plain, q_start, window, doc, slice(0, k.shape[2]))
    positions = query_positions(q_start, length, q.device)
    ticks = local_ticks(q_start, positions, tick)
    outputs, most = [], _ticks_per_block(q)
    for begin, end in _query_blocks(q_start, length, tick, most):
        low, high = _key_range(q_start, begin, end, k.shape[2], window)
        base = ticks[:, begin : begin + 1]
        if isinstance(q_start, int):
            first = (q_start + begin) // tick - q_start // tick
            count = (q_start + end - 1) // tick - q_start // tick + 1 - first
            bias = beta[:, :, first : first + count, low:high]
        else:
            count = min(most, beta.shape[2])
            rows = (base + torch.arange(count, device=q.device)).clamp(max=beta.shape[2] - 1)
            bias = beta.gather(2, rows[:, None, :, None].expand(-1, heads, -1, beta.shape[3]))
        onehot = F.one_hot(ticks[:, begin:end] - base, count).to(q.dtype)
        spare = -(head_dim + count) % 8
        onehot = F.pad(onehot, (0, spare))[:, None].expand(q.shape[0], heads, -1, -1)
        columns = F.pad((bias / scale).to(k.dtype), (0, 0, 0, spare)).transpose(-1, -2)
        wide_q = torch.cat([q[:, :, begin:end], onehot], dim=-1)
        wide_k = torch.cat([k[:, :, low:high], columns], dim=-1)
        wide_v = F.pad(v[:, :, low:high], (0, count + spare))
        start = q_start + begin
        y = _attend(wide_q, wide_k, wide_v, scale, plain, start, window, doc, slice(low, high))
        outputs.append(y[..., :head_dim])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, plain: bool, q_start: QStart, window: int | None, doc: Tensor | None, span: slice
) -> Tensor:
    """scaled_dot_product_attention of queries from q_start against the keys at absolute positions `span`."""
    length, keys = q.shape[2], k.shape[2]
    if plain and q_start + length == span.stop:
        if length == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if length == 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        if q.is_cuda:
            from torch.nn.attention.bias import causal_lower_right  # imported late: it loads the whole compiler

            return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(length, keys), scale=scale)
    positions = query_positions(q_start, length, q.device)
    mask = allowed(positions, torch.arange(span.start, span.stop, device=q.device), window=window, doc=doc)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
