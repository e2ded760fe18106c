"""The definition of the three operators in plain differentiable PyTorch. Every other execution is tested against this file.

The biology of one terminal is in `kernels.terminal`; here it runs over ticks and keys.

Dimensions: B batch, H query heads, Hkv key heads, T tokens (Tq queries, Tk keys), N ticks, D head size, c tick length.

Numbered equations are those of prompts/hybrid.md and prompts/presynapse.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.kernels.masks import QStart, allowed, local_ticks, num_ticks, query_positions
from bio_inspired_nanochat.kernels.noise import ReleaseNoise, sampled_probability
from bio_inspired_nanochat.kernels.terminal import activity, release_logit, terminal_bias, terminal_step
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState


def phi(x: Tensor, kind: str = "phi") -> Tensor:
    """Calcium drive of a logit above threshold: 0 below -1, (x+1)^2/4 in between, x above 1 (a C1 softplus). Equation (P2).

    Elementwise, in logits; `kind="softplus"` is the softplus itself.
    """
    if kind == "softplus":
        return F.softplus(x)
    return torch.where(x < 1, (x + 1).clamp(min=0).square() / 4, x)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, T, D] to [B, H, T, D]: each key head serves H / Hkv consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


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
) -> Tensor:
    """U[n, j] = sum over the queries t > j of tick n of phi(q_t . k_j * scale - theta); shapes as in `kernels.tick_drive`.

    Equation (P1).
    """
    batch, heads, length, _ = q.shape
    logits = torch.einsum("bhtd,bhjd->bhtj", q, expand_heads(k, heads)).to(theta.dtype) * scale
    positions = query_positions(q_start, length, q.device)
    mask = allowed(positions, torch.arange(k.shape[2], device=q.device), window=window, doc=doc, diagonal=False)
    if q_len is not None:
        mask = mask & (torch.arange(length, device=q.device) < q_len.to(q.device)[:, None])[:, None, :, None]
    drive = torch.where(mask, phi(logits - theta[:, None, None], kind), 0.0)
    ticks = local_ticks(q_start, positions, tick).expand(batch, -1)
    total = drive.new_zeros(batch, heads, num_ticks(q_start, length, tick), k.shape[2])
    return total.scatter_add(2, ticks[:, None, :, None].expand_as(drive), drive)


def neighbours(activity: Tensor, p: PresynParams, doc: Tensor | None) -> Tensor:
    """Septin lateral inhibition: s_L times the mean activity of the `lateral_window` older keys, [..., Tk]. Equation (P19).

    activity: [B, H, Tk] or [B, H, N, Tk]; p.lateral_strength broadcasts against it; doc: [B, >= Tk], only keys of one document.
    """
    total = torch.zeros_like(activity)
    for distance in range(1, min(p.lateral_window, activity.shape[-1] - 1) + 1):
        older = activity[..., :-distance]
        if doc is not None:
            keys = doc[:, : activity.shape[-1]]
            same = keys[:, distance:] == keys[:, :-distance]
            older = older * same.view(same.shape[0], *[1] * (activity.ndim - 2), same.shape[1])
        total = total + F.pad(older, (distance, 0))
    return p.lateral_strength * total / p.lateral_window


def presyn_bias(state: PresynState, p: PresynParams, doc: Tensor | None = None) -> Tensor:
    """beta [B, H, Tk] of terminals in `state`: `terminal_bias` less the inhibition by older neighbours."""
    p = p.broadcast(1)
    return _bias(state, p, release_logit(state, p), doc)


def _bias(state: PresynState, p: PresynParams, logit: Tensor, doc: Tensor | None) -> Tensor:
    """`presyn_bias` with broadcast parameters, given the release logit of the state."""
    beta = terminal_bias(state, p, logit)
    return beta if p.lateral_strength is None else beta - neighbours(activity(state, p, logit), p, doc)


def presyn_step(
    state: PresynState, drive: Tensor, p: PresynParams, noise: ReleaseNoise | None = None, tick: int = 0
) -> tuple[PresynState, Tensor]:
    """Advance every terminal by one tick under a mean drive I [B, H, Tk] >= 0: the next state and what was released."""
    p = p.broadcast(1)
    return terminal_step(state, drive, p, _probability(release_logit(state, p), p, noise, tick))


def _probability(logit: Tensor, p: PresynParams, noise: ReleaseNoise | None, tick: int) -> Tensor:
    """Release probabilities of a tick, expected or sampled, for these logits [B, H, Tk]."""
    if noise is None or p.sampler is None:
        return torch.sigmoid(logit)
    return sampled_probability(logit, tick, noise, p.sampler)


def released(state: PresynState, drive: Tensor, p: PresynParams) -> Tensor:
    """Vesicles released during one tick, [B, H, Tk], as a fraction of the full pool: the integral of u p I R(t)."""
    return presyn_step(state, drive, p)[1]


def presyn(
    drive: Tensor,
    p: PresynParams,
    state: PresynState | None,
    closed: int | Tensor | None = None,
    *,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    record: dict[str, Tensor] | None = None,
) -> tuple[Tensor, PresynState]:
    """Run the terminals over the ticks of `drive` [B, H, N, Tk]; shapes as in `kernels.presyn`."""
    batch, heads, ticks, keys = drive.shape
    if state is None:
        state = PresynState.rest(batch, heads, keys, device=drive.device, dtype=drive.dtype, params=p)
    if closed is None:
        closed = ticks
    biases, states, releases = [], [], []
    p = p.broadcast(1)
    for n in range(ticks):
        logit = release_logit(state, p)
        biases.append(_bias(state, p, logit, doc))
        states.append(state)
        collected = drive[:, :, n] + state.open_drive
        ahead, freed = terminal_step(state, collected, p, _probability(logit, p, noise, n))
        releases.append(freed)
        if isinstance(closed, int):
            state = ahead if n < closed else state._replace(open_drive=collected)
        else:
            done = n < closed.to(drive.device)
            parts = {
                name: torch.where(done.view(-1, *[1] * (new.ndim - 1)), new, old)
                for (name, new), old in zip(ahead.parts().items(), state.parts().values(), strict=True)
            }
            state = PresynState(**parts)._replace(open_drive=torch.where(done[:, None, None], 0.0, collected))
    if record is not None:
        fill_record(record, states, biases, releases)
    return torch.stack(biases, dim=2), state


RECORDED = ("calcium", "vesicles", "buffer", "clamp", "primed", "reserve", "energy")


def fill_record(record: dict[str, Tensor], states: list[PresynState], biases: list[Tensor], releases: list[Tensor]) -> None:
    """Add the course of the terminals over the ticks, [B, H, N, Tk] each: states at the start of a tick, bias, release in it."""
    for name in RECORDED:
        if getattr(states[0], name) is not None:
            record[name] = torch.stack([getattr(state, name) for state in states], dim=2)
    record["bias"] = torch.stack(biases, dim=2)
    record["released"] = torch.stack(releases, dim=2)


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
    """Softmax attention with logits q.k * scale + beta[n(t), j]; shapes as in `kernels.tick_biased_attention`. Equation (H1)."""
    batch, heads, length, _ = q.shape
    logits = torch.einsum("bhtd,bhjd->bhtj", q, expand_heads(k, heads)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    positions = query_positions(q_start, length, q.device)
    if beta is not None:
        ticks = local_ticks(q_start, positions, tick).expand(batch, -1)
        logits = logits + beta.gather(2, ticks[:, None, :, None].expand(batch, heads, length, beta.shape[-1]))
    mask = allowed(positions, torch.arange(k.shape[2], device=q.device), window=window, doc=doc)
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("bhtj,bhjd->bhtd", weights.to(v.dtype), expand_heads(v, heads))
