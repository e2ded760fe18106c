"""What lies between the products of a block: one kernel computes what PyTorch's operations do, and inference takes it."""

import importlib.util

import pytest
import torch

from bio_inspired_nanochat.synaptic import glue
from tests.contract import make_ids, make_model
from tests.kernels import test_compile
from tests.kernels.interpreter import run_interpreted

SHAPES = (((2, 3, 48), 2), ((1, 1, 33), 1), ((4, 5, 64), 4))


def both(function, *arguments):
    """What inference takes, and what training takes."""
    with torch.no_grad():
        fast = function(*arguments)
    with torch.enable_grad():
        slow = function(*arguments)
    return zip(*((one,) if isinstance(one, torch.Tensor) else one for one in (fast, slow)), strict=True)


def equality(device="cpu", dtype=torch.float32, tolerance=1e-6):
    make = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=make).to(device, dtype)

    def check(name, function, *arguments):
        for fast, slow in both(function, *arguments):
            assert fast.shape == slow.shape and fast.dtype == slow.dtype == dtype, name
            assert (fast.double() - slow.double()).norm() <= tolerance * slow.double().norm(), name

    for (batch, tokens, width), shared in SHAPES:
        x, y, scales = draw(batch, tokens, width), draw(batch, tokens, width), draw(3, 2)
        check("sum", glue.mix_norm, x, y)
        check("sum of strided rows", glue.mix_norm, draw(batch, width, tokens).transpose(1, 2), y)
        check("weighted sum", glue.mix_norm, x, y, scales[1])
        check("small values", glue.mix_norm, x * 1e-4, y * 1e-4)
        check("activation", glue.relu_squared, x)
        q, k = draw(batch, tokens, 4, 2 * width).transpose(1, 2), draw(batch, shared, tokens, 2 * width)
        for rows in {1, batch}:
            angles = draw(rows, 1, tokens, width).float()
            check("rotary positions", glue.rotate_norm, q, k, (angles.cos().to(dtype), angles.sin().to(dtype)))


@torch.no_grad()
def choice():
    """Kernels where nothing is differentiated, PyTorch's operations for what they do not take."""
    x = torch.randn(2, 8)
    assert glue._kernels(x) is not None
    assert glue._kernels(x.double()) is None and glue._kernels(x[:0]) is None
    with torch.enable_grad():
        assert glue._kernels(x) is None
    for fast, slow in both(glue.mix_norm, x.bfloat16(), x):
        assert fast.dtype == slow.dtype == torch.float32, "types are promoted as in training"
    model, ids = make_model("default"), make_ids(2, 6)
    with torch.enable_grad():
        want, _ = model(ids)
    got, _ = model(ids)
    assert 0 < (got - want).abs().max() < 1e-5


def test_kernels_equal_pytorch_in_the_interpreter():
    run_interpreted("from tests.kernels.test_glue import *\nequality()\nchoice()")


def test_without_a_gpu_inference_takes_the_operations_of_training():
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert all(torch.equal(fast, slow) for fast, slow in both(glue.mix_norm, x, y))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile(capability, monkeypatch):
    from bio_inspired_nanochat.kernels import glue_triton, tiles

    names = {"x_ptr", "sum_ptr", "norm_ptr", "cos_ptr", "sin_ptr", "scale_ptr", "out_ptr", "q_out_ptr", "k_out_ptr"}
    monkeypatch.setattr(test_compile, "HALF", test_compile.HALF | names)
    monkeypatch.setattr(test_compile, "REALS", test_compile.REALS | {"epsilon", "gain"})
    for kernel, constants in (
        (glue_triton._mix_norm, {"SCALED": True, "BLOCK": glue_triton.WIDEST}),
        (glue_triton._mix_norm, {"SCALED": False, "BLOCK": 1024}),
        (glue_triton._rotate_norm, {"HALF": 32, "BLOCK": 32, "Q": 16, "K": 16}),
        (glue_triton._rotate_norm, {"HALF": 48, "BLOCK": 64, "Q": 32, "K": 1}),
        (glue_triton._relu_squared, {"BLOCK": 1024}),
    ):
        binary = test_compile.compiled(kernel, capability, constants, tiles.Tile(0, 0, 4, 3))
        assert binary.asm["cubin"] and binary.metadata.shared <= test_compile.SHARED_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str)
def test_kernels_equal_pytorch_on_the_gpu(dtype, tolerance):
    equality("cuda", dtype, tolerance)
