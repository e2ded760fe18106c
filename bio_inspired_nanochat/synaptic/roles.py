"""What the parameters of a model are: their role for the optimizer, and the operations that they cost.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.nn import Parameter

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.synaptic.postsynaptic import DENSITY_ROLES


def param_roles(named: Iterable[tuple[str, Parameter]]) -> dict[str, str]:
    """matrix (also stacked ones), fast, embed, value_embed, head, scalar, gate, router or kinetics, by the name of a parameter."""
    return {name: _role(name, parameter) for name, parameter in named}


def _role(name: str, parameter: Parameter) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if ".synapse." in name:
        return "gate" if leaf.startswith("gate_") or ".extra." in name else "kinetics"
    if ".density." in name:
        return DENSITY_ROLES.get(leaf, "kinetics")
    if leaf == "router":
        return "router"
    if ".value_embed." in name:
        return "value_embed" if leaf == "weight" else "gate"
    if name.startswith(("embed.", "head.")):
        return name.split(".")[0]
    return "matrix" if parameter.ndim >= 2 else "scalar"


def active_size(config: GPTConfig, name: str, parameter: Parameter) -> int:
    """Values of a parameter that a token uses: of the routed experts those of the top k."""
    return parameter.numel() * config.moe_top_k // config.slots if ".experts." in name else parameter.numel()


def flops_per_token(config: GPTConfig, named: Mapping[str, Parameter], modes: Sequence[int]) -> int:
    """Training operations per token, forward and backward: 6 per matrix weight, 12 D per head and visible pair on average. Equation (H9).

    A synaptic layer adds its drive, a second product of queries and keys: 6 D per head and pair; fast weights of r modes (one entry of
    `modes` each) the product that reads and the one that writes: 12 r^2 per token. Of the routed experts the top k count.
    """
    lookups = {name for name, role in param_roles(named.items()).items() if role in ("embed", "value_embed", "scalar", "kinetics")}
    flops = 6 * sum(active_size(config, name, p) for name, p in named.items() if name not in lookups)
    flops += sum(12 * r**2 for r in modes)
    for layer in range(config.n_layer):
        window = min(config.window(layer) or config.sequence_len, config.sequence_len)
        pairs = window - window * (window - 1) / (2 * config.sequence_len)
        synaptic = config.synapses and config.syn_cfg.presyn
        flops += int((18 if synaptic else 12) * config.n_embd * pairs)
    return flops
