"""Fast weights: the chunked form is the recurrence, and the memory does what an associative memory should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import fast_fla
from bio_inspired_nanochat.kernels.decay import decayed_sums
from bio_inspired_nanochat.kernels.fast_weights import RULES, fast_weights, solve_unit_lower
from tests.kernels.interpreter import run_interpreted

LENGTHS = [1, 7, 63, 64, 65, 200]
DOUBLE = torch.float64


def inputs(length: int, rule: str, *, batch: int = 3, modes: int = 5, start: bool = True, gamma: float | None = None) -> dict[str, Tensor]:
    """Random arguments in float64 that ask for gradients."""
    shape = (modes,) if rule == "hebb" else ()
    made = {
        "u": F.normalize(torch.randn(batch, length, modes, dtype=DOUBLE), dim=-1),
        "m": torch.randn(batch, length, modes, dtype=DOUBLE),
        "eta": torch.rand(batch, length, dtype=DOUBLE),
        "gamma": torch.rand(shape, dtype=DOUBLE) * 0.2 + 0.79 if gamma is None else torch.full(shape, gamma, dtype=DOUBLE),
    }
    if start:
        made["start"] = torch.randn(batch, modes, modes, dtype=DOUBLE)
    return {name: value.requires_grad_() for name, value in made.items()}


def events(length: int, fresh: bool, live: bool) -> dict[str, Tensor]:
    """Documents that begin here and there, one of them with the first token, and rows of full, half and no length."""
    made = {}
    if fresh:
        made["fresh"] = torch.rand(3, length) < 3 / length
        made["fresh"][1, 0] = True
    if live:
        made["live"] = torch.arange(length) < torch.tensor([[length], [length // 2], [0]])
    return made


def outcome(arguments: dict[str, Tensor], weights: tuple[Tensor, Tensor], **options) -> list[Tensor]:
    """z of the real tokens, the final state and the gradients of a random sum of both."""
    z, final = fast_weights(**arguments, **options)
    if "live" in options:
        z = z.masked_fill(~options["live"][..., None], 0)
    total = (z * weights[0]).sum() + (final * weights[1]).sum()
    return [z, final, *torch.autograd.grad(total, arguments.values(), allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("marks", [(False, False), (True, False), (False, True), (True, True)], ids=["plain", "fresh", "live", "both"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_the_chunked_form_equals_the_recurrence_with_all_gradients(rule, length, marks):
    arguments, marked = inputs(length, rule), events(length, *marks)
    weights = (torch.randn(3, length, 5, dtype=DOUBLE), torch.randn(3, 5, 5, dtype=DOUBLE))
    expected = outcome(arguments, weights, rule=rule, backend="reference", **marked)
    found = outcome(arguments, weights, rule=rule, backend="chunked", **marked)
    for name, a, b in zip(("z", "final", *arguments), expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_longer_than_a_block_of_chunks(rule):
    arguments = {name: value.detach() for name, value in inputs(64 * 66 + 5, rule, batch=1, modes=2, gamma=0.999).items()}
    marked = {"fresh": torch.rand(1, 64 * 66 + 5) < 1e-3}
    for backend_pair in zip(
        *(fast_weights(**arguments, rule=rule, backend=name, **marked) for name in ("reference", "chunked")), strict=True
    ):
        torch.testing.assert_close(*backend_pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 30, 64, 99])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("rule", RULES)
def test_two_calls_equal_one(rule, backend, cut):
    arguments, marked = inputs(100, rule), events(100, True, True)
    options = {"rule": rule, "backend": backend}
    whole, final = fast_weights(**arguments, **options, **marked)
    timed = {name: arguments[name] for name in ("u", "m", "eta")} | marked
    first, state = fast_weights(
        **{name: x[:, :cut] for name, x in timed.items()}, gamma=arguments["gamma"], start=arguments["start"], **options
    )
    second, state = fast_weights(**{name: x[:, cut:] for name, x in timed.items()}, gamma=arguments["gamma"], start=state, **options)
    live = marked["live"][..., None]
    torch.testing.assert_close(torch.cat([first, second], dim=1) * live, whole * live, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_reading_is_strictly_of_the_past(rule, backend):
    arguments = {name: value.detach() for name, value in inputs(100, rule).items()}
    before, _ = fast_weights(**arguments, rule=rule, backend=backend)
    for t in (0, 40, 64, 98):
        changed = {name: value.clone() for name, value in arguments.items()}
        changed["m"][:, t:] += 1
        changed["eta"][:, t:] = 0.5
        changed["u"][:, t + 1 :] = changed["u"][:, t + 1 :].flip(-1)
        after, _ = fast_weights(**changed, rule=rule, backend=backend)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.allclose(after[:, t + 1], before[:, t + 1])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_padding_changes_nothing_whatever_it_holds(rule, backend):
    arguments = {name: value.detach() for name, value in inputs(70, rule).items()}
    short = {name: value[:, :50] if name in ("u", "m", "eta") else value for name, value in arguments.items()}
    live = (torch.arange(70) < 50).expand(3, -1)
    for name in ("u", "m", "eta"):
        arguments[name][:, 50:] = float("nan")
    z, final = fast_weights(**arguments, rule=rule, backend=backend, live=live, fresh=~live)
    expected, state = fast_weights(**short, rule=rule, backend=backend)
    torch.testing.assert_close(z[:, :50], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_a_document_reads_nothing_of_the_one_before(rule, backend):
    arguments = {name: value.detach() for name, value in inputs(100, rule).items()}
    fresh = torch.zeros(3, 100, dtype=torch.bool)
    fresh[:, 37] = True
    z, final = fast_weights(**arguments, rule=rule, backend=backend, fresh=fresh)
    alone = {name: arguments[name][:, 37:] for name in ("u", "m", "eta")}
    expected, state = fast_weights(**alone, gamma=arguments["gamma"], rule=rule, backend=backend)
    torch.testing.assert_close(z[:, 37:], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_finite_differences(rule, backend):
    arguments = inputs(6, rule, batch=1, modes=2)
    fresh = torch.tensor([[False, False, False, True, False, False]])

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fast_weights(*values, rule=rule, backend=backend, fresh=fresh)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize("rule", RULES)
def test_the_extremes_of_decay_and_write_strength(rule):
    for gamma, eta in ((1.0, 1.0), (1.0, 0.0), (math.exp(-0.25), 1.0)):
        arguments = inputs(150, rule, gamma=gamma)
        arguments["eta"] = torch.full_like(arguments["eta"], eta).requires_grad_()
        weights = (torch.randn(3, 150, 5, dtype=DOUBLE), torch.randn(3, 5, 5, dtype=DOUBLE))
        expected, found = (outcome(arguments, weights, rule=rule, backend=name) for name in ("reference", "chunked"))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        if gamma == 1 and eta == 0:
            assert torch.allclose(found[1], arguments["start"], rtol=1e-12)


# What the memory is for


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_repeated_key_is_overwritten_by_delta_and_added_to_by_hebb(backend):
    modes = 8
    keys = torch.eye(modes, dtype=DOUBLE)
    old, new, final = torch.randn(3, modes, modes, dtype=DOUBLE)
    u = torch.cat([keys, keys, keys])[None]
    m = torch.cat([old, new, final])[None]
    eta = torch.ones(1, 3 * modes, dtype=DOUBLE)
    z, state = fast_weights(u, m, eta, torch.tensor(1.0, dtype=DOUBLE), rule="delta", backend=backend)
    torch.testing.assert_close(z[0, modes : 2 * modes], old)
    torch.testing.assert_close(z[0, 2 * modes :], new)
    torch.testing.assert_close(state[0], final.T)
    z, state = fast_weights(u, m, eta, torch.ones(modes, dtype=DOUBLE), rule="hebb", backend=backend)
    torch.testing.assert_close(z[0, 2 * modes :], old + new)
    torch.testing.assert_close(state[0], (old + new + final).T)


def test_every_pre_mode_of_hebb_forgets_at_its_own_rate():
    gamma = torch.tensor([0.8, 0.99], dtype=DOUBLE)
    u = torch.zeros(1, 40, 2, dtype=DOUBLE)
    u[0, 0] = 1
    u[0, -1, 0] = 1
    m, eta = torch.ones(1, 40, 2, dtype=DOUBLE), torch.zeros(1, 40, dtype=DOUBLE)
    eta[0, 0] = 1
    z, final = fast_weights(u, m, eta, gamma, rule="hebb")
    torch.testing.assert_close(z[0, -1, 0], gamma[0] ** 38)
    torch.testing.assert_close(final[0, 0], gamma**39)


@pytest.mark.parametrize("gamma", [0.78, 0.99])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_delta_rule_is_bounded_for_any_keys(backend, gamma):
    length, modes, decay = 600, 4, torch.tensor(gamma, dtype=DOUBLE)
    near = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.05 * torch.randn(1, length, modes), dim=-1)
    turning = torch.stack([torch.cos(torch.arange(length) * 1.5), torch.sin(torch.arange(length) * 1.5)], -1)
    keys = [near, F.pad(turning, (0, 2))[None], near[:, :1].expand(-1, length, -1)]
    for u in keys:
        for eta in (1.0, 0.3):
            m = torch.randn(1, length, modes, dtype=DOUBLE).sign() * 5
            bound = 10 * math.sqrt(eta / (1 - gamma**2))
            strength = torch.full((1, length), eta, dtype=DOUBLE)
            z, final = fast_weights(u.to(DOUBLE), m, strength, decay, rule="delta", backend=backend)
            assert z.norm(dim=-1).max() <= bound
            assert final.norm() <= bound


def test_the_bound_of_the_delta_rule_is_attained_by_keys_that_avoid_what_is_stored():
    gamma, state = torch.tensor(0.9, dtype=DOUBLE), torch.zeros(1, 1, 2, 2, dtype=DOUBLE)[0]
    for _ in range(100):
        stored = state[0, 0]
        u = torch.stack([-stored[1], stored[0]]) / stored.norm() if stored.any() else torch.tensor([1.0, 0.0], dtype=DOUBLE)
        m = torch.tensor([[[3.0, 0.0]]], dtype=DOUBLE)
        _, state = fast_weights(u.view(1, 1, 2), m, torch.ones(1, 1, dtype=DOUBLE), gamma, state, rule="delta")
    assert state.norm().item() == pytest.approx(3 / math.sqrt(1 - 0.81), rel=1e-6)


# Precision, compilation, errors


@pytest.mark.parametrize("rule", RULES)
def test_products_in_bfloat16_stay_close_and_leave_the_state_in_float32(rule):
    arguments = {name: value.detach().float() for name, value in inputs(200, rule, modes=16).items()}
    arguments |= {name: arguments[name].bfloat16() for name in ("u", "m")}
    exact = {name: value.double() for name, value in arguments.items()}
    z, final = fast_weights(**arguments, rule=rule)
    expected, state = fast_weights(**exact, rule=rule, backend="reference")
    assert z.dtype == torch.bfloat16 and final.dtype == torch.float32 and state.dtype == DOUBLE
    torch.testing.assert_close(z.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    torch.testing.assert_close(final.double(), state, rtol=0.02, atol=0.02 * state.abs().max().item())


@pytest.mark.parametrize("rule", RULES)
def test_repeated_keys_lose_no_digits_in_float32(rule):
    u = F.normalize(torch.randn(2, 1, 16), dim=-1).expand(-1, 512, -1)
    m, eta = torch.randn(2, 512, 16), torch.ones(2, 512)
    gamma = torch.ones(16) if rule == "hebb" else torch.tensor(1.0)
    z, _ = fast_weights(u, m, eta, gamma, rule=rule)
    expected, _ = fast_weights(u.double(), m.double(), eta.double(), gamma.double(), rule=rule, backend="reference")
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("rule", RULES)
def test_it_compiles_as_one_graph(rule):
    arguments = inputs(100, rule)
    marked = events(100, True, True)

    def function(**values: Tensor) -> tuple[Tensor, Tensor]:
        return fast_weights(**values, **marked, rule=rule)

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    (z, final), (expected, state) = compiled(**arguments), function(**arguments)
    torch.testing.assert_close((z, final), (expected, state), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(z.sum() + final.sum(), arguments.values())
    wanted = torch.autograd.grad(expected.sum() + state.sum(), arguments.values())
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_inputs_are_never_written():
    for rule in RULES:
        arguments = {name: value.detach() for name, value in inputs(70, rule).items()}
        copies = {name: value.clone() for name, value in arguments.items()}
        for backend in ("reference", "chunked"):
            fast_weights(**arguments, rule=rule, backend=backend, **events(70, True, True))
        assert all(torch.equal(arguments[name], copies[name]) for name in copies)


@pytest.mark.parametrize("wrong, said", [({"rule": "oja"}, "rule='oja'"), ({"rule": "hebb", "backend": "cuda"}, "backend='cuda'")])
def test_wrong_names_are_user_errors(wrong, said):
    with pytest.raises(UserError, match=said):
        fast_weights(**inputs(3, "hebb"), **wrong)


def compare(backend: str, rule: str, length: int, modes: int, device: str = "cpu", marks: tuple[bool, bool] = (False, False)) -> None:
    """An execution in float32 gives the outputs and gradients of the recurrence in float64, the same ones twice."""
    marked = {name: value.to(device) for name, value in events(length, *marks).items()}
    found = []
    runs = 2 if device == "cuda" else 1  # the interpreter runs the programs of a grid in a row: the bits are the same
    for dtype, name in (*[(torch.float32, backend)] * runs, (DOUBLE, "reference")):
        torch.manual_seed(0)
        given = {key: value.detach().to(device, dtype).requires_grad_() for key, value in inputs(length, rule, modes=modes).items()}
        weights = [torch.randn(3, *shape, dtype=DOUBLE).to(device, dtype) for shape in ((length, modes), (modes, modes))]
        found.append(outcome(given, weights, rule=rule, backend=name, **marked))
    for name, got, again, want in zip(("z", "final", *given), found[0], found[runs - 1], found[-1], strict=True):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
        assert error <= 2e-5, f"{name} is off by {error:.1e} ({rule}, T={length}, r={modes}, {marks})"
        assert torch.equal(got, again), f"{name} differs between two runs"


def interpreted() -> None:
    """What a CPU can try of the kernels."""
    for count in (5, 16):
        compare("chunked", "delta", 200, count)
    for rule in RULES:
        compare("triton", rule, 1, 5)
        compare("triton", rule, 70, 20)
        for marks in ((False, True), (True, False), (True, True)):
            compare("triton", rule, 100, 5, marks=marks)
    garbage = {name: value.detach().float() for name, value in inputs(70, "delta").items()}
    live = (torch.arange(70) < 50).expand(3, -1)
    short = {name: value[:, :50].clone() if name in ("u", "m", "eta") else value for name, value in garbage.items()}
    for name in ("u", "m", "eta"):
        garbage[name][:, 50:] = float("nan")
    z, final = fast_weights(**garbage, rule="delta", backend="triton", live=live, fresh=~live)
    expected, state = fast_weights(**short, rule="delta", backend="triton")
    torch.testing.assert_close((z[:, :50], final), (expected, state), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(z).all()


def test_the_kernels_in_the_interpreter():
    run_interpreted("from tests.kernels.test_fast_weights import interpreted\ninterpreted()")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_on_the_gpu(rule):
    for length, modes in ((1, 16), (65, 5), (500, 16), (300, 32), (700, 64)):
        for marks in ((False, False), (True, True)):
            compare("triton", rule, length, modes, "cuda", marks)


@pytest.mark.gpu
def test_the_kernel_of_the_states_between_chunks_on_the_gpu():
    for modes in (5, 16, 64, 100):
        compare("chunked", "delta", 200, modes, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_keys_that_repeat_lose_no_digits_in_the_kernels(rule):
    u = F.normalize(torch.randn(2, 1, 16), dim=-1).expand(-1, 512, -1).cuda()
    m, eta = torch.randn(2, 512, 16).cuda(), torch.ones(2, 512).cuda()
    gamma = torch.ones(16 if rule == "hebb" else ()).cuda()
    z, _ = fast_weights(u, m, eta, gamma, rule=rule, backend="triton")
    expected, _ = fast_weights(u.double(), m.double(), eta.double(), gamma.double(), rule=rule, backend="reference")
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_kernels_say_why_they_cannot_serve():
    with pytest.raises(UserError, match="backend='triton' cannot serve these fast weights: the tensors are on cpu; use backend='auto'"):
        fast_weights(**inputs(3, "delta"), rule="delta", backend="triton")


def test_fla_says_why_it_cannot_serve():
    with pytest.raises(UserError, match="backend='fla' cannot serve these fast weights: the tensors are on cpu; use backend='auto'"):
        fast_weights(**inputs(3, "delta"), rule="delta", backend="fla")


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_fla_equals_the_recurrence_on_the_gpu(rule):
    pytest.importorskip("fla")
    given = {name: value.detach().float().cuda().requires_grad_() for name, value in inputs(130, rule, modes=16).items()}
    if obstacle := fast_fla.obstacle(given["u"], rule, None, None):
        pytest.skip(obstacle)
    got, want = (fast_weights(**given, rule=rule, backend=backend) for backend in ("fla", "reference"))
    weight = [torch.randn_like(value) for value in want]
    grads = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(values, weight, strict=True)), list(given.values())) for values in (got, want)
    ]
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()  # its products run in tf32


@pytest.mark.parametrize("steps", [1, 64, 65, 300])
@pytest.mark.parametrize("segmented", [False, True])
def test_decayed_sums_equal_the_recurrence_with_gradients(steps, segmented):
    values = torch.randn(2, steps, 2, 3, dtype=DOUBLE, requires_grad=True)
    gamma = torch.tensor([0.5, 0.97, 1.0], dtype=DOUBLE, requires_grad=True)
    segment = (torch.rand(2, steps) < 0.03).int().cumsum(1) if segmented else None
    total, course = torch.zeros(2, 2, 3, dtype=DOUBLE), []
    for n in range(steps):
        kept = 1.0 if segment is None or n == 0 else (segment[:, n] == segment[:, n - 1]).to(DOUBLE)[:, None, None]
        total = total * gamma * kept + values[:, n]
        course.append(total)
    expected, found = torch.stack(course, dim=1), decayed_sums(values, gamma, segment)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(found)
    wanted, got = (torch.autograd.grad((y * weight).sum(), (values, gamma)) for y in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_triangular_solve_and_its_gradient(size):
    lower = torch.randn(2, size, size, dtype=DOUBLE).mul(0.3).tril(-1).requires_grad_()
    right = torch.randn(2, size, 3, dtype=DOUBLE, requires_grad=True)
    expected = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    found = solve_unit_lower(lower, right)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(found)
    wanted, got = (torch.autograd.grad((x * weight).sum(), (lower, right)) for x in (expected, found))
    torch.testing.assert_close(got[0].tril(-1), wanted[0].tril(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-9, atol=1e-9)
