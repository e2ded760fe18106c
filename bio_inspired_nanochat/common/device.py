"""Devices and dtypes."""

from __future__ import annotations

import os

import torch

from bio_inspired_nanochat.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU. Under torchrun a CUDA device is the local rank's.

    A CUDA device is probed with a launch, because a visible GPU may still be unusable by this build, and becomes the current one of this
    thread, because that is where Triton launches. Raises UserError for a device that cannot be used and for a rank without a GPU.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name in ("auto", "cuda") and torch.cuda.is_available() and local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"local rank {local} has no GPU of its own: this machine has {count}; use --nproc_per_node={count} or --device=cpu")
    if name == "auto":
        name = "cuda" if _cuda_works(local) else "mps" if torch.backends.mps.is_available() else "cpu"
    elif name == "cuda" and not _cuda_works(local):
        raise UserError("device=cuda is not usable: no CUDA GPU answers a test launch; use --device=cpu")
    elif name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps is not available on this machine; use --device=cpu")
    if name == "cuda":
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


def _cuda_works(index: int) -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        return bool((torch.ones(8, device=torch.device("cuda", index)) + 1).sum().item() == 16)
    except RuntimeError:
        return False


def compute_dtype(device: torch.device) -> torch.dtype:
    """Activation dtype: bfloat16 on CUDA devices that have it (compute capability 8.0 and later), float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return torch.float32
