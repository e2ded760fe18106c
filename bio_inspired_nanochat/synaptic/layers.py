"""The vanilla parts of a block: normalisation, rotary positions, linear layers, attention and MLP.

Dimensions: B batch, T tokens, H query heads, Hkv key heads, D head size, L cache length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import tick_biased_attention
from bio_inspired_nanochat.synaptic import native
from bio_inspired_nanochat.synaptic.state import Arrival, Chunk, Extras, LayerState

ROPE_BASE = 100_000.0
QK_SCALE = 1.2


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last dimension, without gains."""
    return F.rms_norm(x, (x.shape[-1],))


class Linear(nn.Linear):
    """A bias-free linear layer that keeps float32 weights and computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight to the model's `init_weights`, which fills every parameter."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n_in] to [..., n_out]."""
        return F.linear(x, self.weight.to(x.dtype))


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, T, D/2] of the rotary angles at integer positions [B or 1, T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * ROPE_BASE**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head's coordinates, x [B, H, T, D]."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


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
        self.q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.o = Linear(config.n_head * config.head_dim, config.n_embd)

    def project(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D] and k, v [B, Hkv, T, D] of the normalised block input x [B, T, n_embd]."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if value_embed is not None:
            v = v + value_embed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = (rms_norm(apply_rotary(side, cos_sin)) * QK_SCALE for side in (q, k))
        return q, k, v

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None, extras: Extras) -> Tensor:
        """Whole sequences from position 0: x [B, T, n_embd] to [B, T, n_embd]."""
        q, k, v = self.project(x, cos_sin, value_embed)
        return self._merge(self.attend(x, q, k, v, extras))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Tensor:
        """Attention output [B, H, T, D] for whole sequences."""
        return tick_biased_attention(q, k, v, None, self.tick, self.scale, window=self.window, doc=extras.doc, backend=self.parts)

    def step(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], value_embed: Tensor | None, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of every sequence: x [B, t, n_embd]; keys, values and synapses in `state` advance in place."""
        q, k, v = self.project(x, cos_sin, value_embed)
        return self._merge(chunk.attend(self, x, q, k, v, state))

    def attend_step(self, x: Tensor, q: Tensor, state: LayerState, chunk: Chunk) -> Tensor:
        """Attention output [B, H, t, D] of a chunk against the cache."""
        if (y := native.attend(self, x, q, state, chunk)) is not None:
            return y
        k, v = state.k[:, :, : chunk.stop], state.v[:, :, : chunk.stop]
        return tick_biased_attention(
            q, k, v, None, self.tick, self.scale, q_start=chunk.start, window=self.window, doc=chunk.doc, backend=self.parts
        )

    def init_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        k, v = torch.zeros(2, batch, self.n_kv_head, length, self.head_dim, device=device, dtype=dtype)
        return LayerState(k, v)

    def _merge(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w_in = Linear(config.n_embd, 4 * config.n_embd)
        self.w_out = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, n_embd] to [B, T, n_embd]."""
        return self.w_out(F.relu(self.w_in(x)).square())
