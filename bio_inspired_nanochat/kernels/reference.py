"""The definition of the three operators in plain differentiable PyTorch. Every other execution is tested against this file.

Dimensions: B batch, H query heads, Hkv key heads, T tokens (Tq queries, Tk keys), N ticks, D head size, c tick length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.kernels.masks import QStart, allowed, local_ticks, num_ticks, query_positions
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState


def phi(x: Tensor, kind: str = "phi") -> Tensor:
    """Calcium drive of a logit above threshold: 0 below -1, (x+1)^2/4 in between, x above 1 (a C1 softplus).

    `kind="softplus"` is the softplus itself.
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
    """U[n, j] = sum over the queries t > j of tick n of phi(q_t . k_j * scale - theta); shapes as in `kernels.tick_drive`."""
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


def release_logit(calcium: Tensor, p: PresynParams) -> Tensor:
    """Logit of the release probability: a * syt(C) + b0 with the sensors' Hill curves C / (C + K)."""
    fast = calcium / (calcium + p.k_fast[:, None])
    if p.syt_mix is None or p.k_slow is None:
        syt = fast
    else:
        syt = p.syt_mix[:, None] * fast + (1 - p.syt_mix[:, None]) * calcium / (calcium + p.k_slow[:, None])
    return p.syt_gain[:, None] * syt + p.release_bias[:, None]


def log_pool(vesicles: Tensor, epsilon: float) -> Tensor:
    """l(x) = log((x + eps) / (1 + eps)): zero for a full pool, finite slope at an empty one."""
    return torch.log((vesicles + epsilon) / (1 + epsilon))


def presyn_bias(state: PresynState, p: PresynParams) -> Tensor:
    """beta [..., H, Tk] = g_f log(p / p_rest) + g_d l(R), limited smoothly to +-beta_max; 0 for a rested terminal."""
    return bias_of(state.calcium, state.vesicles, p)


def bias_of(calcium: Tensor, vesicles: Tensor, p: PresynParams, logit: Tensor | None = None) -> Tensor:
    """`presyn_bias` from its two ingredients, [..., H, Tk] each; `logit` saves a second release_logit(calcium)."""
    logit = release_logit(calcium, p) if logit is None else logit
    facilitation = F.logsigmoid(logit) - F.logsigmoid(p.release_bias)[:, None]
    beta = p.gain_release[:, None] * facilitation + p.gain_depletion[:, None] * log_pool(vesicles, p.epsilon)
    return p.beta_max * torch.tanh(beta / p.beta_max) if p.beta_max > 0 else beta


def pool_step(drive: Tensor, logit: Tensor, p: PresynParams) -> tuple[Tensor, Tensor]:
    """Decay e and target R_inf of the pool over one tick: R+ = R_inf + (R - R_inf) e.

    lambda = u p I + 1/tau_rrp, e = exp(-c lambda), R_inf = 1 / (tau_rrp lambda): exact for constant p and I, with release
    and refill acting together (the rate form of Tsodyks and Markram, 1997).
    """
    refill = 1 / p.tau_rrp[:, None]
    rate = p.release_rate[:, None] * torch.sigmoid(logit) * drive + refill
    return torch.exp(-p.tick * rate), refill / rate


def calcium_step(p: PresynParams) -> tuple[Tensor, Tensor]:
    """Decay and influx of calcium over one tick, [H, 1] each: C+ = decay C + influx I, exact for constant I."""
    decay = torch.exp(-p.tick / p.tau_c)
    return decay[:, None], ((1 - decay) * p.tau_c * p.alpha_ca)[:, None]


def presyn_step(state: PresynState, drive: Tensor, p: PresynParams) -> PresynState:
    """Advance every terminal by one tick under a mean drive I = `drive` [B, H, Tk] >= 0."""
    decay, influx = calcium_step(p)
    pool_decay, pool_target = pool_step(drive, release_logit(state.calcium, p), p)
    return PresynState(
        calcium=decay * state.calcium + influx * drive,
        vesicles=pool_target + (state.vesicles - pool_target) * pool_decay,
        open_drive=torch.zeros_like(drive),
    )


def released(state: PresynState, drive: Tensor, p: PresynParams) -> Tensor:
    """Vesicles released during one tick, [B, H, Tk], as a fraction of the full pool: the integral of u p I R(t)."""
    logit = release_logit(state.calcium, p)
    use = p.release_rate[:, None] * torch.sigmoid(logit) * drive
    rate = use + 1 / p.tau_rrp[:, None]
    pool_decay, pool_target = pool_step(drive, logit, p)
    return use * (p.tick * pool_target + (state.vesicles - pool_target) * (1 - pool_decay) / rate)


def presyn(drive: Tensor, p: PresynParams, state: PresynState | None, closed: int | Tensor | None = None) -> tuple[Tensor, PresynState]:
    """Run the terminals over the ticks of `drive` [B, H, N, Tk]; shapes as in `kernels.presyn`."""
    batch, heads, ticks, keys = drive.shape
    if state is None:
        state = PresynState.rest(batch, heads, keys, device=drive.device, dtype=drive.dtype)
    if closed is None:
        closed = ticks
    biases = []
    for n in range(ticks):
        biases.append(presyn_bias(state, p))
        collected = drive[:, :, n] + state.open_drive
        ahead = presyn_step(state, collected, p)
        if isinstance(closed, int):
            state = ahead if n < closed else state._replace(open_drive=collected)
        else:
            done = (n < closed.to(drive.device))[:, None, None]
            state = PresynState(
                torch.where(done, ahead.calcium, state.calcium),
                torch.where(done, ahead.vesicles, state.vesicles),
                torch.where(done, 0.0, collected),
            )
    return torch.stack(biases, dim=2), state


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
    """Softmax attention with logits q.k * scale + beta[n(t), j]; shapes as in `kernels.tick_biased_attention`."""
    batch, heads, length, _ = q.shape
    logits = torch.einsum("bhtd,bhjd->bhtj", q, expand_heads(k, heads)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    positions = query_positions(q_start, length, q.device)
    if beta is not None:
        ticks = local_ticks(q_start, positions, tick).expand(batch, -1)
        logits = logits + beta.gather(2, ticks[:, None, :, None].expand(batch, heads, length, beta.shape[-1]))
    mask = allowed(positions, torch.arange(k.shape[2], device=q.device), window=window, doc=doc)
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("bhtj,bhjd->bhtd", weights.to(v.dtype), expand_heads(v, heads))
