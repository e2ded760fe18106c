"""One account per expert, moved by what the real router does: fair demand rests, demand fills, neglect empties."""

import pytest
import torch

from bio_inspired_nanochat.structural import decide, gini, health, update
from bio_inspired_nanochat.synaptic.state import Place
from tests.structural.colony import World, colony
from tests.synaptic.test_moe import WIDTH, layer

START = Place()


def stream(step, tokens=512):
    """Inputs with a constant first channel, by which a router's first column is a bias."""
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(step))
    x[..., 0] = 1.0
    return x


def town(bias, **fields):
    """A mixture of eight experts whose router prefers them by `bias` [8], with plain experts otherwise alike."""
    fields = {"expert_plasticity": False, "router_identity": False} | fields
    moe = layer(experts=8, slots=10, **fields)
    moe.router.data *= 0.5
    moe.router.data[:8, 0] = torch.tensor(bias)
    return moe


def settle(moe, steps):
    """Steps of metabolism; the demand in units of the fair one, averaged."""
    total = 0
    for step in range(steps):
        x = stream(step)
        with torch.no_grad():
            found = moe.statistics(x, moe.route(x, START)[0])
        update([moe], [found], moe.synapse.cfg)
        total = total + found.demand / (moe.k * found.tokens / moe.accounts.alive.sum())
    return total / steps


def preferring(wanted, steps=4):
    """A bias for the first expert with which its demand is `wanted` times the fair one, by bisection on the real router."""
    low, high = -20.0, 20.0
    for _ in range(14):
        middle = (low + high) / 2
        demand = settle(town([middle] + [0.0] * 7), steps)[0]
        low, high = (middle, high) if demand < wanted else (low, middle)
    return low


def test_fair_demand_is_the_fixed_point():
    moe = town([0.0] * 8, bank_rate=0.05, bank_decay=0.1)
    moe.router.data[:8] = torch.eye(WIDTH)[:8] * 3  # every expert likes a channel of its own
    moe.router.data[0] = torch.eye(WIDTH)[9] * 3
    moe.accounts.energy[:8] = torch.linspace(0, 1, 8)
    demand = settle(moe, 80)
    assert torch.all((demand[:8] - 1).abs() < 0.1)
    assert torch.all((moe.accounts.energy[:8] - 0.5).abs() < 0.05)
    assert torch.all(moe.accounts.energy[8:] == 0.5)


def test_an_overloaded_expert_becomes_splittable():
    moe = town([preferring(2.0)] + [0.0] * 7)
    demand = settle(moe, 130)
    assert 1.7 < demand[0] < 2.4
    assert health(moe.accounts, False)[0] > 0.8
    moe.accounts.age.fill_(1000)
    (event,) = [event for event in decide(moe, moe.synapse.cfg) if event.event == "split"]
    assert event.slots == (0, 8)


def test_a_starved_expert_goes_bankrupt():
    moe = town([-20.0] + [0.0] * 7)
    demand = settle(moe, 200)
    assert demand[0] < 0.01 and moe.accounts.energy[0] < 0.1
    assert health(moe.accounts, False)[0] < 0.15 and torch.all(health(moe.accounts, False)[1:8] > 0.15)
    moe.accounts.age.fill_(1000)
    assert [event.slots for event in decide(moe, moe.synapse.cfg) if event.event == "death"] == [(0,)]


def test_the_balancing_bias_evens_loads_and_hides_nothing_from_demand():
    bias = [1.5, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -1.5]
    uneven, even = town(bias, balance_rate=0.0, bank_gain=0.0), town(bias, balance_rate=0.03, bank_gain=0.0)
    demand = settle(uneven, 100)
    torch.testing.assert_close(settle(even, 100), demand)
    loads = [moe.accounts.load[:8] / moe.accounts.load[:8].sum() for moe in (uneven, even)]
    assert gini(loads[0]) > 0.3 and gini(loads[1]) < 0.1
    assert even.accounts.balance[:8].mean().abs() < 1e-4


def test_tokens_that_the_bias_sends_are_not_paid_for():
    moe = town([0.0] * 8, balance_rate=0.0, bank_gain=0.0, bank_rate=0.05, bank_decay=0.1)
    moe.accounts.balance[0] = 50.0
    demand = settle(moe, 40)
    assert moe.accounts.load[0] > 3 and demand[0] < 1.5
    assert moe.accounts.energy[0] < 0.75


def test_a_rich_account_attracts_tokens():
    """The bank is part of the choice: kappa (E - 1/2)."""
    moe = town([0.0] * 8, bank_gain=4.0)
    before = settle(moe, 3)
    moe.accounts.energy[3] = 1.0
    assert settle(moe, 3)[3] > before[3] + 0.5


@pytest.mark.parametrize("pull, push, closer", [(1.0, 0.0, True), (0.0, 1.0, False)])
def test_contrast_pulls_partners_together_and_pushes_strangers_apart(pull, push, closer):
    moe = town([0.0] * 8, router_identity=True, router_contrastive_pull=pull, router_contrastive_push=push)
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(32, generator=generator)
    moe.synapse.identity.data[:8] = common + 0.5 * torch.randn(8, 32, generator=generator)
    moe.synapse.identity_gain.data.zero_()
    moe.router.data[:8] = 0
    moe.router.data[0, 1] = moe.router.data[1, 1] = 5.0  # these two like the same tokens
    moe.router.data[2, 1] = -5.0
    size = moe.synapse.identity.norm(dim=1)

    def cosine(a, b):
        return torch.cosine_similarity(moe.synapse.identity[a], moe.synapse.identity[b], dim=0).item()

    together, strangers = cosine(0, 1), cosine(0, 2)
    settle(moe, 40)
    assert (cosine(0, 1) > together + 0.02) if closer else (cosine(0, 2) < strangers - 0.1)
    torch.testing.assert_close(moe.synapse.identity.norm(dim=1), size, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_twins_turn_apart_for_ever_and_grow_no_longer(backend):
    """Steps relative to a row's length would add up to any length in a life of thousands of steps, and saturate the router."""
    moe = town([0.0] * 8, router_contrastive_push=1.0)
    moe.backend = backend
    moe.router.data[8] = moe.router.data[1]
    moe.accounts.alive[8] = True
    moe.accounts.lead[8], moe.accounts.child[1] = 1, 8
    size = moe.router.detach().norm(dim=1)
    between = []
    for _ in range(3):
        settle(moe, 100)
        between.append(torch.cosine_similarity(moe.router[1], moe.router[8], dim=0).item())
    torch.testing.assert_close(moe.router.detach().norm(dim=1), size, rtol=1e-4, atol=1e-6)
    assert between[0] < 0.99 and between[-1] < between[0]


def test_only_the_keeper_changes_accounts():
    model = colony()
    world = World(model)
    kept = {name: value.clone() for name, value in model.named_buffers()}
    idx = torch.randint(1, 50, (2, 32))
    model.run(idx, idx, routing=True).loss.backward()
    model.zero_grad()
    assert all(torch.equal(kept[name], value) for name, value in model.named_buffers())
    world.live(1)
    assert any(not torch.equal(kept[name], value) for name, value in model.named_buffers())


def test_micro_batches_count_like_one_batch():
    whole, parts = colony(seed=3), colony(seed=3)
    for model, pieces in ((whole, 1), (parts, 2)):
        idx = torch.randint(1, 50, (4, 32), generator=torch.Generator().manual_seed(0))
        model.experts()[0].experts.w_out.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.head.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        keeper = World(model).keeper
        for piece in idx.chunk(pieces):
            out = model.run(piece[:, :-1], piece[:, 1:], routing=True, probes=keeper.probes())
            keeper.add(out.routing)
            (out.loss / pieces).backward()
        keeper.after_step(1, idx, idx)
    kept, other = whole.experts()[0].accounts, parts.experts()[0].accounts
    assert kept.benefit[:4].abs().min() > 0
    for name, value in kept.named_buffers():
        torch.testing.assert_close(value, dict(other.named_buffers())[name], rtol=1e-4, atol=1e-6)
