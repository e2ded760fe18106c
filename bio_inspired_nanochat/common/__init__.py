"""Device, dtype, seeding, ranks, paths, atomic files and console output: what every other room uses."""

from bio_inspired_nanochat.common.console import progress, say, table
from bio_inspired_nanochat.common.device import Rank, compute_dtype, pick_device, this_rank
from bio_inspired_nanochat.common.files import base_dir, print_json_line, sha256_file, write_atomic
from bio_inspired_nanochat.common.seeding import generator_for, stable_hash

__all__ = [
    "Rank",
    "base_dir",
    "compute_dtype",
    "generator_for",
    "pick_device",
    "print_json_line",
    "progress",
    "say",
    "sha256_file",
    "stable_hash",
    "table",
    "this_rank",
    "write_atomic",
]
