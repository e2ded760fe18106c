"""Device, dtype, collectives, seeding, ranks, paths, atomic files and console output: what every other room uses.

What needs PyTorch is imported when it is first asked for: that takes over a second, and a quality gate has no use for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bio_inspired_nanochat.common.console import progress, say, table
from bio_inspired_nanochat.common.files import base_dir, check_writable, print_json_line, sha256_file, write_atomic
from bio_inspired_nanochat.common.rank import Rank, this_rank

if TYPE_CHECKING:
    from bio_inspired_nanochat.common.collective import cut_like, fill, is_cut, local, several, sum_over_ranks, whole, whole_tree
    from bio_inspired_nanochat.common.device import compute_dtype, pick_device
    from bio_inspired_nanochat.common.graphs import aside, capture, reason, side_stream
    from bio_inspired_nanochat.common.host import to_host
    from bio_inspired_nanochat.common.seeding import generator_for, stable_hash

__all__ = [
    "Rank",
    "aside",
    "base_dir",
    "capture",
    "check_writable",
    "compute_dtype",
    "cut_like",
    "fill",
    "generator_for",
    "is_cut",
    "local",
    "pick_device",
    "print_json_line",
    "progress",
    "reason",
    "say",
    "several",
    "sha256_file",
    "side_stream",
    "stable_hash",
    "sum_over_ranks",
    "table",
    "this_rank",
    "to_host",
    "whole",
    "whole_tree",
    "write_atomic",
]

_WITH_TORCH = ("collective", "device", "graphs", "host", "seeding")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _WITH_TORCH:
            module = importlib.import_module(f"{__name__}.{room}")
            if name in vars(module):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
