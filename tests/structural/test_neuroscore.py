"""What experts are worth: the gradient's estimate against the exact one, a planted worker, inequality, oracles, forgetting."""

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT, GPTConfig
from bio_inspired_nanochat.structural import (
    ForgettingCurve,
    NeuroBoard,
    contribution_of,
    gini,
    leave_one_out,
    oracle_agreement,
    scores,
    variation,
)
from tests.structural.colony import SIZES, World, batch, colony


def ranks(values):
    return values.argsort().argsort().double()


def spearman(a, b):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@pytest.fixture(scope="module")
def trained():
    """Eight experts per layer that do the work: the shared one is silenced, embedding and head are fixed and say the token itself."""
    model = colony(8, 8, n_layer=2, balance_rate=0.003)
    model.head.weight.data.copy_(model.embed.weight)
    fixed = [model.head.weight, model.embed.weight, *(p for m in model.experts() for p in (m.w_in.weight, m.w_out.weight))]
    for parameter in fixed:
        parameter.requires_grad_(False)
    roles = model.param_roles
    model.param_roles = lambda: {n: "scalar" if n.endswith(("mlp.w_in.weight", "mlp.w_out.weight")) else r for n, r in roles().items()}
    world = World(model)
    losses = world.live(120)
    assert losses[-1] < losses[0] - 1
    return world


def test_the_estimate_orders_experts_as_leaving_them_out_does(trained):
    idx, targets = batch(9999, rows=32)
    estimated = torch.cat(contribution_of(trained.model, idx, targets))
    exact = torch.cat(leave_one_out(trained.model, idx, targets))
    assert exact.max() > 0.1
    assert spearman(estimated, exact) > 0.8


def test_accounts_carry_the_contribution_of_training(trained):
    idx, targets = batch(9999, rows=32)
    exact = torch.cat(leave_one_out(trained.model, idx, targets))
    kept = torch.cat([layer.accounts.benefit for layer in trained.model.experts()])
    assert spearman(kept, exact) > 0.7


def test_one_expert_that_does_all_the_work_has_all_the_score(trained):
    """All others are made mute in their output: they add nothing, whatever is routed to them."""
    model = GPT(trained.model.config)
    model.load_state_dict(trained.model.state_dict())
    layer = model.experts()[1]
    worker = int(torch.stack(leave_one_out(model, *batch(9999)))[1].argmax())
    for slot in range(8):
        if slot != worker:
            layer.experts.w_out.data[slot] = 0
    idx, targets = batch(9999, rows=32)
    found = contribution_of(model, idx, targets)[1]
    assert found.argmax() == worker and found[worker] > 0
    assert torch.all(found[torch.arange(8) != worker] == 0)


def test_scores_name_the_specialist_the_steady_and_the_idle():
    model = colony(4, 5)
    kept = model.experts()[0].accounts
    kept.load[:4] = torch.tensor([2.0, 2.0, 0.0, 0.0])
    kept.benefit[:4] = torch.tensor([0.4, 0.2, 0.1, 0.0])
    kept.benefit_square[:4] = kept.benefit[:4].square() + torch.tensor([1e-2, 1e-4, 1e-4, 1e-4])
    kept.common[:2] = 1.0
    kept.inputs[0, :2] = 3.0
    kept.inputs[1, 4] = 1.0
    found = scores(model.experts()[0])
    assert found.efficiency[0] == pytest.approx(0.2) and found.efficiency[1] == pytest.approx(0.1)
    assert found.specialization[0] == pytest.approx(0.0, abs=1e-6) and found.specialization[1] == pytest.approx(1.0)
    assert found.resilience[1] > 50 * found.resilience[0]
    assert found.gini == pytest.approx(0.5) and found.dead == 0.5
    assert torch.isnan(found.contribution[4])
    assert [row[1] for row in NeuroBoard(model).best(2)] == [0, 1]


def test_variation_of_equal_loads_is_zero_and_grows_with_their_spread():
    assert variation(torch.ones(8)) == 0.0 and variation(torch.zeros(4)) == 0.0
    assert variation(torch.tensor([1.0, 3.0])) == pytest.approx(0.5)
    assert variation(torch.eye(8)[0]) == pytest.approx(7**0.5)


def test_gini_of_equal_loads_is_zero_and_of_a_monopoly_nearly_one():
    assert gini(torch.ones(8)) == pytest.approx(0.0)
    assert gini(torch.eye(8)[0]) == pytest.approx(7 / 8)
    assert gini(torch.zeros(4)) == 0.0


def test_an_oracle_agrees_more_with_a_trained_router_than_with_a_random_one(trained):
    idx, targets = batch(9999)
    agreed = oracle_agreement(trained.model, idx, targets, layer=1, samples=128)
    model = GPT(trained.model.config)
    model.load_state_dict(trained.model.state_dict())
    moe = model.experts()[1]
    moe.router.data.copy_(torch.randn(moe.router.shape, generator=torch.Generator().manual_seed(0)) * 3)
    assert 0 < oracle_agreement(model, idx, targets, layer=1, samples=128) < agreed <= 1


def test_forgetting_is_the_loss_above_the_best_so_far():
    curve = ForgettingCurve()
    for step, loss in [(1, 3.0), (2, 2.0), (3, 2.5), (4, 1.0)]:
        curve.add(step, {"old": loss})
    assert curve.forgetting("old") == [(1, 0.0), (2, 0.0), (3, 0.5), (4, 0.0)]


def test_a_model_without_experts_has_no_scores():
    model = GPT(GPTConfig(**SIZES))
    for action in (NeuroBoard, lambda model: leave_one_out(model, *batch(0)), lambda model: contribution_of(model, *batch(0))):
        with pytest.raises(UserError, match="num_experts"):
            action(model)
