"""Genomes: every protein acts with the sign that it has in the background, and a genome at birth changes nothing."""

import math

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig, knobs_of
from bio_inspired_nanochat.registry import markdown_table
from bio_inspired_nanochat.synaptic.genome import EFFECTS, LIMIT, PROTEINS, SHIFTS, Proteins, Xi, protein_table

HEADS = 3
UP, DOWN = 1, -1
# What the background says about each protein, written down independently of the table of effects.
SIGNS = {
    "Syt1": {"syt_gain": UP, "syt_fast_kd": DOWN},
    "Syt7": {"syt_mix": DOWN, "syt_gain": UP},
    "complexin": {"complexin_bias": UP, "release_bias": DOWN},
    "Munc13": {"tau_prime": DOWN, "tau_rrp": DOWN},
    "Munc18": {"tau_prime": UP},
    "RIM": {"alpha_ca": UP, "tau_rrp": DOWN},
    "PV": {"tau_c": DOWN},
    "SV2": {"release_bias": UP, "quantal_slope": DOWN},
    "clathrin": {"rec_rate": UP, "tau_syn": DOWN},
    "dynamin": {"rec_rate": UP, "tau_syn": DOWN},
    "V-ATPase": {"tau_syn": DOWN, "energy_cost_pump": UP},
    "VGLUT": {"tau_syn": DOWN, "quantal_slope": DOWN},
    "VDAC": {"tau_energy": DOWN},
    "Doc2": {"doc2_gain": UP, "async_rate": UP},
    "Rab5": {"tau_rab5": DOWN},
    "Rab7": {"tau_rab7": DOWN},
}


def expressed(**levels: float) -> Proteins:
    """Head 1 has these proteins (names with _ for -) at these logits, everything else is at birth."""
    proteins = Proteins(HEADS)
    with torch.no_grad():
        for name, level in levels.items():
            proteins.level[1, PROTEINS.index(name.replace("_", "-"))] = level
    return proteins


def test_the_sixteen_proteins_are_those_of_the_background_in_order():
    assert PROTEINS == tuple(SIGNS) and len(PROTEINS) == 16


@pytest.mark.parametrize("protein", PROTEINS)
def test_a_protein_moves_its_quantities_the_right_way_and_no_others(protein):
    more = expressed(**{protein.replace("-", "_"): 2.0}).effects()
    less = expressed(**{protein.replace("-", "_"): -2.0}).effects()
    for quantity, effect in more.items():
        sign = SIGNS[protein].get(quantity, 0)
        assert torch.sign(effect).tolist() == [0, sign, 0], f"{protein} on {quantity}"
        torch.testing.assert_close(less[quantity], -effect)
        assert sign == 0 or effect[1].abs() > 0.1, f"{protein} on {quantity} is too weak to matter"
    assert SIGNS[protein].keys() <= more.keys()


def test_at_birth_proteins_are_half_expressed_and_change_nothing():
    proteins = Proteins(HEADS)
    assert (proteins.expression() == 0.5).all()
    assert all(effect.shape == (HEADS,) and (effect == 0).all() for effect in proteins.effects().values())


@pytest.mark.parametrize("seed", range(4))
def test_no_expression_changes_a_quantity_more_than_fourfold(seed):
    proteins = Proteins(64)
    with torch.no_grad():
        proteins.level.copy_(torch.randn(proteins.level.shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (2 * seed))
    assert 0 <= proteins.expression().min() and proteins.expression().max() <= 1
    effects = torch.stack(list(proteins.effects().values()))
    assert 0.5 < effects.abs().max() <= LIMIT + 1e-6 == math.log(4) + 1e-6


def test_the_strongest_expression_of_every_protein_is_within_the_limit():
    total = dict.fromkeys((effect.quantity for effect in EFFECTS), 0.0)
    for effect in EFFECTS:
        total[effect.quantity] += abs(effect.strength)
    assert max(total.values()) <= LIMIT


def test_every_protein_learns_from_the_start_and_in_its_own_head():
    proteins = Proteins(HEADS)
    sum(effect[1] * (1 + 0.1 * i) for i, effect in enumerate(proteins.effects().values())).backward()
    assert (proteins.level.grad[1] != 0).all() and (proteins.level.grad[[0, 2]] == 0).all()


def test_expression_has_the_gradient_of_its_equation():
    proteins = Proteins(2).double()
    level = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def effects(level):
        return torch.stack(list(torch.func.functional_call(_Effects(proteins), {"inner.level": level}).values()))

    assert torch.autograd.gradcheck(effects, level)


class _Effects(torch.nn.Module):
    def __init__(self, inner: Proteins) -> None:
        super().__init__()
        self.inner = inner

    def forward(self):
        return self.inner.effects()


def test_quantities_are_knobs_of_a_synapse():
    assert {effect.quantity for effect in EFFECTS} <= set(knobs_of(SynapticConfig))
    assert SHIFTS - {"theta"} <= {effect.quantity for effect in EFFECTS}
    assert {effect.protein for effect in EFFECTS} == set(PROTEINS)


def test_the_table_for_the_documentation_says_what_the_module_does():
    lines = markdown_table(protein_table()).splitlines()
    assert lines[0] == "| protein | quantity | effect | role | source |" and len(lines) == 2 + len(EFFECTS)
    assert next(line for line in lines if line.startswith("| PV |")).split(" | ")[1:3] == ["tau_c", "÷ 2"]
    assert next(line for line in lines if line.startswith("| SV2 | release_bias")).split(" | ")[2] == "+0.5"
    assert all(row.role and row.source.startswith("§") for row in protein_table())


# --- Xi --------------------------------------------------------------------------------------------------------------------------

NAMES = ("tau_c", "tau_rrp", "alpha_ca", "theta", "syt_gain", "release_bias")


def test_a_genome_at_birth_is_no_offset_but_can_learn():
    genome = Xi(HEADS, 4, NAMES)
    offsets = genome.offsets()
    assert tuple(offsets) == NAMES and all(value.shape == (HEADS,) and (value == 0).all() for value in offsets.values())
    offsets["tau_rrp"][2].backward()
    assert (genome.xi.grad[2] != 0).any() and (genome.xi.grad[:2] == 0).all()
    torch.testing.assert_close(genome.xi.grad[2], genome.decoder[:, 1].detach())


def test_the_decoder_learns_once_genomes_differ_from_birth():
    genome = Xi(HEADS, 4, NAMES)
    with torch.no_grad():
        genome.xi[0, 1] = 0.5
    genome.offsets()["theta"].sum().backward()
    assert genome.decoder.grad[1].tolist() == [0, 0, 0, 0.5, 0, 0]


def test_heads_have_their_own_offsets_through_one_decoder():
    genome = Xi(2, 3, NAMES)
    with torch.no_grad():
        genome.xi.copy_(torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]))
    offsets = torch.stack(list(genome.offsets().values()), dim=1)
    torch.testing.assert_close(offsets, torch.stack([genome.decoder[2], 2 * genome.decoder[1]]))


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 9, 64])
def test_components_of_a_genome_move_independent_combinations(dim):
    decoder = Xi(HEADS, dim, NAMES).decoder.detach().double()
    gram = decoder @ decoder.T if dim <= len(NAMES) else decoder.T @ decoder
    torch.testing.assert_close(gram, gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-6)
    length = decoder.norm(dim=0)
    assert length.min() > 0.5 and length.max() < 2 and abs(length.square().mean() - 1) < 1e-6


def test_birth_needs_no_seed_and_works_after_meta_construction():
    torch.manual_seed(1)
    first = {**Xi(HEADS, 4, NAMES).state_dict(), **Proteins(HEADS).state_dict()}
    torch.manual_seed(2)
    with torch.device("meta"):
        genome, proteins = Xi(HEADS, 4, NAMES), Proteins(HEADS)
    for module in (genome, proteins):
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.data.fill_(math.nan)
        module.init_weights()
    assert first.keys() == {"xi", "decoder", "level"}
    for name, value in {**genome.state_dict(), **proteins.state_dict()}.items():
        assert torch.equal(value, first[name]), name
