"""One layer of the model: residual stream, attention and MLP, and the tables of token embeddings.

Dimensions: B batch, T tokens, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic.attention import SynapticCausalSelfAttention
from bio_inspired_nanochat.synaptic.glue import mix_norm
from bio_inspired_nanochat.synaptic.layers import CausalSelfAttention
from bio_inspired_nanochat.synaptic.mlp import MLP, SynapticMLP
from bio_inspired_nanochat.synaptic.moe import SynapticMoE
from bio_inspired_nanochat.synaptic.postsynaptic import SynapticLinear
from bio_inspired_nanochat.synaptic.presynaptic import GAINS
from bio_inspired_nanochat.synaptic.state import Arrival, ExpertState, Extras, FastState, LayerState

GATE_CHANNELS = 12
LEAST_SHARE = 0.05  # of the embedding in the stream that enters the first layer


def stream_scales(resid: Tensor, x0: Tensor) -> Tensor:
    """Factors [..., L, 2] of the residual stream and of the embedding x0 for L layers, from the learned resid and x0 [..., L].

    The stream that enters the first layer is x0 itself, so only the sum of its two factors counts, and behind an RMS norm hardly more
    than the sign of that: a step across zero would turn the whole stream around at once. The sum is kept at `LEAST_SHARE` or above; its
    gradient is that of the free sum, so that it can come back.
    """
    short = (LEAST_SHARE - resid[..., :1] - x0[..., :1]).clamp(min=0).detach()
    return torch.stack([torch.cat([resid[..., :1] + short, resid[..., 1:]], dim=-1), x0], dim=-1)


class Embedding(nn.Embedding):
    """A lookup table whose weight is left to the model's `init_weights`."""

    def reset_parameters(self) -> None:
        """Fill nothing: on the meta device the default would load the whole compiler."""

    def check(self, idx: Tensor, targets: Tensor | None = None) -> None:
        """Raise UserError unless idx [B, T] are token ids of this table, and targets [B, T], if any, such ids or -1.

        Values are looked at on a CPU alone; elsewhere the host would have to wait for them.
        """
        if idx.dim() != 2 or idx.numel() == 0:
            raise UserError(f"token ids have shape {list(idx.shape)}: expected [batch, tokens] with at least one token")
        if targets is not None and targets.shape != idx.shape:
            raise UserError(f"targets have shape {list(targets.shape)}, token ids {list(idx.shape)}: give one target per token")
        for name, ids, low, types in (("token ids", idx, 0, (torch.int64, torch.int32)), ("targets", targets, -1, (torch.int64,))):
            if ids is None:
                continue
            if ids.dtype not in types:
                raise UserError(f"{name} are {ids.dtype}: expected torch.long")
            if ids.device.type == "cpu" and not torch.compiler.is_compiling():
                least, most = (int(end) for end in ids.aminmax())
                if least < low or most >= self.num_embeddings:
                    bad = least if least < low else most
                    raise UserError(f"{name} hold {bad}, out of bounds [{low}, {self.num_embeddings - 1}] of this vocabulary")


class ValueEmbedding(nn.Module):
    """A second token embedding added to one layer's values, gated per key head by the first channels of the input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.table = Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
        self.gate = nn.Parameter(torch.empty(config.n_kv_head, min(GATE_CHANNELS, config.n_embd)))

    def forward(self, idx: Tensor, x: Tensor) -> Tensor:
        """idx [B, T] and normalised x [B, T, n_embd] to an addition [B, T, Hkv * D] for the values."""
        gate = 3 * torch.sigmoid(F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
        value = self.table(idx).to(x.dtype)
        return (value.unflatten(-1, (len(self.gate), -1)) * gate[..., None]).flatten(-2)


class Block(nn.Module):
    """One layer: mix the residual stream with the embedding x0, then attention and MLP on the normalised stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        synaptic = config.synapses and config.syn_cfg.in_attention
        self.attn = (SynapticCausalSelfAttention if synaptic else CausalSelfAttention)(config, layer)
        self.mlp = (SynapticMoE if config.num_experts else SynapticMLP if config.synapses else MLP)(config)
        alternate = (config.n_layer - 1 - layer) % 2 == 0
        self.value_embed = ValueEmbedding(config) if config.value_embeds and alternate else None
        self.dropout = config.dropout

    def fast_layers(self) -> dict[str, SynapticLinear]:
        """The projections that carry fast weights, by their name in `LayerState.fast`."""
        return {layer.key: layer for layer in self.modules() if isinstance(layer, SynapticLinear) and layer.density is not None}

    def gains(self) -> dict[str, Tensor]:
        """Learned output gains, detached, float32: [H] each; `fast_<projection>` [1] is the root mean square of the matrix that fast
        weights are read through.
        """
        synapse = getattr(self.attn, "synapse", None)
        found = {name: getattr(synapse, name).detach().float() for name in GAINS if hasattr(synapse, name)}
        matrices = {key: layer.density.out.detach().float() for key, layer in self.fast_layers().items()}
        return found | {f"fast_{key}": matrix.square().mean().sqrt()[None] for key, matrix in matrices.items()}

    def _enter(self, x: Tensor, x0: Tensor, scales: Tensor, idx: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mixed stream, its normalised form and the addition to the values, if this layer has one."""
        x, normed = mix_norm(x, x0, scales)
        return x, normed, None if self.value_embed is None else self.value_embed(idx, normed)

    def forward(self, x: Tensor, x0: Tensor, scales: Tensor, idx: Tensor, cos_sin: tuple[Tensor, Tensor], extras: Extras) -> Tensor:
        """Whole sequences: x and x0 [B, T, n_embd], scales [2] of the two, idx [B, T]."""
        x, normed, value_embed = self._enter(x, x0, scales, idx)
        x, normed = mix_norm(x, self._dropped(self.attn(normed, cos_sin, value_embed, extras)))
        return x + self._dropped(self.mlp(normed, extras))

    def _dropped(self, x: Tensor) -> Tensor:
        """In training an addition to the residual stream with a share of its values zeroed and the others scaled up."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def step(
        self, x: Tensor, x0: Tensor, scales: Tensor, idx: Tensor, cos_sin: tuple[Tensor, Tensor], state: LayerState, chunk: Arrival
    ) -> Tensor:
        """The next chunk of running sequences, x [B, t, n_embd]."""
        x, normed, value_embed = self._enter(x, x0, scales, idx)
        x, normed = mix_norm(x, self.attn.step(normed, cos_sin, value_embed, state, chunk))
        return x + self.mlp.step(normed, state, chunk)

    def init_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state of `batch` fresh sequences of at most `length` tokens."""
        state = self.attn.init_state(batch, length, device, dtype)
        state.fast = {name: layer.init_state(batch, device, dtype) for name, layer in self.fast_layers().items()}
        state.experts = self.mlp.init_state(batch, device, dtype) if isinstance(self.mlp, SynapticMoE) else None
        return state

    def fits(self, state: LayerState) -> bool:
        """Whether a state has the parts of this layer, in the shapes that they have here."""
        shapes = self.attn.state_shapes(state.k.shape[2])
        for key, layer in self.fast_layers().items():
            modes = layer.density.modes
            shapes |= {f"fast.{key}.{part}": (modes, modes) if part == "weights" else () for part in FastState._fields}
        if isinstance(self.mlp, SynapticMoE) and self.mlp.remembers:
            shapes |= {f"experts.{part}": (self.mlp.slots,) for part in ExpertState._fields}
        return {name: value.shape[1:] for name, value in state.tensors().items()} == shapes
