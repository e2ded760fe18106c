"""Dropout, the baseline without biology: it acts in training only, keeps the mean, and off is its absence."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.config import fill_defaults, model_config
from bio_inspired_nanochat.tuning.stack import obstacle, stack_key
from tests.contract import SIZES, make_ids, make_model

VARIANTS = ("vanilla", "default", "fast_delta", "router_identity")


def drop(model: GPT, share: float) -> GPT:
    for block in model.blocks:
        block.dropout = share
    return model


@pytest.mark.parametrize("synapses", VARIANTS)
def test_evaluation_and_decoding_do_not_drop(synapses: str) -> None:
    plain, dropping = make_model(synapses), make_model(synapses, dropout=0.5)
    ids = make_ids()
    assert dropping.blocks[0].dropout == 0.5
    assert torch.equal(plain(ids), dropping(ids))
    assert torch.equal(plain.step(ids, plain.init_state(2, 64)), dropping.step(ids, dropping.init_state(2, 64)))


@pytest.mark.parametrize("synapses", VARIANTS)
def test_off_is_its_absence_in_training_too(synapses: str) -> None:
    ids = make_ids()
    model = make_model(synapses).train()
    state = torch.get_rng_state()
    trained = model(ids)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert torch.equal(trained, model.eval()(ids))


def test_training_drops_anew_and_by_the_generator() -> None:
    model, ids = make_model("default", dropout=0.3).train(), make_ids()
    torch.manual_seed(1)
    first, second = model(ids), model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first) and not torch.equal(first, second)


def test_an_addition_keeps_its_mean() -> None:
    block = drop(make_model("vanilla"), 0.25).train().blocks[0]
    torch.manual_seed(0)
    dropped = block._dropped(torch.ones(400, 500))
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
    assert torch.allclose(dropped[dropped > 0], torch.tensor(1 / 0.75))


def test_the_flag_reaches_the_model_and_has_bounds() -> None:
    config = fill_defaults(TrainConfig(depth=1, dropout=0.1), torch.device("cpu"))
    assert model_config(config, 300, 0).dropout == 0.1
    with pytest.raises(UserError, match=r"dropout=0\.95.*0\.9"):
        TrainConfig(dropout=0.95)


def test_a_stack_refuses_it() -> None:
    config = GPTConfig(**SIZES)
    dropping = dataclasses.replace(config, dropout=0.1)
    assert obstacle(config) is None and "dropout" in obstacle(dropping)
    assert stack_key(config) != stack_key(dropping)
