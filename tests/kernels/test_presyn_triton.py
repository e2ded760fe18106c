"""The generated kernel of the terminals equals the reference: outputs, states, random draws and every gradient."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.kernels import PresynParams, PresynState, ReleaseNoise
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.synaptic import Presynaptic
from tests.kernels.interpreter import run_interpreted

CASES = {
    "core": SynapticConfig.preset("core"),
    "one_sensor": config_with("presyn", tied_gains=True),
    "buffer": config_with("buffer"),
    "recycling": config_with("rab", "lateral", endo_delay=20.0),
    "full": SynapticConfig.preset("full"),
    "seed": SynapticConfig.preset("seed"),
}


def run(cfg: SynapticConfig, backend: str, device: str, dtype: torch.dtype, ticks: int, keys: int, noisy: bool):
    """Values by name: bias, record, final state and gradients, through the public operator."""
    torch.manual_seed(0)
    module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=cfg))
    module.init_weights()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    drive = torch.rand(2, 2, ticks, keys) * 3
    drive[:, :, 1] = 0
    module, drive = module.to(device), drive.to(device).requires_grad_()
    params = PresynParams(*[value.to(dtype) if isinstance(value, torch.Tensor) else value for value in module.params()])
    state = PresynState.rest(2, 2, keys, device=drive.device, dtype=dtype, params=params)
    state = state._replace(open_drive=torch.full_like(state.open_drive, 0.3))
    noise = ReleaseNoise.of(torch.arange(2, device=device), 5).at(3, 2) if noisy else None
    record: dict[str, torch.Tensor] = {}
    beta, state = kernels.presyn(drive.to(dtype), params, state, closed=ticks - 1, noise=noise, record=record, backend=backend)
    values = {"beta": beta, **record, **{f"final {name}": value for name, value in state.parts().items()}}
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator).to(device)).sum() for _, value in sorted(values.items()))
    leaves = {"drive": drive, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return values, dict(zip(leaves, grads, strict=True))


def compare(name: str, device: str, ticks: int = 6, keys: int = 20) -> None:
    cfg = dataclasses.replace(CASES[name], stochastic_train_frac=0.5 if name == "full" else 0.0)
    noisy = name == "full"
    values, grads = run(cfg, "sdpa", device, torch.float32, ticks, keys, noisy)
    # the interpreter runs the programs of a grid in a row, so that only a GPU can give other bits
    again, grads_again = run(cfg, "sdpa", device, torch.float32, ticks, keys, noisy) if device == "cuda" else (values, grads)
    wanted, wanted_grads = run(cfg, "reference", device, torch.float64, ticks, keys, noisy)
    for key, value in wanted.items():
        torch.testing.assert_close(values[key].double(), value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{name} {key}: {text}")
        assert torch.equal(values[key], again[key]), key
    _, plain = run(cfg, "reference", device, torch.float32, ticks, keys, noisy)
    for key, grad in wanted_grads.items():
        # a gradient that is a small difference of large terms is no better than float32 allows
        error, unavoidable = ((got - grad).norm() / grad.norm().clamp(min=1e-3) for got in (grads[key], plain[key]))
        assert error <= max(1e-5, 3 * unavoidable), f"{name}: gradient of {key} is off by {error:.1e}, not {unavoidable:.1e}"
        assert torch.equal(grads[key], grads_again[key]), key


def compare_young(device: str, ticks: int = 7, keys: int = 200) -> None:
    """Skipping the ticks before a key's birth changes neither bias nor gradients, given a drive that is zero there."""
    module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=dataclasses.replace(CASES["recycling"], tick=32)))
    module.init_weights()
    module.gain_depletion.data += 1
    params = module.to(device).params()
    born = torch.arange(ticks)[:, None] >= torch.arange(keys) // 32
    drive = (torch.rand(1, 2, ticks, keys, generator=torch.Generator().manual_seed(0)) * born).to(device).requires_grad_()
    results = []
    for causal in (True, False):
        beta, _ = kernels.presyn(drive, params, closed=ticks, causal=causal, backend="sdpa")
        grads = torch.autograd.grad(
            (beta * beta).sum(), [drive, *module.parameters()], allow_unused=True, materialize_grads=True, retain_graph=True
        )
        results.append([beta, grads[0] * born.to(device), *grads[1:]])
    for skipped, whole in zip(*results, strict=True):
        torch.testing.assert_close(skipped, whole, rtol=1e-5, atol=1e-6)
    assert results[0][0].abs().max() > 0.1


@pytest.mark.gpu
def test_skipping_unborn_keys_changes_nothing_on_the_gpu():
    compare_young("cuda", ticks=9, keys=280)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_on_the_gpu(name):
    compare(name, "cuda", ticks=37, keys=150)


def test_kernels_equal_the_reference_in_the_interpreter():
    run_interpreted(
        "from tests.kernels.test_presyn_triton import CASES, compare, compare_young\nfor name in ('core', 'recycling', 'full'): compare(name, 'cpu')\ncompare_young('cpu')"
    )


def test_memory_that_nothing_has_written_is_not_a_number_in_the_interpreter():
    run_interpreted("assert torch.empty(1000).isnan().all() and torch.zeros(1).new_empty(1000).isnan().all()")


def test_every_part_of_a_terminal_is_in_a_case():
    used = {name for cfg in CASES.values() for name, value in _params(cfg).items() if isinstance(value, torch.Tensor)}
    assert used == set(PresynParams._fields) - {"tick", "beta_max", "epsilon", "endo_slots", "lateral_window", "sampler"}


def _params(cfg: SynapticConfig) -> dict[str, object]:
    module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=cfg))
    module.init_weights()
    return module.params()._asdict()
