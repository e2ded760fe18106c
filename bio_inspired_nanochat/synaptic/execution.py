"""Which execution the attention of a model takes on a device, and why: one line for the log."""

from __future__ import annotations

import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import GPTConfig


def describe_execution(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The line for whole sequences, for example `attention: triton kernels (backend=auto)`."""
    if not (config.synapses and config.syn_cfg.active):
        return "attention: PyTorch's scaled_dot_product_attention (no synapses)"
    if config.backend != "auto":
        return f"attention: {config.backend} (backend={config.backend})"
    q = torch.zeros(1, 1, 2, config.head_dim, device=device, dtype=dtype)
    obstacle = kernels.triton_obstacle(q, config.syn_cfg.tick)
    if obstacle is None:
        return "attention: triton kernels of drive, terminals and bias (backend=auto)"
    return f"attention: sdpa, PyTorch's own fast parts (backend=auto; not triton: {obstacle})"
