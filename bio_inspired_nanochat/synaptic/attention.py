"""SynapticCausalSelfAttention: attention whose keys are presynaptic terminals.

Each query head h and key position j is a terminal. The logits of past queries drive calcium, calcium releases vesicles,
release empties the pool, and the terminal's state biases the logits of later ticks. The gated or linear barrier joins the
same per-key bias.

Dimensions: B batch, H query heads, T tokens, N ticks, D head size, L cache length.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import (
    PresynParams,
    PresynState,
    ReleaseNoise,
    cannot_fuse,
    fused_attention,
    fused_obstacle,
    fused_opening,
    num_ticks,
    presyn,
    presyn_bias,
    running_sum,
    tick_biased_attention,
    tick_drive,
)
from bio_inspired_nanochat.synaptic import native
from bio_inspired_nanochat.synaptic.glue import QK_SCALE
from bio_inspired_nanochat.synaptic.layers import CausalSelfAttention
from bio_inspired_nanochat.synaptic.presynaptic import Presynaptic
from bio_inspired_nanochat.synaptic.state import Chunk, Extras, LayerState

# What a terminal keeps between ticks, by mechanism.
STATE_OF = {
    "presyn": ("calcium", "vesicles", "open_drive", "beta"),
    "buffer": ("buffer",),
    "clamp_dynamics": ("clamp",),
    "priming": ("primed", "spent"),
    "reserve": ("reserve", "resynthesis"),
    "endocytosis": ("ring",),
    "rab": ("early", "late"),
    "energy": ("energy",),
    "barrier_gated": ("barrier",),
}


class SynapticCausalSelfAttention(CausalSelfAttention):
    """Vanilla attention plus one terminal per key and head. With all gains at zero it computes vanilla attention.

    checked: on a CPU, raise FloatingPointError with the layer's number for a drive that is not finite. Training turns it off: one
    rank alone must not leave a step that the others wait in, and the loss tells all of them.
    """

    checked = True

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.cfg = config.syn_cfg
        self.synapse = Presynaptic(config)
        self.state_fields |= {name for mechanism, names in STATE_OF.items() if mechanism in self.synapse.on for name in names}

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Tensor:
        """Attention output [B, H, T, D] for whole sequences, terminals starting at rest."""
        theta, params = (self.synapse.theta_value(), self.synapse.params()) if self.cfg.presyn else (None, None)
        if self.backend in ("auto", "fused"):
            obstacle = self._fused_obstacle(q, theta, params, extras)
            if obstacle is None:
                return self._fused(x, q, k, v, theta, params, extras)
            if self.backend == "fused":
                raise cannot_fuse(obstacle)
        tokens = q.shape[2]
        beta = None
        if params is not None:
            drive = self._drive(q, k, theta, window=self.window, doc=extras.doc)
            course = {"doc": extras.doc, "noise": extras.noise, "record": extras.record}
            beta, _ = presyn(drive, params, closed=tokens // self.tick, causal=True, backend=self.parts, **course)
        if self.cfg.barrier != "none":
            total = running_sum(self.synapse.barrier_cost(x)) if self.cfg.barrier == "gated" else None
            first = torch.arange(0, tokens, self.tick, device=x.device)[None]
            barrier = self.synapse.barrier_bias(total, first, tokens)
            beta = barrier if beta is None else beta + barrier
        return self._biased(q, k, v, beta, doc=extras.doc)

    def _fused_obstacle(self, q: Tensor, theta: Tensor | None, params: PresynParams | None, extras: Extras) -> str | None:
        """Why one operator cannot serve the whole layer, or None."""
        if params is None:
            return "it has no presynaptic terminals"
        if extras.record is not None and not extras.brief:
            return "telemetry reads the terminals tick by tick"
        return fused_obstacle(q, theta, params, extras.noise)

    def _fused(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, params: PresynParams, extras: Extras) -> Tensor:
        cost = None if self.cfg.barrier == "none" else self.synapse.barrier_cost(x)
        options = self._options(cost, extras.doc, extras.noise)
        return fused_attention(q, k, v, theta, params, self.scale, self._largest, record=extras.record, **options)

    @property
    def _largest(self) -> float:
        """Bound on the logits that QK norm gives, and a little for rounding. Equation (H8)."""
        return 1.01 * QK_SCALE**2 * self.head_dim * self.scale

    def _options(self, cost: Tensor | None, doc: Tensor | None, noise: ReleaseNoise | None) -> dict[str, Any]:
        strength = None if cost is None else self.synapse.strength()
        return {"cost": cost, "strength": strength, "window": self.window, "doc": doc, "noise": noise, "kind": self.cfg.drive}

    def attend_step(self, x: Tensor, q: Tensor, state: LayerState, chunk: Chunk) -> Tensor:
        """Attention output [B, H, t, D] of a chunk against the cache; the terminals in `state` advance in place."""
        if (y := native.attend(self, x, q, state, chunk)) is not None:
            return y
        stop = chunk.stop
        k, v = state.k[:, :, :stop], state.v[:, :, :stop]
        if self._may_open(chunk):
            terminals = self.synapse.theta_value(), self.synapse.params()
            if self._fused_obstacle(q, *terminals, Extras(noise=self._noise(chunk))) is None:
                return self._open(x, q, k, v, *terminals, state, chunk)
        beta = self._advance(q, k, state, chunk) if self.cfg.presyn else None
        if self.cfg.barrier != "none":
            barrier = self._barrier_step(x, state, chunk)
            beta = barrier if beta is None else beta + barrier
        return self._biased(q, k, v, beta, q_start=chunk.start, doc=chunk.doc)

    def _may_open(self, chunk: Chunk) -> bool:
        """Whether it is the first chunk of all rows, long enough for one operator."""
        first = bool(chunk.uniform and chunk.start == 0)
        return first and chunk.size >= self.tick and self.cfg.presyn and self.backend in ("auto", "fused")

    def _noise(self, chunk: Chunk) -> ReleaseNoise | None:
        return None if chunk.noise is None else chunk.noise.at(self.layer, chunk.start // self.tick)

    def _open(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, params: PresynParams, state: LayerState, chunk: Chunk
    ) -> Tensor:
        """`attend_step` of the first chunk of all rows, by one operator."""
        cost = None
        if self.cfg.barrier != "none":
            cost = self.synapse.barrier_cost(x)
            if state.barrier is not None:
                chunk.write(state.barrier, cost.to(state.barrier.dtype).cumsum(-1))
        options = self._options(cost, chunk.doc, self._noise(chunk))
        y, after, state.beta[:, :, : chunk.stop] = fused_opening(q, k, v, theta, params, self.scale, self._largest, **options)
        for name, value in after.parts().items():
            getattr(state, name)[:, :, : chunk.stop] = value
        return y

    def _drive(self, q: Tensor, k: Tensor, theta: Tensor, **where) -> Tensor:
        drive = tick_drive(q, k, theta, self.tick, self.scale, kind=self.cfg.drive, backend=self.parts, **where) / self.tick
        if self.checked and not drive.is_cuda and not torch.compiler.is_compiling() and not torch.isfinite(drive).all():
            raise FloatingPointError(f"layer {self.layer}: the presynaptic drive is not finite (NaN or infinity in q or k)")
        return drive

    def _biased(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, **where) -> Tensor:
        beta = None if beta is None else beta.expand(q.shape[0], -1, -1, -1)  # the linear barrier is common to all rows
        return tick_biased_attention(q, k, v, beta, self.tick, self.scale, window=self.window, backend=self.parts, **where)

    def _advance(self, q: Tensor, k: Tensor, state: LayerState, chunk: Chunk) -> Tensor:
        """Collect the chunk's drive, advance the terminals over the ticks that end in it; bias [B, H, N, stop]."""
        stop, params = chunk.stop, self.synapse.params()
        lengths = None if chunk.full else torch.tensor(chunk.lengths, device=q.device)
        drive = self._drive(q, k, self.synapse.theta_value(), q_start=chunk.start, window=self.window, doc=chunk.doc, q_len=lengths)
        closed = chunk.closed(self.tick, q.device)
        if chunk.size == 1 and isinstance(closed, int) and closed == 0:
            state.open_drive[:, :, :stop] += drive[:, :, 0]
            if params.lateral_strength is not None:  # a key born after the tick began has neighbours too
                return presyn_bias(self._terminals(state, stop), params, chunk.doc)[:, :, None]
            return state.beta[:, :, None, :stop]
        before = self._terminals(state, stop)
        beta, after = presyn(drive, params, before, closed=closed, doc=chunk.doc, noise=self._noise(chunk), backend=self.parts)
        for name, value in after.parts().items():
            getattr(state, name)[:, :, :stop] = value
        state.beta[:, :, :stop] = presyn_bias(after, params, chunk.doc)
        return beta

    def _terminals(self, state: LayerState, stop: int) -> PresynState:
        return PresynState(**{name: getattr(state, name)[:, :, :stop] for name in PresynState._fields if name in self.state_fields})

    def _barrier_step(self, x: Tensor, state: LayerState, chunk: Chunk) -> Tensor:
        """Extend the running cost of the gate and return the barrier's bias [B, H, N, stop]."""
        ticks = torch.arange(num_ticks(chunk.start, chunk.size, self.tick), device=x.device)
        starts = torch.tensor(chunk.starts, device=x.device)
        if isinstance(chunk.start, int):
            starts = starts[:1]
        first = (starts[:, None] // self.tick + ticks) * self.tick
        if self.cfg.barrier == "linear":
            return self.synapse.barrier_bias(None, first, chunk.stop)
        cost = self.synapse.barrier_cost(x).to(state.barrier.dtype)
        previous = torch.stack(
            [state.barrier[row, :, a - 1] if a else torch.zeros_like(state.barrier[row, :, 0]) for row, a in enumerate(chunk.starts)]
        )
        chunk.write(state.barrier, previous[..., None] + cost.cumsum(-1))
        return self.synapse.barrier_bias(state.barrier[:, :, : chunk.stop], first, chunk.stop)

    def state_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """See `CausalSelfAttention.state_shapes`."""
        shapes = dict.fromkeys(self.state_fields, (self.n_head, length)) | super().state_shapes(length)
        return shapes | ({"ring": (self.n_head, length, self.synapse.endo_slots)} if "ring" in shapes else {})

    def init_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """An empty cache with every terminal at rest."""
        state = super().init_state(batch, length, device, dtype)
        shape = (batch, self.n_head, length)
        kinetic = torch.promote_types(dtype, torch.float32)
        if self.cfg.presyn:
            rest = PresynState.rest(*shape, device=device, dtype=kinetic, params=self.synapse.params())
            for name, value in rest.parts().items():
                setattr(state, name, value)
            state.beta = torch.zeros(shape, device=device, dtype=kinetic)
        if self.cfg.barrier == "gated":
            state.barrier = torch.zeros(shape, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        return state
