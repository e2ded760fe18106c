"""The list of synaptic mechanisms: contract tests, parameter census, ablation study and the README's tables all read it from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bio_inspired_nanochat.config.knobs import REQUIRED, Knob, format_number, kinds_of, knobs_of
from bio_inspired_nanochat.config.synaptic import SynapticConfig
from bio_inspired_nanochat.errors import UserError, nearest


@dataclass(frozen=True)
class Mechanism:
    """One mechanism of a synapse.

    on, off: the SynapticConfig fields that switch it, with the value for on and for off (`on` may set more than the switch);
    source: where its equation comes from; knobs: the fields that matter only while it is on; needs: the mechanisms without which
    it does nothing.
    """

    name: str
    doc: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]
    source: str
    knobs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """Every field that belongs to the mechanism: its switches and its knobs."""
        return frozenset(self.on) | frozenset(self.off) | frozenset(self.knobs)

    def is_set(self, config: SynapticConfig) -> bool:
        """Whether its own switch is on: a named choice must be its own, a number or switch must differ from off."""
        for name, off in self.off.items():
            value = getattr(config, name)
            if value == off or (isinstance(off, str) and value != self.on[name]):
                return False
        return True

    def is_on(self, config: SynapticConfig) -> bool:
        """Whether the mechanism acts in a config: its own switch and all that it needs are on."""
        return self.is_set(config) and all(MECHANISMS[need].is_on(config) for need in self.needs)


# Fields that no single mechanism owns: the time grid and a numerical floor.
GENERAL: tuple[str, ...] = ("tick", "epsilon")

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
)

MECHANISMS: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in _ALL}


def closure(*names: str) -> list[str]:
    """The named mechanisms and everything that they need, in the order of `MECHANISMS`. Raises UserError for an unknown name."""
    wanted: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in MECHANISMS:
            raise UserError(f"mechanism={name!r} is not valid: one of {', '.join(MECHANISMS)}{nearest(name, MECHANISMS)}")
        if name not in wanted:
            wanted.add(name)
            queue += MECHANISMS[name].needs
    return [name for name in MECHANISMS if name in wanted]


def config_with(*names: str, **overrides: Any) -> SynapticConfig:
    """A config with only the named mechanisms on (and those that they need), all others off, and `overrides` on top.

    Raises UserError for an unknown name and for two that exclude each other.
    """
    values: dict[str, Any] = {}
    for mechanism in MECHANISMS.values():
        values |= mechanism.off
    setter: dict[str, str] = {}
    for name in closure(*names):
        for field, value in MECHANISMS[name].on.items():
            other = setter.setdefault(field, name)
            if MECHANISMS[other].on[field] != value:
                raise UserError(f"mechanisms {other} and {name} exclude each other: both set {field}")
            values[field] = value
    return dataclasses.replace(SynapticConfig(), **(values | overrides))


def config_without(config: SynapticConfig, name: str) -> SynapticConfig:
    """The ablation of one mechanism: `config` with its off values. Raises UserError for an unknown name."""
    closure(name)
    return dataclasses.replace(config, **MECHANISMS[name].off)


def active_mechanisms(config: SynapticConfig) -> list[str]:
    """Names of the mechanisms that act in a config, in the order of `MECHANISMS`."""
    return [name for name, mechanism in MECHANISMS.items() if mechanism.is_on(config)]


def owners(field: str) -> list[str]:
    """Names of the mechanisms that a SynapticConfig field belongs to; empty for a general field."""
    return [name for name, mechanism in MECHANISMS.items() if field in mechanism.fields]


def inert_fields(config: SynapticConfig, given: Collection[str]) -> list[str]:
    """One line for every given field that does nothing because all its mechanisms are off: which ones, and the flags that help.

    given: dotted names as of `parse_with_given`; those that do not begin with `syn_cfg.` are passed over, and so is a field that
    switches its mechanism off.
    """
    lines = []
    for field in (f.name for f in dataclasses.fields(config)):
        names = owners(field)
        if f"syn_cfg.{field}" not in given or not names or any(MECHANISMS[name].is_on(config) for name in names):
            continue
        if any(MECHANISMS[name].off.get(field, REQUIRED) == getattr(config, field) for name in names):
            continue
        ways = [[MECHANISMS[need] for need in closure(name) if not MECHANISMS[need].is_set(config)] for name in names]
        ways = [way for way in ways if len(way) == min(map(len, ways))]  # two choices of one switch serve alike
        missing = list(dict.fromkeys(mechanism.name for way in ways for mechanism in way))
        flags = [" ".join(f"--syn_cfg.{name}={_default(m.on[name], Knob(''))}" for m in way for name in m.off) for way in ways]
        are = f"{missing[0]} is" if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]} are"
        lines.append(f"--syn_cfg.{field} has no effect while {are} off: add {' or '.join(flags)}")
    return lines


class KnobRow(NamedTuple):
    """One line of a knob table, all text."""

    name: str
    default: str
    bounds: str
    unit: str
    meaning: str
    analogue: str


def knob_table(cls: type, prefix: str = "") -> list[KnobRow]:
    """A row for every field of a config class, nested configs included under their dotted names."""
    rows: list[KnobRow] = []
    records, kinds = knobs_of(cls), kinds_of(cls)
    for field in dataclasses.fields(cls):
        record = records[field.name]
        if kinds[field.name].nested:
            rows += knob_table(kinds[field.name].base, f"{prefix}{field.name}.")
            continue
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        bounds = "0 or 1" if kinds[field.name].base is bool else record.bounds()
        rows.append(KnobRow(prefix + field.name, _default(made, record), bounds, record.unit, record.doc, record.analogue))
    return rows


def _default(value: Any, record: Knob) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return record.none
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return format_number(value) if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Sequence[str]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table that ends with a newline. Without `columns` the rows must be named tuples, whose fields head it."""
    if columns is None:
        assert rows and hasattr(rows[0], "_fields"), "columns are missing"
        columns = rows[0]._fields  # type: ignore[attr-defined]
    lines = [list(columns), ["---"] * len(columns), *([_escape(str(cell)) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
