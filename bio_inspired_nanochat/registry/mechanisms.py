"""What a synapse is made of: a record per mechanism."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bio_inspired_nanochat.config.mechanisms import EXPERT_MECHANISMS, LIFE_CYCLE
from bio_inspired_nanochat.config.synaptic import SynapticConfig

if TYPE_CHECKING:
    from torch import nn

    from bio_inspired_nanochat.config import GPTConfig


@dataclass(frozen=True)
class Mechanism:
    """One mechanism of a synapse.

    on, off: the SynapticConfig fields that switch it, with the value for on and for off (`on` may set more than the switch);
    source: where its equation comes from; knobs: the fields that matter only while it is on; needs: the mechanisms without which
    it does nothing; any_of: mechanisms of which it needs at least one, the first when none is asked for;
    experts: it acts in models with routed experts only; build: makes what it adds to a layer, for a mechanism of `registry.extra`.
    """

    name: str
    doc: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]
    source: str
    knobs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    experts: bool = False
    build: Callable[[GPTConfig], nn.Module] | None = None

    @cached_property
    def fields(self) -> frozenset[str]:
        """Every field that belongs to the mechanism: its switches and its knobs."""
        return frozenset(self.on) | frozenset(self.off) | frozenset(self.knobs)

    def is_set(self, config: SynapticConfig) -> bool:
        """Whether its own switch is on: a named choice must be its own, names must be among those given, others must differ from off."""
        for name, off in self.off.items():
            value = getattr(config, name)
            if value == off or (isinstance(off, str) and value != self.on[name]):
                return False
            if isinstance(off, tuple) and not set(self.on[name]) <= set(value):
                return False
        return True

    def is_on(self, config: SynapticConfig) -> bool:
        """Whether the mechanism acts in a config: its own switch and all that it needs are on."""
        return self.is_set(config) and self.is_served({name for name, mechanism in MECHANISMS.items() if mechanism.is_set(config)})

    def is_served(self, names: Collection[str]) -> bool:
        """Whether all that it needs, directly or not, is among `names`."""
        if self.any_of and not any(need in names and MECHANISMS[need].is_served(names) for need in self.any_of):
            return False
        return all(need in names and MECHANISMS[need].is_served(names) for need in self.needs)


FAST_RULES = ("fast_delta", "fast_hebb")

# Fields that no single mechanism owns: the time grid, a numerical floor, the names of mechanisms from elsewhere, and the life cycle,
# which is switched by a flag of training.
GENERAL: tuple[str, ...] = ("tick", "epsilon", "extra", *LIFE_CYCLE)

_ALL = (
    Mechanism(
        "presyn",
        "presynaptic terminals: calcium facilitates, vesicle depletion depresses, both bias the attention logits",
        on={"presyn": True},
        off={"presyn": False},
        source="short-term plasticity in rate form (Tsodyks & Markram 1997), integrated exactly over a tick",
        knobs=(
            "lambda_loge",
            "theta",
            "tau_c",
            "tau_rrp",
            "alpha_ca",
            "syt_fast_kd",
            "syt_gain",
            "release_bias",
            "release_rate",
        ),
    ),
    Mechanism(
        "drive_softplus",
        "calcium drive through softplus instead of the piecewise quadratic phi",
        on={"drive": "softplus"},
        off={"drive": "phi"},
        source="the drive of the pilot study; phi is its C1 form without a transcendental",
        needs=("presyn",),
    ),
    Mechanism(
        "slow_sensor",
        "a second calcium sensor of low affinity (Syt7) beside the fast one (Syt1)",
        on={"syt_mix": 0.7},
        off={"syt_mix": 1.0},
        source="Hill activation of order one for each sensor, mixed by w; Syt7 as the facilitation sensor (Jackman et al. 2016)",
        knobs=("syt_slow_kd",),
        needs=("presyn",),
    ),
    Mechanism(
        "bias_limit",
        "smooth limit of the synaptic bias, beta_max tanh(beta / beta_max)",
        on={"beta_max": 8.0},
        off={"beta_max": 0.0},
        source="own: keeps an adversarial drive from silencing a key for good",
        needs=("presyn",),
    ),
    Mechanism(
        "barrier_linear",
        "septin barrier as a learned slope on distance, per head",
        on={"barrier": "linear"},
        off={"barrier": "none"},
        source="linear attention bias (Press et al. 2022) with a learned slope, per token and never divided by the length",
        knobs=("barrier_strength",),
    ),
    Mechanism(
        "barrier_gated",
        "septin barrier as a forgetting gate, per head and token",
        on={"barrier": "gated"},
        off={"barrier": "none"},
        source="forgetting attention (Lin et al. 2025): the sum of -log f between key and query",
        knobs=("barrier_strength",),
    ),
    Mechanism(
        "tied_gains",
        "one learned gain for release, pool, priming and amplitude",
        on={"tied_gains": True},
        off={"tied_gains": False},
        source="the background's attention bias lambda log(eps + q n), with n = p R Q",
        needs=("presyn",),
    ),
    Mechanism(
        "buffer",
        "calcium buffer: slows and flattens calcium transients",
        on={"buffer": True},
        off={"buffer": False},
        source="calcium binding by parvalbumin and calmodulin, second-order binding integrated exactly",
        knobs=("tau_buf", "buf_kd"),
        needs=("presyn",),
    ),
    Mechanism(
        "doc2",
        "Doc2 sensor and an asynchronous release channel that residual calcium drives without a query",
        on={"doc2_gain": 0.3},
        off={"doc2_gain": 0.0},
        source="synchronous and asynchronous release as two channels (background, section 9; Yao et al. 2011)",
        knobs=("doc2_threshold", "async_rate"),
        needs=("presyn",),
    ),
    Mechanism(
        "complexin",
        "complexin clamp on the release probability",
        on={"complexin_bias": 1.0},
        off={"complexin_bias": 0.0},
        source="clamp term of the background's release probability (section 2.3)",
        needs=("presyn",),
    ),
    Mechanism(
        "clamp_dynamics",
        "the complexin clamp is lifted by calcium and returns with time",
        on={"clamp": True},
        off={"clamp": False},
        source="background, section 2.3: complexin is displaced when calcium binds synaptotagmin",
        knobs=("tau_clamp", "clamp_release"),
        needs=("complexin",),
    ),
    Mechanism(
        "priming",
        "SNARE priming by Munc13 and Munc18, recovery of used complexes by NSF",
        on={"priming": True},
        off={"priming": False},
        source="priming variable Q of the background (section 2.2), as a cycle free, primed, spent",
        knobs=("tau_prime", "tau_nsf", "prime_use", "priming_gain"),
        needs=("presyn",),
    ),
    Mechanism(
        "reserve",
        "finite reserve pool: docking empties it, recycling fills it, vesicles are conserved",
        on={"reserve": True},
        off={"reserve": False},
        source="docked, reserve and recycling pools of the background (section 2.4), synapsin and actin mobilisation",
        knobs=("reserve_size", "mobilisation", "tau_syn"),
        needs=("presyn",),
    ),
    Mechanism(
        "endocytosis",
        "released vesicles come back after a delay",
        on={"endo_delay": 24.0},
        off={"endo_delay": 0.0},
        source="endocytosis ring of the background (clathrin, AP-2, dynamin), with a recycling fraction",
        knobs=("rec_rate",),
        needs=("reserve",),
    ),
    Mechanism(
        "rab",
        "early and late endosome between endocytosis and refilling",
        on={"rab": True},
        off={"rab": False},
        source="Rab5 and Rab7 stages of the background (section 9)",
        knobs=("tau_rab5", "tau_rab7"),
        needs=("endocytosis",),
    ),
    Mechanism(
        "energy",
        "energy budget that release, pumping and priming spend and docking, refilling and priming need",
        on={"energy": True},
        off={"energy": False},
        source="energy balance of the background (section 2.5): VDAC supply, V-ATPase and release costs",
        knobs=("tau_energy", "energy_cost_rel", "energy_cost_pump", "energy_cost_prime"),
        needs=("presyn",),
    ),
    Mechanism(
        "quantal",
        "quantal amplitude that follows energy",
        on={"quantal": True},
        off={"quantal": False},
        source="quantal size of the background (section 2.6): filling of a vesicle by VGLUT and SV2",
        knobs=("quantal_slope",),
        needs=("energy",),
    ),
    Mechanism(
        "lateral",
        "septin lateral inhibition: a key is inhibited by the release of its older neighbours",
        on={"lateral_strength": 0.5},
        off={"lateral_strength": 0.0},
        source="septin rings limit cross-talk between neighbouring terminals (background, section 9)",
        knobs=("lateral_window",),
        needs=("presyn",),
    ),
    Mechanism(
        "stochastic",
        "a fraction of the release events is drawn at random in training",
        on={"stochastic_train_frac": 0.12},
        off={"stochastic_train_frac": 0.0},
        source="binomial release of the background, by a normal approximation, relaxed or straight-through samples",
        knobs=("stochastic_mode", "stochastic_tau", "stochastic_count_cap"),
        needs=("presyn",),
    ),
    Mechanism(
        "genome_xi",
        "kinetics decoded from a small learned vector per head",
        on={"genome": "xi"},
        off={"genome": "direct"},
        source="synaptic genome Xi of the background, with one decoder per layer",
        knobs=("xi_dim",),
        needs=("presyn",),
    ),
    Mechanism(
        "genome_proteins",
        "kinetics that follow from the learned levels of 16 named proteins per head",
        on={"genome": "proteins"},
        off={"genome": "direct"},
        source="protein table of the background (section 4)",
        needs=("presyn",),
    ),
    Mechanism(
        "aux_energy_loss",
        "auxiliary loss on terminals that run out of energy",
        on={"aux_energy": 0.1},
        off={"aux_energy": 0.0},
        source="L_energy of the background (section 8)",
        needs=("energy",),
    ),
    Mechanism(
        "aux_pool_loss",
        "auxiliary loss on depleted pools",
        on={"aux_pool": 0.1},
        off={"aux_pool": 0.0},
        source="L_pool of the background (section 8), on pools that run empty",
        needs=("presyn",),
    ),
    Mechanism(
        "fast_delta",
        "fast weights that a sequence writes by the delta rule: what is recalled wrongly is corrected",
        on={"hebb": "delta"},
        off={"hebb": "off"},
        source="the gated delta rule (Yang et al. 2025) as the eligibility trace of the postsynaptic density, read before it is written",
        knobs=("fast_layers", "rank_eligibility", "rho_elig", "hebb_rate"),
    ),
    Mechanism(
        "fast_hebb",
        "fast weights that a sequence writes by the Hebb rule: what is active together is added up",
        on={"hebb": "hebb"},
        off={"hebb": "off"},
        source="fast weights (Schmidhuber 1992; Ba et al. 2016) with one decay per mode, read before they are written",
        knobs=("fast_layers", "rank_eligibility", "hebb_rate"),
    ),
    Mechanism(
        "camkii",
        "CaMKII, which past activity raises, opens the gate through which fast weights are written",
        on={"camkii_gain": 1.5},
        off={"camkii_gain": 0.0},
        source="CaMKII of the background: a leaky integrator of postsynaptic calcium",
        knobs=("tau_camkii",),
        any_of=FAST_RULES,
    ),
    Mechanism(
        "camkii_latch",
        "CaMKII as a switch with two stable states: it holds after the calcium is gone, low calcium erases it through PP1",
        on={"camkii_latch": True},
        off={"camkii_latch": False},
        source="the CaMKII switch (Lisman 1985; Lisman & Zhabotinsky 2001) with Hill self-excitation",
        knobs=("tau_camkii", "camkii_half", "latch_gain", "tau_pp1", "pp1_half"),
        needs=("camkii",),
    ),
    Mechanism(
        "pp1",
        "the phosphatase PP1 closes the gate through which fast weights are written",
        on={"pp1_gain": 1.0},
        off={"pp1_gain": 0.0},
        source="PP1 of the background, the counterpart of CaMKII",
        knobs=("tau_pp1", "pp1_half"),
        any_of=FAST_RULES,
    ),
    Mechanism(
        "bdnf",
        "BDNF, a slow average of activity, raises the write strength",
        on={"bdnf_gamma": 1.0},
        off={"bdnf_gamma": 0.0},
        source="metaplasticity of the background: BDNF changes the rate of learning",
        knobs=("tau_bdnf",),
        any_of=FAST_RULES,
    ),
    Mechanism(
        "camkii_read",
        "CaMKII opens the gate through which fast weights are read",
        on={"camkii_read": 2.0},
        off={"camkii_read": 0.0},
        source="AMPA receptors that CaMKII inserts: a stronger answer of a potentiated synapse",
        knobs=("tau_camkii",),
        any_of=FAST_RULES,
    ),
    Mechanism(
        "psd95",
        "PSD-95 slots limit how strongly a mode of the fast weights can answer; CaMKII adds slots",
        on={"psd95_slots": 1.0},
        off={"psd95_slots": 0.0},
        source="receptor slots of the PSD-95 scaffold in the background",
        knobs=("tau_camkii",),
        any_of=FAST_RULES,
    ),
    Mechanism(
        "fast_init",
        "a new sequence starts from learned fast weights",
        on={"fast_init": True},
        off={"fast_init": False},
        source="learned initial state of recurrent networks",
        any_of=FAST_RULES,
    ),
)

MECHANISMS: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in _ALL}
MECHANISMS |= {record["name"]: Mechanism(**record, experts=True) for record in EXPERT_MECHANISMS}
