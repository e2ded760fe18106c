"""Muon: what orthogonalisation does to a matrix, and that batching changes nothing but speed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from bio_inspired_nanochat.optim import muon
from bio_inspired_nanochat.optim.muon import BAND, SMALLEST, Muon, orthogonalize, step_scale

SHAPES = [(24, 24), (40, 16), (16, 40), (24, 24), (64, 16), (24, 24)]


def spectrum_matrix(rows: int, columns: int, smallest: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of Frobenius norm 1 with singular values down to `smallest`, and the nearest semi-orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), size, dtype=torch.float64)
    values /= values.norm()
    return (u * values) @ v.T, u @ v.T


def parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def run(shapes: list[tuple[int, ...]], steps: int = 3, seed: int = 0, **settings: float) -> list[torch.Tensor]:
    params = parameters(shapes, seed)
    optimizer = Muon(params, **settings)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        optimizer.step()
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (16, 64), (64, 16), (7, 130), (1, 5), (5, 1)])
def test_singular_values_end_in_the_band(rows: int, columns: int) -> None:
    matrix, nearest = spectrum_matrix(rows, columns, smallest=2 * SMALLEST)
    for scale in (1e-6, 1.0, 1e6):
        result = orthogonalize((matrix * scale).float()).double()
        values = torch.linalg.svdvals(result)
        assert BAND[0] <= values.min() and values.max() <= BAND[1]
        cosine = (result * nearest).sum() / (result.norm() * nearest.norm())
        assert cosine > 0.99


def test_tiny_singular_values_stay_below_the_band_instead_of_exploding() -> None:
    matrix, _ = spectrum_matrix(32, 32, smallest=1e-6)
    assert torch.linalg.svdvals(orthogonalize(matrix.float())).max() <= BAND[1]


def test_bfloat16_stays_near_the_band() -> None:
    matrix, _ = spectrum_matrix(32, 64, smallest=1e-2)
    values = torch.linalg.svdvals(orthogonalize(matrix.bfloat16()).float())
    assert values.min() > 0.75 and values.max() < 1.25


def test_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_a_batch_equals_its_matrices_one_by_one() -> None:
    for rows, columns in ((16, 16), (40, 12), (12, 40)):
        batch = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(rows))
        single = torch.stack([orthogonalize(matrix) for matrix in batch])
        torch.testing.assert_close(orthogonalize(batch), single, rtol=0, atol=1e-5)
        torch.testing.assert_close(orthogonalize(batch.view(5, 1, rows, columns)).squeeze(1), single, rtol=0, atol=1e-5)


def test_batching_by_shape_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(SHAPES, weight_decay=0.1)
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 1)
    for batched, alone in zip(together, run(SHAPES, weight_decay=0.1), strict=True):
        torch.testing.assert_close(batched, alone, rtol=0, atol=1e-5)


def test_stacked_experts_step_like_separate_matrices() -> None:
    stacked = parameters([(3, 20, 8)])[0]
    separate = [Parameter(matrix.clone()) for matrix in stacked.detach()]
    for matrix, grad in zip(separate, stacked.grad, strict=True):
        matrix.grad = grad.clone()
    one, many = Muon([stacked], weight_decay=0.1), Muon(separate, weight_decay=0.1)
    for _ in range(3):
        one.step()
        many.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([matrix.detach() for matrix in separate]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cautious", [False, True])
def test_an_expert_that_no_token_reached_rests(cautious: bool) -> None:
    experts = parameters([(3, 8, 8)])[0]
    optimizer = Muon([experts], weight_decay=0.1, cautious=cautious)
    optimizer.step()
    before, momentum = experts.detach().clone(), optimizer.state[experts]["momentum"].clone()
    experts.grad[1] = 0
    optimizer.step()
    assert torch.equal(experts.detach()[1], before[1]) and torch.equal(optimizer.state[experts]["momentum"][1], momentum[1])
    assert not torch.equal(experts.detach()[0], before[0])


def test_matches_torch_muon_in_direction_and_scale() -> None:
    """The same momentum and scale; only the orthogonalisation is another polynomial, so the steps agree to its band."""
    for shape in ((48, 16), (16, 48)):
        ours, theirs = parameters([shape])[0], parameters([shape])[0]
        start = ours.detach().clone()
        Muon([ours], lr=0.1, momentum=0.9).step()
        torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0).step()
        step, reference = ours.detach() - start, theirs.detach() - start
        assert (step * reference).sum() / (step.norm() * reference.norm()) > 0.95
        assert 0.85 < step.norm() / reference.norm() < 1.25


def test_nesterov_momentum_is_what_gets_orthogonalised() -> None:
    param = parameters([(8, 8)])[0]
    start, first = param.detach().clone(), param.grad.clone()
    optimizer = Muon([param], lr=0.1, momentum=0.9)
    optimizer.step()
    second = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    middle = param.detach().clone()
    param.grad = second
    optimizer.step()
    average = 0.1 * first
    torch.testing.assert_close(middle, start - 0.1 * orthogonalize(0.1 * first + 0.9 * average))
    average = 0.9 * average + 0.1 * second
    torch.testing.assert_close(param.detach(), middle - 0.1 * orthogonalize(0.1 * second + 0.9 * average))


def test_tall_matrices_take_larger_steps() -> None:
    assert step_scale((64, 16)) == 2.0 and step_scale((16, 64)) == 1.0 and step_scale((9, 64, 16)) == 2.0
    tall, wide = parameters([(64, 16)])[0], Parameter(torch.zeros(16, 64))
    wide.grad, tall.data = tall.grad.T.contiguous(), torch.zeros(64, 16)
    Muon([tall, wide], lr=0.1).step()
    torch.testing.assert_close(tall.detach(), 2 * wide.detach().T, rtol=0, atol=1e-6)


def test_decay_is_decoupled_and_cautious_decay_never_works_against_the_step() -> None:
    start = parameters([(16, 16)])[0].detach().clone()
    plain, decayed, cautious = (
        run([(16, 16)], steps=1, lr=0.1, weight_decay=decay, cautious=flag)[0] for decay, flag in ((0.0, False), (0.5, False), (0.5, True))
    )
    torch.testing.assert_close(decayed, plain - 0.05 * start)
    shrinks = (plain - start) * start < 0
    torch.testing.assert_close(cautious, torch.where(shrinks, decayed, plain))
    assert 0 < shrinks.sum() < shrinks.numel()


def test_a_parameter_without_gradient_is_left_alone() -> None:
    moved, rests = parameters([(8, 8), (8, 8)])
    optimizer = Muon([moved, rests], weight_decay=0.5, cautious=False)
    optimizer.step()
    before, momentum = rests.detach().clone(), optimizer.state[rests]["momentum"].clone()
    rests.grad = None
    optimizer.step()
    assert torch.equal(rests.detach(), before) and torch.equal(optimizer.state[rests]["momentum"], momentum)


def test_vectors_are_refused() -> None:
    with pytest.raises(AssertionError, match="matrices"):
        Muon([Parameter(torch.zeros(4))])
