"""Linear layers without a bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.synaptic.state import Arrival, Extras, LayerState


class Linear(nn.Linear):
    """A bias-free linear layer that keeps float32 weights and computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight to the model's `init_weights`, which fills every parameter."""

    def forward(self, x: Tensor, extras: Extras | None = None) -> Tensor:
        """x [..., n_in] to [..., n_out]."""
        return F.linear(x, self.weight.to(x.dtype))

    def step(self, x: Tensor, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of running sequences, x [B, t, n_in] to [B, t, n_out]; a layer without memory reads no state."""
        return Linear.forward(self, x)
