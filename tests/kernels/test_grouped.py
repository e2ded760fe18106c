"""Dropless dispatch: all executions agree, nobody is dropped, ties are broken by index."""

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels.grouped import combine, dispatch, group_by_expert, grouped_linear, top_k

EXPERTS, INPUTS, OUTPUTS = 5, 8, 12


def case(tokens, k, spread="even", dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + k)
    scores = torch.randn(tokens, EXPERTS, generator=generator)
    if spread == "one":
        scores[:, 3] += 100
    if spread == "unused":
        scores[:, [0, 4]] -= 100
    weight = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=generator).to(dtype)
    return torch.randn(tokens, INPUTS, generator=generator).to(dtype), weight, top_k(scores, k)


def through(x, weight, chosen, gates, backend):
    groups = group_by_expert(chosen, EXPERTS)
    return combine(grouped_linear(dispatch(x, groups, chosen.shape[1]), weight, groups, backend), groups, gates)


def plain(x, weight, chosen, gates):
    """Token by token, as one would write it down."""
    return torch.stack(
        [sum(g * (weight[e] @ row) for e, g in zip(es, gs, strict=True)) for row, es, gs in zip(x, chosen, gates, strict=True)]
    )


@pytest.mark.parametrize("backend", ["reference", "grouped", "blocked", "auto"])
@pytest.mark.parametrize("spread", ["even", "one", "unused"])
@pytest.mark.parametrize("tokens, k", [(1, 1), (1, 2), (7, 2), (64, 3), (129, 2), (40, 5)])
def test_every_token_visits_its_experts_and_gradients_agree(backend, spread, tokens, k):
    x, weight, chosen = case(tokens, k, spread)
    gates = torch.rand(tokens, k, generator=torch.Generator().manual_seed(1))
    made, wanted = [], []
    for found, function in ((made, lambda *a: through(*a, backend)), (wanted, plain)):
        leaves = [value.clone().requires_grad_() for value in (x, weight, gates)]
        y = function(leaves[0], leaves[1], chosen, leaves[2])
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        found += [y.detach(), *(leaf.grad for leaf in leaves)]
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero():
    """Muon leaves such an expert alone."""
    for backend in ("grouped", "blocked"):
        x, weight, chosen = case(64, 2, "unused")
        weight.requires_grad_()
        through(x, weight, chosen, torch.ones(64, 2), backend).square().sum().backward()
        assert torch.all(weight.grad[[0, 4]] == 0) and weight.grad[1].abs().sum() > 0


def test_double_precision_gradients_match_finite_differences():
    x, weight, chosen = case(9, 2, dtype=torch.float64)
    gates = torch.rand(9, 2, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (x, weight, gates)]
    assert torch.autograd.gradcheck(lambda *a: through(a[0], a[1], chosen, a[2], "auto"), leaves)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 4).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("backend", ["grouped", "blocked"])
def test_the_whole_path_is_one_graph_without_host_waits(backend):
    """fullgraph fails at anything that depends on the data on the host."""
    x, weight, chosen = case(64, 2)
    x.requires_grad_()
    run = torch.compile(lambda *a: through(*a, backend), fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(run(x, weight, chosen, torch.ones(64, 2)), through(x, weight, chosen, torch.ones(64, 2), backend))


def test_an_explicit_backend_that_cannot_serve_is_an_error():
    x, weight, chosen = case(7, 2, dtype=torch.float64)
    groups = group_by_expert(chosen, EXPERTS)
    with pytest.raises(UserError, match="grouped.*float64.*blocked"):
        grouped_linear(dispatch(x, groups, 2), weight, groups, "grouped")
    with pytest.raises(UserError, match="one of auto"):
        grouped_linear(dispatch(x, groups, 2), weight, groups, "loop")
