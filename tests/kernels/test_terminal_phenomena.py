"""What a physiologist would see at these terminals, part by part."""

import itertools
import math

import pytest
import torch

from bio_inspired_nanochat.kernels import presyn_bias, presyn_step
from bio_inspired_nanochat.kernels.terminal import release_logit
from tests.kernels.terminals import CONFIGS, constant, course, make, rest, silence, terminal, trace

INTERVALS = (2, 5, 10, 20, 50, 100, 400)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def pulses(ticks: int, *at: int, size: float = 1.0) -> torch.Tensor:
    drive = silence(ticks)
    drive[list(at)] = size
    return drive


def level(states, name: str) -> torch.Tensor:
    """One quantity of the single head and key over time, [N + 1]."""
    return trace(states, name)[:, 0, 0]


def paired_pulse_ratio(interval: int, **knobs) -> float:
    _, freed = course(terminal(**knobs), pulses(interval + 1, 0, interval))
    return (freed[-1] / freed[0]).item()


# Calcium and vesicles: the core


def test_paired_pulses_facilitate_at_low_release_probability():
    ratios = [paired_pulse_ratio(gap, release_bias=-4.0, alpha_ca=0.5, tau_c=10.0, tau_rrp=2.0) for gap in INTERVALS]
    assert ratios[0] > 1.5
    assert all(b < a for a, b in itertools.pairwise(ratios))
    assert ratios[-1] == pytest.approx(1, abs=1e-3)


def test_paired_pulses_depress_at_high_release_probability():
    ratios = [paired_pulse_ratio(gap, release_bias=3.0, release_rate=0.8, tau_c=1.0, tau_rrp=50.0) for gap in INTERVALS]
    assert ratios[0] < 0.6
    assert all(b > a for a, b in itertools.pairwise(ratios))
    assert ratios[-1] == pytest.approx(1, abs=1e-3)


def test_the_same_terminal_turns_from_facilitation_to_depression_as_its_release_probability_rises():
    ratios = [paired_pulse_ratio(5, release_bias=bias, release_rate=0.8, alpha_ca=0.5) for bias in (-5.0, -3.0, -1.0, 1.0, 3.0)]
    assert ratios[0] > 1 > ratios[-1] and all(b < a for a, b in itertools.pairwise(ratios))


@pytest.mark.parametrize("tick", [1, 8, 64])
@pytest.mark.parametrize("tau", [10.0, 40.0, 300.0])
def test_an_emptied_pool_recovers_with_its_time_constant(tau, tick):
    params = terminal(tick=tick, tau_rrp=tau)
    emptied, _ = course(params, torch.full((3, 1), 1e4))
    assert emptied[-1].vesicles < 0.1
    missing = 1 - level(course(params, silence(8), emptied[-1])[0], "vesicles")
    ages = torch.arange(9, dtype=torch.float64) * tick
    torch.testing.assert_close(missing, missing[0] * torch.exp(-ages / tau), **CLOSE)


@pytest.mark.parametrize("tick", [1, 8, 64])
@pytest.mark.parametrize("tau", [4.0, 48.0])
def test_residual_calcium_decays_with_its_time_constant(tau, tick):
    params = terminal(tick=tick, tau_c=tau)
    excited, _ = course(params, torch.full((3, 1), 2.0))
    calcium = level(course(params, silence(5), excited[-1])[0], "calcium")
    torch.testing.assert_close(calcium, calcium[0] * torch.exp(-torch.arange(6, dtype=torch.float64) * tick / tau), **CLOSE)


@pytest.mark.parametrize("tick", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("syt_mix", [1.0, 0.7])
def test_steady_state_follows_the_rate_form_of_tsodyks_and_markram_at_every_frequency(syt_mix, tick):
    params = terminal(tick=tick, syt_mix=syt_mix, tau_c=20.0, tau_rrp=40.0, release_rate=0.1)
    rates = torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0], dtype=torch.float64)
    states, freed = course(params, rates.expand(1600 // tick + 20, -1))
    calcium = 20.0 * params.alpha_ca * rates
    syt = syt_mix * calcium / (calcium + params.k_fast)
    if syt_mix < 1:
        syt = syt + (1 - syt_mix) * calcium / (calcium + params.k_slow)
    probability = torch.sigmoid(params.syt_gain * syt + params.release_bias)
    expected = 1 / (1 + 0.1 * probability * rates * 40.0)
    found = states[-1].vesicles[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert torch.all(found[1:] < found[:-1]) and found[0] > 0.9 and found[-1] < 0.01
    # what is released per token rises with frequency, up to what refilling can replace
    per_token = freed[-1, 0] / tick
    torch.testing.assert_close(per_token, 0.1 * probability * rates * expected, rtol=1e-3, atol=0)
    assert torch.all(per_token[1:] > per_token[:-1]) and 0.99 / 40 < per_token[-1] < 1 / 40


@pytest.mark.parametrize("part", [name for name in CONFIGS if make(name, 1).reserve_size is None])
def test_the_steady_state_under_constant_use_does_not_depend_on_the_tick(part):
    ends = [course(make(part, tick), torch.full((max(6000 // tick, 60), 1), 0.6))[0][-1].parts() for tick in (10, 50, 1000)]
    for name, value in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


# Sensors, buffer, clamp


def test_syt7_goes_on_facilitating_where_syt1_is_saturated():
    def growth(**knobs):
        params = terminal(**knobs).broadcast(1)
        low, high = (release_logit(rest(params)._replace(calcium=constant(params, level)), params) for level in (3.0, 12.0))
        return (high - low).item()

    assert growth(syt_mix=0.3) > 2 * growth(syt_mix=1.0) > 0


def test_a_buffer_slows_calcium_and_leaves_a_longer_tail():
    burst = torch.cat([torch.ones(20, 1), silence(80)])
    free = level(course(terminal(tau_c=10.0), burst)[0], "calcium")
    states, _ = course(terminal("buffer", tau_c=10.0, buf_kd=0.3), burst)
    buffered = level(states, "calcium")
    assert torch.all(buffered[1:21] < free[1:21])
    assert buffered[:21].max() < 0.95 * free[:21].max()

    def rise(calcium):
        return (calcium[:21] >= calcium[20] / 2).nonzero()[0].item()

    assert rise(buffered) > rise(free)
    assert torch.all(buffered[35:] > 1.2 * free[35:])
    assert level(states, "buffer")[20] > 0.1 > level(states, "buffer")[-1]


def test_bound_and_free_calcium_only_trade_places():
    params = terminal("buffer", tau_c=4096.0)
    excited, _ = course(params, torch.full((40, 1), 3.0))
    state = excited[-1]._replace(buffer=torch.zeros_like(excited[-1].buffer))
    after, _ = presyn_step(state, constant(params, 0.0), params)
    total = state.calcium * math.exp(-1 / 4096)
    torch.testing.assert_close(after.calcium + after.buffer, total, **CLOSE)
    settled = course(params, silence(200), state)[0][-1]
    equilibrium = settled.calcium / (settled.calcium + params.buf_kd)
    torch.testing.assert_close(settled.buffer, equilibrium, rtol=1e-2, atol=0)


def test_asynchronous_release_outlasts_the_drive():
    burst = torch.cat([torch.full((10, 1), 3.0), silence(200)])
    states, with_doc2 = course(terminal("doc2", tau_c=20.0), burst)
    _, without = course(terminal(tau_c=20.0), burst)
    after = with_doc2[10:, 0, 0]
    assert torch.all(without[10:] == 0)
    assert after[0] > 1e-3 and torch.all(after > 0)
    assert after[100:].sum() < 0.1 * after[:100].sum()  # it ends with the calcium that drives it
    assert torch.all(after[1:] <= after[:-1])
    assert level(states, "vesicles")[11] < level(states, "vesicles")[10]
    assert course(terminal("doc2"), silence(20))[1].abs().max() == 0


def test_complexin_clamps_the_rested_terminal():
    _, clamped = course(terminal("complexin", complexin_bias=2.0), pulses(1, 0))
    _, free = course(terminal(), pulses(1, 0))
    assert 0 < clamped[0] < 0.3 * free[0]


def test_calcium_lifts_the_complexin_clamp_and_rest_restores_it():
    params = terminal("clamp_dynamics", tau_clamp=30.0, clamp_release=0.2, tau_c=5.0)
    states, _ = course(params, torch.full((300, 1), 5.0))
    clamp = level(states, "clamp")
    assert clamp[0] == 1 and torch.all(clamp[2:100] < clamp[1:99])
    calcium = level(states, "calcium")[-1]
    torch.testing.assert_close(clamp[-1], 1 / (1 + 30.0 * 0.2 * calcium), rtol=1e-6, atol=0)

    lifted = states[-1]._replace(calcium=constant(params, 0.0))
    back = level(course(params, silence(60), lifted)[0], "clamp")
    ages = torch.arange(61, dtype=torch.float64)
    torch.testing.assert_close(1 - back, (1 - back[0]) * torch.exp(-ages / 30.0), **CLOSE)
    clamped = lifted._replace(clamp=constant(params, 1.0))
    use = constant(params, 1.0)
    assert presyn_step(lifted, use, params)[1] > 1.5 * presyn_step(clamped, use, params)[1]


# SNARE priming


def test_release_uses_up_primed_sites_and_rest_primes_them_again():
    params = terminal("priming", release_rate=0.3)
    states, _ = course(params, torch.cat([torch.full((40, 1), 3.0), silence(400)]))
    primed, spent = level(states, "primed"), level(states, "spent")
    assert torch.all(primed[1:41] < 1) and primed[20] < 0.7 and spent[20] > 0.1
    assert primed[-1] == pytest.approx(1, abs=1e-6) and spent[-1] == pytest.approx(0, abs=1e-6)
    tired = states[20]._replace(primed=constant(params, 1.0))
    use = constant(params, 1.0)
    assert presyn_step(states[20], use, params)[1] < 0.8 * presyn_step(tired, use, params)[1]


@pytest.mark.parametrize("tick", [1, 8, 64])
def test_primed_sites_under_constant_use_follow_their_cycle(tick):
    params = terminal("priming", tick=tick, tau_prime=5.0, tau_nsf=10.0, prime_use=4.0)
    states, freed = course(params, torch.full((4000 // tick, 1), 1.5))
    use = 4.0 * freed[-1, 0, 0] / tick
    torch.testing.assert_close(level(states, "primed")[-1], 1 / (1 + use * (5.0 + 10.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("knob", ["tau_nsf", "tau_prime"])
def test_nsf_and_priming_set_how_fast_used_sites_return(knob):
    def missing(value, ticks):
        params = terminal("priming", **{"tau_nsf": 2.0, "tau_prime": 2.0, knob: value})
        used = rest(params)._replace(primed=constant(params, 0.0), spent=constant(params, 1.0))
        return 1 - level(course(params, silence(ticks), used)[0], "primed")[-1].item()

    left = [missing(value, 20) for value in (3.0, 10.0, 40.0)]
    assert all(b > a + 0.05 for a, b in itertools.pairwise(left))
    # once the fast step is over the slow one alone is left: a time constant of its own, by an implicit step
    assert missing(200.0, 120) / missing(200.0, 20) == pytest.approx(math.exp(-100 / 200), rel=0.01)


# Reserve and recycling


@pytest.mark.parametrize("tick", [1, 4, 8])
@pytest.mark.parametrize("delay", [24.0, 48.0])
def test_released_vesicles_come_back_no_earlier_than_the_endocytosis_delay(delay, tick):
    params = terminal("endocytosis", tick=tick, endo_delay=delay, rec_rate=0.9, tau_syn=2.0)
    ticks = int(delay) // tick
    states, freed = course(params, pulses(ticks + 60, 0, size=50.0))
    here = level(states, "vesicles") + params.reserve_size * level(states, "reserve")
    away = 1 + params.reserve_size - here
    torch.testing.assert_close(away[1 : ticks + 1], freed[0, 0].expand(ticks), **CLOSE)
    assert freed[0] > 0.3 and away[ticks + 1] < 0.5 * freed[0]
    assert away[-1] < 0.01 * freed[0]


STAGES = [
    ("rab", "early", "tau_rab5", 1.0),
    ("rab", "late", "tau_rab7", 1.0),
    ("reserve", "resynthesis", "tau_syn", 1.0),
    ("clamp_dynamics", "clamp", "tau_clamp", 0.0),
    ("energy", "energy", "tau_energy", 0.0),
]


@pytest.mark.parametrize("tick", [1, 8, 64])
@pytest.mark.parametrize("part, quantity, knob, start", STAGES, ids=[row[1] for row in STAGES])
def test_every_compartment_relaxes_with_its_time_constant_at_every_tick(part, quantity, knob, start, tick):
    params = terminal(part, tick=tick, **{knob: 30.0})
    states, _ = course(params, silence(6), rest(params)._replace(**{quantity: constant(params, start)}))
    distance = (level(states, quantity) - (1 - start)).abs()
    torch.testing.assert_close(distance, torch.exp(-torch.arange(7, dtype=torch.float64) * tick / 30), rtol=1e-6, atol=1e-12)


def absence(*parts, **knobs) -> float:
    """Mean time in tokens that a vesicle released in tick 0 stays away from both pools."""
    params = terminal("reserve", *parts, endo_delay=10.0 if parts else 0.0, tau_syn=5.0, rec_rate=0.25, **knobs)
    states, freed = course(params, pulses(600, 0, size=50.0))
    away = 1 + params.reserve_size - level(states, "vesicles") - params.reserve_size * level(states, "reserve")
    return (away.sum() / freed[0, 0, 0]).item()


def test_each_stage_of_recycling_adds_its_own_delay():
    refilled = absence()
    ring = absence("endocytosis")
    staged = absence("endocytosis", "rab", tau_rab5=16.0, tau_rab7=40.0)
    assert refilled == pytest.approx(5, abs=1)
    assert ring - refilled == pytest.approx(10 - 0.25 * 5, abs=1)  # a quarter skips resynthesis
    assert staged - ring == pytest.approx(16 + 0.75 * 40, rel=0.05)  # and the late endosome


def test_synapsin_mobilisation_speeds_docking_under_calcium():
    params = terminal("reserve", reserve_size=100.0, mobilisation=2.0, tau_c=4096.0, tau_rrp=40.0)
    emptied = rest(params)._replace(vesicles=constant(params, 0.0))
    docked = [
        presyn_step(emptied._replace(calcium=constant(params, c)), constant(params, 0.0), params)[0].vesicles for c in (0.0, 1.0, 9.0)
    ]
    rates = [-math.log(1 - docked.item()) for docked in docked]
    assert rates[0] == pytest.approx(1 / 40, rel=0.01)
    assert rates[1] / rates[0] == pytest.approx(1 + 2 * 0.5, rel=0.01)
    assert rates[2] / rates[0] == pytest.approx(1 + 2 * 0.9, rel=0.01)


@pytest.mark.parametrize("tick", [1, 8, 64])
def test_an_emptied_reserve_starves_the_pool(tick):
    params = terminal("reserve", tick=tick)
    empty = rest(params)._replace(vesicles=constant(params, 0.0))
    starved = empty._replace(reserve=constant(params, 0.0))
    ticks = max(1, 64 // tick)
    recovered = level(course(params, silence(ticks), empty)[0], "vesicles")[-1]
    assert recovered > 0.3
    assert level(course(params, silence(ticks), starved)[0], "vesicles")[-1] < 1e-6


def test_long_use_empties_a_small_reserve_and_then_the_pool():
    def steady(size):
        params = terminal("reserve", reserve_size=size, tau_syn=500.0, tau_rrp=20.0, release_rate=0.3)
        states, _ = course(params, torch.full((300, 1), 2.0))
        return level(states, "reserve")[-1].item(), level(states, "vesicles")[-1].item()

    small, large = steady(0.5), steady(50.0)
    assert small[0] < 0.3 < large[0] and small[1] < 0.5 * large[1]


# Energy, amplitude, neighbours


def test_work_costs_energy_which_comes_back_with_its_time_constant():
    params = terminal("energy", energy_cost_rel=0.2, tau_energy=100.0)
    states, _ = course(params, torch.full((200, 1), 5.0))
    energy = level(states, "energy")
    assert energy[-1] < 0.7 and torch.all(energy[1:12] < energy[:11])
    full = states[-1]._replace(vesicles=constant(params, 1.0))
    missing = 1 - level(course(params, silence(50), full)[0], "energy")
    torch.testing.assert_close(missing, missing[0] * torch.exp(-torch.arange(51, dtype=torch.float64) / 100), **CLOSE)


@pytest.mark.parametrize("knob", ["energy_cost_rel", "energy_cost_pump", "energy_cost_prime"])
def test_each_kind_of_work_has_its_price(knob):
    def left(cost):
        params = terminal(
            "energy", "priming", **{name: 0.0 for name in ("energy_cost_rel", "energy_cost_pump", "energy_cost_prime")} | {knob: cost}
        )
        return level(course(params, torch.full((60, 1), 2.0))[0], "energy")[-1].item()

    levels = [left(cost) for cost in (0.0, 0.05, 0.5)]
    assert levels[0] == 1 and levels[1] < 0.99 and levels[2] < levels[1]


@pytest.mark.parametrize("parts", [("energy",), ("energy", "reserve"), ("energy", "rab")])
def test_energy_starvation_slows_refill(parts):
    params = terminal(*parts, tau_energy=4096.0, tau_rrp=40.0, energy_cost_pump=0.0, energy_cost_rel=0.0)
    emptied = rest(params)._replace(vesicles=constant(params, 0.0))
    refilled = []
    for energy in (1.0, 0.5, 0.1):
        states, _ = course(params, silence(20), emptied._replace(energy=constant(params, energy)))
        refilled.append(level(states, "vesicles")[-1].item())
    assert refilled[0] > 1.5 * refilled[1] > 1.5 * 1.5 * refilled[2] > 0


def test_a_terminal_that_pays_more_refills_less_under_the_same_use():
    pools = []
    for cost in (0.0, 0.1, 1.0):
        states, _ = course(terminal("energy", energy_cost_rel=cost, energy_cost_pump=cost), torch.full((400, 1), 1.0))
        pools.append(level(states, "vesicles")[-1].item())
    assert pools[0] > pools[1] + 0.02 > pools[2] + 0.04


@pytest.mark.parametrize("quantity, start", [("primed", 0.0), ("resynthesis", 1.0)])
def test_energy_starvation_slows_priming_and_filling_of_vesicles(quantity, start):
    params = terminal("energy", "priming", "reserve", tau_energy=4096.0, energy_cost_pump=0.0, energy_cost_prime=0.0)
    moved = []
    for energy in (1.0, 0.2):
        state = rest(params)._replace(energy=constant(params, energy), **{quantity: constant(params, start)})
        moved.append(abs(getattr(presyn_step(state, constant(params, 0.0), params)[0], quantity).item() - start))
    assert moved[1] < 0.35 * moved[0]


def test_low_energy_lowers_the_quantal_amplitude():
    params = terminal("quantal", quantal_slope=4.0, beta_max=0.0)._replace(gain_quantal=torch.ones(1, dtype=torch.float64))
    energies = (1.0, 0.8, 0.5, 0.2, 0.0)
    found = [presyn_bias(rest(params)._replace(energy=constant(params, e)), params).item() for e in energies]
    sizes = [1 / (1 + math.exp(-4 * (e - 0.5))) for e in energies]
    assert found == pytest.approx([math.log(size / sizes[0]) for size in sizes], abs=1e-12)
    assert all(b < a for a, b in itertools.pairwise(found))


def active_key(params, keys: int, key: int):
    state = rest(params, keys)
    calcium = state.calcium.clone()
    calcium[..., key] = 2.0
    return state._replace(calcium=calcium)


def test_septins_inhibit_the_younger_neighbours_of_an_active_key_within_their_window():
    params = terminal("lateral", lateral_strength=0.8, lateral_window=3)._replace(gain_release=torch.zeros(1, dtype=torch.float64))
    beta = presyn_bias(active_key(params, 10, 4), params)[0, 0]
    assert torch.all(beta[:5] == 0) and torch.all(beta[8:] == 0) and torch.all(beta[5:8] < 0)
    excess = torch.sigmoid(params.syt_gain * 2 / 2.4 + params.release_bias) - torch.sigmoid(params.release_bias)
    torch.testing.assert_close(beta[5:8], (-0.8 / 3 * excess).expand(3), **CLOSE)


def test_septins_do_not_reach_into_another_document():
    params = terminal("lateral", lateral_strength=0.8, lateral_window=3)
    state = active_key(params, 10, 4)
    doc = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    beta, free = presyn_bias(state, params, doc)[0, 0], presyn_bias(state, params)[0, 0]
    assert beta[5] == free[5] < 0 and torch.all(beta[6:] == 0) and torch.all(free[6:8] < 0)


def test_a_depleted_neighbour_inhibits_less():
    params = terminal("lateral", lateral_strength=0.8)
    state = active_key(params, 3, 0)
    tired = state._replace(vesicles=state.vesicles * 0.1)
    quiet, loud = presyn_bias(tired, params)[0, 0], presyn_bias(state, params)[0, 0]
    torch.testing.assert_close(quiet[1:], 0.1 * loud[1:], **CLOSE)
