"""The tiled Triton kernels equal the reference: drive and biased attention, outputs and gradients."""

import pytest
import torch

from bio_inspired_nanochat import kernels
from tests.kernels.interpreter import run_interpreted

OPTIONS = {
    "plain": {},
    "window": {"window": 19},
    "documents": {"doc": True},
    "both": {"window": 9, "doc": True},
    "late start": {"q_start": 21},
    "softplus": {"kind": "softplus"},
}


def run(backend, device, dtype, length, tick, dim, heads=4, kv_heads=2, q_start=0, window=None, doc=None, kind="phi", real=torch.float64):
    """Drive, attention output and all gradients. `real`: dtype in which the reference computes from the same numbers."""
    generator = torch.Generator().manual_seed(length * 100 + tick)
    keys = q_start + length
    shapes = [(2, heads, length, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    ticks = kernels.num_ticks(q_start, length, tick)
    beta = torch.randn(2, heads, ticks, keys, generator=generator).to(device)
    theta = torch.linspace(-0.5, 0.5, heads).to(device)
    weights = [torch.randn(2, heads, ticks, keys, generator=generator), torch.randn(2, heads, length, dim, generator=generator)]
    if doc is not None:
        doc = (torch.rand(2, keys, generator=generator) < 0.1).cumsum(1).to(device)
    exact = backend == "reference"
    leaves = [value.to(real if exact else value.dtype).requires_grad_() for value in (q, k, v, beta, theta)]
    q, k, v, beta, theta = leaves
    where = {"q_start": q_start, "window": window, "doc": doc, "backend": backend}
    drive = kernels.tick_drive(q, k, theta, tick, dim**-0.5, kind=kind, **where)
    y = kernels.tick_biased_attention(q, k, v, beta, tick, dim**-0.5, **where)
    drive_grads = torch.autograd.grad((drive * weights[0].to(drive)).sum(), [q, k, theta])
    y_grads = torch.autograd.grad((y * weights[1].to(y)).sum(), [q, k, v, beta])
    return {
        "drive": drive, "y": y,
        **{f"drive d{name}": grad for name, grad in zip(("q", "k", "theta"), drive_grads, strict=True)},
        **{f"y d{name}": grad for name, grad in zip(("q", "k", "v", "beta"), y_grads, strict=True)},
    }  # fmt: skip


def compare(device, dtype, length, tick, dim, **options):
    got = run("triton", device, dtype, length, tick, dim, **options)
    again = run("triton", device, dtype, length, tick, dim, **options) if device == "cuda" else got
    want = run("reference", device, dtype, length, tick, dim, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for name, value in want.items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - value.double()).norm() / value.norm().clamp(min=1)
        assert error <= tolerance, f"{name} is off by {error:.1e} (T={length}, c={tick}, D={dim}, {options})"
        assert torch.equal(got[name], again[name]), f"{name} differs between two runs"


def interpreted():
    compare("cpu", torch.float32, 1, 8, 16)
    compare("cpu", torch.float32, 33, 1, 16)
    compare("cpu", torch.float32, 65, 8, 16, heads=2, kv_heads=1)  # three tiles of queries and keys
    for options in list(OPTIONS.values())[1:]:
        compare("cpu", torch.float32, 25, 4, 16, heads=2, kv_heads=1, **options)
    compare("cpu", torch.float32, 40, 32, 32, heads=2, kv_heads=2)


def test_kernels_equal_the_reference_in_the_interpreter():
    run_interpreted("from tests.kernels.test_tiled_kernels import interpreted\ninterpreted()")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tick", [1, 4, 8, 16])
def test_kernels_equal_the_reference_on_the_gpu(dtype, dim, tick):
    for length in (1, 7, 63, 64, 65, 500):
        compare("cuda", dtype, length, tick, dim)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_options_equal_the_reference_on_the_gpu(options):
    for dtype in (torch.float32, torch.bfloat16):
        compare("cuda", dtype, 300, 8, 64, **OPTIONS[options])
