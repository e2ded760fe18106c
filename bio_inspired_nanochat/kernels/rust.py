"""CPU kernels compiled from `rust_src`. The extension is optional: without it everything runs on PyTorch.

`available()` and `why_not()` tell whether it can serve; `notice()` says once, in one line, that it cannot.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from bio_inspired_nanochat import __version__
from bio_inspired_nanochat.errors import UserError

_FIX = "run `bash scripts/env.sh` with a Rust toolchain on PATH"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it cannot be used."""
    try:
        module = importlib.import_module("bio_inspired_nanochat._rust")
    except ImportError as error:
        return None, f"the Rust extension is not built or does not load ({error})"
    if module.version() != __version__:
        return None, f"the Rust extension was built for version {module.version()}, the package is {__version__}"
    return module, ""


def available() -> bool:
    """Whether the extension is built, loads, and belongs to this version of the package."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the extension cannot be used, as one line with the fix; empty when it can."""
    reason = _load()[1]
    return f"{reason}: {_FIX}" if reason else ""


@functools.cache
def notice() -> None:
    """Print one line, once per process, when the extension is missing and PyTorch does its work."""
    if not available():
        print(f"PyTorch does the work of the CPU kernels: {why_not()}", flush=True)


def phi(x: Tensor) -> Tensor:
    """`kernels.phi` (0 below -1, (x+1)^2/4 in between, x above 1) of a float32 CPU tensor of any shape, not differentiable.

    Returns a new tensor of x's shape; the interpreter lock is free meanwhile. UserError when the extension is missing or
    cannot take x.
    """
    module = _load()[0]
    if module is None:
        raise UserError(f"backend='rust' is not available: {why_not()}; or use backend='reference'")
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        given = f"{x.dtype} on {x.device}" + (" with requires_grad" if x.requires_grad else "")
        raise UserError(f"backend='rust' takes float32 CPU tensors without gradients, not {given}: use backend='reference'")
    return torch.from_numpy(module.phi(x.reshape(-1).contiguous().numpy())).view(x.shape)
