"""Seeds keyed by name, so that a tensor's values do not depend on what else is drawn."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def stable_hash(*parts: Any) -> int:
    """A 63-bit hash of the parts that is the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, name), so that a tensor's values do not depend on what else is drawn."""
    return torch.Generator().manual_seed(stable_hash(seed, name))
