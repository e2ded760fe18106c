"""The line that says which execution the attention takes, and why."""

import re

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.synaptic import describe_execution


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "no synapses"),
        ({"synapses": True, "syn_cfg": SynapticConfig.preset("off")}, "no synapses"),
        ({"synapses": True}, "sdpa, PyTorch's own fast parts .backend=auto; not triton: (the tensors are on cpu|Triton is not installed)"),
        ({"synapses": True}, "; decoding: (rust$|sdpa .not rust: the Rust extension is not built)"),
        ({"num_experts": 4}, "; experts: torch(, rust for up to 32 running tokens, statistics and accounts$| .not rust: the Rust)"),
        ({"num_experts": 4, "backend": "rust"}, "; experts: torch(, rust for running tokens, statistics|.*not built)"),
        ({"num_experts": 4, "synapses": True, "backend": "sdpa"}, "; experts: torch .not rust: backend='sdpa' was asked for"),
        ({"synapses": True, "doc_mask": True}, "not rust: documents"),
        ({"synapses": True, "syn_cfg": SynapticConfig(energy=True)}, "not rust: .*(optional parts|not built)"),
        ({"synapses": True, "backend": "reference"}, "reference .backend=reference"),
        ({"synapses": True, "backend": "rust"}, "rust .backend=rust"),
    ],
)
def test_the_line_names_the_execution_and_the_reason(settings, expected):
    line = describe_execution(GPTConfig(**settings), torch.device("cpu"), torch.float32)
    assert line.startswith("attention: ")
    assert re.search(expected, line), line


@pytest.mark.gpu
@pytest.mark.parametrize("tick, expected", [(8, "fused, one operator per layer"), (12, "a tick of 12 tokens is not a power of two")])
def test_the_gpu_takes_triton_where_it_can(tick, expected):
    config = GPTConfig(synapses=True, syn_cfg=SynapticConfig(tick=tick))
    assert expected in describe_execution(config, torch.device("cuda"), torch.bfloat16)
