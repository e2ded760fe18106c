"""Genomes: what a head's kinetics are learned from when it is not one number per quantity and head.

`Xi` is a short vector per head and one decoder for all heads; its offsets are added to the stored parameters. `Proteins` is the
expression of sixteen named proteins per head, each acting on a few quantities with a fixed sign and strength (`EFFECTS`). Both are
zero at birth: the knobs then hold as they are.

Sources, all in the background: the protein list and what each does, "What each protein does computationally" in the design dialogue
(§4 there), its equations in §2.1-2.6 and §9; a small genome per unit with a decoder, "Synaptic Genome Embedding" in the README.
Dimensions: H heads, G genome length.

Numbered equations are those of prompts/presynapse.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

PROTEINS = (
    *("Syt1", "Syt7", "complexin", "Munc13", "Munc18", "RIM", "PV", "SV2"),
    *("clathrin", "dynamin", "V-ATPase", "VGLUT", "VDAC", "Doc2", "Rab5", "Rab7"),
)
SHIFTS = frozenset({"theta", "syt_mix", "release_bias", "rec_rate"})  # quantities that are added to; all others are multiplied
LIMIT = math.log(4)  # no quantity, or odds of one, changes by more than this factor, whatever is expressed


class Effect(NamedTuple):
    """What one protein does to one quantity.

    strength: at full expression, relative to half: the logarithm of a factor, or for a quantity in `SHIFTS` an addition
    (to a logit, or to theta). With nothing expressed the opposite.
    """

    protein: str
    quantity: str
    strength: float
    role: str
    source: str


# Strengths keep the ratios that the background's constants have within one equation (kappa_7 = 0.4 kappa_1, theta_18 = 0.8 theta_13,
# beta_13 = 0.53 beta_RIM, eta_clathrin = 0.83 eta_dynamin, zeta_VGLUT = 0.9 zeta_V-ATPase); a lone protein has a factor of two.
_TWO = math.log(2)
EFFECTS = (
    Effect("Syt1", "syt_gain", _TWO, "fast sensor: release climbs steeper with calcium", "§2.3"),
    Effect("Syt1", "syt_fast_kd", -_TWO, "fast sensor: answers at less calcium", "§4"),
    Effect("Syt7", "syt_mix", -1.2, "slow sensor: share of the one that facilitates", "§4"),
    Effect("Syt7", "syt_gain", 0.4 * _TWO, "slow sensor: adds to the slope, less than Syt1", "§2.3"),
    Effect("complexin", "complexin_bias", _TWO, "clamp of the SNARE complex that calcium lifts", "§2.3"),
    Effect("complexin", "release_bias", -0.4, "clamp: less release at any calcium", "§2.3"),
    # CSP and alpha-synuclein, chaperones of the SNARE, multiply the priming rate; they have no component of their own.
    Effect("Munc13", "tau_prime", -_TWO, "primes vesicles sooner (CSP and α-synuclein priming included)", "§2.2, §9"),
    Effect("Munc13", "tau_rrp", -0.53 * _TWO, "docks vesicles sooner", "§2.4"),
    Effect("Munc18", "tau_prime", 0.8 * _TWO, "holds syntaxin closed: priming takes longer", "§2.2"),
    Effect("RIM", "alpha_ca", _TWO, "couples calcium channels to vesicles: more influx per drive", "§2.1"),
    Effect("RIM", "tau_rrp", -_TWO, "scaffold: docks vesicles sooner", "§2.4, §4"),
    # The displayed equation multiplies tau_Ca by 1 + beta PV; the sentence below it and the code shorten it.
    Effect("PV", "tau_c", -_TWO, "fast buffer: calcium falls sooner", "§2.1"),
    Effect("SV2", "release_bias", 0.5, "lowers the threshold of release", "§2.3"),
    # A size that is constant in time cancels in log(q / q_rest): what counts is how much of it is left when energy falls.
    Effect("SV2", "quantal_slope", -_TWO, "quantal size: vesicles weaken less when energy falls", "§2.6, §4"),
    Effect("clathrin", "rec_rate", 0.83 * 0.7, "endocytosis capacity, AP-2 included: more vesicles come straight back", "§2.4"),
    Effect("clathrin", "tau_syn", -0.83 * 0.35 * _TWO, "endocytosis capacity, AP-2 included: the others are rebuilt sooner", "§2.4"),
    Effect("dynamin", "rec_rate", 0.7, "endocytosis capacity: more vesicles come straight back", "§2.4"),
    Effect("dynamin", "tau_syn", -0.35 * _TWO, "endocytosis capacity: the others are rebuilt sooner", "§2.4"),
    Effect("V-ATPase", "tau_syn", -0.7 * _TWO, "acidifies vesicles: filled sooner", "§2.4"),
    Effect("V-ATPase", "energy_cost_pump", 0.7 * _TWO, "the pump burns ATP", "§2.5"),
    Effect("VGLUT", "tau_syn", -0.9 * 0.7 * _TWO, "loads transmitter: filled sooner", "§2.4"),
    Effect("VGLUT", "quantal_slope", -0.9 * _TWO, "quantal size: vesicles weaken less when energy falls", "§4"),
    Effect("VDAC", "tau_energy", -_TWO, "mitochondrial exchange: energy comes back sooner", "§2.5"),
    Effect("Doc2", "doc2_gain", _TWO, "release at low calcium", "§2.3"),
    Effect("Doc2", "async_rate", _TWO, "asynchronous release", "§9"),
    Effect("Rab5", "tau_rab5", -_TWO, "early endosome: passed sooner", "§9"),
    Effect("Rab7", "tau_rab7", -_TWO, "late endosome: passed sooner", "§9"),
)


class Proteins(nn.Module):
    """Expression Ξ in [0, 1] of the sixteen `PROTEINS` in each head. The parameter `level` [H, 16] is the logit of Ξ, 0 at birth.

    Equation (P22).
    A protein of a mechanism that is switched off has no quantity to act on and gets no gradient.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.empty(heads, len(PROTEINS)))
        if self.level.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Half expression of everything; it does not depend on a seed."""
        self.level.zero_()

    def expression(self) -> Tensor:
        """Ξ [H, 16] in [0, 1], columns in the order of `PROTEINS`."""
        return torch.sigmoid(self.level)

    def effects(self) -> dict[str, Tensor]:
        """For each quantity in `EFFECTS` (a knob of `SynapticConfig`) a tensor [H]: the log of its factor, or the addition to it (`SHIFTS`).

        The sum over proteins of strength * (2 Ξ - 1): zero at birth, within +-LIMIT always.
        """
        surplus = dict(zip(PROTEINS, (2 * self.expression() - 1).unbind(-1), strict=True))
        found: dict[str, Tensor] = {}
        for effect in EFFECTS:
            part = effect.strength * surplus[effect.protein]
            found[effect.quantity] = found[effect.quantity] + part if effect.quantity in found else part
        return found


class Xi(nn.Module):
    """A vector `xi` [H, G] per head, 0 at birth, and a `decoder` [G, quantities] that all heads share. Equation (P23).

    names: the quantities, one column each. The decoder is born as waves over the quantities (a cosine basis), so that each component
    of a genome moves another combination of them: rows are orthogonal while G <= quantities, columns otherwise. Columns have a length
    of about one, so that quantities move about as fast as they would with a parameter of their own.
    """

    def __init__(self, heads: int, dim: int, names: Sequence[str]) -> None:
        super().__init__()
        assert heads > 0 and dim > 0 and names and len(set(names)) == len(names), (heads, dim, names)
        self.names = tuple(names)
        self.xi = nn.Parameter(torch.empty(heads, dim))
        self.decoder = nn.Parameter(torch.empty(dim, len(self.names)))
        if self.xi.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Genomes of zero and the cosine basis; they do not depend on a seed."""
        self.xi.zero_()
        dim, count = self.decoder.shape
        size = max(dim, count)
        row, column = torch.arange(dim, dtype=torch.float64)[:, None], torch.arange(count, dtype=torch.float64)
        waves = torch.cos(math.pi * row * (2 * column + 1) / (2 * size))  # type II cosine transform
        waves[0] *= math.sqrt(0.5)
        self.decoder.copy_(waves * math.sqrt(2 / dim))

    def offsets(self) -> dict[str, Tensor]:
        """What to add to the stored parameter of each quantity: tensors [H], by name."""
        return dict(zip(self.names, (self.xi @ self.decoder).unbind(-1), strict=True))


class ProteinRow(NamedTuple):
    """One line of the documentation's table of proteins."""

    protein: str
    quantity: str
    effect: str
    role: str
    source: str


def protein_table() -> list[ProteinRow]:
    """`EFFECTS` for the documentation (`registry.markdown_table`): the effect of full expression relative to half."""
    rows = []
    for effect in EFFECTS:
        factor = math.exp(abs(effect.strength))
        text = f"{effect.strength:+.2g}" if effect.quantity in SHIFTS else f"{'×' if effect.strength > 0 else '÷'} {factor:.2g}"
        rows.append(ProteinRow(effect.protein, effect.quantity, text, effect.role, effect.source))
    return rows
