"""The conditions of the evaluation matrix and what is compared with what. Mechanisms come from the registry, so a new one joins by itself.

A condition is a set of fields of TrainConfig; conditions with equal fields are one, whatever names they go by. Each mechanism is
added to (or left out of) exactly what it needs, so that a comparison differs in that mechanism alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bio_inspired_nanochat.config import SynapticConfig, to_dict
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms, closure, config_with, config_without, owners

# Other forms of something that all-on already has: they exclude it or replace it, so they are added alone but are no part of all-on.
ALTERNATIVES = ("drive_softplus", "barrier_linear", "tied_gains", "genome_xi", "genome_proteins", "fast_hebb")
EXPERTS = {"num_experts": 8}
LIFE_CYCLES = 16  # of a run with a life cycle
AUTO = "auto"  # a period that the plan makes LIFE_CYCLES of
FRACTIONS = (0.12, 0.25, 0.5, 1.0)  # of random releases
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 1.0)
DROPOUT = 0.1
PAIR_OF = ("presyn", "barrier_gated", "fast_delta", "stochastic")
# The factors of the factorial set, over the default preset with fast weights: what turns each on.
FACTORS: dict[str, dict[str, Any]] = {
    "stochastic": dict(MECHANISMS["stochastic"].on),
    "bdnf": dict(MECHANISMS["bdnf"].on),
    "calcium_gate": dict(MECHANISMS["camkii_read"].on),
    "rates": {},
}


@dataclass(frozen=True)
class Condition:
    """One kind of model. changes: fields of TrainConfig as nested values; about: in words; match: a condition whose parameters or FLOPs
    it is given (`params:default`, `flops:all_on`), filled in by the plan for each depth."""

    name: str
    changes: Mapping[str, Any]
    about: str
    match: str = ""

    @property
    def key(self) -> str:
        """What makes it another condition than others."""
        return repr((_canonical(self.changes), self.match))


@dataclass(frozen=True)
class Comparison:
    """condition against reference within a set; `what` is the one thing that differs."""

    set: str
    condition: str
    reference: str
    what: str


@dataclass
class Matrix:
    """Conditions by name in the order of the plan, and comparisons between them. aliases: every name that was given to one, to its own."""

    conditions: dict[str, Condition] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def add(self, condition: Condition) -> str:
        """The name under which the condition stands: its own, or that of an equal one that is there already."""
        known = self._names.setdefault(condition.key, condition.name)
        if known == condition.name:
            other = self.conditions.setdefault(known, condition)
            assert other.key == condition.key, f"two conditions are called {known}"
        self.aliases[condition.name] = known
        return known

    def compare(self, set_name: str, condition: str, reference: str, what: str) -> None:
        """Note a comparison; one of a condition with itself is none."""
        found = Comparison(set_name, condition, reference, what)
        if condition != reference and found not in self.comparisons:
            self.comparisons.append(found)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((key, _canonical(one)) for key, one in value.items())
    return list(value) if isinstance(value, tuple) else value


def synaptic(config: SynapticConfig, **changes: Any) -> dict[str, Any]:
    """Fields of a synaptic model: those of its synapses that differ from the defaults, of experts only where there are any."""
    defaults, values = to_dict(SynapticConfig()), to_dict(config)
    idle = set() if changes.get("num_experts") else {name for name in values if _of_experts(name)}
    differing = {name: value for name, value in values.items() if value != defaults[name] and name not in idle}
    return {"synapses": True, "syn_cfg": differing, **changes}


def _of_experts(name: str) -> bool:
    found = owners(name)
    return bool(found) and all(MECHANISMS[owner].experts for owner in found)


def with_default(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The default preset with other values of some of its fields."""
    return synaptic(dataclasses.replace(SynapticConfig(), **values), **changes)


def dense_mechanisms() -> list[str]:
    """What all-on turns on in a model without experts."""
    return [name for name, mechanism in MECHANISMS.items() if name not in ALTERNATIVES and not mechanism.experts]


def all_mechanisms() -> list[str]:
    """What all-on turns on in a model with experts."""
    return [name for name in MECHANISMS if name not in ALTERNATIVES]


# --- shared conditions ----------------------------------------------------------------------------------------------------------------


def vanilla() -> Condition:
    """Plain attention and MLP."""
    return Condition("vanilla", {"synapses": False}, "vanilla")


def default() -> Condition:
    """The default preset."""
    return Condition("default", synaptic(SynapticConfig()), "the default preset: terminals and gated barrier")


def all_on() -> Condition:
    """Every mechanism that acts without experts and excludes no other."""
    return Condition("all_on", synaptic(config_with(*dense_mechanisms())), f"all {len(dense_mechanisms())} mechanisms without experts")


def plain_experts() -> Condition:
    """The fair baseline of experts."""
    return Condition("experts_plain", {"synapses": False, **EXPERTS}, "vanilla with plain routed experts")


def all_experts() -> Condition:
    """All-on with experts."""
    config = config_with(*all_mechanisms())
    return Condition("all_on_experts", synaptic(config, **EXPERTS), f"all {len(all_mechanisms())} mechanisms, with experts")


def only(names: Iterable[str]) -> Condition:
    """The named mechanisms and nothing else; vanilla, or plain experts, without any."""
    names = [name for name in MECHANISMS if name in set(names)]
    experts = any(MECHANISMS[name].experts for name in names)
    if not names:
        return vanilla()
    short = [name for name in names if closure(name) == closure(*names)]
    extra = EXPERTS if experts else {}
    return Condition(f"add:{(short or ['+'.join(names)])[0]}", synaptic(config_with(*names), **extra), " + ".join(names) + " alone")


# --- sets -----------------------------------------------------------------------------------------------------------------------------


def _anchors(matrix: Matrix, _: Options) -> None:
    plain, normal, everything = (matrix.add(one) for one in (vanilla(), default(), all_on()))
    off = matrix.add(Condition("synaptic_off", synaptic(SynapticConfig.preset("off")), "a synaptic model with every mechanism off"))
    matrix.compare("anchors", normal, plain, "the default preset")
    matrix.compare("anchors", everything, plain, "all mechanisms")
    matrix.compare("anchors", everything, normal, "all mechanisms beyond the default")
    matrix.compare("anchors", off, plain, "nothing: a check of the comparison itself")
    for of in (normal, everything):
        params = matrix.add(Condition(f"vanilla_params_{of}", {"synapses": False}, f"vanilla with the parameters of {of}", f"params:{of}"))
        flops = matrix.add(Condition(f"vanilla_flops_{of}", {"synapses": False}, f"vanilla with the training FLOPs of {of}", f"flops:{of}"))
        matrix.compare("anchors", of, params, "synapses at equal parameters")
        matrix.compare("anchors", of, flops, "synapses at equal training FLOPs")


def _baselines(matrix: Matrix, _: Options) -> None:
    plain, normal = matrix.add(vanilla()), matrix.add(default())
    gate = matrix.add(only(["barrier_gated"]))  # the forgetting transformer
    slope = matrix.add(only(["barrier_linear"]))  # linear attention biases, their slopes scaled by a learned factor per head
    drop = matrix.add(Condition("vanilla_dropout", {"synapses": False, "dropout": DROPOUT}, f"vanilla with dropout {DROPOUT}"))
    both = matrix.add(Condition("default_dropout", synaptic(SynapticConfig(), dropout=DROPOUT), f"the default with dropout {DROPOUT}"))
    for baseline, what in ((gate, "forgetting gate"), (slope, "slope on distance"), (drop, "dropout")):
        matrix.compare("baselines", baseline, plain, f"{what} against vanilla")
        matrix.compare("baselines", normal, baseline, f"the default against {what}")
    matrix.compare("baselines", both, normal, "dropout in the default")
    matrix.compare("baselines", matrix.add(all_on()), both, "all mechanisms against the default with dropout")


def _add_one(matrix: Matrix, options: Options) -> None:
    for name in options.chosen():
        needed = [other for other in closure(name) if other != name]
        base = only(needed) if needed or not MECHANISMS[name].experts else plain_experts()
        matrix.compare("add_one", matrix.add(only(closure(name))), matrix.add(base), name)


def _leave_one(matrix: Matrix, options: Options) -> None:
    for name in options.chosen():
        if name in ALTERNATIVES:
            continue
        full = all_experts() if MECHANISMS[name].experts else all_on()
        names = all_mechanisms() if MECHANISMS[name].experts else dense_mechanisms()
        without = config_without(config_with(*names), name)
        extra = EXPERTS if MECHANISMS[name].experts else {}
        left = matrix.add(Condition(f"without:{name}", synaptic(without, **extra), f"{full.name} without {name}"))
        matrix.compare("leave_one", matrix.add(full), left, name)


def _beside_default(matrix: Matrix, options: Options) -> None:
    """What a choice of other defaults needs to know."""
    for name in options.chosen():
        needed = [other for other in closure(name) if other != name]
        if name not in active_mechanisms(SynapticConfig()):
            matrix.compare("beside_default", matrix.add(_default_and(*needed, name)), matrix.add(_default_and(*needed, experts=name)), name)
            continue
        full = _default_and(experts=name)
        extra = EXPERTS if MECHANISMS[name].experts else {}
        without = synaptic(config_without(SynapticConfig(), name), **extra)
        left = matrix.add(Condition(f"{full.name}-{name}", without, f"{full.about}, without {name}"))
        matrix.compare("beside_default", matrix.add(full), left, name)


def _default_and(*names: str, experts: str = "") -> Condition:
    """The default and more mechanisms, some of them in the place of others; with experts where one of these or `experts` has any."""
    usual = active_mechanisms(SynapticConfig())
    more = [name for name in MECHANISMS if name in names and name not in usual]
    colony = any(MECHANISMS[name].experts for name in (*more, *filter(None, [experts])))
    values = {field: value for name in more for field, value in MECHANISMS[name].on.items()}
    for name in active_mechanisms(dataclasses.replace(SynapticConfig(), **values)):
        if name not in (*usual, *more):  # one that waits in the default for what it needs
            values |= MECHANISMS[name].off
    base = Condition("default_experts", with_default({}, **EXPERTS), "the default with routed experts") if colony else default()
    if not more:
        return base
    short = [name for name in more if set(more) <= {*closure(name), *usual}]
    about = f"{base.about}, and {', '.join(more)}"
    return Condition(f"{base.name}+{(short or ['+'.join(more)])[0]}", with_default(values, **(EXPERTS if colony else {})), about)


def _pairs(matrix: Matrix, options: Options) -> None:
    for one, other in itertools.combinations(options.pair_of, 2):
        try:
            together = only(closure(one, other))
            config_with(one, other)
        except UserError:  # two forms of one thing
            continue
        pair = matrix.add(together)
        for single, added in ((one, other), (other, one)):
            matrix.compare("pairs", pair, matrix.add(only(closure(single))), f"{added} beside {single}")


def _factorial(matrix: Matrix, _: Options) -> None:
    base = {"hebb": "delta"}
    names: dict[tuple[str, ...], str] = {}
    for count in range(len(FACTORS) + 1):
        for on in itertools.combinations(FACTORS, count):
            values = dict(base)
            for factor in on:
                values |= FACTORS[factor]
            # one rate for all matrices, where the default gives those around fast weights a rate of their own
            rates = {} if "rates" in on else {"optim": {"fast_lr": OptimConfig().matrix_lr}}
            about = "the default with fast weights" + "".join(f" + {factor}" for factor in on)
            names[on] = matrix.add(Condition("factorial:" + ("+".join(on) or "none"), with_default(values, **rates), about))
            for factor in on:
                rest = tuple(other for other in on if other != factor)
                matrix.compare("factorial", names[on], names[rest], f"{factor} beside {'+'.join(rest) or 'none'}")


def _cumulative(matrix: Matrix, _: Options) -> None:
    done: list[str] = []
    last = matrix.add(vanilla())
    for name in dense_mechanisms():
        done = closure(*done, name)
        step = only(done)
        full = set(done) == set(dense_mechanisms())
        condition = (
            all_on() if full else Condition(f"cumulative:{len(done):02d}_{name}", step.changes, f"{len(done)} mechanisms, up to {name}")
        )
        now = matrix.add(condition)
        matrix.compare("cumulative", now, last, f"{name} as number {len(done)}")
        last = now


def _predictions(matrix: Matrix, _: Options) -> None:
    """What the scorecard needs beyond the other sets."""
    normal = matrix.add(default())
    for fraction in FRACTIONS:
        config = with_default({"stochastic_train_frac": fraction})
        name = matrix.add(Condition(f"release:{round(100 * fraction)}", config, f"the default with {fraction:.0%} of releases at random"))
        matrix.compare("predictions", name, normal, f"{fraction:.0%} of releases at random")
        if fraction > FRACTIONS[0]:
            first = matrix.aliases[f"release:{round(100 * FRACTIONS[0])}"]
            matrix.compare("predictions", name, first, f"{FRACTIONS[0]:.0%} to {fraction:.0%} of releases at random")
    for value in TEMPERATURES:
        config = {"stochastic_train_frac": FRACTIONS[0], "stochastic_mode": "gumbel_sigmoid_ste", "stochastic_tau": value}
        about = f"the default with {FRACTIONS[0]:.0%} relaxed releases at temperature {value}"
        name = matrix.add(Condition(f"temperature:{value}", with_default(config), about))
        matrix.compare("predictions", name, normal, f"relaxed release at temperature {value}")
    fast = {"hebb": "delta"}
    memory = matrix.add(Condition("default_fast", with_default(fast), "the default with fast weights"))
    matrix.compare("predictions", memory, normal, "fast weights")
    read = matrix.add(
        Condition("default_fast_gate", with_default({**fast, **MECHANISMS["camkii_read"].on}), "the same read through the calcium gate")
    )
    matrix.compare("predictions", read, memory, "calcium gate of fast weights")
    raised = matrix.add(Condition("default_fast_bdnf", with_default({**fast, **MECHANISMS["bdnf"].on}), "the same with BDNF"))
    matrix.compare("predictions", raised, memory, "BDNF")
    static = matrix.add(Condition("experts_static", with_default(fast, **EXPERTS), "fast weights and experts, no life cycle"))
    bdnf = matrix.add(Condition("experts_bdnf", with_default({**fast, **MECHANISMS["bdnf"].on}, **EXPERTS), "the same with BDNF"))
    alive = matrix.add(Condition("experts_life", with_default(fast, **EXPERTS, splitmerge_every=AUTO), "the same with a life cycle"))
    matrix.compare("predictions", bdnf, static, "BDNF beside experts")
    matrix.compare("predictions", alive, static, "life cycle of experts")
    matrix.compare("predictions", matrix.add(all_on()), matrix.add(vanilla()), "all mechanisms")


@dataclass(frozen=True)
class Options:
    """mechanisms: for add_one, leave_one and beside_default, empty for all; pair_of: for pairs."""

    mechanisms: tuple[str, ...] = ()
    pair_of: tuple[str, ...] = PAIR_OF

    def __post_init__(self) -> None:
        for name in (*self.mechanisms, *self.pair_of):
            if name not in MECHANISMS:
                raise UserError(f"mechanism={name!r} is not valid: one of {', '.join(MECHANISMS)}{nearest(name, MECHANISMS)}")

    def chosen(self) -> list[str]:
        """Mechanisms in the order of the registry."""
        return [name for name in MECHANISMS if not self.mechanisms or name in self.mechanisms]


SETS: dict[str, Callable[[Matrix, Options], None]] = {
    "anchors": _anchors,
    "baselines": _baselines,
    "add_one": _add_one,
    "leave_one": _leave_one,
    "beside_default": _beside_default,
    "pairs": _pairs,
    "factorial": _factorial,
    "cumulative": _cumulative,
    "predictions": _predictions,
}


def build_matrix(sets: Sequence[str], options: Options | None = None) -> Matrix:
    """The conditions and comparisons of the named sets. Raises UserError for unknown names."""
    matrix = Matrix()
    for name in sets:
        if name not in SETS:
            raise UserError(f"sets={name!r} is not valid: one of {', '.join(SETS)}{nearest(name, SETS)}")
    for name, fill in SETS.items():
        if name in sets:
            fill(matrix, options or Options())
    return matrix


def subset(matrix: Matrix, names: Sequence[str]) -> Matrix:
    """The named conditions, what they are matched to, and the comparisons between them. Raises UserError for an unknown name."""
    for name in names:
        if name not in matrix.aliases:
            known = ", ".join(matrix.aliases)
            raise UserError(f"conditions={name!r} is not part of the chosen sets: one of {known}{nearest(name, matrix.aliases)}")
    found = Matrix()
    names = [matrix.aliases[name] for name in names]
    wanted = {*names} | {matrix.conditions[name].match.partition(":")[2] for name in names}
    for name, condition in matrix.conditions.items():
        if name in wanted:
            found.add(condition)
    for one in matrix.comparisons:
        if {one.condition, one.reference} <= wanted:
            found.comparisons.append(one)
    found.aliases |= {alias: name for alias, name in matrix.aliases.items() if name in wanted}
    return found
