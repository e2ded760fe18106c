"""Stochastic release, Monte-Carlo inference, telemetry and auxiliary losses of a whole model."""

import dataclasses
import itertools

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.synaptic.telemetry import BINS
from bio_inspired_nanochat.training.job import Objective
from tests.contract import SYNAPSES, make_ids, make_model

MODES = ("normal_reparam", "gumbel_sigmoid_ste", "straight_through")


def noisy_model(monkeypatch, parts="stochastic", mode="normal_reparam", **overrides):
    cfg = dataclasses.replace(config_with("barrier_gated", parts), stochastic_train_frac=0.5, stochastic_mode=mode, **overrides)
    monkeypatch.setitem(SYNAPSES, "noisy", cfg)
    return make_model("noisy")


def logits_of(model, ids, seed, **options):
    return model.run(ids, noise_seed=seed, **options).logits


@pytest.mark.parametrize("mode", MODES)
def test_prefill_decode_and_recomputation_draw_the_same_numbers(monkeypatch, mode):
    model, ids = noisy_model(monkeypatch, mode=mode, stochastic_count_cap=2), make_ids()
    whole = logits_of(model, ids, 3)
    assert torch.equal(whole, logits_of(model, ids, 3))
    assert (whole - model(ids)).abs().max() > 1e-3
    for cuts in ([], [3, 4, 5, 17, 32], list(range(1, 40))):
        state = model.init_state(2, 40, noise_seed=3)
        pieces = [model.step(ids[:, a:b], state) for a, b in itertools.pairwise([0, *cuts, 40])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)


def test_seeds_and_training_steps_draw_different_numbers(monkeypatch):
    model, ids = noisy_model(monkeypatch), make_ids()
    runs = [logits_of(model, ids, 3), logits_of(model, ids, 4), logits_of(model, ids, 3, noise_step=1)]
    for a, b in itertools.combinations(runs, 2):
        assert (a - b).abs().max() > 1e-4


def test_a_sequence_keeps_its_draws_in_any_batch(monkeypatch):
    model, ids = noisy_model(monkeypatch), make_ids(batch=3)
    whole = logits_of(model, ids, 3)
    part = logits_of(model, ids[[2, 0]], 3, sequence_ids=torch.tensor([2, 0]))
    torch.testing.assert_close(part, whole[[2, 0]], rtol=0, atol=1e-5)
    assert (logits_of(model, ids[[2, 0]], 3) - whole[[2, 0]]).abs().max() > 1e-4  # without its id a row draws as row 0
    state = model.init_state(3, 40, noise_seed=3)
    model.step(ids[:, :10], state)
    chosen = state.select([2, 0])
    torch.testing.assert_close(model.step(ids[[2, 0], 10:], chosen), whole[[2, 0], 10:], rtol=0, atol=1e-5)


def test_training_draws_do_not_depend_on_how_a_batch_is_cut(monkeypatch):
    model, ids = noisy_model(monkeypatch), make_ids(batch=4)
    objective, targets = Objective(model, seed=5), make_ids(batch=4, seed=1)
    whole = objective(ids, targets, 7)[0]
    halves = [objective(ids[a : a + 2], targets[a : a + 2], 7, a)[0] for a in (0, 2)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=0, atol=1e-6)
    assert abs(objective(ids, targets, 8)[0] - whole) > 1e-6


def test_nothing_is_random_unless_asked(monkeypatch):
    model, ids = noisy_model(monkeypatch), make_ids()
    for mode in (model.train(), model.eval()):
        assert torch.equal(mode(ids), mode.run(ids).logits)
    expected = make_model("barrier_gated")
    assert not expected.stochastic
    assert torch.equal(expected.run(ids, noise_seed=1).logits, expected(ids))


def test_monte_carlo_gives_the_predictive_mean_and_its_variance(monkeypatch):
    model, ids = noisy_model(monkeypatch), make_ids()
    with torch.no_grad():
        out = model.run(ids, make_ids(seed=2), noise_seed=3, samples=6)
        passes = torch.stack(
            [torch.softmax(model._pass(ids, None, False, model._noise(ids, 3, None, sample=s)).logits, -1) for s in range(6)]
        )
    torch.testing.assert_close(out.logits.exp(), passes.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.variance, passes.var(0), rtol=1e-3, atol=1e-9)
    assert out.variance.max() > 1e-6 and out.loss > 0
    assert out.variance[:, :4].max() == 0  # nothing has been released in the first tick
    with pytest.raises(UserError, match="samples=2.*stochastic_train_frac"):
        make_model("default").run(ids, samples=2)


@pytest.mark.parametrize("synapses", ["presyn", "full"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_telemetry_reports_each_head_of_each_layer_and_costs_nothing_unasked(synapses, backend):
    model, ids = make_model(synapses, backend=backend), make_ids()
    plain, out = model.run(ids), model.run(ids, telemetry=True)
    assert plain.telemetry is None and len(out.telemetry) == 2
    torch.testing.assert_close(out.logits, plain.logits)
    names = {"calcium", "vesicles", "bias", "released", "bias_abs"}
    names |= {"buffer", "clamp", "primed", "reserve", "energy"} if synapses == "full" else set()
    for layer in out.telemetry:
        assert set(layer.mean) == set(layer.histogram) == names
        for name in names:
            assert layer.mean[name].shape == (4,) and layer.histogram[name].shape == (4, BINS)
            torch.testing.assert_close(layer.histogram[name].sum(1), torch.ones(4))
            assert layer.mean[name].abs().max() > 0
        assert 0 < layer.mean["vesicles"].min() and layer.mean["vesicles"].max() < 1


def test_telemetry_counts_only_terminals_that_exist():
    model, ids = make_model("presyn", tick=8), make_ids(length=8)
    (first, _) = model.run(ids, telemetry=True).telemetry
    assert first.histogram["vesicles"][:, -1].tolist() == [1.0] * 4  # the first tick: all at rest
    assert first.mean["calcium"].abs().max() == 0


@pytest.mark.parametrize("weights", [{"aux_energy": 3.0}, {"aux_pool": 3.0}])
def test_an_auxiliary_loss_counts_in_training_only_and_pushes_the_terminals_back_into_range(monkeypatch, weights):
    cfg = dataclasses.replace(config_with("energy", **weights), energy_cost_rel=5.0)
    monkeypatch.setitem(SYNAPSES, "weighted", cfg)
    model, ids = make_model("weighted"), make_ids()
    for block in model.blocks:
        block.attn.synapse.release_rate.data.add_(3.0)
    out = model.run(ids, make_ids(seed=1))
    assert out.aux > 1e-3
    torch.testing.assert_close(model(ids, make_ids(seed=1)), out.loss + out.aux)
    objective, loss, _ = Objective(model)(ids, make_ids(seed=1))
    assert torch.equal(loss, out.loss.detach()) and objective > loss
    out.aux.backward()
    assert all((block.attn.synapse.release_rate.grad > 0).any() for block in model.blocks)  # less release, less of it
    assert model.run(ids).aux is None
    assert make_model("energy").run(ids, make_ids(seed=1)).aux is None


def test_an_evaluation_of_a_compiled_model_compiles_nothing():
    seen = []

    def compiler(graph, inputs):
        seen.append(graph)
        return graph.forward

    model, ids = make_model("vanilla").compile_regions(backend=compiler), make_ids()
    with torch.no_grad():
        losses = model.token_losses(ids, make_ids(seed=1))
    assert not seen and losses.shape == ids.shape
    model(ids, make_ids(seed=1))
    assert seen
