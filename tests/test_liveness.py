"""Nothing inert: every knob of a synapse changes what a trained model computes."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, knobs_of
from bio_inspired_nanochat.gpt import GPT
from tests.small_training import VOCAB, batch, train

LEAST_CHANGE = 1e-3
AT_BIRTH = {"lambda_loge", "barrier_strength"}  # birth values of gains: a trained model has its own
SIZES = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}


def values_over_range(name: str) -> list:
    """The choices of a name, both values of a switch, and five points between a number's bounds."""
    record, default = knobs_of(SynapticConfig)[name], getattr(SynapticConfig(), name)
    if isinstance(default, bool):
        return [not default]
    if record.choices is not None:
        return [choice for choice in record.choices if choice != default]
    if isinstance(default, int):
        return [1, 2, 32]
    if record.log:
        return [record.lo * (record.hi / record.lo) ** share for share in (0, 0.25, 0.5, 0.75, 1)]
    return [record.lo + (record.hi - record.lo) * share for share in (0, 0.02, 0.25, 0.5, 1)]


def build(cfg: SynapticConfig) -> GPT:
    return GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=cfg)).eval()


@pytest.fixture(scope="module")
def trained() -> GPT:
    model = build(SynapticConfig(tick=4, release_rate=0.3))  # a short text drains pools only at a high rate
    losses = train(model, 200)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    return model


@pytest.mark.parametrize("name", list(knobs_of(SynapticConfig)))
def test_moving_a_knob_moves_the_logits(name, trained):
    ids = batch(9999)[0]
    changes = []
    with torch.no_grad():
        for value in values_over_range(name):
            cfg = dataclasses.replace(trained.config.syn_cfg, **{name: value})
            model = build(cfg)
            weights = {k: v for k, v in trained.state_dict().items() if k in dict(model.named_parameters())}
            if name in AT_BIRTH:
                weights = {k: v for k, v in weights.items() if ".synapse." not in k}
            model.load_state_dict(weights, strict=False)
            reference = trained
            if name in AT_BIRTH:
                reference = build(trained.config.syn_cfg)
                reference.load_state_dict(weights, strict=False)
            want = reference(ids)
            changes.append(((model(ids) - want).norm() / want.norm()).item())
    assert max(changes) >= LEAST_CHANGE, f"{name} is inert: largest relative change {max(changes):.1e} over {values_over_range(name)}"


def test_training_moves_every_learned_constant(trained):
    fresh = dict(build(trained.config.syn_cfg).named_parameters())
    for name, parameter in trained.named_parameters():
        if ".synapse." in name:
            assert not torch.equal(parameter, fresh[name]), name
