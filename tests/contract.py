"""Small models and the list of variants that every contract test runs over. A new mechanism joins by being registered."""

import dataclasses

import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.config.synaptic import FAST_LAYERS
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.registry import MECHANISMS, config_with
from bio_inspired_nanochat.synaptic import Density

SIZES = {"sequence_len": 64, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "bos_token_id": 0}
BACKENDS = ["reference", "sdpa"]
EXPERTS = {"num_experts": 4, "expert_slots": 5}
MODELS = {
    "plain": {},
    "window": {"window_pattern": "SL"},
    "documents": {"doc_mask": True},
    "no_value_embeds": {"value_embeds": False},
    "experts": EXPERTS,
    "experts_documents": {"num_experts": 4, "doc_mask": True},
}
SYNAPSES: dict[str, SynapticConfig | None] = {"vanilla": None, "default": SynapticConfig()}
SYNAPSES |= {name: config_with(name) for name in MECHANISMS}
SYNAPSES["all"] = config_with(*[name for name in MECHANISMS if name not in ("barrier_linear", "genome_xi", "fast_hebb")])
SYNAPSES["all_hebb"] = dataclasses.replace(SYNAPSES["all"], hebb="hebb", fast_layers=FAST_LAYERS)
SYNAPSES["all_fast"] = dataclasses.replace(SYNAPSES["all"], presyn=False, barrier="none", fast_layers=FAST_LAYERS)
SYNAPSES |= {preset: SynapticConfig.preset(preset) for preset in ("full", "seed")}


def lively(synapse: torch.nn.Module) -> None:
    """Gains large enough that every path matters, and a gate that depends on its input."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in synapse.named_parameters():
        if name.startswith("gain_") or name == "lateral_strength":
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 2)
        elif name in ("gate_weight", "genome.xi", "genome.level"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if name == "gate_weight" else 0.5))
        elif name.startswith("extra."):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        elif name == "gate_bias":
            parameter.data.fill_(2.0)


def remembering(density: Density, seed: int = 8) -> None:
    """Fast weights that are read, gates that depend on their input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in density.named_parameters():
        if name in ("out", "start", "write_gate", "read_gate"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if name == "out" else 0.3))


def needed_by(synapses: str) -> dict[str, int]:
    """What a model must have for a variant to act: experts, for the mechanisms of experts."""
    return EXPERTS if synapses in MECHANISMS and MECHANISMS[synapses].experts else {}


def make_model(synapses: str, tick: int = 4, seed: int = 0, live: bool = True, **overrides) -> GPT:
    """A tiny model in evaluation mode whose zero-initialised matrices are filled, so that every layer matters."""
    cfg = SYNAPSES[synapses]
    if cfg is not None:
        cfg = dataclasses.replace(cfg, tick=tick, theta=-1.0, alpha_ca=0.5, release_rate=0.2, tau_c=12.0, tau_rrp=24.0)
        cfg = dataclasses.replace(cfg, tau_camkii=8.0, tau_pp1=6.0, tau_bdnf=12.0, camkii_half=0.2, rank_eligibility=8)
        overrides = {"synapses": True, "syn_cfg": cfg, **overrides}
    model = GPT(GPTConfig(**{**SIZES, **needed_by(synapses), **overrides}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", "w_out.weight", "experts.w_out", "head.weight", "value_embed.gate")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for block in model.blocks:
        if live and hasattr(block.attn, "synapse"):
            lively(block.attn.synapse)
        if live and getattr(block.mlp, "synapse", None) is not None:
            lively(block.mlp.synapse)
        for layer in block.fast_layers().values() if live else ():
            remembering(layer.density)
    return model.eval()


def make_ids(batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Random token ids with some BOS tokens (id 0) among them."""
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
