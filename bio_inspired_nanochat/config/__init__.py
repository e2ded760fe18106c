"""Configuration records and the command line generated from them."""

from bio_inspired_nanochat.config.cli import parse, parse_command, parse_with_given
from bio_inspired_nanochat.config.knobs import (
    REQUIRED,
    Knob,
    check_value,
    device_knob,
    dtype_knob,
    from_dict,
    knob,
    knobs_of,
    to_dict,
    validate,
)
from bio_inspired_nanochat.config.model import GPTConfig, sizes_from_depth
from bio_inspired_nanochat.config.synaptic import PRESETS, SynapticConfig

__all__ = [
    "PRESETS",
    "REQUIRED",
    "GPTConfig",
    "Knob",
    "SynapticConfig",
    "check_value",
    "device_knob",
    "dtype_knob",
    "from_dict",
    "knob",
    "knobs_of",
    "parse",
    "parse_command",
    "parse_with_given",
    "sizes_from_depth",
    "to_dict",
    "validate",
]
