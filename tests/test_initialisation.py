"""Initial weights: every scheme gives each matrix the same mean and spread, and only the schemes' own matrices differ."""

import dataclasses
import math

import pytest
import torch

from bio_inspired_nanochat.checkpoint import save_checkpoint
from bio_inspired_nanochat.common.automata import RULES
from bio_inspired_nanochat.config import GPTConfig, knobs_of, parse, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tasks.phrases import VOCAB, batch, train
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.plan import make_plan

SIZES = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
DRAWN = ("attn.q.weight", "attn.k.weight", "attn.v.weight", "mlp.w_in.weight")


def build(init: str, seed: int = 0, **changes) -> GPT:
    return GPT(GPTConfig(**(SIZES | changes), init=init), seed=seed)


def matrices(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in model.state_dict().items() if name.endswith(DRAWN)}


def test_the_choices_are_the_rules_that_are_built():
    assert knobs_of(GPTConfig)["init"].choices == ("standard", *RULES)


@pytest.mark.parametrize("init", list(RULES))
def test_each_matrix_has_the_spread_of_the_standard_scheme(init):
    standard, own = matrices(build("standard")), matrices(build(init))
    assert len(own) == len(DRAWN) * SIZES["n_layer"] and own.keys() == standard.keys()
    for name, value in own.items():
        limit = (0.4 if "w_in" in name else 1.0) * math.sqrt(3 / SIZES["n_embd"])  # of the uniform draw
        assert 0.99 * limit < standard[name].abs().max().item() <= limit + 1e-7
        assert abs(value.std(unbiased=False).item() / (limit / math.sqrt(3)) - 1) < 1e-6, name
        assert abs(value.mean().item()) < 1e-7 and len(value.unique()) == 2, name


@pytest.mark.parametrize("init", list(RULES))
def test_everything_else_is_as_in_the_standard_scheme(init):
    standard, own = build("standard").state_dict(), build(init).state_dict()
    for name, value in own.items():
        assert torch.equal(value, standard[name]) != name.endswith(DRAWN), name


@pytest.mark.parametrize("init", list(RULES))
def test_rows_are_distinct_and_span_the_space(init):
    for name, value in matrices(build(init)).items():
        assert len(value.unique(dim=0)) == len(value), name
        assert torch.linalg.matrix_rank(value) >= min(value.shape) - 1, name


@pytest.mark.parametrize("init", list(RULES))
def test_seed_and_name_decide_and_synapses_do_not(init):
    first, again, other = matrices(build(init)), matrices(build(init)), matrices(build(init, seed=1))
    synaptic = matrices(build(init, synapses=True))
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, synaptic[name]), name
        assert not torch.equal(value, other[name]), name
    same_shape = [value for name, value in first.items() if name.endswith(("k.weight", "v.weight"))]
    assert all(not torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


@pytest.mark.parametrize(("init", "synapses"), [("rule30", False), ("rule116", False), ("rule116", True)])
def test_a_model_born_from_an_automaton_learns(init, synapses):
    losses = train(build(init, synapses=synapses, n_embd=32, n_head=2), 60)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert sum(losses[-10:]) / 10 < losses[0] - 0.1


def test_a_checkpoint_remembers_the_scheme(tmp_path):
    model = build("rule116", synapses=True)
    save_checkpoint(tmp_path, 0, model.state_dict(), {"model_config": to_dict(model.config)})
    back = GPT.from_checkpoint(tmp_path)
    assert back.config == model.config and back.config.init == "rule116"
    ids = batch(0)[0]
    assert torch.equal(back(ids), model.eval()(ids))


def test_a_checkpoint_from_before_the_choice_is_standard(tmp_path):
    model = build("standard")
    values = to_dict(model.config)
    del values["init"]
    save_checkpoint(tmp_path, 0, model.state_dict(), {"model_config": values})
    assert GPT.from_checkpoint(tmp_path).config == model.config


def test_the_flag_of_base_train_reaches_the_model():
    config = parse(TrainConfig, ["--init=rule30", "--depth=1"], prog="base_train", description="")
    assert make_plan(config, torch.device("cpu"), 1).model.init == "rule30"
    with pytest.raises(UserError, match=r"init=.*rule31.*standard, rule30, rule116.*did you mean 'rule30'"):
        parse(TrainConfig, ["--init=rule31"], prog="base_train", description="")
    with pytest.raises(UserError, match="init='rule31' is not valid"):
        dataclasses.replace(config, init="rule31")
