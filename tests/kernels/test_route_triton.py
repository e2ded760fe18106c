"""The route of a decoded token in one kernel: every set of mechanisms gives the experts, gates and states of `SynapticMoE.route`."""

import dataclasses
import importlib.util
import itertools

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.synaptic import Place, SynapticMoE
from bio_inspired_nanochat.synaptic.state import ExpertState
from tests.kernels import test_compile
from tests.kernels.interpreter import run_interpreted

TICK = 3
PARTS = ("router_identity", "snare_codes", "expert_lateral", "expert_plasticity", "nmda")
SETS = [set(chosen) for size in (0, 1, 4, 5) for chosen in itertools.combinations(PARTS, size)] + [
    {"expert_plasticity", "vesicle_output"},
    {*PARTS, "vesicle_output"},
]


def mixture(parts, synapses=True, experts=6, choices=2, slots=7, width=16):
    """Experts with parameters, accounts and gains of all kinds; the last slots are empty."""
    sizes = {"identity_dim": 37, "snare_dim": 3}  # more than what the kernel holds of a code at once, and less
    cfg = dataclasses.replace(SynapticConfig(), tick=TICK, tau_c=4.0, tau_rrp=6.0, **sizes)
    for name in (*PARTS, "vesicle_output"):
        value = getattr(cfg, name)
        cfg = dataclasses.replace(cfg, **{name: type(value)(0.7 if name in parts and isinstance(value, float) else name in parts)})
    config = GPTConfig(
        n_embd=width,
        n_head=1,
        n_kv_head=1,
        vocab_size=8,
        num_experts=experts,
        expert_slots=slots,
        moe_top_k=choices,
        synapses=synapses,
        syn_cfg=cfg,
    )
    layer, make = SynapticMoE(config), torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=make) * (0.5 if parameter.ndim else 1.0))
    layer.accounts.energy.copy_(torch.rand(slots, generator=make))
    layer.accounts.balance.copy_(torch.randn(slots, generator=make) * 0.1)
    return layer


@torch.no_grad()
def equality(device="cpu", tolerance=1e-5):
    """Rows at different positions, one of them not there; states after every token of two ticks."""
    for synapses, parts in [(False, set()), *((True, parts) for parts in SETS)]:
        layer = mixture(parts, synapses).to(device)
        router, make = layer.hold(torch.float32).router, torch.Generator().manual_seed(2)
        assert router is not None
        want = layer.init_state(3, torch.device(device), torch.float32)
        if want is not None:
            want = ExpertState(*(part + 0.3 * torch.rand(part.shape, generator=make).to(device) for part in want))
        got = None if want is None else ExpertState(*(part.clone() for part in want))
        for token in range(2 * TICK):
            x, positions = torch.randn(3, 1, 16, generator=make).to(device), torch.tensor([token, token + 1, -1], device=device)
            route, after = layer.route(x, Place(positions, None, positions[:, None] >= 0), want)
            expert, gates = router.route(x, positions, got)
            assert torch.equal(expert, route.expert), (parts, token)
            wanted = route.gates if route.scale is None else route.gates * route.scale
            torch.testing.assert_close(gates, wanted, rtol=tolerance, atol=tolerance)
            if after is not None:
                want = after
                for name, mine, theirs in zip(want._fields, got, want, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=f"{name} of {parts} after token {token}")


@torch.no_grad()
def choice(device="cpu"):
    """Ties, more choices than open slots, and logits that are no numbers."""
    for experts, choices in ((8, 2), (5, 4), (33, 3)):
        layer = mixture((), experts=experts, choices=choices, slots=experts).to(device)
        layer.accounts.alive[experts // 2 + 1 :] = False
        layer.accounts.energy.fill_(0.5)
        layer.accounts.balance.zero_()
        x = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(2)).to(device)
        x[0] = 0  # all scores alike
        positions = torch.zeros(4, dtype=torch.long, device=device)
        route, _ = layer.route(x, Place(positions, None, None))
        router = layer.hold(torch.float32).router
        expert, gates = router.route(x, positions, None)
        assert torch.equal(expert, route.expert)
        torch.testing.assert_close(gates, route.gates)
        x[1] = float("nan")
        expert, wrong = router.route(x, positions, None)
        assert (expert.sort(1).values.diff(dim=1) > 0).all() and 0 <= expert.min() and expert.max() < experts
        assert wrong[1].isnan().any() and torch.equal(wrong[2:], gates[2:])
        layer.router[1] = float("nan")  # one damaged expert of sound ones: it must not be passed over in silence
        route, _ = layer.route(x, Place(positions, None, None))
        expert, gates = layer.hold(torch.float32).router.route(x, positions, None)
        assert torch.equal(expert, route.expert) and (expert[2:, 0] == 1).all()
        assert gates.isnan().all() and route.gates.isnan().all()


@torch.no_grad()
def constancy():
    """What is held is of one moment, also before the first token: no parameter and no account that changes later gets into it."""
    layer = mixture({*PARTS, "vesicle_output"})
    x, positions = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(2)), torch.zeros(3, dtype=torch.long)

    def routed(router):
        return router.route(x, positions, ExpertState(*torch.full((4, 3, layer.slots), 0.5)))

    held, want = layer.hold(torch.float32).router, routed(layer.hold(torch.float32).router)
    changing = [layer.router, *layer.synapse.parameters(), layer.accounts.energy, layer.accounts.balance]
    for tensor in changing:
        tensor.add_(10 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(*pair) for pair in zip(routed(held), want, strict=True))
    assert not torch.equal(routed(layer.hold(torch.float32).router)[1], want[1])


@torch.no_grad()
def refusals():
    from bio_inspired_nanochat.kernels import route_triton

    layer = mixture(PARTS)
    assert layer.hold(torch.float64).router is None
    twin = mixture(PARTS)
    twin.accounts.child[1], twin.accounts.lead[6] = 6, 1
    assert twin.hold(torch.float32).router is None
    wide = route_triton.MOST_EXPERTS + 1
    assert mixture((), experts=wide, slots=wide).hold(torch.float32).router is None


def test_one_kernel_routes_as_training_does_in_the_interpreter():
    run_interpreted("from tests.kernels.test_route_triton import *\nequality()\nchoice()\nconstancy()\nrefusals()")


def test_without_a_gpu_nothing_is_held():
    assert mixture(PARTS).hold(torch.float32).router is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability, parts", [(89, {*PARTS, "vesicle_output"}), (90, set())])
def test_kernels_compile(capability, parts, monkeypatch):
    from bio_inspired_nanochat.kernels import presyn_codegen, route_triton, tiles

    monkeypatch.setattr(test_compile, "HALF", {"seen_ptr"})
    monkeypatch.setattr(test_compile, "WHOLE", {"expert_ptr": "*i64", "position_ptr": "*i64", "shut_ptr": "*i1"})
    monkeypatch.setattr(test_compile, "REALS", {"fair", "identity_gain", "snare_gain", "vesicle_gain", "nmda_gain", "decay"})
    signature = None
    if "expert_plasticity" in parts:
        params = mixture(parts).synapse.params()
        signature = presyn_codegen.signature_of(params, list(route_triton.STATES), ["bias"], False, "any")
    flags = (name in parts for name in ("router_identity", "snare_codes", "expert_lateral", "vesicle_output", "nmda"))
    kernel = route_triton._kernel(TICK, signature, *flags)
    binary = test_compile.compiled(
        kernel, capability, {"K": 2, "BLOCK": route_triton.MOST_EXPERTS, "D": 32, "S": 8}, tiles.Tile(0, 0, 4, 3)
    )
    assert binary.asm["cubin"] and binary.metadata.shared <= test_compile.SHARED_LIMIT


@pytest.mark.gpu
def test_one_kernel_routes_as_training_does_on_the_gpu():
    equality("cuda", 1e-4)
    choice("cuda")
