"""The fused execution of a whole synaptic attention layer as one differentiable operator.

Forward: drive, terminals, attention, one kernel each, and one for lateral inhibition where it is on. Backward: the terminals again, then dk, dv and the gradient of the bias,
the terminals in reverse time, dk of the drive, and dq. What passes between two kernels belongs to a tick and a key; it lives in
a workspace of bounded size for a few pairs of batch row and head at a time. Of it only the drive is kept between forward and
backward, and in long contexts not even that: then the backward computes it again.

Dimensions: B batch, H query heads, Hkv key heads, T tokens, N ticks, D head size; S state variables, C constants of the terminals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels import attention_adjoint_triton, attention_triton, drive_triton, lateral_triton
from bio_inspired_nanochat.kernels.masks import num_ticks
from bio_inspired_nanochat.kernels.noise import ReleaseNoise
from bio_inspired_nanochat.kernels.presyn_codegen import BLOCK, LAUNCH, Spec, constants_of, signature_of, state_from, states_of
from bio_inspired_nanochat.kernels.presyn_kernels import Kernels, kernels_for
from bio_inspired_nanochat.kernels.presyn_triton import noise_tensors
from bio_inspired_nanochat.kernels.presyn_triton import obstacle as presyn_obstacle
from bio_inspired_nanochat.kernels.reference import presyn_bias
from bio_inspired_nanochat.kernels.scan_triton import running_sum, sum_from_end
from bio_inspired_nanochat.kernels.terminal import SHORTAGES
from bio_inspired_nanochat.kernels.tiles import KINDS, Site, dense, key_gradients, launch, planes_of, sum_groups
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

# Largest |logit| + beta_max whose exponentials and their sums stay well inside float32 without a running maximum.
LARGEST_LOGIT = 40.0
# Values of one buffer of the workspace: more pairs at once keep a large GPU busy, fewer save memory.
WORKSPACE = 1 << 26


def obstacle(p: PresynParams, noise: ReleaseNoise | None, theta: Tensor) -> str | None:
    """Why the kernels cannot serve these terminals with thresholds theta [H], or None."""
    return presyn_obstacle(p, noise, theta)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    p: PresynParams,
    scale: float,
    largest: float | None,
    *,
    cost: Tensor | None = None,
    strength: Tensor | None = None,
    window: int | None = None,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    kind: str = "phi",
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """See `kernels.fused_attention`."""
    constants, drawn, signature = _terminals(q, p, noise, record is not None)
    options = (p.lateral_strength, p.lateral_window, signature, scale, _limit(p, largest), window, kind)
    y, _, _, low = fused_op(q, k, v, theta, constants, cost, strength, doc, *drawn, *options)
    if record is not None:
        all_of_them = q.shape[0] * q.shape[1] * num_ticks(0, q.shape[2], p.tick) * k.shape[2]
        record |= dict(zip(_low(Spec.parse(signature)), (low / all_of_them).unbind(), strict=True))
    return y


@torch.no_grad()
def opening(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    p: PresynParams,
    scale: float,
    largest: float | None,
    *,
    cost: Tensor | None = None,
    strength: Tensor | None = None,
    window: int | None = None,
    doc: Tensor | None = None,
    noise: ReleaseNoise | None = None,
    kind: str = "phi",
) -> tuple[Tensor, PresynState, Tensor]:
    """See `kernels.fused_opening`."""
    constants, drawn, signature = _terminals(q, p, noise)
    lateral = (p.lateral_strength, p.lateral_window)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))  # a cache is read where it is
    it = _Layer.of(q, k, v, theta, constants, cost, strength, doc, *drawn, *lateral, signature, scale, window, kind)
    (y, stat), names = _outputs(q), it.kernels.spec.states
    final = torch.empty(len(names) + 1, *q.shape[:2], k.shape[2], device=q.device)
    open_drive = torch.zeros_like(final[0])
    for site, drive, planes, _, _ in it.sites(q.new_empty(0), it.low(), backward=False, final=final):
        attention_triton.forward(it.q, it.k, it.v, planes, it.barrier, it.strength, _limit(p, largest), site, y, stat)
        if q.shape[2] % p.tick:
            open_drive.flatten(0, 1)[site.first : site.first + site.count] = drive[: site.count, -1].float() / p.tick
    *states, beta = final
    state = state_from(dict(zip(names, states, strict=True)), open_drive)
    return y, state, beta if p.lateral_strength is None else presyn_bias(state, p, doc)


def _terminals(q: Tensor, p: PresynParams, noise: ReleaseNoise | None, low: bool = False) -> tuple[Tensor, tuple, str]:
    """The terminals' constants [C, H], the tensors that they draw from, and the signature of their kernels; low: with `SHORTAGES`."""
    noisy, states = noise is not None and p.sampler is not None, list(states_of(PresynState.rest(1, 1, 1, params=p)))
    outputs = ["bias"] if p.lateral_strength is None else ["bias", "activity"]
    outputs += [name for name, (part, _) in SHORTAGES.items() if low and part in states]
    signature = signature_of(p, states, outputs, noisy, "layer")
    return torch.stack(list(constants_of(p).values())), noise_tensors(noise, q) if noisy else (None, None, None), signature


def _low(spec: Spec) -> list[str]:
    """Those of `SHORTAGES` that the kernels of a layer sum up."""
    return [name for name in spec.outputs if name in SHORTAGES]


def _limit(p: PresynParams, largest: float | None) -> float | None:
    """Bound on the biased logits in units of log 2, where there is one that float32 bears without a running maximum."""
    bounded = largest is not None and 0 < p.beta_max <= LARGEST_LOGIT - largest and p.lateral_strength is None
    return (largest + p.beta_max) / math.log(2) if bounded else None


def _keeping(q: Tensor, ticks: int) -> int:
    """How many pairs keep their drive: all, or none where it would take more memory than q, k, v and y."""
    return q.shape[0] * q.shape[1] if ticks <= 4 * q.shape[3] else 0


class _Layer(NamedTuple):
    """What the kernels of both directions share. q, k and v may have any strides but the last; gradients want them dense."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    constants: Tensor
    barrier: Tensor | None
    strength: Tensor | None
    doc: Tensor | None
    noise: tuple[Tensor, ...]
    lateral: Tensor | None
    reach: int
    kernels: Kernels
    scale: float
    window: int | None
    kind: int

    @classmethod
    def of(
        cls, q, k, v, theta, constants, cost, strength, doc, key, first, layer, lateral, reach, signature, scale, window, kind
    ) -> _Layer:
        plain = (theta.contiguous(), constants.contiguous())
        gate = (None, None) if cost is None else (running_sum(cost), strength.contiguous())
        noise = () if key is None else (key, first, layer)
        lateral = None if lateral is None else lateral.contiguous()
        return cls(q, k, v, *plain, *gate, doc, noise, lateral, reach, kernels_for(signature), scale, window, KINDS[kind])

    @property
    def ticks(self) -> int:
        return num_ticks(0, self.q.shape[2], self.kernels.spec.tick)

    @property
    def every(self) -> int:
        return self.kernels.spec.every(self.ticks)

    def buffer(self, count: int, *front: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised [count, *front, N, T]."""
        return torch.empty(count, *front, self.ticks, self.k.shape[2], dtype=dtype, device=self.q.device)

    def scratch(self, check: Tensor) -> Tensor:
        """Room for the states of the ticks between two stored ones, where registers have none."""
        return check.new_empty(self.every if self.kernels.spec.unroll == 1 else 0, *check.shape[1:])

    def kept(self) -> Tensor:
        """Room for the drive of the pairs that keep it."""
        return self.buffer(_keeping(self.q, self.ticks), dtype=self.q.dtype)

    def low(self) -> Tensor:
        """Room for the sums of shortages, [K, B, H, blocks]."""
        blocks = -(-self.k.shape[2] // BLOCK)
        return self.theta.new_empty(len(_low(self.kernels.spec)), *self.q.shape[:2], blocks)

    def sites(
        self, kept: Tensor, low: Tensor, backward: bool, final: Tensor | None = None
    ) -> Iterator[tuple[Site, Tensor, Tensor, Tensor, Tensor | None]]:
        """Groups of pairs, each with its drive, the bias as planes, the terminals' states every few ticks, and with lateral inhibition
        their activities.

        kept, low: see there; backward: it holds the drive already, if it is kept, and the states are needed; final [S + 1, B, H, Tk]:
        to fill with the states at the start of the tick that is left open, and their bias.
        """
        pairs, keys = self.q.shape[0] * self.q.shape[1], self.k.shape[2]
        most = min(pairs, max(1, WORKSPACE // (self.ticks * keys)))
        spec = self.kernels.spec
        planes = self.buffer(most, planes_of(self.q.dtype), dtype=self.q.dtype)
        activity = None if self.lateral is None else self.buffer(most)
        spare = None if len(kept) else self.buffer(most, dtype=self.q.dtype)
        check = torch.empty(-(-self.ticks // self.every) if backward else 0, len(spec.states), most, keys, device=self.q.device)
        for first in range(0, pairs, most):
            site = Site(spec.tick, self.scale, 0, self.window, self.doc, first, min(most, pairs - first))
            drive = kept[first : first + site.count] if spare is None else spare
            if spare is not None or not backward:
                drive_triton.forward(self.q, self.k, self.theta, self.kind, site, drive, fill=self.window is not None)
            written = [planes, *([] if activity is None else [activity]), *([low] if len(low) else [])]
            operands = (drive, self.constants, *written, check, check if final is None else final, *self._gate(), 1 / self.scale)
            self._launch(
                self.kernels.forward, site, *operands, self.q.shape[2] // spec.tick,
                P=planes_of(self.q.dtype), CHECK=backward, FINAL=final is not None,
            )  # fmt: skip
            if activity is not None:
                lateral_triton.inhibit(activity[: site.count], planes, self.lateral, self.reach, site)
            yield site, drive, planes, check, activity

    def _gate(self) -> tuple[Tensor, Tensor]:
        return (self.theta, self.theta) if self.barrier is None or self.strength is None else (self.barrier, self.strength)

    def _launch(self, kernel: Any, site: Site, *arguments: Any, **static: Any) -> None:
        pairs, keys = self.q.shape[0] * self.q.shape[1], self.k.shape[2]
        exact = keys % BLOCK == 0 and keys == self.ticks * self.kernels.spec.tick and self.ticks % self.every == 0
        launch(
            kernel, (site.count, -(-keys // BLOCK)), *arguments, site.first, pairs, self.ticks, keys, self.q.shape[1], self.every, *self.noise,
            BARRIER=self.barrier is not None, EXACT=exact, **static, **LAUNCH,
        )  # fmt: skip

    def reverse(self, site: Site, drive: Tensor, gdrive: Tensor, check: Tensor, gradients: list, scratch: Tensor, sums: tuple) -> None:
        """Fill the gradient of the drive from those of bias, activities and shortages; add this site's gradients of barrier, strength and constants
        to `sums`.
        """
        self._launch(self.kernels.backward, site, drive, self.constants, check, scratch, *gradients, gdrive, *self._gate(), *sums)


@torch.library.custom_op("bio_inspired_nanochat::fused_attention", mutates_args=())
def fused_op(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, constants: Tensor, cost: Tensor | None, strength: Tensor | None,
    doc: Tensor | None, key: Tensor | None, first: Tensor | None, layer: Tensor | None, lateral: Tensor | None, reach: int,
    signature: str, scale: float, limit: float | None, window: int | None, kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, laid out [B, T, H, D] in memory, the statistic of every query's logits [B, H, T] (`kernels.attention_triton`), the
    drive [B * H, N, T] if it is kept, else nothing, and the sums of those of `SHORTAGES` that the signature names.
    """
    sides, gate = (dense(q), dense(k), dense(v)), (cost, strength)
    it = _Layer.of(*sides, theta, constants, *gate, doc, key, first, layer, lateral, reach, signature, scale, window, kind)
    y, stat = _outputs(q)
    kept, low = it.kept(), it.low()
    for site, _, planes, _, _ in it.sites(kept, low, backward=False):
        attention_triton.forward(it.q, it.k, it.v, planes, it.barrier, it.strength, limit, site, y, stat)
    return y, stat, kept, low.sum((1, 2, 3))


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@fused_op.register_fake
def _(q, k, v, theta, constants, cost, strength, doc, key, first, layer, lateral, reach, signature, scale, limit, window, kind):
    spec = Spec.parse(signature)
    ticks = num_ticks(0, q.shape[2], spec.tick)
    return *_outputs(q), q.new_empty(_keeping(q, ticks), ticks, q.shape[2]), theta.new_empty(len(_low(spec)))


@torch.library.custom_op("bio_inspired_nanochat::fused_attention_adjoint", mutates_args=())
def fused_adjoint(
    grad: Tensor, glow: Tensor, y: Tensor, stat: Tensor, kept: Tensor,
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, constants: Tensor, cost: Tensor | None, strength: Tensor | None,
    doc: Tensor | None, key: Tensor | None, first: Tensor | None, layer: Tensor | None, lateral: Tensor | None, reach: int,
    signature: str, scale: float, window: int | None, kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, theta, constants, cost, strength and lateral, of their shapes (empty without barrier or inhibition)."""
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    it = _Layer.of(q, k, v, theta, constants, cost, strength, doc, key, first, layer, lateral, reach, signature, scale, window, kind)
    batch, heads, tokens, _ = q.shape
    delta, side = attention_adjoint_triton.row_products(grad, y, stat, scale)
    gq, gk, gv = torch.empty_like(q), key_gradients(q, k), key_gradients(q, v)
    shares, blocks = drive_triton.theta_shares(q, k, it.kernels.spec.tick), -(-tokens // BLOCK)
    gbarrier = delta.new_empty(batch, heads, tokens if cost is not None else 0)
    gstrength, partial = delta.new_empty(batch, heads, blocks), delta.new_empty(it.kernels.derived, batch * heads, blocks)
    rows = None if cost is None else torch.empty_like(delta)
    inhibition = delta.new_empty(0) if lateral is None else lateral_triton.strength_shares(it.buffer(0), batch * heads)
    gbeta = gdrive = scratch = gactivity = None
    for site, drive, planes, check, activity in it.sites(kept, it.low(), backward=True):
        gbeta = it.buffer(planes.shape[0]) if gbeta is None else gbeta
        gdrive = torch.empty_like(gbeta, dtype=q.dtype) if gdrive is None else gdrive
        scratch = it.scratch(check) if scratch is None else scratch
        attention_adjoint_triton.backward_keys(grad, q, k, v, planes, side, site, gk, gv, gbeta, fill=window is not None)
        gradients = [gbeta]
        if activity is not None:
            gactivity = torch.empty_like(gbeta) if gactivity is None else gactivity
            lateral_triton.adjoint(gbeta, activity, gactivity, it.lateral, it.reach, site, inhibition)
            gradients.append(gactivity)
        if len(glow):
            gradients.append(glow)
        it.reverse(site, drive, gdrive, check, gradients, scratch, (gbarrier, gstrength, partial))
        drive_triton.backward_keys(q, k, it.theta, it.kind, gdrive, site, gk, shares, add=True)
        attention_adjoint_triton.backward_queries(grad, q, k, v, planes, stat, delta, site, gq, gdrive, it.theta, it.kind, rows)
    gconstants = torch.empty_like(it.constants)
    launch(it.kernels.finish, (heads, 1), it.constants, partial, gconstants, batch, heads, blocks, **LAUNCH)
    gk, gv = sum_groups(gk, k), sum_groups(gv, v)
    gate = (gbarrier, gstrength.new_empty(0))
    if cost is not None:  # the sums of a query's row are zero in exact arithmetic; here they cancel the rounding of all later ones
        gate = (sum_from_end(torch.addcmul(gbarrier, it.strength[:, None], rows, value=-1)), gstrength.sum((0, 2)))
    glateral = inhibition if lateral is None else inhibition.unflatten(0, (batch, heads)).sum((0, 2, 3))
    return gq, gk, gv, shares.sum((0, 2)), gconstants, *gate, glateral


@fused_adjoint.register_fake
def _(grad, glow, y, stat, kept, q, k, v, theta, constants, cost, *rest):
    q, k, v = dense(q), dense(k), dense(v)
    gk, gv = (sum_groups(key_gradients(q, x), x) for x in (k, v))
    gcost = theta.new_empty(*q.shape[:2], 0 if cost is None else q.shape[2])
    plain = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (theta, constants))
    gates = (theta.new_empty(0 if part is None else len(theta)) for part in (cost, rest[5]))
    return torch.empty_like(q), gk, gv, *plain, gcost, *gates


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.reach, ctx.signature, ctx.scale, _, ctx.window, ctx.kind = inputs
    ctx.save_for_backward(*tensors, *output[:3])
    ctx.set_materialize_grads(False)  # else the kept drive, which nobody differentiates, gets zeros of its size


def _backward(ctx, grad, _stat, _kept, glow):
    *tensors, y, stat, kept = ctx.saved_tensors
    grad = torch.zeros_like(y) if grad is None else grad
    glow = tensors[3].new_zeros(len(_low(Spec.parse(ctx.signature)))) if glow is None else glow
    options = (ctx.reach, ctx.signature, ctx.scale, ctx.window, ctx.kind)
    *grads, gcost, gstrength, glateral = fused_adjoint(grad, glow, y, stat, kept, *tensors, *options)
    gate = (None, None) if tensors[5] is None else (gcost, gstrength)
    return *grads, *gate, *[None] * 4, None if tensors[11] is None else glateral, *[None] * 6


fused_op.register_autograd(_backward, setup_context=_setup)
