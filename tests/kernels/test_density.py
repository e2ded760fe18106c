"""CaMKII, PP1 and BDNF over ticks: exact bookkeeping of ticks and documents, and a switch that sets, keeps and erases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bio_inspired_nanochat.kernels.codegen import emit, trace
from bio_inspired_nanochat.kernels.density import DensityParams, DensityState, density, density_step
from bio_inspired_nanochat.kernels.molecules import latch_slopes, latch_step
from tests.kernels.interpreter import run_interpreted

DOUBLE = torch.float64
FIRSTS = [0, 3, torch.tensor([0, 5, 14])]
MODES = pytest.mark.parametrize("latch", [False, True], ids=["linear", "latch"])


def rest(batch: int = 1) -> DensityState:
    return DensityState.rest(batch, dtype=DOUBLE)


def anywhere(batch: int) -> DensityState:
    return DensityState(*torch.rand(4, batch, dtype=DOUBLE))


def token_by_token(calcium: Tensor, params: DensityParams, state: DensityState, first, fresh: Tensor, live: Tensor):
    """The definition: what each token sees, [3, B, T], and the state at the end, [4, B]; a plain loop over rows and tokens."""
    seen, ends = torch.zeros(3, *calcium.shape, dtype=calcium.dtype), []
    for row in range(len(calcium)):
        now = DensityState(*[part[row] for part in state])
        position = first if isinstance(first, int) else int(first[row])
        for t in range(int(live[row].sum())):
            if fresh[row, t]:
                now = DensityState(*[torch.zeros_like(part) for part in now])
            seen[:, row, t] = torch.stack(now[:3])
            now = now._replace(open_calcium=now.open_calcium + calcium[row, t])
            if (position + t + 1) % params.tick == 0:
                now = density_step(now, now.open_calcium / params.tick, params)
        ends.append(torch.stack(list(now)))
    return seen, torch.stack(ends, dim=1)


def constant(level: float | Tensor, params: DensityParams, ticks: int, state: DensityState | None = None) -> tuple[Tensor, DensityState]:
    """K at the start of every tick [B, N] and the state after `ticks` ticks of constant calcium, one row per level."""
    level = torch.atleast_1d(torch.as_tensor(level, dtype=DOUBLE))
    state = rest(len(level)) if state is None else state
    with torch.no_grad():
        camkii, _, _, final = density(level[:, None].expand(-1, ticks * params.tick), params, state, 0)
    return camkii[:, :: params.tick], final


# Ticks, documents, padding


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("first", FIRSTS, ids=["0", "3", "ragged"])
@pytest.mark.parametrize("tick", [1, 4, 8])
@MODES
def test_the_parallel_form_equals_the_definition(latch, tick, first, marked):
    params = DensityParams(tick, latch, tau_camkii=16.0, tau_bdnf=torch.tensor(40.0, dtype=DOUBLE))
    for length in (1, 7, 65):
        calcium, state = torch.rand(3, length, dtype=DOUBLE) * 1.5, anywhere(3)
        fresh = (torch.rand(3, length) < 0.1) & marked
        live = (torch.arange(length) < torch.tensor([[length], [length // 2], [0]])) | (not marked)
        seen, ends = token_by_token(calcium, params, state, first, fresh, live)
        *found, final = density(calcium, params, state, first, **({"fresh": fresh, "live": live} if marked else {}))
        torch.testing.assert_close(torch.stack(found) * live, seen, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.stack(list(final)), ends, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cuts", [[1, 1, 5, 8, 21], [16, 3, 17], [35, 1]])
@MODES
def test_any_chunking_gives_the_same_course(latch, cuts):
    params, calcium = DensityParams(8, latch), torch.rand(3, 36, dtype=DOUBLE)
    fresh = torch.rand(3, 36) < 0.05
    first = torch.tensor([0, 5, 14])
    state = anywhere(3)
    *whole, final = density(calcium, params, state, first, fresh=fresh)
    parts, place = [], 0
    for size in cuts:
        span = slice(place, place + size)
        *part, state = density(calcium[:, span], params, state, first + place, fresh=fresh[:, span])
        parts.append(torch.stack(part))
        place += size
    assert place == 36
    torch.testing.assert_close(torch.cat(parts, dim=-1), torch.stack(whole), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-11, atol=1e-12)


@MODES
def test_a_document_starts_at_rest_and_goes_on_as_if_it_were_alone(latch):
    params, calcium = DensityParams(8, latch), torch.rand(1, 90, dtype=DOUBLE) * 2
    fresh = torch.zeros(1, 90, dtype=torch.bool)
    fresh[0, [19, 21]] = True  # two documents begin in one tick
    *packed, final = density(calcium, params, anywhere(1), 0, fresh=fresh)
    *alone, state = density(calcium[:, 21:], params, rest(), 21)
    torch.testing.assert_close(torch.stack(packed)[..., 21:], torch.stack(alone), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tuple(final), tuple(state), rtol=1e-11, atol=1e-12)
    assert torch.stack(packed)[..., :19].all() and not torch.stack(packed)[..., 19:24].any()


@MODES
def test_padding_changes_nothing_whatever_it_holds(latch):
    params, calcium, state = DensityParams(8, latch), torch.rand(2, 40, dtype=DOUBLE), anywhere(2)
    live = (torch.arange(40) < 27).expand(2, -1)
    padded = calcium.masked_fill(~live, float("nan"))
    *found, final = density(padded, params, state, 2, live=live, fresh=~live)
    *expected, end = density(calcium[:, :27], params, state, 2)
    torch.testing.assert_close(torch.stack(found)[..., :27], torch.stack(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(tuple(final), tuple(end), rtol=1e-12, atol=1e-14)


@MODES
def test_a_token_acts_from_the_next_tick_on(latch):
    params, calcium = DensityParams(8, latch), torch.rand(1, 32, dtype=DOUBLE)
    before = torch.stack(density(calcium, params, rest(), 0)[:3])
    calcium[0, 11] += 0.5
    after = torch.stack(density(calcium, params, rest(), 0)[:3])
    assert torch.equal(after[..., :16], before[..., :16])
    assert (after[:, 0, 16] != before[:, 0, 16]).all()


# Bounds, gradients, execution


@pytest.mark.parametrize("tick", [1, 8, 64, 4096])
@MODES
def test_every_molecule_stays_between_zero_and_one(latch, tick):
    calcium = torch.rand(6, 50) * torch.tensor([0.0, 0.1, 1.0, 3.0, 1e4, 1e12])[:, None]
    calcium[3, ::2] = 1e4
    for tau in (1.0, 4.0, 1e4):
        for extreme in (0.0, 1.0):
            params = DensityParams(1, latch, tau_camkii=tau / tick, tau_pp1=tau / tick, tau_bdnf=tau / tick)
            state = DensityState(*[torch.full((6,), extreme)] * 3, torch.zeros(6))
            levels = torch.stack(density(calcium, params, state, 0)[:3])
            assert levels.isfinite().all() and levels.min() >= 0 and levels.max() <= 1


@MODES
def test_without_calcium_a_resting_density_stays_at_rest(latch):
    levels = torch.stack(density(torch.zeros(1, 300), DensityParams(8, latch), DensityState.rest(1), 0)[:3])
    assert not levels.any()


@MODES
def test_gradients_are_those_of_finite_differences(latch):
    constants = torch.tensor([20.0, 12.0, 30.0, 0.2, 0.5, 6.0, 0.5, 6.0, 3.0, 2.0], dtype=DOUBLE, requires_grad=True)
    calcium = (torch.rand(2, 17, dtype=DOUBLE) * 0.9).requires_grad_()  # below the corner of min(1, ca)
    start = [part.requires_grad_() for part in anywhere(2)]
    fresh = torch.zeros(2, 17, dtype=torch.bool)
    fresh[1, 6] = True

    def function(calcium: Tensor, constants: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        *levels, final = density(calcium, DensityParams(4, latch, *constants.unbind()), DensityState(*state), 3, fresh=fresh)
        return *levels, *final

    assert torch.autograd.gradcheck(function, (calcium, constants, *start))


def test_the_slopes_of_the_latch_are_its_derivatives():
    camkii, pp1, calcium = (torch.rand(50, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    params = DensityParams(8, True)
    after = latch_step(camkii, pp1, calcium, params)
    wanted = [slope for value in after for slope in torch.autograd.grad(value.sum(), (camkii, pp1), retain_graph=True)]
    torch.testing.assert_close(list(latch_slopes(camkii, pp1, calcium, params)), wanted, rtol=1e-9, atol=1e-12)


@MODES
def test_inference_and_training_compute_the_same_bits(latch):
    calcium = torch.rand(2, 100, requires_grad=True)
    params, state = DensityParams(8, latch), DensityState.rest(2)
    trained = density(calcium, params, state, 0)
    with torch.no_grad():
        inferred = density(calcium, params, state, 0)
    assert all(torch.equal(a, b) for a, b in zip((*trained[:3], *trained[3]), (*inferred[:3], *inferred[3]), strict=True))


@MODES
def test_it_compiles_as_one_graph(latch):
    calcium, fresh = torch.rand(2, 50, dtype=DOUBLE, requires_grad=True), torch.rand(2, 50) < 0.1

    def function(calcium: Tensor) -> tuple[Tensor, ...]:
        *levels, final = density(calcium, DensityParams(8, latch), rest(2), 3, fresh=fresh)
        return *levels, *final

    found = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")(calcium)
    expected = function(calcium)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (a,), (b,) = (torch.autograd.grad(sum(value.sum() for value in values), calcium) for values in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@MODES
def test_a_step_can_be_traced_into_a_kernel(latch):
    def function(*tensors: Tensor) -> list[Tensor]:
        state, calcium, constants = DensityState(*tensors[:3], torch.zeros_like(tensors[0])), tensors[3], tensors[4:]
        return list(density_step(state, calcium, DensityParams(8, latch, *constants))[:3])

    lines, outputs = emit(trace(function, 14), [f"x{i}" for i in range(14)], "v")
    assert lines and len(outputs) == 3


# The linear mode


@pytest.mark.parametrize("tick", [1, 8, 32])
def test_linear_molecules_relax_exactly_with_their_time_constants(tick):
    params = DensityParams(tick, tau_camkii=50.0, tau_pp1=20.0, tau_bdnf=200.0)
    _, final = constant([0.3, 5.0], params, 64 // tick)
    share, sensed = torch.tensor([0.3, 1.0], dtype=DOUBLE), torch.tensor([0.3, 5.0], dtype=DOUBLE)
    for found, target, tau in zip(final[:3], (share, sensed / (sensed + 0.2), share), (50.0, 20.0, 200.0), strict=True):
        torch.testing.assert_close(found, target * (1 - math.exp(-64 / tau)))


@MODES
def test_moderate_calcium_favours_pp1_and_high_calcium_camkii(latch):
    _, final = constant([0.2, 2.0], DensityParams(8, latch), 400)
    assert final.pp1[0] > 2 * final.camkii[0]
    assert final.camkii[1] > final.pp1[1]


# The switch


def imbalance(camkii: Tensor, calcium: float) -> Tensor:
    """dK/dt tau_camkii of the default latch with P at rest for that K: its zeros are the resting points of the switch."""
    strong = calcium**4 / (0.5**4 + calcium**4)
    rise = 3 * calcium / (calcium + 0.2) * (1 - strong)
    pp1 = rise / (rise + 1 + 2 * camkii)
    return (strong + 6 * camkii**4 / (0.5**4 + camkii**4)) * (1 - camkii) - (1 + 6 * pp1) * camkii


def is_bistable(calcium: float) -> bool:
    """Whether there are three resting points: dK/dt turns from negative to positive and back."""
    signs = imbalance(torch.linspace(1e-9, 1, 20001, dtype=DOUBLE), calcium).sign()
    return int((signs[1:] != signs[:-1]).sum()) == 3


def boundary(low: float, high: float) -> float:
    """The calcium between `low` and `high` at which the number of resting points changes, by bisection."""
    at_low = is_bistable(low)
    assert at_low != is_bistable(high)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if is_bistable(middle) == at_low else (low, middle)
    return (low + high) / 2


def saturated(batch: int) -> DensityState:
    return rest(batch)._replace(camkii=torch.ones(batch, dtype=DOUBLE))


def jump(levels: Tensor, final: Tensor) -> float:
    """Where the final K changes branch along increasing calcium."""
    high = final > 0.35
    (place,) = (high[1:] != high[:-1]).nonzero()
    return levels[place.item() : place.item() + 2].mean().item()


@pytest.mark.parametrize("tick", [2, 8, 32])
@pytest.mark.parametrize("name, low, high", [("keeps up to", 0.05, 0.3), ("holds from", 0.3, 0.5), ("sets from", 0.5, 0.8)])
def test_the_switch_jumps_where_its_equations_bifurcate(name, low, high, tick):
    point = boundary(low, high)
    levels = point + torch.linspace(-0.004, 0.004, 17, dtype=DOUBLE)  # a jump is found to within 5e-4
    state = rest(17) if name == "sets from" else saturated(17)
    _, final = constant(levels, DensityParams(tick, True), 1500, state)
    assert jump(levels, final.camkii) == pytest.approx(point, abs=5e-4)


def test_sweeping_calcium_up_and_down_draws_a_hysteresis_loop():
    params, state = DensityParams(8, True), rest()
    levels = [0.04 * step for step in range(26)]
    branches = []
    for course in (levels, levels[::-1]):
        branch = {}
        for level in course:
            _, state = constant(level, params, 150, state)
            branch[level] = state.camkii.item()
        branches.append(branch)
    up, down = branches
    opening = boundary(0.3, 0.5), boundary(0.5, 0.8)
    for level in levels:
        inside = opening[0] + 0.01 < level < opening[1] - 0.01
        if inside:
            assert down[level] > up[level] + 0.3
        elif level < opening[0] - 0.01 or level > opening[1] + 0.01:
            assert abs(down[level] - up[level]) < 0.02
    assert opening[1] - opening[0] > 0.1


@pytest.mark.parametrize(("gain", "tokens", "held"), [(1.9, 1600, False), (2.1, 1600, True), (4.2, 32, False), (4.5, 32, True)])
def test_what_is_held_depends_on_the_gain_as_the_knob_says(gain, tokens, held):
    calcium = torch.cat([torch.ones(1, tokens), torch.zeros(1, 2400)], dim=1)
    camkii = density(calcium, DensityParams(8, True, latch_gain=gain), rest(), 0)[0]
    assert (float(camkii[0, -1]) > 0.5) == held


def test_the_switch_remembers_after_the_input_stops():
    params = DensityParams(8, True)
    _, written = constant([0.0, 1.0], params, 16)
    assert written.camkii[1] > 0.6
    assert not written.camkii[0]
    course, _ = constant([0.0, 0.0], params, 4000 // 8, written)
    assert (course[1, -1] > 0.8) and course[1].min() > 0.6
    assert not course[0].any()
    linear, _ = constant(0.0, params._replace(latch=False), 4000 // 8, saturated(1))
    assert linear[0, -1] < 1e-6


@pytest.mark.parametrize("level", [0.15, 0.25, 0.35])
def test_sustained_low_calcium_erases_what_high_calcium_wrote(level):
    params = DensityParams(8, True)
    _, written = constant(1.0, params, 32)
    _, brief = constant(level, params, 2, written)
    _, kept = constant(0.0, params, 500, brief)
    assert kept.camkii > 0.8
    _, erased = constant(level, params, 60, written)
    _, silent = constant(0.0, params, 500, erased)
    assert silent.camkii < 0.01


@MODES
def test_refining_the_tick_converges(latch):
    def course(tick: int) -> Tensor:
        """K, P, D at every 64th token while calcium writes and then erases."""
        params = DensityParams(tick, latch, tau_camkii=1600.0, tau_pp1=1200.0, tau_bdnf=2000.0)
        calcium = torch.tensor([[1.0, 0.25]], dtype=DOUBLE).repeat_interleave(3072, dim=1)
        with torch.no_grad():
            return torch.stack(density(calcium, params, rest(), 0)[:3])[:, 0, ::64]

    finest = course(1)
    errors = torch.stack([(course(tick) - finest).abs().amax(-1) for tick in (64, 16, 4)])
    assert (errors[-1] < 0.02).all()
    if latch:
        assert (errors[1:, :2] < 0.4 * errors[:-1, :2]).all()  # first order: a quarter each time
        assert (errors[:, 2] < 1e-12).all()
    else:
        assert (errors < 1e-12).all()  # exact


# On CUDA


def kernels(device: str = "cpu") -> None:
    """The latch in float32 by its kernels equals the loop in float64, with gradients, and what a model calls does not fail."""
    params = DensityParams(4, True, tau_camkii=16.0)
    generator = torch.Generator().manual_seed(1)
    calcium, state = torch.rand(5, 90, generator=generator), torch.rand(4, 5, generator=generator)
    fresh = (torch.rand(5, 90, generator=generator) < 0.05).to(device)
    weight = [torch.randn(value.shape, generator=generator) for value in (*[calcium] * 3, *[calcium[:, 0]] * 4)]
    found = []
    for dtype in (torch.float32, DOUBLE):
        leaves = [value.to(device, dtype).requires_grad_() for value in (calcium, state)]
        *levels, final = density(leaves[0], params, DensityState(*leaves[1]), 3, fresh=fresh)
        values = [*levels, *final]
        loss = sum((value * by.to(value)).sum() for value, by in zip(values, weight, strict=True))
        found.append([*values, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_the_kernels_of_the_latch_in_the_interpreter():
    run_interpreted("from tests.kernels.test_density import kernels\nkernels()")


@pytest.mark.gpu
def test_the_kernels_of_the_latch_on_the_gpu():
    kernels("cuda")
