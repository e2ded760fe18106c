"""Every execution of the three operators equals the reference: outputs, states and gradients."""

import itertools

import pytest
import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import PresynParams, PresynState

LENGTHS = [1, 7, 63, 64, 65, 500]
TICKS = [1, 4, 8, 16]


def make_params(heads: int, tick: int, dtype=torch.float64, beta_max: float = 8.0, one_sensor: bool = False) -> PresynParams:
    spread = torch.linspace(0.8, 1.2, heads, dtype=dtype)
    slow = (None, None) if one_sensor else (3.0 * spread, 0.7 * spread.clamp(max=1.1))
    return PresynParams(
        tick, 20 * spread, 40 * spread, 0.2 * spread, 0.4 * spread, slow[0], slow[1], 3 * spread, -spread, 0.1 * spread,
        -0.5 * spread, 0.7 * spread, beta_max, 1e-4,
    )  # fmt: skip


def make_qkv(length: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, dim: int = 8, dtype=torch.float64):
    torch.manual_seed(length)
    return [torch.randn(batch, h, length, dim, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def documents(batch: int, length: int) -> torch.Tensor:
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.1
    return starts.cumsum(1)


def whole_layer(q, k, v, tick, backend, *, window=None, doc=None, kind="phi", beta_max=8.0, one_sensor=False):
    """All three operators in a row; returns output, final state and gradients with respect to everything learned."""
    params = make_params(q.shape[1], tick, q.dtype, beta_max, one_sensor)
    leaves = [t.requires_grad_() for t in params if isinstance(t, torch.Tensor)]
    theta = torch.linspace(-0.5, 0.5, q.shape[1], dtype=q.dtype).requires_grad_()
    scale = q.shape[-1] ** -0.5
    drive = kernels.tick_drive(q, k, theta, tick, scale, window=window, doc=doc, kind=kind, backend=backend) / tick
    beta, state = kernels.presyn(drive, params, closed=q.shape[2] // tick, backend=backend)
    y = kernels.tick_biased_attention(q, k, v, beta, tick, scale, window=window, doc=doc, backend=backend)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    loss = (y * weight).sum() + sum(s.sum() for s in state.parts().values())
    inputs = [q, k, v, theta, *leaves]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return y, state, grads


def assert_same(got, want, tolerance=1e-9):
    for a, b in zip([got[0], *got[1].parts().values(), *got[2]], [want[0], *want[1].parts().values(), *want[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tick", TICKS)
def test_sdpa_equals_reference(length, tick):
    qkv = make_qkv(length)
    assert_same(whole_layer(*qkv, tick, "sdpa"), whole_layer(*qkv, tick, "reference"))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5},
        {"window": 100},
        {"doc": True},
        {"doc": True, "window": 9},
        {"kind": "softplus"},
        {"beta_max": 0.0},
        {"one_sensor": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [7, 65, 300])
def test_options_agree(length, options):
    options = dict(options)
    qkv = make_qkv(length)
    if options.get("doc"):
        options["doc"] = documents(2, length)
    assert_same(whole_layer(*qkv, 4, "sdpa", **options), whole_layer(*qkv, 4, "reference", **options))


@pytest.mark.parametrize("tick", [1, 4, 8])
def test_any_chunking_gives_the_same_drive_and_state(tick):
    length, cuts = 45, [0, 3, 4, 17, 18, 40, 45]
    q, k, _ = make_qkv(length)
    theta = torch.zeros(4, dtype=q.dtype)
    params = make_params(4, tick)
    drive = kernels.tick_drive(q, k, theta, tick, 1.0, backend="reference") / tick
    beta, state = kernels.presyn(drive, params, closed=length // tick, backend="reference")
    for backend in ("reference", "sdpa"):
        piece = PresynState.rest(2, 4, length, dtype=q.dtype)
        for a, b in itertools.pairwise(cuts):
            part = kernels.tick_drive(q[:, :, a:b], k, theta, tick, 1.0, q_start=a, backend=backend) / tick
            bias, piece = kernels.presyn(part, params, piece, closed=b // tick - a // tick, backend=backend)
            torch.testing.assert_close(bias, beta[:, :, a // tick : a // tick + bias.shape[2]])
        for got, want in zip(piece.parts().values(), state.parts().values(), strict=True):
            torch.testing.assert_close(got, want)


def test_rows_at_different_positions_equal_each_row_alone():
    tick, starts, length = 4, [0, 5, 11], 9
    torch.manual_seed(0)
    q = torch.randn(3, 2, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 24, 8, dtype=torch.float64)
    theta, params = torch.zeros(2, dtype=torch.float64), make_params(2, tick)
    start = torch.tensor(starts)
    drive = kernels.tick_drive(q, k, theta, tick, 1.0, q_start=start) / tick
    closed = (start + length) // tick - start // tick
    beta, state = kernels.presyn(drive, params, closed=closed)
    y = kernels.tick_biased_attention(q, k, v, beta, tick, 1.0, q_start=start)
    for row, begin in enumerate(starts):
        pick = slice(row, row + 1)
        alone = kernels.tick_drive(q[pick], k[pick], theta, tick, 1.0, q_start=begin, backend="reference") / tick
        beta_1, state_1 = kernels.presyn(alone, params, closed=int(closed[row]), backend="reference")
        y_1 = kernels.tick_biased_attention(q[pick], k[pick], v[pick], beta_1, tick, 1.0, q_start=begin, backend="reference")
        torch.testing.assert_close(y[pick], y_1)
        for got, want in zip(state.parts().values(), state_1.parts().values(), strict=True):
            torch.testing.assert_close(got[pick], want)


def test_long_ragged_prefill_equals_reference():
    tick, length = 2, 150
    torch.manual_seed(0)
    q = torch.randn(2, 2, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 170, 8, dtype=torch.float64)
    start = torch.tensor([3, 16])
    beta = torch.randn(2, 2, kernels.num_ticks(start, length, tick), 170, dtype=torch.float64)
    args = (q, k, v, beta, tick, 1.0)
    torch.testing.assert_close(
        kernels.tick_biased_attention(*args, q_start=start, backend="sdpa"),
        kernels.tick_biased_attention(*args, q_start=start, backend="reference"),
    )


def test_gradients_match_finite_differences():
    q, k, v = make_qkv(11, heads=2, kv_heads=1, batch=1, dim=4)
    params = make_params(2, 4)
    tensors = [t for t in params if isinstance(t, torch.Tensor)]

    def run(q, k, v, theta, *values):
        values = iter(values)
        p = PresynParams(*[next(values) if isinstance(old, torch.Tensor) else old for old in params])
        drive = kernels.tick_drive(q, k, theta, 4, 0.5, backend="sdpa") / 4
        beta, _ = kernels.presyn(drive, p, backend="sdpa")
        return kernels.tick_biased_attention(q, k, v, beta, 4, 0.5, backend="sdpa")

    theta = torch.tensor([0.1, -0.3], dtype=torch.float64)
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v, theta, *tensors)]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


def test_explicit_backend_that_cannot_serve_is_an_error():
    q, k, v = make_qkv(4)
    with pytest.raises(UserError, match="cannot serve"):
        kernels.tick_drive(q, k, torch.zeros(4), 4, 1.0, q_start=torch.tensor([0, 1]), backend="sdpa")
    with pytest.raises(UserError, match="one of auto, reference, sdpa"):
        kernels.tick_biased_attention(q, k, v, None, 4, 1.0, backend="cuda")


def test_attention_without_bias_equals_zero_bias_bit_for_bit_in_the_reference():
    q, k, v = make_qkv(33, dtype=torch.float32)
    zero = torch.zeros(2, 4, 9, 33)
    plain = kernels.tick_biased_attention(q, k, v, None, 4, 0.3, backend="reference")
    assert torch.equal(plain, kernels.tick_biased_attention(q, k, v, zero, 4, 0.3, backend="reference"))
