"""The vanilla parts of attention: rotary positions, projections, QK norm.

Dimensions: B batch, T tokens, H query heads, Hkv key heads, D head size, L cache length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import tick_biased_attention
from bio_inspired_nanochat.synaptic import native
from bio_inspired_nanochat.synaptic.glue import rotate_norm
from bio_inspired_nanochat.synaptic.linear import Linear
from bio_inspired_nanochat.synaptic.postsynaptic import SynapticLinear
from bio_inspired_nanochat.synaptic.state import Arrival, Chunk, Extras, LayerState

Through = Callable[[Linear, Tensor], Tensor]  # runs a projection on an input, for whole sequences or for the next chunk

ROPE_BASE = 100_000.0


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, T, D/2] of the rotary angles at integer positions [B or 1, T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * ROPE_BASE**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention with rotary positions and QK norm; keys and values may be shared by groups of heads."""

    state_fields = frozenset({"k", "v"})  # tensors of this layer's LayerState

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.head_dim**-0.5
        self.tick = config.syn_cfg.tick
        self.window = config.window(layer)
        self.backend = config.backend
        self.parts = "auto" if self.backend == "fused" else self.backend  # of the single operators, which fused does not name
        heads, shared = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        for key, n_in, n_out in (("q", config.n_embd, heads), ("k", config.n_embd, shared), ("v", config.n_embd, shared)):
            setattr(self, key, SynapticLinear(n_in, n_out, config.syn_cfg, key) if config.synapses else Linear(n_in, n_out))
        self.o = SynapticLinear(heads, config.n_embd, config.syn_cfg, "o") if config.synapses else Linear(heads, config.n_embd)

    def project(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None, through: Through
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D] and k, v [B, Hkv, T, D] of the normalised block input x [B, T, n_embd]."""
        q, k, v = (through(layer, x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if value_embed is not None:
            v = v + value_embed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return *rotate_norm(q, k, cos_sin), v

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None, extras: Extras) -> Tensor:
        """Whole sequences from position 0: x [B, T, n_embd] to [B, T, n_embd]."""

        def through(layer: Linear, x: Tensor) -> Tensor:
            return layer(x, extras)

        q, k, v = self.project(x, cos_sin, value_embed, through)
        return self.o(_merged(self.attend(x, q, k, v, extras)), extras)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Tensor:
        """Attention output [B, H, T, D] for whole sequences."""
        return tick_biased_attention(q, k, v, None, self.tick, self.scale, window=self.window, doc=extras.doc, backend=self.parts)

    def step(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of every sequence: x [B, t, n_embd]; keys, values and synapses in `state` advance in place."""

        def through(layer: Linear, x: Tensor) -> Tensor:
            return layer.step(x, state, chunk)

        q, k, v = self.project(x, cos_sin, value_embed, through)
        return self.o.step(_merged(chunk.attend(self, x, q, k, v, state)), state, chunk)

    def attend_step(self, x: Tensor, q: Tensor, state: LayerState, chunk: Chunk) -> Tensor:
        """Attention output [B, H, t, D] of a chunk against the cache."""
        if (y := native.attend(self, x, q, state, chunk)) is not None:
            return y
        k, v = state.k[:, :, : chunk.stop], state.v[:, :, : chunk.stop]
        return tick_biased_attention(
            q, k, v, None, self.tick, self.scale, q_start=chunk.start, window=self.window, doc=chunk.doc, backend=self.parts
        )

    def state_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of the tensors of this layer's LayerState for at most `length` tokens."""
        return dict.fromkeys(("k", "v"), (self.n_kv_head, length, self.head_dim))

    def init_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        k, v = torch.zeros(2, batch, self.n_kv_head, length, self.head_dim, device=device, dtype=dtype)
        return LayerState(k, v)


def _merged(y: Tensor) -> Tensor:
    """Heads [B, H, T, D] side by side, [B, T, H * D]."""
    return y.transpose(1, 2).flatten(2)
