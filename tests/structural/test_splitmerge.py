"""The life of experts: what each event preserves, who may have one, and that rows of moments follow."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.structural import Rules, decide, operate
from bio_inspired_nanochat.structural.splitmerge import Event
from tests.structural.colony import World, batch, colony

IDX = batch(9999)[0]
PREFIX = "blocks.0.mlp"


def act(world, event, step=0):
    layer = world.model.experts()[0]
    operate(layer, event, world.model.config.syn_cfg, prefix=PREFIX, seed=0, step=step, optimizer=world.optimizer)


def split(parent=0, child=4, number=4):
    return Event("split", (parent, child), number, (parent,), (1.0, 0.0))


@pytest.fixture(scope="module")
def grown():
    """A colony after 60 steps, whose experts matter, as a function that makes a fresh copy."""
    world = World(colony(expert_plasticity=True, nmda=True, snare_codes=True, expert_lateral=0.3))
    losses = world.live(60)
    assert losses[-1] < losses[0] - 1
    state, moments = world.model.state_dict(), world.optimizer.state_dict()
    state = {name: value.clone() for name, value in state.items()}

    def fresh(every=0, **fields):
        again = World(colony(expert_plasticity=True, nmda=True, snare_codes=True, expert_lateral=0.3, **fields), every)
        again.model.load_state_dict(state)
        again.optimizer.load_state_dict(moments)
        again.step = 60
        return again

    return fresh


def logits(world):
    with torch.no_grad():
        return world.model(IDX)


def test_a_split_preserves_the_function_and_twins_come_apart(grown):
    world = grown()
    layer, before = world.model.experts()[0], logits(world)
    used = int(layer.accounts.load.argmax())
    act(world, split(used))
    torch.testing.assert_close(logits(world), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.synapse.identity[used], layer.synapse.identity[4])
    assert not torch.equal(layer.synapse.genome.xi[used], layer.synapse.genome.xi[4])
    world.live(200)
    away = (layer.experts.w_in[used] - layer.experts.w_in[4]).norm() / layer.experts.w_in[used].norm()
    assert away > 0.05 and layer.accounts.load[used] > 0.1 and layer.accounts.load[4] > 0.1
    assert layer.accounts.alive[[used, 4]].all()


def test_the_bias_between_twins_acts_less_the_more_they_differ(grown):
    world = grown()
    layer = world.model.experts()[0]
    act(world, split(int(layer.accounts.load.argmax())))
    lead = int(layer.accounts.lead[4])
    felt, blends = [], []
    world.live(
        25,
        lambda: (
            felt.append(float((1 - layer.accounts.blend[lead]) * layer.accounts.tie[lead])),
            blends.append(float(layer.accounts.blend[lead])),
        ),
    )
    assert blends[9] == pytest.approx(0.5) and blends[-1] == 1.0
    assert max(map(abs, felt[:18])) > 0.01 and felt[-1] == 0.0


def test_a_split_clones_the_moments(grown):
    world = grown()
    act(world, split(1))
    for name in ("experts.w_in", "experts.w_out", "router", "synapse.identity", "synapse.genome.xi"):
        moments = world.optimizer.moments(f"{PREFIX}.{name}")
        assert moments and all(value[1].abs().sum() > 0 and torch.equal(value[4], value[1]) for value in moments.values()), name


def test_grown_twins_separate_without_a_jump_of_the_loss(grown):
    world = grown()
    layer = world.model.experts()[0]
    act(world, split(int(layer.accounts.load.argmax())))
    lead, shares = int(layer.accounts.lead[4]), []
    world.live(100, lambda: shares.append(float(layer.accounts.both[lead])))
    assert shares[-1] < 0.5 * shares[19]  # fewer and fewer tokens would take both
    energy, before = layer.accounts.energy[lead].clone(), logits(world)
    loss = world.model(*batch(9999)).item()
    act(world, Event("separate", (lead, 4), 4, (lead,), (0.5, 0.5)))
    assert layer.accounts.lead[4] == 4 and layer.accounts.child[lead] == lead
    assert layer.accounts.energy[4] == energy and layer.accounts.tie[lead] == layer.accounts.blend[lead] == 0
    assert 0 < (logits(world) - before).abs().max() and abs(world.model(*batch(9999)).item() - loss) < 0.01


def test_a_merge_averages_by_use_and_leaves_an_empty_slot(grown):
    world = grown()
    layer = world.model.experts()[0]
    layer.accounts.load[:2] = torch.tensor([1.5, 0.5])
    first, second = layer.experts.w_in[0].clone(), layer.experts.w_in[1].clone()
    moment = world.optimizer.moments(f"{PREFIX}.experts.w_in")["momentum"]
    moved = torch.lerp(moment[0], moment[1], 0.25)
    act(world, Event("merge", (0, 1), 4, (0, 1), (0.3, 0.2)))
    torch.testing.assert_close(layer.experts.w_in[0], 0.75 * first + 0.25 * second)
    torch.testing.assert_close(moment[0], moved)
    assert layer.experts.w_in[1].abs().sum() == 0 and moment[1].abs().sum() == 0
    assert layer.accounts.ids.tolist() == [4, -1, 2, 3, -1, -1] and layer.accounts.next_id == 5
    assert layer.accounts.alive.tolist() == [True, False, True, True, False, False]
    assert torch.isfinite(torch.tensor(world.live(5))).all()
    assert layer.experts.w_in[1].abs().sum() == 0  # what is dead stays untouched by the optimizer


def test_a_death_closes_the_slot_and_a_newborn_adds_nothing_at_first(grown):
    world = grown()
    layer = world.model.experts()[0]
    act(world, Event("death", (2,), 2, (), (0.05,)))
    assert world.model.run(IDX, routing=True).routing[0].load[2] == 0
    act(world, Event("birth", (2,), 4, (), (0.0,)))
    assert layer.accounts.ids[2] == 4 and layer.accounts.alive[2] and layer.experts.w_out[2].abs().sum() == 0
    layer.accounts.balance[2] = 50.0
    out = world.model.run(IDX, routing=True)
    assert out.routing[0].load[2] == IDX.numel()
    world.live(10)
    assert layer.experts.w_out[2].abs().sum() > 0


def ready(**fields):
    """A colony of six of nine slots in which everybody is old enough, with accounts to be set."""
    model = colony(6, 9, **fields)
    layer = model.experts()[0]
    layer.accounts.age.fill_(1000)
    return layer, model.config.syn_cfg


def wealth(layer, slot, demand, energy):
    layer.accounts.demand[slot], layer.accounts.energy[slot] = demand, energy


def kinds(events):
    return [event.event for event in events]


def test_nobody_has_an_event_in_its_youth():
    layer, cfg = ready()
    wealth(layer, 0, 2.0, 1.0)
    assert kinds(decide(layer, cfg)) == ["split"]
    layer.accounts.age[0] = cfg.expert_youth - 1
    assert decide(layer, cfg) == []


def test_twins_are_not_merged_back():
    layer, cfg = ready(mutation_strength=0.0, merge_similarity=0.9)
    world_event = Event("split", (0, 6), 6, (0,), (1.0, 0.0))
    operate(layer, world_event, cfg, prefix=PREFIX, seed=0, step=1)
    for slot in (0, 6):
        wealth(layer, slot, 0.5, 0.4)
    assert decide(layer, cfg) == []
    layer.accounts.age.fill_(1000)
    assert decide(layer, cfg) == []  # still one slot
    layer.accounts.lead[6], layer.accounts.child[0] = 6, 0
    assert kinds(decide(layer, cfg)) == ["merge"]


def test_population_keeps_between_floor_and_ceiling():
    layer, cfg = ready()
    for slot in range(6):
        wealth(layer, slot, 0.0, 0.0)
    rules = Rules.of(layer)
    assert (rules.floor, rules.target, rules.ceiling) == (3, 6, 9)
    assert kinds(decide(layer, cfg, dataclasses.replace(rules, floor=6))) == []
    assert kinds(decide(layer, cfg, dataclasses.replace(rules, target=3))) == ["death"]
    for slot in range(6):
        wealth(layer, slot, 2.0, 1.0)
    assert kinds(decide(layer, cfg, dataclasses.replace(rules, ceiling=6))) == []
    layer.accounts.alive[5] = False
    assert kinds(decide(layer, cfg, dataclasses.replace(rules, ceiling=5))) == []


def test_nobody_dies_or_merges_where_twins_leave_a_token_no_choice():
    layer, cfg = ready(k=5)
    for number, parent in enumerate(range(3), 6):
        operate(layer, Event("split", (parent, number), number, (parent,), (1.0, 0.0)), cfg, prefix=PREFIX, seed=0, step=1)
    layer.accounts.age.fill_(1000)
    for slot in range(3, 6):
        wealth(layer, slot, 0.0, 0.0)
    assert layer.accounts.alive.sum() == 9 and layer.accounts.leads().sum() == 6  # of which a token visits five
    assert decide(layer, cfg) == []


def test_below_the_target_somebody_is_born_unless_somebody_splits():
    layer, cfg = ready()
    wealth(layer, 3, 0.0, 0.0)
    (death, birth) = decide(layer, cfg)
    assert (death.event, birth.event, death.slots, birth.slots) == ("death", "birth", (3,), (3,))
    assert birth.id == 6 and death.id == 3
    wealth(layer, 0, 2.0, 1.0)
    assert kinds(decide(layer, cfg)) == ["death", "split"]


def test_twins_separate_once_few_tokens_would_take_both():
    layer, cfg = ready()
    operate(layer, Event("split", (0, 6), 6, (0,), (1.0, 0.0)), cfg, prefix=PREFIX, seed=0, step=1)
    layer.accounts.blend[0], layer.accounts.both[0] = 1.0, 0.02
    assert decide(layer, cfg) == []
    layer.accounts.both[0] = 0.005
    assert kinds(decide(layer, cfg)) == ["separate"]
    layer.accounts.blend[0] = 0.9
    assert decide(layer, cfg) == []


def test_contribution_can_drive_the_life_cycle():
    layer, cfg = ready(sm_use_neuroscore=True)
    layer.accounts.benefit[:6] = torch.tensor([0.4, 0.0, 0.1, 0.1, 0.1, 0.1])
    wealth(layer, 0, 1.6, 0.8)
    wealth(layer, 1, 1.6, 0.8)
    (dead, born) = decide(layer, cfg)
    assert (dead.event, dead.slots) == ("death", (1,)) and born.event == "split" and born.slots[0] == 0
    assert kinds(decide(layer, dataclasses.replace(cfg, sm_use_neuroscore=False))) == ["split"]


def test_surgery_draws_the_same_everywhere():
    made = []
    for _ in range(2):
        layer, cfg = ready()
        torch.manual_seed(len(made))
        operate(layer, Event("split", (0, 6), 6, (0,), (1.0, 0.0)), cfg, prefix=PREFIX, seed=5, step=7)
        operate(layer, Event("birth", (7,), 7, (), (0.0,)), cfg, prefix=PREFIX, seed=5, step=7)
        made.append({name: value.clone() for name, value in layer.state_dict().items()})
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


EASY = {"death_health_max": 0.35, "split_health_min": 0.6, "merge_health_max": 0.6, "merge_similarity": -1.0, "balance_rate": 0.0}
EASY |= {"bank_rate": 0.05, "bank_decay": 0.1, "expert_youth": 10}


def test_a_whole_life_resumed_in_the_middle_is_the_same_life(grown):
    whole, parts = grown(every=10, **EASY), grown(every=10, **EASY)
    expected = whole.live(60)
    assert whole.keeper.events >= 3
    got = parts.live(30)
    assert parts.keeper.events > 0
    again = grown(every=10, **EASY)
    again.model.load_state_dict(parts.model.state_dict())
    again.optimizer.load_state_dict(parts.optimizer.state_dict())
    again.step = parts.step
    assert got + again.live(30) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True))
