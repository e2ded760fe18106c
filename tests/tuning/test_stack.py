"""Models that are trained as one are the models that they are alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, build_optimizer
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.tuning.stack import Stack, stack_key

SIZES = {"sequence_len": 40, "vocab_size": 30, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
OPTIM = OptimConfig(warmup_steps=0)
KINDS = {
    "vanilla": [None, None],
    "default": [{}, {"tau_c": 9.0, "theta": 0.3, "syt_mix": 0.4, "barrier_strength": 2.0}, {"tau_rrp": 12.0, "lambda_loge": 0.5}],
    "linear": [{"barrier": "linear"}, {"barrier": "linear", "release_bias": 0.0}],
    "barrier": [{"presyn": False}, {"presyn": False, "barrier_strength": 0.5}],
    "full": [{}, {"tau_energy": 20.0, "rec_rate": 0.3, "doc2_gain": 0.7, "energy_cost_prime": 0.4}],
    "delta": [{"hebb": "delta"}, {"hebb": "delta", "rho_elig": 0.9, "camkii_gain": 4.0, "tau_pp1": 9.0}],
    "hebb": [{"hebb": "hebb", "camkii_read": 1.0, "psd95_slots": 1.0}, {"hebb": "hebb", "camkii_read": 3.0, "psd95_slots": 0.2}],
}


def configs_of(kind: str) -> list[GPTConfig]:
    if kind == "vanilla":
        return [GPTConfig(**SIZES) for _ in KINDS[kind]]
    base = SynapticConfig(rank_eligibility=4, tick=4)
    if kind == "full":
        names = ("presyn", "slow_sensor", "barrier_gated", "buffer", "doc2", "complexin", "clamp_dynamics", "priming", "reserve", "rab")
        base = config_with(*names, "energy", "quantal", "lateral", tick=4)
    return [GPTConfig(**SIZES, synapses=True, syn_cfg=dataclasses.replace(base, **change)) for change in KINDS[kind]]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(30, (3, 24), generator=torch.Generator().manual_seed(step))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_of_a_stack_learns_as_it_does_alone(kind: str) -> None:
    configs = configs_of(kind)
    seeds = list(range(len(configs)))
    stack = Stack(configs, seeds)
    models = [GPT(config, seed) for config, seed in zip(configs, seeds, strict=True)]
    optimizers = [build_optimizer(model.named_parameters(), model.param_roles(), OPTIM, n_embd=32, batch_tokens=69) for model in models]
    together = stack.optimizer(OPTIM, batch_tokens=69)
    for step in range(6):
        idx, targets = batch(step)
        losses = stack.losses(idx, targets)
        alone = [model(idx, targets) for model in models]
        torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-4)
        losses.sum().backward()
        together.step()
        together.zero_grad()
        for loss, optimizer in zip(alone, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = stack.logits(batch(99)[0]).detach()
    for index, model in enumerate(models):
        torch.testing.assert_close(moved[index], model(batch(99)[0]).detach(), rtol=1e-3, atol=2e-3)
    assert kind == "vanilla" or (moved[0] - moved[1]).abs().max() > 1e-2, "the constants of the models differ, and so do the models"


def test_a_model_that_diverges_stays_alone() -> None:
    configs = configs_of("default")
    stack, sound = Stack(configs, [0, 0, 0]), Stack(configs, [0, 0, 0])
    with torch.no_grad():
        stack.weights["blocks.0.attn.q.weight"][1] = torch.nan
    losses, expected = stack.losses(*batch(0)), sound.losses(*batch(0))
    assert losses.isnan().tolist() == [False, True, False]
    losses.sum().backward()
    expected.sum().backward()
    assert torch.equal(losses[[0, 2]], expected[[0, 2]])
    for name, weight in stack.named_parameters():
        assert torch.equal(weight.grad[[0, 2]], sound.weights[name].grad[[0, 2]]), name


@pytest.mark.parametrize("change", [{"tick": 8}, {"beta_max": 3.0}, {"syt_mix": 1.0}, {"hebb": "delta"}])
def test_what_cannot_differ_keeps_models_apart(change: dict) -> None:
    one = configs_of("default")[0]
    other = dataclasses.replace(one, syn_cfg=dataclasses.replace(one.syn_cfg, **change))
    assert stack_key(one) != stack_key(other)
    with pytest.raises(UserError, match="cannot be trained as a stack"):
        Stack([one, other], [0, 0])


@pytest.mark.parametrize("change", [{"genome": "xi"}, {"stochastic_train_frac": 0.5}, {"hebb": "delta", "camkii_latch": True}])
def test_models_that_cannot_be_stacked_say_why(change: dict) -> None:
    one = configs_of("default")[0]
    with pytest.raises(UserError, match="cannot be trained as a stack"):
        Stack([dataclasses.replace(one, syn_cfg=dataclasses.replace(one.syn_cfg, **change))], [0])
