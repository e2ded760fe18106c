"""Nothing inert: every knob of a synapse changes what a trained model computes."""

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig, knobs_of
from bio_inspired_nanochat.evaluation.census import LEAST_CHANGE, STEPS, UNMEASURED, Census, build, plan

KNOBS = [name for name in knobs_of(SynapticConfig) if name not in UNMEASURED]
MODELS = list(dict.fromkeys(plan().values()))


@pytest.fixture(scope="module")
def census() -> Census:
    return Census()


def test_the_criterion_is_the_agreed_one():
    assert (LEAST_CHANGE, STEPS) == (1e-3, 200)


@pytest.mark.parametrize("mechanisms", MODELS, ids=range(len(MODELS)))
def test_the_models_learn(mechanisms, census):
    census.model(mechanisms)
    losses = census.losses[mechanisms]
    assert len(losses) == STEPS and sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("name", KNOBS)
def test_moving_a_knob_moves_the_output(name, census):
    found = census.measure(name)
    assert not found.fault and found.change >= LEAST_CHANGE, f"{name} {found.fault}"


@pytest.mark.parametrize("mechanisms", MODELS, ids=range(len(MODELS)))
def test_training_moves_every_learned_constant(mechanisms, census):
    trained = census.model(mechanisms)
    fresh = dict(build(trained.config.syn_cfg).named_parameters())
    learned = {name: parameter for name, parameter in trained.named_parameters() if ".synapse." in name or ".density." in name}
    assert learned and [name for name, parameter in learned.items() if torch.equal(parameter, fresh[name])] == []
