"""What more of a protein does to a real terminal with every part on: one measurement for each role in the table of effects."""

import dataclasses
import itertools

import pytest
import torch

from bio_inspired_nanochat.kernels import PresynParams, presyn_bias, presyn_step
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.synaptic.genome import EFFECTS, PROTEINS, SHIFTS
from tests.kernels.terminals import PARTS, constant, course, differ, kinetics, rest, silence, trace

UP, DOWN = 1, -1
# A weak synapse with a large reserve: nothing saturates, so that each protein can be seen.
CONFIG = config_with(
    *PARTS, "genome_proteins", tick=1, release_bias=-2.0, complexin_bias=1.0, reserve_size=10.0, endo_delay=5.0, release_rate=0.1
)


def terminal_with(**proteins: float) -> PresynParams:
    """A terminal with proteins at these logits of expression (names with _ for -), all others half expressed."""
    return kinetics(CONFIG, proteins={name.replace("_", "-"): level for name, level in proteins.items()})


def state_of(params: PresynParams, **quantities: float):
    return rest(params)._replace(**{name: constant(params, value) for name, value in quantities.items()})


def released(params: PresynParams, **quantities: float) -> float:
    """Release by one token of moderate drive."""
    return presyn_step(state_of(params, **quantities), constant(params, 1.0), params)[1].item()


def after_rest(params: PresynParams, name: str, ticks: int = 10, **quantities: float) -> float:
    """A quantity after some silence."""
    states, _ = course(params, silence(ticks), state_of(params, **quantities))
    return trace(states, name)[-1].sum().item()


def absence(params: PresynParams) -> float:
    """Vesicles still away from both pools some time after a release."""
    states, _ = course(params, silence(60), state_of(params, vesicles=0.5)._replace(ring=rest(params).ring + 0.1))
    back = states[-1].vesicles + params.reserve_size * states[-1].reserve
    return (0.5 + params.reserve_size - back + 0.1 * params.endo_slots).item()


def work(params: PresynParams) -> float:
    """Energy that is left after a pool was filled."""
    return after_rest(params, "energy", 20, resynthesis=3.0)


def amplitude(params: PresynParams) -> float:
    """Bias through the quantal amplitude at low energy."""
    gain = {name: torch.zeros_like(getattr(params, name)) for name in ("gain_release", "gain_depletion", "gain_priming")}
    params = params._replace(**gain, gain_quantal=torch.ones_like(params.tau_c), lateral_strength=None)
    return presyn_bias(state_of(params, energy=0.3), params).item()


MEASURED = [
    ("Syt1", "release at a little calcium", lambda p: released(p, calcium=0.2), UP),
    ("Syt1", "facilitation by calcium", lambda p: released(p, calcium=2.0) / released(p), UP),
    ("Syt7", "facilitation beyond the range of Syt1", lambda p: released(p, calcium=20.0) / released(p, calcium=4.0), UP),
    ("complexin", "release at rest", released, DOWN),
    ("complexin", "release at high calcium", lambda p: released(p, calcium=5.0), DOWN),
    ("complexin", "gain from lifting the clamp", lambda p: released(p, calcium=1.0, clamp=0.1) / released(p, calcium=1.0), UP),
    ("Munc13", "priming of free sites", lambda p: after_rest(p, "primed", 3, primed=0.0), UP),
    ("Munc13", "docking", lambda p: after_rest(p, "vesicles", vesicles=0.0), UP),
    ("Munc18", "priming of free sites", lambda p: after_rest(p, "primed", 3, primed=0.0), DOWN),
    ("RIM", "calcium after a pulse", lambda p: presyn_step(rest(p), constant(p, 1.0), p)[0].calcium.item(), UP),
    ("RIM", "docking", lambda p: after_rest(p, "vesicles", vesicles=0.0), UP),
    ("PV", "residual calcium", lambda p: after_rest(p, "calcium", calcium=1.0), DOWN),
    ("PV", "calcium under constant drive", lambda p: course(p, torch.ones(200, 1))[0][-1].calcium.item(), DOWN),
    ("SV2", "release at rest", released, UP),
    ("SV2", "amplitude at low energy", amplitude, UP),
    ("clathrin", "vesicles that are away", absence, DOWN),
    ("clathrin", "share that skips the late endosome", lambda p: after_rest(p, "late", early=1.0), DOWN),
    ("dynamin", "vesicles that are away", absence, DOWN),
    ("dynamin", "share that skips the late endosome", lambda p: after_rest(p, "late", early=1.0), DOWN),
    ("V-ATPase", "empty vesicles", lambda p: after_rest(p, "resynthesis", resynthesis=1.0), DOWN),
    ("V-ATPase", "energy after filling", work, DOWN),
    ("VGLUT", "empty vesicles", lambda p: after_rest(p, "resynthesis", resynthesis=1.0), DOWN),
    ("VGLUT", "amplitude at low energy", amplitude, UP),
    ("VDAC", "energy after exhaustion", lambda p: after_rest(p, "energy", energy=0.1), UP),
    ("VDAC", "energy under constant use", lambda p: course(p, torch.full((200, 1), 5.0))[0][-1].energy.item(), UP),
    ("Doc2", "release without a query", lambda p: course(p, silence(5), state_of(p, calcium=2.0))[1].sum().item(), UP),
    ("Doc2", "release at low calcium", lambda p: released(p, calcium=0.5), UP),
    ("Rab5", "early endosome", lambda p: after_rest(p, "early", early=1.0), DOWN),
    ("Rab7", "late endosome", lambda p: after_rest(p, "late", late=1.0), DOWN),
]


def test_every_protein_is_measured():
    assert {row[0] for row in MEASURED} == set(PROTEINS)


@pytest.mark.parametrize("protein, what, measure, sign", MEASURED, ids=[f"{row[0]}: {row[1]}" for row in MEASURED])
def test_more_of_a_protein_moves_the_terminal_as_its_role_says(protein, what, measure, sign):
    values = [measure(terminal_with(**{protein.replace("-", "_"): level})) for level in (-6.0, -1.0, 0.0, 1.0, 6.0)]
    assert all(sign * (b - a) > 0 for a, b in itertools.pairwise(values)), f"{what}: {values}"
    assert abs(values[-1] - values[0]) > 0.02 * abs(values[2]), f"{what} hardly moves: {values}"


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: f"{effect.protein}-{effect.quantity}")
def test_every_line_of_the_table_reaches_the_terminal(effect):
    field = {"syt_fast_kd": "k_fast", "complexin_bias": "complexin"}.get(effect.quantity, effect.quantity)
    more, half = (getattr(terminal_with(**{effect.protein.replace("-", "_"): level}), field) for level in (6.0, 0.0))
    if effect.quantity not in SHIFTS:
        assert torch.log(more / half).item() == pytest.approx(effect.strength, rel=0.01)
    else:
        assert (more - half).item() * effect.strength > 0


def test_half_expression_is_the_terminal_that_the_knobs_describe():
    assert not differ(terminal_with(), kinetics(dataclasses.replace(CONFIG, genome="direct")))


def test_proteins_belong_to_their_head():
    more = kinetics(CONFIG, heads=2, proteins=dict.fromkeys(PROTEINS, 2.0))
    half = kinetics(CONFIG, heads=2)
    for name, a, b in zip(PresynParams._fields, more, half, strict=True):
        if isinstance(a, torch.Tensor):
            assert a[1] == b[1], name
    assert differ(more, half)
