"""The models that a memory study compares: windowed attention without and with a memory, and full attention.

B batch, T tokens, r modes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, knob
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.kernels.fast_weights import fast_weights
from bio_inspired_nanochat.registry import MECHANISMS

GATES = ("camkii", "pp1", "bdnf", "camkii_read")  # the mechanisms that the variants `..._gates` have; `..._bdnf` has one, the others none
_OFF = {name: value for gate in GATES for name, value in MECHANISMS[gate].off.items()}
_ON = {name: value for gate in GATES for name, value in MECHANISMS[gate].on.items()}


@dataclass(frozen=True)
class Variant:
    """One kind of model. full: attention to everything, in all layers but the first, which keeps its window; linear: a linear-attention
    memory; fast: changes to the synapses, None: no synapses.

    A first layer that sees only a word's neighbours puts a phrase together at once. Without that window the models of this size stay at
    guessing among the attributes of the row in the fact probe, for as long as the others take to solve it three times over.
    """

    full: bool = False
    linear: bool = False
    fast: Mapping[str, Any] | None = None


VARIANTS: Mapping[str, Variant] = {
    "vanilla": Variant(),
    "full": Variant(full=True),
    "linear": Variant(linear=True),
    "hebb": Variant(fast={"hebb": "hebb", **_OFF}),
    "delta": Variant(fast={"hebb": "delta", **_OFF}),
    "hebb_gates": Variant(fast={"hebb": "hebb", **_ON}),
    "delta_gates": Variant(fast={"hebb": "delta", **_ON}),
    "delta_bdnf": Variant(fast={"hebb": "delta", **_OFF, **MECHANISMS["bdnf"].on}),
}


@dataclass(frozen=True)
class WindowedConfig(GPTConfig):
    """A model whose layers, the last one included, attend to a window of the same length."""

    attention_window: int = knob(8, "attention window of the layers", lo=1, hi=1 << 20, unit="tokens")
    full_from: int | None = knob(None, "first layer that attends to everything; none has no such layer", lo=0, hi=256, none="none")

    def window(self, layer: int) -> int | None:
        """See `GPTConfig.window`."""
        return self.attention_window if self.full_from is None or layer < self.full_from else None

    @property
    def reach(self) -> int | None:
        """How many tokens back attention can bring something from, through all layers; None without a limit."""
        return self.n_layer * (self.attention_window - 1) if self.full_from is None else None


class LinearMemory(nn.Module):
    """Linear attention as a memory of r x r values beside a projection: what fast weights are without decay, gates and normalised read.

        u_t = normalize(x_t A)    m_t = y_t P    z_t = F_{t-1} u_t    F_t = F_{t-1} + m_t u_t^T    output y_t + z_t O

    with y_t the projection's own output and O zero at birth; the same matrices as those of fast weights with r modes. Whole sequences only.
    Source: Katharopoulos et al. 2020 without their normaliser, with the keys' norms at 1.
    """

    def __init__(self, n_in: int, n_out: int, modes: int) -> None:
        super().__init__()
        self.pre = nn.Parameter(torch.empty(modes, n_in))
        self.post = nn.Parameter(torch.empty(modes, n_out))
        self.out = nn.Parameter(torch.empty(n_out, modes))

    @torch.no_grad()
    def init_weights(self, seed: int, name: str) -> None:
        """Uniform values of unit gain drawn from generators keyed by (seed, name); `out` is zero."""
        for leaf, matrix in (("pre", self.pre), ("post", self.post)):
            bound = (3 / matrix.shape[1]) ** 0.5
            matrix.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator_for(seed, f"{name}.{leaf}")))
        self.out.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Input x [B, T, n_in] and output y [B, T, n_out] of the projection to the output with what is remembered."""
        u = F.normalize(F.linear(x, self.pre.to(x.dtype)), dim=-1)
        m = F.linear(y, self.post.to(y.dtype))
        ones = torch.ones(u.shape[:2], device=u.device)
        read, _ = fast_weights(u, m, ones, ones.new_ones(u.shape[-1]), rule="hebb")
        return y + F.linear(read, self.out.to(y.dtype))

    def attach(self, projection: nn.Module) -> None:
        """Make this memory part of a projection, whose output it then adds to."""
        projection.add_module("linear_memory", self)
        projection.register_forward_hook(lambda _, inputs, output: self(inputs[0], output))


def build_variant(name: str, config: WindowedConfig, seed: int = 0) -> GPT:
    """The model of a variant. `config` has the sizes, the window and in `syn_cfg` the constants of the memory.

    rank_eligibility and fast_layers of `syn_cfg` say how large a memory is and where, the linear one included. Vanilla parameters
    are equal in all variants of one seed. Raises UserError for an unknown name.
    """
    if name not in VARIANTS:
        raise UserError(f"variant={name!r} is not valid: one of {', '.join(VARIANTS)}{nearest(name, VARIANTS)}")
    variant = VARIANTS[name]
    changes: dict[str, Any] = {"full_from": min(1, config.n_layer - 1)} if variant.full else {}
    if variant.fast is not None:
        changes |= {"synapses": True, "syn_cfg": dataclasses.replace(config.syn_cfg, **variant.fast)}
    model = GPT(dataclasses.replace(config, **changes), seed)
    if variant.linear:
        for layer, block in enumerate(model.blocks):
            for key in config.syn_cfg.fast_layers:
                projection = block.mlp.get_submodule(key.replace("mlp", "w")) if key.startswith("mlp") else block.attn.get_submodule(key)  # pyrefly: ignore[missing-attribute]
                memory = LinearMemory(projection.in_features, projection.out_features, config.syn_cfg.rank_eligibility)
                memory.init_weights(seed, f"linear_memory.{layer}.{key}")
                memory.attach(projection)
    return model


def variant_roles(model: GPT) -> dict[str, str]:
    """`param_roles` of a variant: the matrices of a linear memory learn as those of fast weights do."""
    return {name: "fast" if ".linear_memory." in name else role for name, role in model.param_roles().items()}


def memory_values(name: str, config: WindowedConfig) -> int:
    """Values that the memory of a variant keeps of a sequence, over all layers; 0 without one (a KV cache is not counted)."""
    variant, cfg = VARIANTS[name], config.syn_cfg
    return config.n_layer * len(cfg.fast_layers) * cfg.rank_eligibility**2 if variant.linear or variant.fast is not None else 0


def memory_only() -> SynapticConfig:
    """Synapses without terminals and barrier, so that what is measured is the memory."""
    return SynapticConfig(presyn=False, barrier="none")
