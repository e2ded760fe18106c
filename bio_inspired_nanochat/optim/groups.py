"""Parameter groups: one per role, with the learning rate that fits the model's width and the batch.

Numbered equations are those of prompts/hybrid.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Parameter

from bio_inspired_nanochat.optim.config import OptimConfig

MATRIX = "matrix"
FAST = "fast"  # the matrices into and out of fast weights
MUON = (MATRIX, FAST)
# AdamW's betas and decay by role. Decay is times the learning rate per step.
ADAMW = {
    "embed": {"betas": (0.8, 0.995), "weight_decay": 0.001},
    "value_embed": {"betas": (0.8, 0.995), "weight_decay": 0.01},
    "head": {"betas": (0.8, 0.96), "weight_decay": 0.01},
    "scalar": {"betas": (0.8, 0.95), "weight_decay": 0.0},
    "gate": {"betas": (0.8, 0.95), "weight_decay": 0.0},
    "router": {"betas": (0.8, 0.95), "weight_decay": 0.0},
    "kinetics": {"betas": (0.8, 0.95), "weight_decay": 0.0},
}
ROLES = (*MUON, *ADAMW)

_REFERENCE_WIDTH = 768
_REFERENCE_BATCH = 1 << 19


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    roles: Mapping[str, str],
    config: OptimConfig,
    *,
    n_embd: int,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """One group per role that occurs, for Muon (roles `matrix` and `fast`) and AdamW (the others).

    Only the role decides: a parameter without one, an unknown role, a role without its parameter, and a matrix that has fewer than two
    dimensions or does not learn are assertions. Other parameters that do not learn are left out.
    """
    named = dict(named_parameters)
    assert set(named) == set(roles), f"parameters and roles differ: {sorted(set(named) ^ set(roles))[:4]}"
    members: dict[str, list[str]] = {}
    for name, param in named.items():
        role = roles[name]
        assert role in ROLES, f"{name} has the unknown role {role!r}: one of {', '.join(ROLES)}"
        if role in MUON:
            assert param.ndim >= 2, f"{name} has shape {tuple(param.shape)}: Muon takes matrices only"
            assert param.requires_grad, f"{name} does not learn: Muon takes matrices with a gradient only"
        if param.requires_grad:
            members.setdefault(role, []).append(name)
    groups = []
    for role in ROLES:
        if role in members:
            lr = learning_rate(role, config, n_embd=n_embd, batch_tokens=batch_tokens)
            own = {"momentum": config.momentum, "weight_decay": config.weight_decay} if role in MUON else ADAMW[role]
            params = [named[name] for name in members[role]]
            groups.append({"name": role, "role": role, "names": members[role], "params": params, "lr": lr, "initial_lr": lr, **own})
    return groups


def learning_rate(role: str, config: OptimConfig, *, n_embd: int, batch_tokens: int) -> float:
    """The role's learning rate at multiplier 1: the config's, times a width factor and a batch factor. Equation (H13).

    Width, and with it depth, because the one dial sets both: tables and the head (`embed`, `value_embed`, `head`) scale with
    sqrt(768 / n_embd). A matrix does not: an orthogonalised step already changes a layer's output by the same amount at every width.
    Gates, routers, scalars and kinetics act per head, expert or channel and have no width.
    Batch: all but gates, routers and kinetics grow with sqrt(batch_tokens / 2^19), at most twofold, and do not shrink below 2^19: at 4096 tokens
    the full rates are stable, and square-root scaling down to there costs 0.7 nats in 120 steps.
    """
    factor = 1.0
    if role in ("embed", "value_embed", "head"):
        factor *= (_REFERENCE_WIDTH / n_embd) ** 0.5
    if role not in ("gate", "router", "kinetics"):
        factor *= min(2.0, max(1.0, (batch_tokens / _REFERENCE_BATCH) ** 0.5))
    return float(getattr(config, f"{role}_lr")) * factor
