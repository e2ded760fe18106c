"""The MLP of a block, with plain projections or with synaptic ones."""

from __future__ import annotations

from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.synaptic.glue import relu_squared
from bio_inspired_nanochat.synaptic.linear import Linear
from bio_inspired_nanochat.synaptic.postsynaptic import SynapticLinear
from bio_inspired_nanochat.synaptic.state import Arrival, Extras, LayerState


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.n_embd
        self.w_in = self._layer(config, "mlp_in", config.n_embd, hidden)
        self.w_out = self._layer(config, "mlp_out", hidden, config.n_embd)

    def _layer(self, config: GPTConfig, key: str, n_in: int, n_out: int) -> Linear:
        return Linear(n_in, n_out)

    def forward(self, x: Tensor, extras: Extras | None = None) -> Tensor:
        """Whole sequences, x [B, T, n_embd] to [B, T, n_embd]."""
        return self.w_out(relu_squared(self.w_in(x, extras)), extras)

    def step(self, x: Tensor, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of running sequences, x [B, t, n_embd]; fast weights in `state` advance in place."""
        return self.w_out.step(relu_squared(self.w_in.step(x, state, chunk)), state, chunk)


class SynapticMLP(MLP):
    """The same with `SynapticLinear` layers, of which those named in `fast_layers` carry fast weights. With hebb=off it is the MLP."""

    def _layer(self, config: GPTConfig, key: str, n_in: int, n_out: int) -> Linear:
        return SynapticLinear(n_in, n_out, config.syn_cfg, key)
