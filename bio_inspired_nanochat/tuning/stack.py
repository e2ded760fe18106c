"""Small models trained as one: K models of one shape, whose synapses have constants of their own, in the launches of a single model.

Linear layers are batched matrix products. The terminals of all models stand side by side as the heads of one layer, so that every
execution of the attention operators serves them, Triton's kernels included; a constant that differs between models is a tensor over
heads. Fast weights go through `torch.func.vmap`. Gradients of one model never reach another, and a model that diverges stays alone.

Dimensions: K models, B batch, T tokens, C width, H query heads, Hkv key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT, SOFTCAP
from bio_inspired_nanochat.kernels import tick_drive
from bio_inspired_nanochat.optim import OptimConfig, Optimizer, build_optimizer
from bio_inspired_nanochat.registry import active_mechanisms
from bio_inspired_nanochat.synaptic.attention import SynapticCausalSelfAttention
from bio_inspired_nanochat.synaptic.block import stream_scales
from bio_inspired_nanochat.synaptic.glue import QK_SCALE, apply_rotary, rms_norm
from bio_inspired_nanochat.synaptic.layers import CausalSelfAttention, rotary
from bio_inspired_nanochat.synaptic.postsynaptic import POSITIVE as DENSITY_POSITIVE
from bio_inspired_nanochat.synaptic.postsynaptic import SynapticLinear
from bio_inspired_nanochat.synaptic.presynaptic import OFFSETS, POSITIVE, Presynaptic
from bio_inspired_nanochat.synaptic.state import Extras

# Constants that may differ between the models of a stack: of the terminals, of the density, and values at birth.
TERMINAL_KNOBS = tuple(name for table in (POSITIVE, OFFSETS) for names in table.values() for name in names) + ("energy_cost_prime",)
DENSITY_KNOBS = (*DENSITY_POSITIVE, "rho_elig", "pp1_half", "camkii_half", "latch_gain", "camkii_read", "psd95_slots")
BIRTH_KNOBS = ("lambda_loge", "barrier_strength", "lateral_strength")
STACKABLE = frozenset((*TERMINAL_KNOBS, *DENSITY_KNOBS, *BIRTH_KNOBS))


def stack_key(config: GPTConfig) -> tuple[Any, ...]:
    """Models with equal keys can be stacked: all that must be the same in them. A model that cannot be stacked has a key of its own."""
    syn, rest = config.syn_cfg, dataclasses.replace(config, syn_cfg=SynapticConfig())
    if not config.synapses:
        return (repr(rest),)
    fixed = tuple((f.name, getattr(syn, f.name)) for f in dataclasses.fields(syn) if f.name not in STACKABLE)
    alone = (repr(syn),) if obstacle(config) else ()
    return (repr(rest), fixed, tuple(active_mechanisms(syn)), alone)


def obstacle(config: GPTConfig) -> str | None:
    """Why models of this shape cannot be stacked, or None."""
    syn = config.syn_cfg
    if config.num_experts:
        return "experts route tokens by statistics of one model"
    if config.dropout:
        return "dropout is drawn by the blocks of one model"
    if config.doc_mask:
        return "documents are kept apart by one mask for all"
    if config.synapses and syn.extra:
        return f"{syn.extra[0]} of syn_cfg.extra is a module of one model"
    if config.synapses and syn.presyn and syn.genome != "direct":
        return f"genome={syn.genome} has a decoder for each model"
    if config.synapses and syn.presyn and syn.stochastic_train_frac:
        return "random release is drawn by the heads of one model"
    if config.synapses and syn.presyn and (syn.aux_energy or syn.aux_pool):
        return "auxiliary losses are those of one model"
    if config.synapses and syn.hebb != "off" and syn.camkii_latch:
        return "the latch of CaMKII is an operator for one model"
    return None


class Stack:
    """K models that are trained and asked together.

    configs, seeds: one of each per model. The models must have one `stack_key`; UserError names what keeps them apart. `weights` holds
    the parameters of all, [K, ...] by the names of a single model.
    """

    def __init__(self, configs: Sequence[GPTConfig], seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        if reason := obstacle(configs[0]):
            raise UserError(f"these models cannot be trained as a stack: {reason}")
        if len({stack_key(config) for config in configs}) > 1:
            raise UserError(f"these models cannot be trained as a stack: they differ in more than {', '.join(sorted(STACKABLE))}")
        models = [GPT(config, seed) for config, seed in zip(configs, seeds, strict=True)]
        self.config, self.size, self.device = configs[0], len(models), torch.device(device)
        self.roles = models[0].param_roles()
        each = [dict(model.named_parameters()) for model in models]
        self.weights = {name: nn.Parameter(torch.stack([one[name].detach() for one in each]).to(device)) for name in each[0]}
        self.compute_dtype = torch.float32
        with torch.device("meta"):
            self._blocks = GPT(configs[0]).blocks
        synapses = [config.syn_cfg for config in configs]
        self._attention = [self._folded(layer, synapses) for layer in range(self.config.n_layer)]
        self._density_knobs = {name: self._column(synapses, name) for name in DENSITY_KNOBS}

    def _column(self, synapses: Sequence[SynapticConfig], name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in synapses], dtype=torch.float32, device=self.device)

    def _folded(self, layer: int, synapses: Sequence[SynapticConfig]) -> Any:
        """The attention of one layer with the heads of all models side by side."""
        attention = self._blocks[layer].attn
        if not isinstance(attention, SynapticCausalSelfAttention):
            return attention
        heads, config = self.config.n_head, self.config
        wide = dataclasses.replace(
            config, n_head=self.size * heads, n_kv_head=self.size * config.n_kv_head, n_embd=self.size * config.n_embd
        )
        with torch.device("meta"):
            folded = _FoldedAttention(wide, layer)
        knobs = {name: self._column(synapses, name).repeat_interleave(heads) for name in TERMINAL_KNOBS}
        folded.synapse = _FoldedTerminals(wide, synapses[0], self.size, knobs)
        return folded

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The stacked parameters by the name that a single model gives them."""
        return self.weights.items()

    def parameters(self) -> list[nn.Parameter]:
        """The stacked parameters."""
        return list(self.weights.values())

    def optimizer(self, config: OptimConfig, batch_tokens: int) -> Optimizer:
        """The optimizer of all models; each moves as alone. Clipping by the norm of all gradients would couple them: UserError."""
        if config.grad_clip:
            raise UserError(f"optim.grad_clip={config.grad_clip} would couple the models of a stack: use 0")
        return build_optimizer(self.named_parameters(), self.roles, config, n_embd=self.config.n_embd, batch_tokens=batch_tokens)

    def member(self, index: int) -> dict[str, Tensor]:
        """State dict of model `index` of the K, without the leading K of the stacked weights: views, not copies, without gradient."""
        return {name: weight[index].detach() for name, weight in self.weights.items()}

    def logits(self, idx: Tensor) -> Tensor:
        """Logits [K, B, T, V] float32 of token ids, [B, T] for all models or [K, B, T]."""
        return self._head(self._trunk(idx.expand(self.size, *idx.shape[-2:])))

    def losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each model in nats [K]; targets [B, T] or [K, B, T], -1 ignored. Their sum has every model's gradient."""
        logits, targets = self.logits(idx), targets.expand(self.size, *idx.shape[-2:])
        losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-1, reduction="none").view(self.size, -1)
        return losses.sum(1) / (targets >= 0).flatten(1).sum(1)

    def _lookup(self, name: str, idx: Tensor) -> Tensor:
        table = self.weights[name]
        shifted = idx + torch.arange(self.size, device=idx.device)[:, None, None] * table.shape[1]
        return F.embedding(shifted, table.flatten(0, 1)).to(self.compute_dtype)

    def _matrix(self, name: str, x: Tensor) -> Tensor:
        """x [K, B, T, in] through each model's matrix [out, in]."""
        return torch.bmm(x.flatten(1, 2), self.weights[name].to(x.dtype).mT).unflatten(1, x.shape[1:3])

    def _head(self, x: Tensor) -> Tensor:
        logits = self._matrix("head.weight", rms_norm(x)).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def _trunk(self, idx: Tensor) -> Tensor:
        x0 = x = rms_norm(self._lookup("embed.weight", idx))
        positions = torch.arange(idx.shape[-1], device=idx.device)[None]
        cos_sin = rotary(positions, self.config.head_dim, x.dtype)
        scales = stream_scales(self.weights["resid_scale"], self.weights["x0_scale"]).to(x.dtype)
        for layer in range(self.config.n_layer):
            scale, mix = scales[:, layer, :, None, None, None].unbind(1)
            x = scale * x + mix * x0
            x = x + self._attend(layer, idx, rms_norm(x), cos_sin)
            hidden = self._linear(layer, "mlp.w_in", rms_norm(x))
            x = x + self._linear(layer, "mlp.w_out", F.relu(hidden).square())
        return x

    def _attend(self, layer: int, idx: Tensor, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """The addition [K, B, T, C] of a layer's attention for its normalised input x."""
        size, batch, prefix = self.size, x.shape[1], f"blocks.{layer}."
        q, k, v = (self._heads(self._linear(layer, f"attn.{name}", x)) for name in ("q", "k", "v"))
        if self._blocks[layer].value_embed is not None:
            gate = self.weights[f"{prefix}value_embed.gate"].to(x.dtype)
            gate = 3 * torch.sigmoid(torch.matmul(x[..., : gate.shape[-1]], gate[:, None].mT))
            value = self._heads(self._lookup(f"{prefix}value_embed.table.weight", idx))
            v = v + value * gate.transpose(2, 3).flatten(0, 1)[..., None]
        q, k = (rms_norm(apply_rotary(side, cos_sin)) * QK_SCALE for side in (q, k))
        attention = self._attention[layer]
        if isinstance(attention, _FoldedAttention):
            q, k, v = (side.unflatten(0, (size, batch)).transpose(0, 1).flatten(1, 2) for side in (q, k, v))
            start = f"{prefix}attn.synapse."
            own = {"synapse." + name.removeprefix(start): w.flatten(0, 1) for name, w in self.weights.items() if name.startswith(start)}
            y = torch.func.functional_call(attention, own, (x, q, k, v))
            y = y.unflatten(1, (size, -1)).transpose(0, 1)
        else:
            y = CausalSelfAttention.attend(attention, x, q, k, v, Extras()).unflatten(0, (size, batch))
        return self._linear(layer, "attn.o", y.transpose(2, 3).flatten(3))

    def _heads(self, x: Tensor) -> Tensor:
        """[K, B, T, heads * D] to [K * B, heads, T, D]."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(2, 3).flatten(0, 1)

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        """A projection of a block, with its fast weights if it has any."""
        full = f"blocks.{layer}.{name}."
        module = self._blocks[layer].get_submodule(name)
        if not isinstance(module, SynapticLinear) or module.density is None:
            return self._matrix(full + "weight", x)
        own = {key.removeprefix(full): weight for key, weight in self.weights.items() if key.startswith(full)}
        common = module.density.cfg

        def one(weights: dict[str, Tensor], knobs: dict[str, Tensor], x: Tensor) -> Tensor:
            module.density.cfg = _with(common, knobs)
            return torch.func.functional_call(module, weights, (x,))

        try:
            return torch.func.vmap(one)(own, self._density_knobs, x)
        finally:
            module.density.cfg = common


def _with(config: Any, knobs: dict[str, Tensor]) -> Any:
    """A record with the fields of a config, some of them replaced by tensors."""
    return SimpleNamespace(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | knobs)


class _FoldedTerminals(Presynaptic):
    """Terminals of K models as the heads of one layer."""

    def __init__(self, wide: GPTConfig, cfg: SynapticConfig, size: int, knobs: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            super().__init__(wide)
        self.cfg, self.size = _with(cfg, knobs), size

    def barrier_cost(self, x: Tensor) -> Tensor:
        """See `Presynaptic`, for x [K, B, T, C]: [B, K * H, T]."""
        if self.cfg.barrier == "linear":
            return self._slopes(x.device).float()[:, None].expand(x.shape[1], -1, x.shape[2])
        weight = self.gate_weight.unflatten(0, (self.size, -1)).to(x.dtype)
        gate = torch.bmm(x.flatten(1, 2), weight.mT).float().unflatten(1, x.shape[1:3]) + self.gate_bias.view(self.size, 1, 1, -1)
        return F.softplus(-gate.permute(1, 0, 3, 2).flatten(1, 2).contiguous())

    def _slopes(self, device: torch.device) -> Tensor:
        heads = len(self.barrier_strength) // self.size
        return (2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)).repeat(self.size)


class _FoldedAttention(SynapticCausalSelfAttention):
    """The attention core of K models as one layer with K * H heads; projections are the stack's own."""

    def __init__(self, wide: GPTConfig, layer: int) -> None:
        super().__init__(wide, layer)
        del self.q, self.k, self.v, self.o

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        """q [B, K * H, T, D], k and v [B, K * Hkv, T, D], x [K, B, T, C] to [B, K * H, T, D]."""
        return self.attend(x, q, k, v, Extras())

    def _drive(self, q: Tensor, k: Tensor, theta: Tensor, **where: Any) -> Tensor:
        """Without the check for finite values: one model that has diverged must not end the others."""
        return tick_drive(q, k, theta, self.tick, self.scale, kind=self.cfg.drive, backend=self.parts, **where) / self.tick


class Single:
    """One model that cannot be stacked, behind the same methods as a stack of one."""

    size = 1

    def __init__(self, config: GPTConfig, seed: int, device: torch.device | str = "cpu") -> None:
        self.config, self.model = config, GPT(config, seed).to(device)
        self.calls = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.model.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.model.set_compute_dtype(dtype)

    def parameters(self) -> list[nn.Parameter]:
        """See `Stack`."""
        return list(self.model.parameters())

    def optimizer(self, config: OptimConfig, batch_tokens: int) -> Optimizer:
        """See `Stack`."""
        return build_optimizer(
            self.model.named_parameters(), self.model.param_roles(), config, n_embd=self.config.n_embd, batch_tokens=batch_tokens
        )

    def logits(self, idx: Tensor) -> Tensor:
        """See `Stack`."""
        return self.model(idx.reshape(-1, idx.shape[-1])).unflatten(0, (1, -1))

    def losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """See `Stack`; [1], NaN where the terminals report that something is not finite. Random release draws anew each call."""
        self.calls += 1
        try:
            loss = self.model.run(idx.reshape(-1, idx.shape[-1]), targets.reshape(-1, idx.shape[-1]), noise_seed=0, noise_step=self.calls)
        except FloatingPointError:
            return next(self.model.parameters()).sum()[None] * torch.nan
        return (loss.loss if loss.aux is None else loss.loss + loss.aux)[None]
