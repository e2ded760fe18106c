"""Which execution the attention and the experts of a model take on a device, and why: one line for the log."""

from __future__ import annotations

import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import ReleaseNoise, rust, rust_moe
from bio_inspired_nanochat.synaptic.presynaptic import Presynaptic


def describe_execution(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The line, for example `attention: fused, ... (backend=auto)`."""
    return _attention(config, device, dtype) + _experts(config, device, dtype)


def _experts(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What the Rust extension does for experts on a CPU, or why not; elsewhere nothing need be said."""
    if not config.num_experts or device.type != "cpu":
        return ""
    obstacle = rust_moe.obstacle(config.backend, torch.zeros(1, device=device, dtype=dtype))
    tokens = "running tokens" if config.backend == "rust" else f"up to {rust_moe.FEW_TOKENS} running tokens"
    return f"; experts: torch (not rust: {obstacle})" if obstacle else f"; experts: torch, rust for {tokens}, statistics and accounts"


def _attention(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The line for whole sequences."""
    if not (config.synapses and config.syn_cfg.in_attention):
        return "attention: PyTorch's scaled_dot_product_attention (no synapses)"
    if config.backend != "auto":
        return f"attention: {config.backend} (backend={config.backend})"
    q = torch.zeros(1, 1, 2, config.head_dim, device=device, dtype=dtype)
    obstacle = kernels.triton_obstacle(q, config.syn_cfg.tick)
    if obstacle is not None:
        return f"attention: sdpa, PyTorch's own fast parts (backend=auto; not triton: {obstacle}){_running(config, q)}"
    obstacle = "it has no presynaptic terminals"
    if config.syn_cfg.presyn:
        params = Presynaptic(config).params()  # of which only the parts that exist count here
        noise = ReleaseNoise.of(torch.zeros(1, dtype=torch.long), 0) if params.sampler is not None else None
        obstacle = kernels.fused_obstacle(q, torch.zeros(1, device=device), params, noise)
    if obstacle is None:
        return "attention: fused, one operator per layer, which keeps at most the drive for its backward (backend=auto)"
    return f"attention: triton, one operator each for drive, terminals and attention (backend=auto; not fused: {obstacle})"


def _running(config: GPTConfig, q: torch.Tensor) -> str:
    """How running sequences are read where that differs: by the Rust extension on a CPU, or why not."""
    if q.device.type != "cpu":
        return ""
    obstacle = "documents are kept apart" if config.doc_mask else rust.obstacle(q)
    if obstacle is None and config.syn_cfg.presyn:
        obstacle = rust.terminal_obstacle(Presynaptic(config).params(), random=False)
    return "; decoding: rust" if obstacle is None else f"; decoding: sdpa (not rust: {obstacle})"
