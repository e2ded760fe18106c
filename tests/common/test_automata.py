"""Matrices from cellular automata have the moments that were asked for and no structure that independent draws would not have."""

import pytest
import torch

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.common.automata import RULES, automaton_matrix, automaton_step
from bio_inspired_nanochat.errors import UserError

SHAPES = [(64, 64), (256, 64), (64, 256), (33, 7)]
RULE_NUMBERS = sorted(RULES.values())


def matrix(rows: int, cols: int, rule: int, name: str = "w", seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return automaton_matrix(rows, cols, rule, generator_for(seed, name), std)


@pytest.mark.parametrize("rule", [0, 1, 30, 90, 110, 116, 254, 255])
def test_a_step_follows_the_rule_table_on_a_ring(rule):
    cells = torch.randint(0, 2, (61,), generator=torch.Generator().manual_seed(rule), dtype=torch.uint8)
    ring = cells.tolist()
    expected = [rule >> (4 * ring[i - 1] + 2 * ring[i] + ring[(i + 1) % 61]) & 1 for i in range(61)]
    assert automaton_step(cells, rule).tolist() == expected


def test_rule_30_grows_its_known_triangle_from_one_cell():
    cells = torch.zeros(15, dtype=torch.uint8)
    cells[7] = 1
    rows = [cells := automaton_step(cells, 30) for _ in range(4)]
    drawn = ["".join(".#"[cell] for cell in row.tolist()).strip(".") for row in rows]
    assert drawn == ["###", "##..#", "##.####", "##..#...#"]


@pytest.mark.parametrize("rule", RULE_NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [1.0, 0.05])
def test_mean_and_spread_are_exact_whatever_the_density(shape, rule, std):
    values = matrix(*shape, rule, std=std).double()
    assert values.shape == shape and len(values.unique()) == 2
    assert abs(values.mean().item()) < 1e-7 * std
    assert abs(values.std(unbiased=False).item() / std - 1) < 1e-6


def test_rule_116_is_sparser_and_its_values_make_up_for_it():
    low, high = matrix(256, 256, 116).unique().tolist()
    assert 0.35 < -low / (high - low) < 0.41, "the share of living cells"
    low, high = matrix(256, 256, 30).unique().tolist()
    assert 0.48 < -low / (high - low) < 0.52


@pytest.mark.parametrize("rule", RULE_NUMBERS)
def test_seeds_and_names_give_unrelated_matrices(rule):
    first = matrix(64, 64, rule)
    assert torch.equal(first, matrix(64, 64, rule))
    for other in (matrix(64, 64, rule, seed=1), matrix(64, 64, rule, name="v")):
        assert abs((first * other).mean().item()) < 0.1


@pytest.mark.parametrize("rule", RULE_NUMBERS)
@pytest.mark.parametrize("shape", [(256, 128), (128, 256), (512, 64)])
def test_singular_values_are_those_of_independent_draws(rule, shape):
    rows, cols = shape
    values = matrix(rows, cols, rule)
    assert len(values.unique(dim=0)) == rows and len(values.unique(dim=1).T) == cols
    found = torch.linalg.svdvals(values)
    drawn = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert found[0] < 1.2 * drawn[0], "a few directions stand out"
    assert found[-1] > 0.7 * drawn[-1], "some directions are nearly lost"


@pytest.mark.parametrize("rule", RULE_NUMBERS)
def test_neighbouring_entries_are_not_correlated(rule):
    values = matrix(512, 512, rule)
    for down in range(4):
        for right in range(-3, 4):
            if (down, right) > (0, 0):
                shifted = values.roll((-down, -right), (0, 1))[: 512 - down]
                assert abs((values[: 512 - down] * shifted).mean().item()) < 0.1, (
                    down,
                    right,
                )  # side by side, rule 116 has 0.4 and rule 30 has 0.5


@pytest.mark.parametrize("rule", [0, 255, 8])
def test_a_rule_that_dies_out_is_refused(rule):
    with pytest.raises(UserError, match=f"rule={rule} gives a constant 16 x 16 matrix"):
        matrix(16, 16, rule)


def test_a_single_entry_and_an_unknown_rule_are_refused():
    with pytest.raises(UserError, match="constant 1 x 1"):
        matrix(1, 1, 30)
    with pytest.raises(UserError, match=r"rule=256 is out of bounds \[0, 255\]"):
        matrix(4, 4, 256)


def test_tiny_matrices_never_come_out_constant():
    assert all(matrix(2, 2, rule, seed=seed).unique().numel() == 2 for rule in RULE_NUMBERS for seed in range(100))
