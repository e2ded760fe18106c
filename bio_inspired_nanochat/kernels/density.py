"""The molecules of the postsynaptic density over the ticks of a sequence; the biology of one density is in `kernels.molecules`.

K, P and D are constant within a tick and move once, with its last token. Documents: where one begins (`fresh`), all restart,
inside a tick if need be; ticks stay absolute, and from a document's first token until the end of that tick K, P and D are at
rest.

The linear mode is a matrix product over ticks. The latch is a loop, as a custom operator: opaque to torch.compile, and with
a backward pass that reads every tick's slopes off the kept course at once; on CUDA one kernel each (`kernels.density_triton`).

Dimensions: B batch, T tokens, N ticks, c tick length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.kernels.decay import decayed_sums
from bio_inspired_nanochat.kernels.masks import QStart, num_ticks
from bio_inspired_nanochat.kernels.molecules import DensityParams, DensityState, density_step, drives, latch_slopes, latch_step
from bio_inspired_nanochat.kernels.scan import on_triton

__all__ = ["DensityParams", "DensityState", "density", "density_step"]

LATCH_CONSTANTS = DensityParams._fields[2:]  # all but tick and latch, in this order wherever they travel as one tensor


class _Grid(NamedTuple):
    """A chunk laid out by ticks. place [T] or [B, T]: of each token in the grid's N * c places."""

    ticks: int
    offset: int | Tensor
    tick: int

    def lay(self, x: Tensor) -> Tensor:
        """Tokens [B, T] to [B, N, c]; places that hold no token of the chunk are zero."""
        batch, length = x.shape
        if isinstance(self.offset, int):
            x = F.pad(x, (self.offset, self.ticks * self.tick - self.offset - length))
            return x.view(batch, self.ticks, self.tick)
        token = torch.arange(self.ticks * self.tick, device=x.device) - self.offset[:, None]
        held = (token >= 0) & (token < length)
        x = x.gather(1, token.clamp(0, length - 1))
        return torch.where(held, x, torch.zeros_like(x)).view(batch, self.ticks, self.tick)

    def tokens(self, x: Tensor, length: int) -> Tensor:
        """Places [B, N, c] back to tokens [B, T]."""
        x = x.flatten(1)
        if isinstance(self.offset, int):
            return x[:, self.offset : self.offset + length]
        return x.gather(1, torch.arange(length, device=x.device) + self.offset[:, None])


def density(
    calcium: Tensor,
    params: DensityParams,
    state: DensityState,
    first: QStart,
    *,
    fresh: Tensor | None = None,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, DensityState]:
    """K, P and D that each token sees, and the state after the last one. Handing the state over equals one call.

    Args:
        calcium: [B, T] >= 0, calcium of each token. state: at the first token.
        first: absolute position of the first token, common or per row as an integer tensor [B].
        fresh: [B, T] bool, True where a document begins. live: [B, T] bool, False for padding at the right end.

    Returns:
        camkii, pp1, bdnf: [B, T], constant within a tick and document, in float32 (float64 for float64 calcium); the state at
        the start of the open tick with what the running document has brought into it. Differentiable in calcium, the
        constants and the state.
    """
    batch, length = calcium.shape
    tick = params.tick
    calcium = calcium.to(torch.promote_types(calcium.dtype, torch.float32))
    state = DensityState(*[part.to(calcium.dtype) for part in state])
    offset = first % tick if isinstance(first, int) else first.to(calcium.device) % tick
    grid = _Grid(num_ticks(first, length, tick), offset, tick)
    arrived = length if live is None else live.sum(1)
    if live is not None:
        calcium = torch.where(live, calcium, torch.zeros_like(calcium))
        fresh = None if fresh is None else fresh & live
    collected = grid.lay(calcium)
    opened = state.open_calcium
    before = seen = None
    if fresh is not None:
        seen = grid.lay(fresh.int()).flatten(1).cumsum(1).view(batch, grid.ticks, tick)
        after = seen[:, :, -1]  # documents begun up to the end of each tick, and up to its start
        before = F.pad(after[:, :-1], (1, 0))
        collected = torch.where(seen == after[:, :, None], collected, torch.zeros_like(collected))
        opened = torch.where(after[:, 0] == 0, opened, torch.zeros_like(opened))
    collected = collected.sum(-1)
    collected = torch.cat([(collected[:, 0] + opened)[:, None], collected[:, 1:]], dim=1)

    closed = (offset + arrived) // tick
    if isinstance(closed, int) and closed == 0:
        levels = torch.stack(state[:3], dim=-1)[:, None]  # no tick ends here
    else:
        levels = _levels(collected / tick, params, state, None if fresh is None else F.pad(after, (1, 0)))
    during = levels[:, : grid.ticks, None].expand(-1, -1, tick, -1)
    if fresh is not None:
        during = torch.where((seen == before[:, :, None])[..., None], during, torch.zeros_like(during))
    first, second, third = (grid.tokens(part, length) for part in during.unbind(-1))
    final = _open_tick(levels, collected, closed, None if fresh is None else F.pad(after - before, (0, 1)) > 0)
    return first, second, third, final


def _open_tick(levels: Tensor, collected: Tensor, closed: int | Tensor, restarted: Tensor | None) -> DensityState:
    """The state at the tick that is left open, number `closed` of the chunk's."""
    collected = F.pad(collected, (0, 1))
    if isinstance(closed, int):
        ends, total = levels[:, closed], collected[:, closed]
        restarted = None if restarted is None else restarted[:, closed]
    else:
        rows = torch.arange(len(levels), device=levels.device)
        ends, total = levels[rows, closed], collected[rows, closed]
        restarted = None if restarted is None else restarted[rows, closed]
    if restarted is not None:
        ends = torch.where(restarted[:, None], torch.zeros_like(ends), ends)
    return DensityState(*ends.unbind(-1), total)


def _levels(calcium: Tensor, params: DensityParams, state: DensityState, segment: Tensor | None) -> Tensor:
    """K, P and D at the start of each of N + 1 ticks, [B, N + 1, 3], from each tick's mean calcium [B, N].

    segment: [B, N + 1] documents begun before each tick; a document that begins within a tick starts it from rest.
    """
    taus = (params.tau_camkii, params.tau_pp1, params.tau_bdnf)
    decay = torch.stack([torch.exp(-params.tick / _scalar(tau, calcium)) for tau in taus])
    gains = torch.stack(drives(calcium, params), dim=-1) * (1 - decay)
    values = torch.cat([torch.stack(state[:3], dim=-1)[:, None], gains], dim=1)
    if not params.latch:
        return decayed_sums(values[:, :, None], decay, segment)[:, :, 0].clamp(0.0, 1.0)  # against rounding
    bdnf = decayed_sums(values[:, :, None, 2:], decay[2:], segment)[:, :, 0].clamp(0.0, 1.0)
    kept = torch.ones_like(calcium) if segment is None else (segment[:, 1:] == segment[:, :-1]).to(calcium.dtype)
    return torch.cat([_latch_levels(torch.stack([state.camkii, state.pp1], dim=-1), calcium, kept, params), bdnf], dim=-1)


def _latch_levels(start: Tensor, calcium: Tensor, kept: Tensor, params: DensityParams) -> Tensor:
    """K and P at the start of each of N + 1 ticks, [B, N + 1, 2]. start [B, 2]; calcium, kept [B, N]; kept = 0 restarts a tick.

    The loop only finds the course. Its gradient: one step of every tick at once, from a fixed copy of the course, carries the
    dependence on calcium and constants, and `latch_join` hands the cotangents back from tick to tick through the slopes.
    """
    constants = torch.stack([_scalar(getattr(params, name), calcium) for name in LATCH_CONSTANTS])
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return _latch_course(start, calcium, kept, constants, params.tick)
    course = latch_course(start.detach(), calcium.detach(), kept, constants.detach(), params.tick)
    params = _unpack(constants, params.tick)
    before = [part * kept for part in course[:, :-1].unbind(-1)]
    stepped = torch.stack(latch_step(*before, calcium, params), dim=-1)
    with torch.no_grad():
        slopes = torch.stack(latch_slopes(*before, calcium, params), dim=-1).unflatten(-1, (2, 2)) * kept[..., None, None]
    return latch_join(torch.cat([start[:, None], stepped], dim=1), course, slopes)


def _on_kernels(x: Tensor) -> bool:
    return on_triton(x) and x.dtype == torch.float32


def _unpack(constants: Tensor, tick: int) -> DensityParams:
    return DensityParams(tick, True, *constants.unbind())


def _latch_course(start: Tensor, calcium: Tensor, kept: Tensor, constants: Tensor, tick: int) -> Tensor:
    if _on_kernels(start):
        from bio_inspired_nanochat.kernels import density_triton  # imported late: a machine without Triton never gets here

        return density_triton.course(start, calcium, kept, constants, tick)
    params, course = _unpack(constants, tick), [start]
    for now, keep in zip(calcium.unbind(1), kept.unbind(1), strict=True):
        course.append(torch.stack(latch_step(*(course[-1] * keep[:, None]).unbind(-1), now, params), dim=-1))
    return torch.stack(course, dim=1)


latch_course = torch.library.custom_op("bio_inspired_nanochat::latch_course", _latch_course, mutates_args=())


@latch_course.register_fake
def _(start: Tensor, calcium: Tensor, kept: Tensor, constants: Tensor, tick: int) -> Tensor:
    return start.new_empty(start.shape[0], calcium.shape[1] + 1, 2)


@torch.library.custom_op("bio_inspired_nanochat::latch_join", mutates_args=())
def latch_join(stepped: Tensor, course: Tensor, slopes: Tensor) -> Tensor:
    """The course [B, N + 1, 2] as a function of `stepped`, its start and what each tick makes of a fixed copy of the course.

    slopes: [B, N, 2, 2], after by before.
    """
    return course.clone()


@latch_join.register_fake
def _(stepped: Tensor, course: Tensor, slopes: Tensor) -> Tensor:
    return torch.empty_like(course)


@torch.library.custom_op("bio_inspired_nanochat::latch_adjoint", mutates_args=())
def latch_adjoint(grad: Tensor, slopes: Tensor) -> Tensor:
    """g[n] = grad[n] + slopes[n]^T g[n + 1], from the end. grad: [B, N + 1, 2]."""
    if _on_kernels(grad):
        from bio_inspired_nanochat.kernels import density_triton

        return density_triton.adjoint(grad, slopes)
    adjoint = [grad[:, -1]]
    for n in range(slopes.shape[1] - 1, -1, -1):
        adjoint.append(grad[:, n] + (slopes[:, n] * adjoint[-1][:, :, None]).sum(1))
    return torch.stack(adjoint[::-1], dim=1)


@latch_adjoint.register_fake
def _(grad: Tensor, slopes: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _latch_join_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _latch_join_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return latch_adjoint(grad, ctx.saved_tensors[0]), None, None


latch_join.register_autograd(_latch_join_backward, setup_context=_latch_join_setup)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
