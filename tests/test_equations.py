"""Equations of prompts/ against independent solutions, where no other test of the code has them.

The right-hand sides below are written from the page, not from the code; a solver integrates them.
"""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import PresynState, running_sum, tick_biased_attention
from bio_inspired_nanochat.kernels.molecules import DensityParams, DensityState, density_step
from bio_inspired_nanochat.kernels.terminal import (
    buffer_step,
    calcium_step,
    clamp_step,
    docking_rate,
    energy_step,
    leak,
    pool_step,
    priming_step,
    release_logit,
    terminal_step,
)
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.structural.metabolism import update
from bio_inspired_nanochat.synaptic import Routing, SynapticMoE
from bio_inspired_nanochat.synaptic.presynaptic import Presynaptic
from tests.kernels.terminals import terminal

TICKS = [1, 16, 200]


def value(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def solved(slope, start: list[float], time: float) -> list[float]:
    """The state of an ordinary differential equation after `time`."""
    course = solve_ivp(lambda _, x: slope(*x), (0, time), start, method="LSODA", rtol=1e-11, atol=1e-13)
    assert course.success
    return course.y[:, -1].tolist()


# --- prompts/presynapse.md: exact steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("drive", [0.0, 0.4, 30.0])
def test_release_and_refill_solve_their_equation_together(drive, tick):
    """(P5) to (P9): the pool, what was released, and calcium."""
    p = terminal("slow_sensor", tick=tick, release_rate=0.1).broadcast(1)
    state = PresynState(value(0.3), value(0.6), value(0.0))
    u, tau_rrp, tau_c, alpha = (float(x) for x in (p.release_rate, p.tau_rrp, p.tau_c, p.alpha_ca))
    a, b0, w, fast, slow = (float(x) for x in (p.syt_gain, p.release_bias, p.syt_mix, p.k_fast, p.k_slow))
    activation = w * 0.3 / (0.3 + fast) + (1 - w) * 0.3 / (0.3 + slow)
    use = u / (1 + math.exp(-(a * activation + b0))) * drive

    def slope(pool, released, calcium):
        return (1 - pool) / tau_rrp - use * pool, use * pool, alpha * drive - calcium / tau_c

    pool, released, calcium = solved(slope, [0.6, 0.0, 0.3], tick)
    after, freed = terminal_step(state, value(drive), p)
    got = torch.cat([after.vesicles, freed, after.calcium]).flatten()
    torch.testing.assert_close(got, torch.tensor([pool, released, calcium], dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tick", TICKS)
def test_exchange_clamp_energy_and_compartments_solve_their_equations(tick):
    """(P10), (P11), (P16) and (P14)."""
    p = terminal("buffer", "clamp_dynamics", "energy", tick=tick, tau_buf=30.0)
    k_off = 1 / float(p.tau_buf)
    k_on = k_off / float(p.buf_kd)

    def exchange(free, bound):
        flow = k_on * free * (1 - bound) - k_off * bound
        return -flow, flow

    for free, bound in ((2.0, 0.1), (0.0, 0.9), (1e-6, 1e-6)):
        got = torch.cat(buffer_step(value(free), value(bound), p))
        torch.testing.assert_close(got.tolist(), solved(exchange, [free, bound], tick), rtol=1e-6, atol=1e-9)
    back, lift = 1 / float(p.tau_clamp), float(p.clamp_release)
    (clamp,) = solved(lambda x: [(1 - x) * back - lift * 0.7 * x], [0.4], tick)
    assert clamp_step(value(0.4), value(0.7), p).item() == pytest.approx(clamp, rel=1e-8)
    (energy,) = solved(lambda x: [(1 - x) / float(p.tau_energy) - 0.03 * x], [0.8], tick)
    assert energy_step(value(0.8), value(0.03), p).item() == pytest.approx(energy, rel=1e-8)
    kept, gone = solved(lambda x, y: [0.5 / tick - x / 20, x / 20], [0.2, 0.0], tick)
    assert [part.item() for part in leak(value(0.2), value(0.5), value(1 / 20), tick)] == pytest.approx([kept, gone], rel=1e-7)


def test_the_implicit_step_of_the_snares_converges_to_its_equation_and_rests_where_it_does():
    """(P12): first order in the tick, with a resting point that does not depend on it."""
    supply, nsf, use = 0.2, 0.1, 0.3
    exact = solved(lambda q, w: [supply * (1 - q - w) - use * q, use * q - nsf * w], [1.0, 0.0], 6)
    errors = []
    for steps in (6, 12, 24):
        q, w = value(1.0), value(0.0)
        for _ in range(steps):
            q, w, _ = priming_step(q, w, value(use), value(supply), value(nsf), 6 / steps)
        errors.append(abs(q.item() - exact[0]) + abs(w.item() - exact[1]))
    assert errors[0] < 0.1 and 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3
    rest = 1 / (1 + use / supply + use / nsf)
    for tick in (1, 40):
        q, w = value(1.0), value(0.0)
        for _ in range(400):
            q, w, _ = priming_step(q, w, value(use), value(supply), value(nsf), tick)
        assert q.item() == pytest.approx(rest, rel=1e-9) and w.item() == pytest.approx(rest * use / nsf, rel=1e-9)


@pytest.mark.parametrize("tick", [4, 16])
def test_a_split_step_would_invent_vesicles(tick):
    """The page's reason for stepping release and refill together, below (P8)."""
    p = terminal(tick=tick)
    refill = torch.exp(-tick / p.tau_rrp)
    for use in (0.01, 1.0, 100.0):
        decay, target, _ = pool_step(value(use), 1 / p.tau_rrp, p)
        assert target.item() == pytest.approx(1 / (1 + use * p.tau_rrp.item()), rel=1e-9)
        split = value(1.0)
        for _ in range(2000):
            split = 1 - (1 - split * math.exp(-tick * use)) * refill
        assert split.item() == pytest.approx(((1 - refill) / (1 - math.exp(-tick * use) * refill)).item(), rel=1e-9)
        assert 0 <= decay.item() < 1 and split > target
    assert split.item() == pytest.approx(1 - refill.item(), rel=1e-6) and target < split / 100


def test_docking_never_takes_more_than_the_reserve_holds():
    """(P13), and its limit for short ticks."""
    for tick, reserve in ((1, 0.8), (16, 0.3), (1024, 0.3)):
        p = terminal("reserve", tick=tick, tau_rrp=3.0)
        state = PresynState(value(0.5), value(0.0), value(0.0), reserve=value(reserve))
        dock = docking_rate(state, p)
        assert 0 < dock.item() * tick <= reserve * p.reserve_size.item() * (1 + 1e-8)
    p = terminal("reserve", tick=1, tau_rrp=4096.0)
    state = PresynState(value(0.5), value(0.0), value(0.0), reserve=value(0.8))
    rate = (1 + p.mobilisation.item() * 0.5 / 1.5) / 4096
    assert docking_rate(state, p).item() == pytest.approx(0.8 * rate, rel=1e-3)


def test_every_optional_term_of_the_release_logit_is_zero_at_rest():
    """(P5): at rest the logit is b0, whatever is switched on, and b0 holds the clamp of a rested terminal."""
    parts = ("doc2", "clamp_dynamics", "priming", "slow_sensor")
    p = terminal(*parts, release_bias=-0.7)
    rest = PresynState.rest(1, dtype=torch.float64, params=p)
    assert release_logit(rest, p).item() == pytest.approx(p.release_bias.item())
    assert p.release_bias.item() == pytest.approx(-0.7 - p.complexin.item())
    decay, influx = calcium_step(p)
    assert influx.item() == pytest.approx((1 - decay.item()) * p.tau_c.item() * p.alpha_ca.item())


# --- prompts/hybrid.md: the barrier as a bias per tick and key ------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", ["gated", "linear"])
@pytest.mark.parametrize("tick", [1, 5, 16])
def test_a_barrier_per_pair_is_the_barrier_per_tick_and_key(barrier, tick):
    """(H2) and (H3): what differs between the two forms is common to a query's row, and softmax cancels it."""
    heads, tokens, dim = 3, 37, 8
    config = GPTConfig(n_layer=1, n_head=heads, n_kv_head=heads, n_embd=24, vocab_size=8, sequence_len=tokens, synapses=True)
    synapse = Presynaptic(GPTConfig(**{**vars(config), "syn_cfg": config_with(f"barrier_{barrier}", tick=tick)})).double()
    synapse.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in synapse.parameters():
            parameter += 0.5 * torch.rand_like(parameter)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, heads, tokens, dim, dtype=torch.float64)
    cost = synapse.barrier_cost(x)
    if barrier == "gated":
        forget = torch.sigmoid(torch.einsum("btd,hd->bht", x, synapse.gate_weight) + synapse.gate_bias[:, None])
        torch.testing.assert_close(cost, -forget.log())
    else:
        slopes = torch.tensor([2 ** (-8 * h / heads) for h in (1, 2, 3)], dtype=torch.float64)
        torch.testing.assert_close(cost, slopes[:, None].expand(2, heads, tokens), rtol=1e-6, atol=0)
        cost = slopes[:, None].expand(2, heads, tokens)
    place = torch.arange(tokens)
    charged = ((place > place[None, :, None]) & (place <= place[:, None, None])).double()  # [t, j, i]: j < i <= t
    logits = q @ k.mT * dim**-0.5 - synapse.barrier_strength[:, None, None] * torch.einsum("tji,bhi->bhtj", charged, cost)
    wanted = logits.masked_fill(place > place[:, None], -math.inf).softmax(-1) @ v
    first = torch.arange(0, tokens, tick)[None]
    total = running_sum(synapse.barrier_cost(x)) if barrier == "gated" else None
    beta = synapse.barrier_bias(total, first, tokens).expand(2, -1, -1, -1)
    got = tick_biased_attention(q, k, v, beta, tick, dim**-0.5, backend="reference")
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# --- prompts/synaptic_unit.md: what the switch holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tick", [8, 32])
def test_the_latch_holds_without_calcium_from_a_gain_of_two(tick):
    """Below (D15): with half activation at K = 1/2 a switch that was set stays set exactly from g = 2 on."""
    gains = torch.tensor([1.9, 1.97, 2.03, 2.5], dtype=torch.float64)
    params = DensityParams(tick, True, latch_gain=gains)
    now = DensityState(torch.ones_like(gains), *torch.zeros(3, 4, dtype=torch.float64))
    for _ in range(8_000 // tick):
        now = density_step(now, torch.zeros_like(gains), params)
    assert (now.camkii[:2] < 1e-3).all() and (now.camkii[2:] > 0.5).all()
    kinase = now.camkii[2:]
    torch.testing.assert_close(gains[2:] * kinase**3 * (1 - kinase), 0.5**4 + kinase**4, rtol=1e-6, atol=0)


# --- prompts/life_cycle.md: the account ---------------------------------------------------------------------------------------------


def test_the_account_follows_its_closed_form_and_reaches_the_thresholds_in_the_stated_steps():
    """(L8) and below it: E(n) = E* + (E(0) - E*) (1 - lambda)^n, 0.8 after 92 steps of twice the fair demand, 0.1 after 161 of none."""
    cfg = config_with("bank", bank_rate=0.005, bank_decay=0.01)
    sizes = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8, "vocab_size": 8, "sequence_len": 8, "backend": "reference"}
    moe = SynapticMoE(GPTConfig(**sizes, synapses=True, num_experts=4, moe_top_k=1, syn_cfg=cfg))
    torch.nn.init.normal_(moe.router)
    share = torch.tensor([2.0, 0.0, 1.0, 1.5])
    visits = 100 * share
    routing = Routing(torch.tensor(400.0), visits, visits, visits, torch.zeros(4), torch.diag(visits), torch.ones(4, 8), torch.ones(8))
    energies = [moe.accounts.energy.clone()]
    for _ in range(170):
        update([moe], [routing], cfg)
        energies.append(moe.accounts.energy.clone())
    course = torch.stack(energies)
    rest = 0.5 + 0.5 * (share - 1)
    wanted = rest + (0.5 - rest) * 0.99 ** torch.arange(171)[:, None]
    torch.testing.assert_close(course, wanted, rtol=1e-4, atol=1e-5)
    assert int((course[:, 0] < 0.8).sum()) == 92 and int((course[:, 1] > 0.1).sum()) == 161
