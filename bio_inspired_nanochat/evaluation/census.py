"""The parameter census: how much each knob of a synapse changes what a small trained model computes.

A knob is moved over its bounds on a model that was trained with the mechanism of the knob on. Its liveness is the largest
relative change ‖Δ‖ / ‖reference‖ that this makes: of the logits; for the birth value of a learned quantity, of the logits with all
synapses at birth; for a knob of training alone, of the loss or of the gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, knobs_of
from bio_inspired_nanochat.config.knobs import kinds_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.registry import BETWEEN_STEPS, MECHANISMS, active_mechanisms, closure, config_with, knob_table, owners
from bio_inspired_nanochat.tasks.phrases import VOCAB, batch, objective, train

LEAST_CHANGE = 1e-3
STEPS = 200
MORE_STEPS = 6  # for a value whose parameters are new: what it does may show only once they are learned
PROBE = 9999  # the step whose batch is measured on; training never comes to it
SIZES = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
EXPERTS = {"num_experts": 4, "expert_ratio": 1}  # in every model, so that the mechanisms of experts have something to act on
TICK = 4  # so that a text of 64 tokens has many
# Constants under which such a text drains pools and energy and sees what was released come back.
SMALL: Mapping[str, Any] = {
    "release_rate": 0.3,
    "tau_rrp": 24.0,
    "lambda_loge": 0.5,
    "reserve_size": 0.3,
    "endo_delay": 8.0,
    "rec_rate": 0.2,
    "tau_rab5": 2.0,
    "tau_rab7": 4.0,
    "tau_syn": 4.0,
    "energy_cost_rel": 0.2,
    "stochastic_train_frac": 0.5,
    "tau_camkii": 12.0,
    "tau_pp1": 8.0,
    "pp1_gain": 8.0,
    "tau_bdnf": 24.0,
    "camkii_half": 0.2,
}
ASIDE = ("tied_gains",)  # takes the gains of the others away
SHARED_SOURCE = "the time grid and the numerics that all mechanisms share"
# The background's user-facing names, which keep their meaning here, and what a higher value does.
USER_NAMES: Mapping[str, str] = {
    "tau_c": "a terminal stays excited for longer after use",
    "tau_rrp": "recovery from fatigue takes longer: what was read often is read less",
    "alpha_ca": "attention scores excite a terminal more easily",
    "syt_fast_kd": "more calcium is needed before release",
    "stochastic_train_frac": "more of the release events are random in training",
    "stochastic_mode": "how random release is sampled",
    "stochastic_tau": "softer samples of gumbel_sigmoid_ste",
    "stochastic_count_cap": "more vesicles per event: less noise",
    "tau_buf": "the buffer holds calcium for longer: slower calcium",
    "tau_prime": "a used release site stays unready for longer",
    "endo_delay": "vesicles come back later",
    "energy_cost_rel": "each release costs more energy",
    "complexin_bias": "a stronger clamp: less release",
    "rank_eligibility": "fast weights with more modes, which hold more associations",
    "rho_elig": "fast weights fade more slowly",
    "camkii_gain": "past activity opens the write gate of fast weights further",
    "pp1_gain": "moderate activity closes the write gate of fast weights further",
    "bdnf_gamma": "a sequence with much activity writes more strongly",
    "lambda_loge": "the release probability weighs more in the attention logits",
    "barrier_strength": "distant keys count less",
}


# What acts between training steps alone, and what has no values until a file brings some.
UNMEASURED = (*BETWEEN_STEPS, "extra")


@dataclass(frozen=True)
class Liveness:
    """One measurement. change: largest relative change; value: where it was reached; how: of what; mechanisms: on in the model.

    under: a choice that had to be made for the knob to act. A value for which the model gives NaN or infinity makes `change` NaN;
    `how` is "nothing" when the config refuses every value.
    """

    name: str
    change: float
    value: Any
    how: str
    mechanisms: tuple[str, ...]
    under: tuple[tuple[str, str], ...] = ()

    @property
    def fault(self) -> str:
        """What is wrong with the knob; empty for a live one."""
        if math.isnan(self.change):
            return f"is not finite at {self.name}={self.value}"
        if self.how == "nothing":
            return "has no other value that the configuration accepts"
        return "" if self.change >= LEAST_CHANGE else f"changes nothing (largest relative change {self.change:.1e})"


class CensusRow(NamedTuple):
    """One line of the census, all text."""

    name: str
    default: str
    bounds: str
    unit: str
    liveness: str
    analogue: str
    meaning: str
    source: str


def small_config(mechanisms: Sequence[str]) -> SynapticConfig:
    """The config of a small model with these mechanisms on: short ticks, and `SMALL` wherever it belongs to one of them."""
    on = set(closure(*mechanisms))
    return config_with(*mechanisms, tick=TICK, **{name: value for name, value in SMALL.items() if on.intersection(owners(name))})


def together(names: Iterable[str]) -> tuple[str, ...]:
    """As many of the named mechanisms as can be on at once, the earlier preferred, and those that they need."""
    chosen: list[str] = []
    for name in names:
        try:
            small_config([*chosen, name])
        except UserError:
            continue
        chosen.append(name)
    return tuple(closure(*chosen))


def plan() -> dict[str, tuple[str, ...]]:
    """For every knob the mechanisms of the model that it is measured on: as few models as can be. What acts between training steps
    alone is left to the tests of the life cycle.

    Everything is on in the first, except for what takes the place of something else; the switch of that is moved there. Its
    own knobs get further models.
    """
    models: dict[str, tuple[str, ...]] = {}
    default = SynapticConfig()
    wanted = [*active_mechanisms(default), *(name for name in MECHANISMS if name not in ASIDE and not _replaces(name, default))]
    left = [name for name in knobs_of(SynapticConfig) if name not in UNMEASURED]
    while left:
        model = together(wanted)
        covered = [name for name in left if not owners(name) or any(_acts(name, owner, model) for owner in owners(name))]
        assert covered, f"no model has the mechanism of {left[0]}"
        models |= dict.fromkeys(covered, model)
        left = [name for name in left if name not in models]
        wanted = [owner for name in left for owner in owners(name)]
    return models


def _replaces(mechanism: str, default: SynapticConfig) -> bool:
    """Whether a mechanism, or one that it needs, is another choice than the default's, rather than an addition."""
    switches = [item for name in closure(mechanism) for item in MECHANISMS[name].on.items()]
    return any(isinstance(value, str) and value != getattr(default, field) for field, value in switches)


def _acts(name: str, owner: str, model: Collection[str]) -> bool:
    """Whether a knob of the mechanism `owner` does something in a model, be it to switch the mechanism on."""
    return owner in model or (name in MECHANISMS[owner].off and MECHANISMS[owner].is_served(model))


def points(name: str, current: Any) -> list[Any]:
    """Values of a knob other than the current one: every choice, or up to five numbers from bound to bound.

    A knob that takes several choices is given each alone, and all.
    """
    record, kind = knobs_of(SynapticConfig)[name], kinds_of(SynapticConfig)[name]
    if kind.base is bool:
        values: list[Any] = [False, True]
    elif record.choices is not None:
        values = [*((choice,) for choice in record.choices), record.choices] if kind.many else list(record.choices)
    else:
        assert record.lo is not None and record.hi is not None, f"{name} has no bounds to move within"
        low, high = float(record.lo), float(record.hi)
        if record.log or (kind.base is int and high > 64 * max(low, 1)):
            base = max(low, 1.0) if kind.base is int else low
            values = [low, *(base * (high / base) ** share for share in (0, 0.25, 0.5, 0.75)), high]
        else:
            values = [low + (high - low) * share for share in (0, 0.02, 0.25, 0.5, 1)]
        values = list(dict.fromkeys(kind.base(round(value) if kind.base is int else value) for value in values))
    return [value for value in [*values, *([None] if kind.optional else [])] if value != current]


def build(config: SynapticConfig, device: torch.device | str = "cpu") -> GPT:
    """A small synaptic model at birth, in evaluation mode."""
    return GPT(GPTConfig(**SIZES, **EXPERTS, synapses=True, syn_cfg=config)).to(device).eval()


class Census:
    """Measures knobs; trains each model once, when it is first needed.

    steps: of training per model; on_step(mechanisms, step, loss) is called after each.
    """

    def __init__(
        self,
        steps: int = STEPS,
        device: torch.device | str = "cpu",
        on_step: Callable[[tuple[str, ...], int, float], None] | None = None,
    ) -> None:
        self.steps, self.device, self.on_step = steps, device, on_step
        self.plan = plan()
        self.models: dict[tuple[str, ...], GPT] = {}
        self.losses: dict[tuple[str, ...], list[float]] = {}
        self._references: dict[tuple[object, ...], Any] = {}  # what unmoved models compute; most knobs ask for the same

    def model(self, mechanisms: tuple[str, ...]) -> GPT:
        """The trained model with these mechanisms on, in evaluation mode."""
        if mechanisms not in self.models:
            model = build(small_config(mechanisms), self.device).train()
            tell = self.on_step
            self.losses[mechanisms] = train(model, self.steps, None if tell is None else lambda step, loss: tell(mechanisms, step, loss))
            self.models[mechanisms] = model.eval()
        return self.models[mechanisms]

    def needed(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """The models that the named knobs are measured on."""
        return list(dict.fromkeys(model for name, model in self.plan.items() if name in names))

    def measure(self, name: str) -> Liveness:
        """The liveness of one knob.

        Where it shows nothing, other choices of its mechanism are tried (a temperature acts in one sampler only), and then its
        mechanism alone, because with everything on one part may hide another.
        """
        best, alone = None, tuple(closure(*owners(name)[:1]))
        for mechanisms in dict.fromkeys([self.plan[name], alone or self.plan[name]]):
            for under in [(), *_choices_beside(name, self.model(mechanisms).config.syn_cfg)]:
                found = self._on(name, mechanisms, under)
                if not found.fault or math.isnan(found.change):
                    return found
                best = found if best is None or found.change > best.change else best
        assert best is not None
        return best

    def _on(self, name: str, mechanisms: tuple[str, ...], under: tuple[tuple[str, str], ...]) -> Liveness:
        """The liveness of a knob on one model. Values with parameters of their own are trained on when nothing showed at once."""
        changes: dict[str, Any] = dict(under)
        config = dataclasses.replace(self.model(mechanisms).config.syn_cfg, **changes)
        best, values = Liveness(name, 0.0, None, "nothing", mechanisms, under), points(name, getattr(config, name))
        for steps in (0, MORE_STEPS):
            for value in values:
                try:
                    moved = dataclasses.replace(config, **{name: value})
                    change, how = self._change(name, mechanisms, config, moved, steps)
                except UserError:
                    continue  # a value that does not go with the others, or with the size of the model
                except FloatingPointError:
                    change, how = math.nan, "logits"
                if not math.isfinite(change):
                    return Liveness(name, math.nan, value, how, mechanisms, under)
                if best.how == "nothing" or change > best.change:
                    best = Liveness(name, change, value, how, mechanisms, under)
                if steps and not best.fault:
                    break
            if best.how != "logits" or not best.fault:
                break
        return best

    def _change(
        self, name: str, mechanisms: tuple[str, ...], config: SynapticConfig, moved_config: SynapticConfig, steps: int = 0
    ) -> tuple[float, str]:
        """Relative change of a model between `config` and `moved_config`, both with the trained weights, and of what.

        steps: of training for both when the moved one has parameters of its own; else nothing is measured.
        """
        record = knobs_of(SynapticConfig)[name]
        weights = dict(self.model(mechanisms).named_parameters())
        if record.at_birth:
            weights = {key: value for key, value in weights.items() if ".synapse." not in key}
        moved = build(moved_config, self.device)
        shared = _load(moved, weights)
        new = len(shared) < len(list(moved.parameters()))
        if steps and not new:
            return 0.0, "logits"
        # Where the moved model has parameters of its own, both start them at birth: training is not what is measured.
        start = shared if new else weights
        measure: Callable[[GPT], Any] = _training_outcome if record.training_only else _logits
        key = (mechanisms, config, frozenset(start), measure, steps)
        if key not in self._references:
            reference = build(config, self.device)
            _load(reference, start)
            self._references[key] = measure(_trained(reference, steps))
        outcome, unmoved = measure(_trained(moved, steps)), self._references[key]
        if record.training_only:
            return _training_change(outcome, unmoved), "loss or gradient"
        return _relative(outcome, unmoved), "logits at birth" if record.at_birth else f"logits after {steps} steps" if steps else "logits"


def _trained(model: GPT, steps: int) -> GPT:
    if steps:
        train(model.train(), steps)
    return model.eval()


@torch.no_grad()
def _logits(model: GPT) -> Tensor:
    """Logits [B, T, V] of the probe."""
    return model(batch(PROBE)[0].to(model.embed.weight.device))


def _training_outcome(model: GPT) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of the probe and its gradient by parameter."""
    loss = objective(model.train(), PROBE)
    loss.backward()
    return loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def _training_change(moved: tuple[Tensor, dict[str, Tensor]], unmoved: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Relative change of the loss or of the gradient of what both have, whichever is larger."""
    (loss, gradient), (reference_loss, reference) = moved, unmoved
    shared = [name for name, value in gradient.items() if name in reference and reference[name].shape == value.shape]
    both = [torch.cat([of[name].flatten() for name in shared]) for of in (gradient, reference)]
    changes = (_relative(loss, reference_loss), _relative(*both))
    return math.nan if any(map(math.isnan, changes)) else max(changes)


def _choices_beside(name: str, config: SynapticConfig) -> list[tuple[tuple[str, str], ...]]:
    """Settings of the named choices that belong to the same mechanisms as a knob and are not taken in `config`."""
    records, kinds = knobs_of(SynapticConfig), kinds_of(SynapticConfig)
    fields = dict.fromkeys(f for owner in owners(name) for f in MECHANISMS[owner].knobs if f != name and not kinds[f].many)
    return [((field, choice),) for field in fields for choice in records[field].choices or () if choice != getattr(config, field)]


def _relative(moved: Tensor, reference: Tensor) -> float:
    return ((moved - reference).norm() / reference.norm()).item()


@torch.no_grad()
def _load(model: GPT, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the weights that the model has in the same shape; returns those."""
    own = dict(model.named_parameters())
    shared = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    for name, value in shared.items():
        own[name].copy_(value)
    return shared


def census_rows(found: Sequence[Liveness]) -> list[CensusRow]:
    """The census as a table, a row per measured knob."""
    records, described = knobs_of(SynapticConfig), {row.name: row for row in knob_table(SynapticConfig)}
    return [
        CensusRow(
            row.name,
            row.default,
            row.bounds,
            row.unit,
            format(one.change, ".2g"),
            records[one.name].analogue,
            row.meaning,
            source_of(one.name),
        )
        for one in found
        for row in (described[one.name],)
    ]


def source_of(name: str) -> str:
    """Where a knob comes from: its own source, else that of the mechanism that owns it, one of the default before others."""
    default = set(active_mechanisms(SynapticConfig()))
    mechanisms = sorted(owners(name), key=lambda owner: owner not in default)
    return knobs_of(SynapticConfig)[name].source or (MECHANISMS[mechanisms[0]].source if mechanisms else SHARED_SOURCE)
