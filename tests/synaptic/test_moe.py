"""Experts beside an MLP: priming, causality, genomes that matter, twins that compete as one slot, statistics that add up."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic import Probe, SynapticMoE
from bio_inspired_nanochat.synaptic.state import Place
from tests.contract import make_ids, make_model

WIDTH = 32
START = Place()


def layer(synapses=True, experts=5, slots=8, **fields) -> SynapticMoE:
    """A mixture whose experts and router are all different; the last slots are empty."""
    cfg = dataclasses.replace(SynapticConfig(), **{"tick": 4, "expert_gain": 2.0, **fields})
    config = GPTConfig(
        n_embd=WIDTH, n_head=4, n_kv_head=2, vocab_size=50, num_experts=experts, expert_slots=slots, synapses=synapses, syn_cfg=cfg
    )
    moe = SynapticMoE(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in moe.named_parameters():
        if not name.startswith("synapse."):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if moe.synapse is not None:
        moe.synapse.init_weights(0, "moe")
    return moe


def inputs(batch=2, tokens=24, seed=0) -> torch.Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def twin(moe: SynapticMoE, lead=1, child=6) -> None:
    """A copy of one expert in an empty slot, as its twin."""
    for parameter in (moe.experts.w_in, moe.experts.w_out, moe.router, *moe.synapse.parameters()):
        if parameter.ndim and len(parameter) == moe.slots:
            parameter.data[child] = parameter.data[lead]
    moe.accounts.alive[child] = True
    moe.accounts.lead[child] = lead
    moe.accounts.child[lead] = child


def logits_of(moe, x):
    return moe.route(x, START)[0]


def test_output_is_the_shared_expert_plus_the_gated_chosen_ones():
    moe, x = layer(), inputs(1, 6)
    route = logits_of(moe, x)
    wanted = torch.relu(x[0] @ moe.w_in.weight.T).square() @ moe.w_out.weight.T
    for token in range(6):
        for expert, gate in zip(route.expert[token].tolist(), route.gates[token], strict=True):
            hidden = torch.relu(moe.experts.w_in[expert] @ x[0, token]).square()
            wanted[token] += gate * (moe.experts.w_out[expert] @ hidden)
    torch.testing.assert_close(moe(x)[0], wanted)
    torch.testing.assert_close(route.gates.sum(1), torch.ones(6))


def test_empty_slots_are_never_chosen():
    moe = layer()
    moe.router.data[5:] = 10 * moe.router.data[0]
    assert logits_of(moe, inputs()).expert.max() < 5


def test_a_repeated_prompt_is_routed_differently_the_second_time():
    """Priming: the first reading leaves experts facilitated."""
    primed, deaf = layer(expert_gain=4.0, alpha_ca=0.5), layer(expert_plasticity=False)
    prompt = inputs(1, 16)
    twice = torch.cat([prompt, prompt], dim=1)
    first, second = logits_of(primed, twice).score.split(16)
    assert (first - second)[:, :5].abs().max() > 0.3
    assert (logits_of(primed, twice).expert[:16] != logits_of(primed, twice).expert[16:]).any()
    first, second = logits_of(deaf, twice).score.split(16)
    assert torch.equal(first, second)


def test_an_expert_in_demand_is_facilitated_and_one_with_a_negative_gain_tires():
    x = inputs(1, 1).expand(1, 32, -1)  # one token over and over: one expert wins it
    moe = layer(expert_gain=2.0)
    winner = int(logits_of(moe, x).expert[0, 0])
    score = logits_of(moe, x).score[:, winner]
    assert torch.equal(score[:4], score[:1].expand(4)) and torch.all(score[4::4].diff() > 0)
    moe.synapse.gain_release.data.neg_()
    score = logits_of(moe, x).score[:, winner]
    assert torch.all(score[4::4].diff() < 0)


def test_moving_a_genome_changes_routing_and_training_moves_it():
    moe, x = layer(xi_dim=4), inputs(2, 64)
    before = logits_of(moe, x).expert
    moe(x).square().sum().backward()
    grad = moe.synapse.genome.xi.grad
    assert torch.all(grad[:5].abs().sum(1) > 1e-6) and torch.all(grad[5:] == 0)
    moe.synapse.genome.xi.data[2] += 1.0
    moved = logits_of(moe, x)
    assert (moved.expert != before).any()


@pytest.mark.parametrize("switch", ["router_identity", "expert_plasticity", "snare_codes", "vesicle_output", "nmda", "expert_lateral"])
def test_each_switch_changes_the_output_and_zero_gains_are_the_plain_router(switch):
    off = {"router_identity": False, "expert_plasticity": switch == "vesicle_output", "alpha_ca": 0.5}
    plain, moe, x = layer(synapses=False), layer(**(off | {switch: 0.5 if switch == "expert_lateral" else True})), inputs()
    base = layer(**off)
    for other in (moe, base):
        other.load_state_dict(plain.state_dict(), strict=False)
    assert (moe(x) - base(x)).abs().max() > 1e-3
    moe.synapse.zero_gains()
    torch.testing.assert_close(moe(x), plain(x))


def test_the_account_and_the_balance_move_the_choice_but_not_the_gates():
    moe, x = layer(bank_gain=1.0), inputs()
    base = logits_of(moe, x)
    moe.accounts.balance[3] = 50.0
    forced = logits_of(moe, x)
    assert torch.all((forced.expert == 3).any(1)) and not torch.all((base.expert == 3).any(1))
    kept = (base.expert[:, None] == forced.expert[..., None]).any(2).all(1)
    same = base.gates.sort(1).values[kept]
    torch.testing.assert_close(forced.gates.sort(1).values[kept], same)
    moe.accounts.balance.zero_()
    moe.accounts.energy[3] = 1.0
    assert (logits_of(moe, x).expert == 3).sum() >= (base.expert == 3).sum()
    torch.testing.assert_close(logits_of(moe, x).score[:, 3], base.score[:, 3] + 0.5)


def test_a_new_twin_changes_nothing_and_shares_the_tokens_of_its_slot():
    moe, x = layer(expert_lateral=0.5, nmda=True, snare_codes=True, vesicle_output=True), inputs(4, 48)
    before, route = moe(x), logits_of(moe, x)
    twin(moe)
    moe.synapse.identity.data[6] += 0.1 * torch.randn(moe.synapse.identity.shape[1], generator=torch.Generator().manual_seed(1))
    moe.synapse.genome.xi.data[6, 1] += 0.1
    after = logits_of(moe, x)
    torch.testing.assert_close(moe(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.where(after.expert == 6, 1, after.expert), route.expert)
    assert (after.expert == 1).sum() > 10 and (after.expert == 6).sum() > 10
    moe.accounts.tie[1] = 10.0
    assert (logits_of(moe, x).expert == 1).sum() == 0


def test_grown_twins_separate_without_a_change_where_only_one_is_chosen():
    """With blend 1 a slot scores what its better twin scores, so that two slots differ only for tokens that both would take."""
    moe, x = layer(expert_plasticity=False), inputs(4, 48)
    twin(moe)
    moe.synapse.identity.data[6].neg_()
    moe.router.data[6] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)) * 0.2
    moe.accounts.blend[1] = 1.0
    one = logits_of(moe, x)
    both = moe.statistics(x, one).both[1]
    moe.accounts.lead[6], moe.accounts.child[1] = 6, 1
    two = logits_of(moe, x)
    changed = (one.expert.sort(1).values != two.expert.sort(1).values).any(1)
    assert changed.sum() == both > 0
    taken = (two.expert == 1).any(1) & (two.expert == 6).any(1)
    assert torch.equal(changed, taken)


def test_statistics_add_up():
    moe, x = layer(), inputs(3, 20)
    twin(moe)
    route = logits_of(moe, x)
    found = moe.statistics(x, route)
    assert found.tokens == 60 and found.load.sum() == found.demand.sum() == 120
    torch.testing.assert_close(found.gates.sum(), torch.tensor(60.0))
    assert torch.equal(found.together.diagonal(), found.load)
    torch.testing.assert_close(found.inputs.sum(0), 2 * x.flatten(0, 1).sum(0))
    torch.testing.assert_close(found.common, x.flatten(0, 1).sum(0))
    assert torch.equal(found.load, found.demand)
    moe.accounts.balance[0] = 50.0
    assert not torch.equal(moe.statistics(x, logits_of(moe, x)).load, found.load)
    torch.testing.assert_close(moe.statistics(x, logits_of(moe, x)).demand, found.demand)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_of_equal_scores_a_token_asks_for_no_more_than_its_k(backend):
    moe, x = layer(synapses=False), inputs(3, 20)
    moe.backend = backend
    moe.router.data[:4] = moe.router.data[0]
    with torch.no_grad():
        found = moe.statistics(x, logits_of(moe, x))
    assert found.demand.sum() == 120 and torch.equal(found.demand, found.load)


def test_the_tap_collects_first_and_second_moments_of_the_gates_gradient():
    moe, x = layer(), inputs()
    tap = torch.zeros(8, 2, requires_grad=True)
    y, route, _ = moe.mix(x, START, probe=Probe(tap=tap))
    y.pow(3).sum().backward()
    gates = route.gates.detach().requires_grad_()
    moe.experts(x.flatten(0, 1), route.expert, gates).pow(3).sum().backward()
    a = gates.grad * gates.detach()
    for expert in range(8):
        mine = a[route.expert == expert]
        torch.testing.assert_close(tap.grad[expert], torch.stack([mine.sum(), mine.square().sum()]), rtol=1e-4, atol=1e-4)


def test_a_muted_expert_adds_nothing_and_nobody_is_routed_anew():
    moe, x = layer(), inputs()
    muted = torch.zeros(8, dtype=torch.bool)
    muted[2] = True
    y, route, _ = moe.mix(x, START, probe=Probe(muted=muted))
    assert torch.equal(route.expert, logits_of(moe, x).expert)
    gates = route.gates.masked_fill(route.expert == 2, 0)
    torch.testing.assert_close(y.flatten(0, 1), moe.experts(x.flatten(0, 1), route.expert, gates))


def test_whole_model_statistics_are_outputs_and_change_nothing():
    net, ids = make_model("default", num_experts=4), make_ids()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    out = net.run(ids, ids, routing=True)
    assert len(out.routing) == 2 and out.routing[0].tokens == ids.numel()
    assert net.run(ids).routing is None
    assert torch.equal(out.logits, net(ids))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_compiled_block_has_static_shapes_and_hands_statistics_out():
    net, ids = make_model("default", num_experts=4, n_layer=1), make_ids()
    want = net.run(ids, ids, routing=True)
    for block in net.blocks:
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    taps = [torch.zeros(4, 2, requires_grad=True) for _ in net.blocks]
    got = net.run(ids, ids, routing=True, probes=[Probe(tap) for tap in taps])
    got.loss.backward()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.routing[0].load, want.routing[0].load)
    assert taps[0].grad.abs().sum() > 0


def test_shapes_that_cannot_work_are_named():
    with pytest.raises(UserError, match="moe_top_k=4"):
        GPTConfig(num_experts=4, moe_top_k=4)
    with pytest.raises(UserError, match="expert_slots=3"):
        GPTConfig(num_experts=4, expert_slots=3)
