"""Optimizers by role, their schedules and gradient clipping."""

from bio_inspired_nanochat.optim.clip import clip_grad_norm
from bio_inspired_nanochat.optim.config import OptimConfig
from bio_inspired_nanochat.optim.groups import ROLES, parameter_groups
from bio_inspired_nanochat.optim.muon import Muon
from bio_inspired_nanochat.optim.optimizer import Optimizer, build_optimizer
from bio_inspired_nanochat.optim.schedule import lr_multiplier, muon_momentum

__all__ = [
    "ROLES",
    "Muon",
    "OptimConfig",
    "Optimizer",
    "build_optimizer",
    "clip_grad_norm",
    "lr_multiplier",
    "muon_momentum",
    "parameter_groups",
]
