"""The gradient norm is measured on the device and bounded."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from bio_inspired_nanochat.optim import clip_grad_norm


def with_gradients(*grads: torch.Tensor | None) -> list[Parameter]:
    params = []
    for grad in grads:
        params.append(Parameter(torch.zeros(2) if grad is None else torch.zeros_like(grad)))
        params[-1].grad = grad
    return params


def test_norm_is_returned_before_clipping_and_gradients_end_at_the_limit() -> None:
    params = with_gradients(torch.tensor([[3.0]]), None, torch.tensor([4.0, 0.0]))
    norm = clip_grad_norm(params, 1.0)
    assert norm.ndim == 0 and norm.item() == 5.0
    assert clip_grad_norm(params, 0.0).item() == pytest.approx(1.0)
    assert params[0].grad.item() == pytest.approx(0.6)


def test_gradients_below_the_limit_keep_their_bits() -> None:
    grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for limit in (0.0, 1e3):
        params = with_gradients(grad.clone())
        clip_grad_norm(params, limit)
        assert torch.equal(params[0].grad, grad)


def test_norm_of_half_precision_gradients_is_not_rounded() -> None:
    norm = clip_grad_norm(with_gradients(torch.full((1000,), 1.0, dtype=torch.bfloat16)), 0.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(1000**0.5, rel=1e-6)


def test_nan_and_no_gradients_are_visible_in_the_norm() -> None:
    assert clip_grad_norm(with_gradients(torch.tensor([float("nan")]), torch.ones(1)), 1.0).isnan()
    assert clip_grad_norm(with_gradients(torch.tensor([float("inf")])), 1.0).isinf()
    assert clip_grad_norm(with_gradients(None), 1.0).item() == 0.0


def test_zero_gradients_stay_zero() -> None:
    params = with_gradients(torch.zeros(3))
    clip_grad_norm(params, 1.0)
    assert torch.equal(params[0].grad, torch.zeros(3))
