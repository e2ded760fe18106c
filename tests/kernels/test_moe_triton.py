"""Experts for a few tokens: the kernels compute what PyTorch's operations do, and inference takes them."""

import importlib.util

import pytest
import torch

from bio_inspired_nanochat.synaptic import moe
from tests.kernels import test_compile
from tests.kernels.interpreter import run_interpreted

SHAPES = ((1, 8, 2, 48, 20), (3, 5, 5, 33, 7), (7, 16, 1, 16, 64))  # tokens, experts, choices, width, hidden units


def equality(device="cpu", dtype=torch.float32, tolerance=1e-6):
    for tokens, experts, choices, width, hidden in SHAPES:
        layer, make = moe.Experts(experts, width, hidden), torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=make) / parameter.shape[2] ** 0.5)
        layer = layer.to(device, dtype)
        x, gates = (torch.randn(tokens, size, generator=make).to(device, dtype) for size in (width, choices))
        expert = torch.stack([torch.randperm(experts, generator=make)[:choices] for _ in range(tokens)]).to(device)
        slow = layer(x, expert, gates)  # with gradients, PyTorch's operations
        with torch.no_grad():
            assert moe._kernels(x, choices) is not None
            fast = layer(x, expert, gates)
        assert fast.dtype == dtype and (fast.double() - slow.double()).norm() <= tolerance * slow.double().norm()


def test_kernels_equal_pytorch_in_the_interpreter():
    run_interpreted("from tests.kernels.test_moe_triton import *\nequality()\nselection()")


@torch.no_grad()
def selection():
    """Few tokens take the kernels; many, other types, and what is differentiated do not."""
    from bio_inspired_nanochat.kernels import moe_triton

    x = torch.randn(moe_triton.MOST_PAIRS // 2, 8)
    assert moe._kernels(x, 2) is not None and moe._kernels(x[:0], 2) is None
    assert moe._kernels(x, 3) is None and moe._kernels(x.double(), 2) is None
    with torch.enable_grad():
        assert moe._kernels(x, 2) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile(capability, monkeypatch):
    from bio_inspired_nanochat.kernels import moe_triton, tiles

    monkeypatch.setattr(test_compile, "HALF", {"x_ptr", "matrix_ptr", "hidden_ptr", "y_ptr"})
    monkeypatch.setattr(test_compile, "WHOLE", {"expert_ptr": "*i64"})
    monkeypatch.setattr(test_compile, "ALIGNED", {"hidden", "width"})
    for kernel, constants in (
        (moe_triton._enter, {"ROWS": 4, "COLUMNS": 1024}),
        (moe_triton._leave, {"K": 2, "ROWS": 4, "COLUMNS": 1024}),
    ):
        binary = test_compile.compiled(kernel, capability, constants, tiles.Tile(0, 0, 4, 3))
        assert binary.asm["cubin"] and binary.metadata.shared <= test_compile.SHARED_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_kernels_equal_pytorch_on_the_gpu(dtype, tolerance):
    equality("cuda", dtype, tolerance)
