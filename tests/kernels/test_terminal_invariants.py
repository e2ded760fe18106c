"""What holds for every terminal under every drive: each part alone and all together, at every tick length."""

import itertools

import pytest
import torch

from bio_inspired_nanochat.kernels import PresynState, presyn, presyn_bias, presyn_step
from bio_inspired_nanochat.registry import config_with
from tests.contract import make_ids, make_model
from tests.kernels.terminals import (
    CONFIGS,
    TICKS,
    adversarial,
    constant,
    course,
    kinetics,
    make,
    rest,
    silence,
    trace,
    vesicles_everywhere,
)

PRECISION = {torch.float64: 1e-15, torch.float32: 1e-6}
SHARES = ("vesicles", "buffer", "clamp", "primed", "spent", "energy")
# Drift of the number of vesicles, relative, over 500 ticks of any length: float32 rounds a few hundred times.
DRIFT = {torch.float64: 1e-12, torch.float32: 1e-5}
GRID = [(part, tick, dtype) for dtype in PRECISION for tick in TICKS for part in CONFIGS]
LADDER = (0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e4)


def label(value):
    return str(value).removeprefix("torch.")


def over(grid):
    """Run a test for these cases of `GRID`."""
    return pytest.mark.parametrize("attacked", grid, indirect=True, ids=lambda case: "-".join(map(label, case)))


@pytest.fixture(scope="module")
def attacked(request):
    """A terminal's kinetics, its states and releases under adversarial drives."""
    part, tick, dtype = request.param
    params = make(part, tick, dtype)
    ticks = 120 if params.reserve_size is None else 500 if tick in (8, 1000) else 160
    states, freed = course(params, adversarial(ticks))
    return params, states, freed


def snapshots(states: list[PresynState], every: int) -> PresynState:
    """States of many moments side by side, as keys."""
    chosen = [state.parts() for state in states[::every]]
    return PresynState(**{name: torch.cat([parts[name] for parts in chosen], dim=2) for name in chosen[0]})


@over(GRID)
def test_every_quantity_stays_finite_and_in_its_bounds(attacked):
    params, states, freed = attacked
    slack = PRECISION[freed.dtype]
    for name in states[-1].parts():
        values = trace(states, name)
        assert torch.isfinite(values).all(), name
        assert values.min() >= 0, name
        assert name not in SHARES or values.max() <= 1 + slack, name
    assert torch.isfinite(freed).all() and freed.min() >= -slack * params.tick
    if params.tau_prime is not None:
        assert (trace(states, "primed") + trace(states, "spent")).max() <= 1 + slack


@over(GRID)
def test_the_bias_is_finite_and_within_its_limit(attacked):
    params, states, _ = attacked
    elementwise = params._replace(lateral_strength=None)  # inhibition by neighbours is added to the limited bias
    for state in states[::5]:
        assert torch.isfinite(presyn_bias(state, params)).all()
        assert params.beta_max == 0 or presyn_bias(state, elementwise).abs().max() <= params.beta_max


def test_assembling_what_is_nearly_assembled_gives_no_energy():
    """A tick far longer than priming takes multiplies the rounding of the free share: it must never count as energy gained."""
    fields = {"tick": 1024, "tau_prime": 0.25, "tau_nsf": 1024.0, "energy_cost_rel": 0.0, "energy_cost_pump": 0.0}
    params = kinetics(config_with("energy", "priming", **fields), dtype=torch.float32, spread=0.0)
    drive = 10 ** (6 * torch.rand(300, 64, generator=torch.Generator().manual_seed(0)) - 2)
    drive[torch.rand(300, 64, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0
    states, _ = course(params, drive)
    assert trace(states, "energy").max() <= 1


@over([case for case in GRID if CONFIGS[case[0]].reserve])
def test_vesicles_are_neither_made_nor_lost(attacked):
    params, states, freed = attacked
    total = torch.stack([vesicles_everywhere(state, params) for state in states])
    torch.testing.assert_close(total[0], (1 + params.reserve_size)[None, :, None].expand_as(total[0]), rtol=0, atol=0)
    assert freed.sum() > 10 * params.reserve_size.sum()
    assert ((total - total[0]) / total[0]).abs().max() < DRIFT[freed.dtype]


@over(GRID)
def test_more_drive_releases_more_now_and_leaves_less(attacked):
    params, states, freed = attacked
    state = snapshots(states, 17)
    out, left = [], []
    for level in LADDER:
        ahead, released = presyn_step(state, torch.full_like(state.calcium, level), params)
        out.append(released)
        left.append(ahead.vesicles)
    slack = PRECISION[freed.dtype] * params.tick
    for a, b in itertools.pairwise(out):
        assert torch.all(b - a >= -slack * (1 + b))
    for a, b in itertools.pairwise(left):
        assert torch.all(b - a <= slack)
    assert torch.all(out[-1] > out[0]) and torch.all(left[-1] < left[0])


@over([case for case in GRID if case[1] >= 64])
def test_silence_after_any_history_restores_a_terminal_to_its_birth_state(attacked):
    params, states, freed = attacked
    ticks = max(60, 16_000 // params.tick)
    state = course(params, silence(ticks, freed.shape[2]), states[-1])[0][-1]
    for name, value in state.parts().items():
        atol = 1e-6 if freed.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(value, getattr(states[0], name), rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("part", CONFIGS)
def test_birth_is_a_fixed_point_without_drive_and_has_no_bias(part, tick):
    params = make(part, tick)
    states, freed = course(params, silence(40))
    for name, value in rest(params).parts().items():
        torch.testing.assert_close(getattr(states[-1], name), value, rtol=0, atol=1e-12)
    assert torch.equal(presyn_bias(states[0], params), torch.zeros(1, 2, 1, dtype=torch.float64))
    assert presyn_bias(states[-1], params).abs().max() < 1e-10
    assert freed.abs().max() < 1e-12


@pytest.mark.parametrize("part", CONFIGS)
def test_refining_the_tick_converges_to_one_trajectory(part):
    tokens, grid = 240, 48
    drive = (1 + torch.sin(torch.arange(tokens, dtype=torch.float64) / 40))[:, None]
    ends = {}
    for tick in (16, 8, 4, 2, 1):
        states, _ = course(make(part, tick), drive.view(-1, tick, 1).mean(1))
        names = [name for name in states[0].parts() if name not in ("ring", "open_drive")]
        ends[tick] = {name: trace(states, name)[grid // tick :: grid // tick] for name in names}
    for name, finest in ends[1].items():
        gaps = [(ends[tick][name] - finest).abs().max().item() for tick in (16, 8, 4, 2)]
        assert gaps[0] < 0.25 * (1 + finest.abs().max()), (name, gaps)
        if gaps[-1] > 1e-9:
            assert all(b < a for a, b in itertools.pairwise(gaps)), (name, gaps)
            assert gaps[-1] < 0.45 * gaps[0], (name, gaps)


@pytest.mark.parametrize("part, tick, dtype", [case for case in GRID if case[2] == torch.float32 or case[0] == "all"], ids=label)
def test_gradients_are_finite_under_adversarial_drives(part, tick, dtype):
    params = make(part, tick, dtype)
    params = type(params)(*[value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in params])
    drive = adversarial(14).to(dtype).expand(1, 2, -1, -1).clone().requires_grad_()
    beta, state = presyn(drive, params, backend="reference")
    loss = beta.sum() + sum(value.sum() for value in state.parts().values())
    leaves = {name: value for name, value in params._asdict().items() if isinstance(value, torch.Tensor)}
    grads = torch.autograd.grad(loss, [drive, *leaves.values()], allow_unused=True, materialize_grads=True)
    for name, grad in zip(["drive", *leaves], grads, strict=True):
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("part, tick", [*((part, 8) for part in CONFIGS), ("all", 1), ("all", 64)])
def test_gradients_of_one_tick_are_those_of_finite_differences(part, tick):
    params = make(part, tick, heads=1)
    states, _ = course(params, torch.full((8, 1), 0.7))
    start = states[-1]._replace(open_drive=constant(params, 0.0))
    away = ("ring", "early", "late", "resynthesis")  # empty compartments are at their bound, where no difference quotient exists
    start = start._replace(**{name: getattr(start, name) + 0.05 for name in away if getattr(start, name) is not None})
    moving = {name: value.clone().requires_grad_() for name, value in start.parts().items() if name != "open_drive"}
    learned = {name: value.clone().requires_grad_() for name, value in params._asdict().items() if isinstance(value, torch.Tensor)}
    drive = constant(params, 0.9).clone().requires_grad_()

    def tick_once(drive, *inputs):
        state = start._replace(**dict(zip(moving, inputs, strict=False)))
        p = params._replace(**dict(zip(learned, inputs[len(moving) :], strict=True)))
        ahead, freed = presyn_step(state, drive, p)
        return (freed, presyn_bias(ahead, p), *[value for name, value in ahead.parts().items() if name != "open_drive"])

    assert torch.autograd.gradcheck(tick_once, (drive, *moving.values(), *learned.values()), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_reported_with_its_layer_and_name(value):
    model = make_model("all")
    with torch.no_grad():
        model.blocks[1].attn.q.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"layer 1.*drive.*q or k"):
        model(make_ids())
    with pytest.raises(FloatingPointError, match=r"layer 1.*drive.*q or k"):
        model.step(make_ids()[:, :5], model.init_state(2, 8))
