"""Experts for a few tokens: the kernels choose and compute what PyTorch's operations do, and decoding takes them."""

import importlib.util

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.synaptic import SynapticMoE, moe
from tests.kernels import test_compile
from tests.kernels.interpreter import run_interpreted

SHAPES = ((1, 8, 2, 48, 20), (3, 5, 5, 33, 7), (7, 16, 1, 16, 64))  # tokens, experts, choices, width, hidden units


def mixture(experts, choices, width, synapses=False):
    config = GPTConfig(n_embd=width, n_head=1, n_kv_head=1, vocab_size=8, num_experts=experts, moe_top_k=choices, synapses=synapses)
    layer = SynapticMoE(config)
    make = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=make) / max(1, parameter.shape[-1] if parameter.ndim else 1) ** 0.5)
    layer.accounts.energy.copy_(torch.rand(layer.slots, generator=make))
    layer.accounts.balance.copy_(torch.randn(layer.slots, generator=make) * 0.1)
    return layer


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


@torch.no_grad()
def choice(device="cpu"):
    """The route that training takes, of logits with ties, of slots that are shut, and of what is no number."""
    from bio_inspired_nanochat.kernels import moe_triton

    for experts, choices in ((8, 2), (5, 4), (33, 3)):
        layer = mixture(experts, choices, 16).to(device)
        layer.accounts.alive[experts // 2 + 1 :] = False  # fewer than are to be chosen, once
        standing = layer.standing(held=True)
        assert not standing.twins and standing.shut.any()
        x = torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(2)).to(device)
        x[0] = 0  # all logits alike
        for bank in (standing.bank, torch.zeros_like(standing.bank)):
            route, _ = layer.route(x, moe.Place(), standing=standing._replace(bank=bank))
            args = (route.logit, bank, layer.accounts.balance, standing.shut, layer.k)
            expert, gates = moe_triton.choose(*args)
            assert torch.equal(expert, route.expert)
            torch.testing.assert_close(gates, route.gates)
            scale = torch.randn_like(route.logit)
            torch.testing.assert_close(moe_triton.choose(*args, scale)[1], gates * scale.gather(1, expert).exp())
            layer.accounts.balance.zero_()
        logit = route.logit.clone()
        logit[1], logit[2, 0] = float("nan"), float("nan")
        expert, gates = moe_triton.choose(logit, *args[1:])
        assert (expert.sort(1).values.diff(dim=1) > 0).all() and 0 <= expert.min() and expert.max() < experts
        assert gates[1].isnan().any() and torch.equal(gates[3:], moe_triton.choose(*args)[1][3:])


def test_kernels_equal_pytorch_in_the_interpreter():
    run_interpreted("from tests.kernels.test_moe_triton import *\nequality()\nchoice()\nselection()")


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
    monkeypatch.setattr(test_compile, "WHOLE", {"expert_ptr": "*i64", "shut_ptr": "*i1"})
    monkeypatch.setattr(test_compile, "ALIGNED", {"hidden", "width"})
    for kernel, constants, warps in (
        (moe_triton._choose, {"K": 2, "SCALED": True, "BLOCK": 16}, 1),
        (moe_triton._choose, {"K": 3, "SCALED": False, "BLOCK": 256}, 1),
        (moe_triton._enter, {"ROWS": 4, "COLUMNS": 1024}, 4),
        (moe_triton._leave, {"K": 2, "ROWS": 4, "COLUMNS": 1024}, 4),
    ):
        binary = test_compile.compiled(kernel, capability, constants, tiles.Tile(0, 0, warps, 3))
        assert binary.asm["cubin"] and binary.metadata.shared <= test_compile.SHARED_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_kernels_equal_pytorch_on_the_gpu(dtype, tolerance):
    equality("cuda", dtype, tolerance)
    choice("cuda")
