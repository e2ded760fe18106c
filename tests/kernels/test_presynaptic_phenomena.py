"""What a terminal does, in the words of physiology, and the invariants that hold for every drive."""

import itertools

import pytest
import torch

from bio_inspired_nanochat.kernels import PresynState, phi, presyn, presyn_bias, presyn_step, released
from tests.kernels.test_executions import make_params

DRIVES = {
    "silence": lambda n: torch.zeros(1, 4, n, 3),
    "flood": lambda n: torch.full((1, 4, n, 3), 1e4),
    "bursts": lambda n: 1e4 * (torch.arange(n) % 7 == 0).float()[:, None].expand(1, 4, n, 3),
    "noise": lambda n: torch.rand(1, 4, n, 3, generator=torch.Generator().manual_seed(0)) * 3,
}


def run(drive, params, state=None):
    states = [state or PresynState.rest(1, 4, drive.shape[-1], dtype=drive.dtype)]
    for n in range(drive.shape[2]):
        states.append(presyn_step(states[-1], drive[:, :, n], params)[0])
    return states


def test_drive_is_zero_then_quadratic_then_linear_with_a_continuous_slope():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert phi(x).tolist() == [0, 0, 0.25, 1, 3]
    assert torch.autograd.grad(phi(x).sum(), x)[0].tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("tick", [1, 8, 64])
@pytest.mark.parametrize("drive", list(DRIVES))
def test_pools_stay_in_bounds_for_every_drive(drive, tick):
    params = make_params(4, tick, torch.float32)
    for state in run(DRIVES[drive](40), params):
        assert torch.all(state.calcium >= 0) and torch.all(torch.isfinite(state.calcium))
        assert torch.all((state.vesicles >= 0) & (state.vesicles <= 1))
        assert torch.all(presyn_bias(state, params).abs() <= params.beta_max)


def test_a_rested_terminal_has_no_bias_and_stays_at_rest():
    params = make_params(4, 8)
    states = run(torch.zeros(1, 4, 50, 2, dtype=torch.float64), params)
    assert torch.equal(presyn_bias(states[0], params), torch.zeros(1, 4, 2, dtype=torch.float64))
    for got, want in zip(states[-1], states[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


def test_repeated_use_depresses_and_rest_recovers():
    params = make_params(4, 8)
    used = run(torch.ones(1, 4, 30, 1, dtype=torch.float64), params)
    pools = torch.stack([s.vesicles for s in used])
    assert torch.all(pools[1:] < pools[:-1])
    silent = run(torch.zeros(1, 4, 60, 1, dtype=torch.float64), params, used[-1])
    missing = torch.stack([1 - s.vesicles for s in silent])
    expected = torch.exp(-8 / params.tau_rrp)[:, None].expand(1, 4, 1)
    torch.testing.assert_close(missing[1:] / missing[:-1], expected.expand(60, 1, 4, 1))


def test_use_raises_the_release_probability():
    params = make_params(4, 8)._replace(gain_depletion=torch.zeros(4, dtype=torch.float64), gain_release=torch.ones(4, dtype=torch.float64))
    biases = [presyn_bias(s, params) for s in run(torch.ones(1, 4, 10, 1, dtype=torch.float64), params)]
    assert all(torch.all(b > a) for a, b in itertools.pairwise(biases))


@pytest.mark.parametrize("tick", [1, 4, 8, 16, 64])
def test_steady_state_is_that_of_the_tsodyks_markram_rate_model(tick):
    params = make_params(4, tick)
    drive = torch.full((1, 4, 4000 // tick + 60, 1), 0.7, dtype=torch.float64)
    state = run(drive, params)[-1]
    logit = params.syt_gain * (
        params.syt_mix * state.calcium[0, :, 0] / (state.calcium[0, :, 0] + params.k_fast)
        + (1 - params.syt_mix) * state.calcium[0, :, 0] / (state.calcium[0, :, 0] + params.k_slow)
    )
    release = params.release_rate * torch.sigmoid(logit + params.release_bias) * 0.7
    torch.testing.assert_close(state.vesicles[0, :, 0], 1 / (1 + release * params.tau_rrp), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.calcium[0, :, 0], params.tau_c * params.alpha_ca * 0.7, rtol=1e-6, atol=0)


def test_vesicles_released_plus_left_equal_vesicles_before_plus_refilled():
    params = make_params(4, 8)
    state = run(DRIVES["noise"](5).double(), params)[-1]
    drive = torch.full((1, 4, 3), 0.9, dtype=torch.float64)
    after, _ = presyn_step(state, drive, params)
    steps = 20_000
    from bio_inspired_nanochat.kernels.terminal import release_logit

    rate = params.release_rate[:, None] * torch.sigmoid(release_logit(state, params.broadcast(1))) * drive
    pool, refilled = state.vesicles.clone(), torch.zeros_like(drive)
    for _ in range(steps):
        change = (1 - pool) / params.tau_rrp[:, None]
        refilled += change * 8 / steps
        pool += (change - rate * pool) * 8 / steps
    torch.testing.assert_close(released(state, drive, params), state.vesicles + refilled - after.vesicles, rtol=0, atol=1e-4)


def test_more_drive_releases_more_now_and_leaves_less():
    params = make_params(4, 8)
    state = PresynState.rest(1, 4, 1, dtype=torch.float64)
    drives = [torch.full((1, 4, 1), x, dtype=torch.float64) for x in (0.0, 0.1, 1.0, 10.0, 1e4)]
    out = [released(state, d, params) for d in drives]
    left = [presyn_step(state, d, params)[0].vesicles for d in drives]
    assert all(torch.all(b > a) for a, b in itertools.pairwise(out))
    assert all(torch.all(b < a) for a, b in itertools.pairwise(left))


def test_refining_the_tick_converges_to_one_trajectory():
    tokens = 256
    drive = 1 + torch.sin(torch.arange(tokens, dtype=torch.float64) / 40)
    ends = []
    for tick in (16, 8, 4, 2, 1):
        means = drive.view(-1, tick).mean(1)[:, None].expand(1, 4, -1, 1)
        ends.append(run(means, make_params(4, tick))[-1].vesicles)
    gaps = [(a - ends[-1]).abs().max().item() for a in ends[:-1]]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(gaps))
    assert gaps[0] < 0.05


def test_own_tick_never_biases_itself():
    params = make_params(4, 8)
    beta, _ = presyn(torch.rand(1, 4, 3, 5, dtype=torch.float64), params)
    assert torch.equal(beta[:, :, 0], torch.zeros(1, 4, 5, dtype=torch.float64))
    assert torch.all(beta[:, :, 1] != 0)
