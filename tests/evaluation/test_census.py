"""The census: what is moved and measured, that a dead knob is found, and what the script says."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig, knob, knobs_of
from bio_inspired_nanochat.evaluation import census
from bio_inspired_nanochat.evaluation.census import LEAST_CHANGE, UNMEASURED, USER_NAMES, Census, points
from bio_inspired_nanochat.registry import MECHANISMS, Mechanism, owners
from scripts import param_census

KNOBS = {name: knob for name, knob in knobs_of(SynapticConfig).items() if name not in UNMEASURED}
STEPS = 12


@pytest.fixture(scope="module")
def trained() -> Census:
    """A census whose models have had a few steps only."""
    made = Census(STEPS)
    made.model(made.plan["theta"])
    return made


def _replaced(monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    """Another Knob record for one field, in this test."""
    made = KNOBS | {name: dataclasses.replace(KNOBS[name], **changes)}
    monkeypatch.setattr(census, "knobs_of", lambda _: made)


def _forget(monkeypatch: pytest.MonkeyPatch, trained: Census) -> None:
    """Let the census compute everything anew, in this test."""
    monkeypatch.setattr(trained, "_references", {})


def _blind_to(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Models that do not look at one knob."""
    build, default = census.build, getattr(SynapticConfig(), name)
    monkeypatch.setattr(census, "build", lambda config, device="cpu": build(dataclasses.replace(config, **{name: default}), device))


# --- what is moved -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_moves_to_both_bounds_and_never_stays(name: str) -> None:
    record, current = KNOBS[name], getattr(SynapticConfig(), name)
    values = points(name, current)
    assert values and current not in values and len(set(map(repr, values))) == len(values)
    for value in values:
        assert type(value) is type(current)
        assert record.choices is None or set(value if isinstance(value, tuple) else (value,)) <= set(record.choices)
    if record.choices is None and not isinstance(current, bool):
        assert {record.lo, record.hi} <= {*values, current}
        assert min(values) >= record.lo and max(values) <= record.hi


def test_numbers_are_spread_on_their_own_scale() -> None:
    assert points("tau_c", 48.0) == [1.0, 8.0, 64.0, 512.0, 4096.0]
    assert points("theta", 1.0)[-2:] == [0.25, 2.5]
    assert points("tick", 4) == [1, 6, 32, 181, 1024]
    assert points("fast_layers", ("v",))[:3] == [("q",), ("k",), ("o",)] and len(points("fast_layers", ("v",))[-1]) == 6
    assert points("drive", "phi") == ["softplus"] and points("presyn", True) == [False]


def test_every_knob_has_a_model_with_its_mechanism_on() -> None:
    plan = census.plan()
    assert list(plan.keys() - KNOBS.keys()) == [] and len(plan) == len(KNOBS)
    for name, model in plan.items():
        switches = [owner for owner in owners(name) if name in MECHANISMS[owner].off and MECHANISMS[owner].is_served(model)]
        assert not owners(name) or switches or set(owners(name)) & set(model), name


def test_mechanisms_that_exclude_each_other_get_a_model_each(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Mechanism("other", "", on={"barrier": "linear"}, off={"barrier": "none"}, source="", knobs=("epsilon",))
    monkeypatch.setitem(MECHANISMS, "other", other)
    plan = census.plan()
    assert "barrier_gated" in plan["theta"] and "other" not in plan["theta"]
    assert "other" in plan["epsilon"] and "barrier_gated" not in plan["epsilon"]
    assert plan["barrier"] == plan["theta"]  # a switch is moved where the others are on


# --- what is measured --------------------------------------------------------------------------------------------------------------------


def test_a_model_is_trained_once(trained: Census) -> None:
    first = trained.model(trained.plan["theta"])
    trained.measure("theta")
    assert trained.model(trained.plan["theta"]) is first and len(trained.losses[trained.plan["theta"]]) == STEPS


def test_measuring_leaves_the_trained_model_alone(trained: Census) -> None:
    model = trained.model(trained.plan["theta"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    for name in ("barrier", "lambda_loge", "tick", "presyn"):
        trained.measure(name)
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in model.named_parameters())
    assert not model.training


def test_liveness_is_the_relative_change_of_the_logits(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "points", lambda name, current: [3.0])
    found, model = trained.measure("barrier_strength"), trained.model(trained.plan["barrier_strength"])
    logits = []
    for strength in (3.0, 1.0):
        fresh = census.build(dataclasses.replace(model.config.syn_cfg, barrier_strength=strength))
        shared = {name: value for name, value in model.state_dict().items() if ".synapse." not in name}
        fresh.load_state_dict(shared, strict=False)
        logits.append(fresh(census.batch(census.PROBE)[0]))
    want = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert found.how == "logits at birth" and found.change == pytest.approx(want.item(), rel=1e-4) and found.value == 3.0


@pytest.mark.parametrize("name", ["theta", "lambda_loge", "drive"])
def test_a_knob_that_nothing_reads_is_found(name: str, trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    _blind_to(monkeypatch, name)
    blind = Census(1)
    blind.models = dict(trained.models)
    blind.model(tuple(census.closure(*owners(name)[:1])))
    found = blind.measure(name)
    assert found.change == 0.0 and found.fault.startswith("changes nothing")


def test_the_value_at_birth_needs_its_own_measure(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    _replaced(monkeypatch, "barrier_strength", at_birth=False)
    assert trained.measure("barrier_strength").change == 0.0


def test_a_knob_of_training_shows_in_the_gradient_only(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    _replaced(monkeypatch, "syt_slow_kd", training_only=True)
    _blind_to(monkeypatch, "syt_slow_kd")
    monkeypatch.setattr(census, "points", lambda name, current: [1.0])
    plain = census.objective
    _forget(monkeypatch, trained)
    wanted = iter([2.0, 3.0])  # the order in which the unmoved and the moved model are asked
    monkeypatch.setattr(census, "objective", lambda model, step: plain(model, step) * next(wanted))
    found = trained.measure("syt_slow_kd")
    assert found.how == "loss or gradient" and found.change == pytest.approx(0.5, rel=1e-3)
    _forget(monkeypatch, trained)
    wanted = iter([0.0] * 100)  # no loss at all: the ratio is not a number to report
    assert math.isnan(trained.measure("syt_slow_kd").change)


def test_a_choice_with_parameters_of_its_own_is_not_live_by_losing_what_was_learned(trained: Census) -> None:
    """Another form that computes the same must not pass because it starts from birth: the gated barrier against itself."""
    mechanisms = ("barrier_linear",)
    config = trained.model(mechanisms).config.syn_cfg
    assert trained._change("barrier", mechanisms, config, config) == (0.0, "logits")
    gated = dataclasses.replace(config, barrier="gated")
    for steps in (0, 3):
        change, _ = trained._change("barrier", mechanisms, gated, gated, steps)
        assert change == 0.0
    assert trained._change("barrier", mechanisms, config, gated)[0] > 0


def test_where_parameters_are_exchanged_the_learned_ones_are_left_out_on_both_sides(trained: Census) -> None:
    mechanisms = trained.plan["genome"]
    config = trained.model(mechanisms).config.syn_cfg
    other = dataclasses.replace(config, genome="xi")
    models = [census.build(other), census.build(config)]
    shapes = {name: value.shape for name, value in models[0].named_parameters()}
    learned = dict(trained.model(mechanisms).named_parameters())
    shared = {name: value for name, value in learned.items() if shapes.get(name) == value.shape}
    assert len(shared) < min(len(shapes), len(learned))
    for model in models:
        model.load_state_dict(shared, strict=False)
    want = census._relative(*map(census._logits, models))
    assert trained._change("genome", mechanisms, config, other)[0] == pytest.approx(want, rel=1e-4, abs=1e-9)


def test_a_choice_that_a_knob_needs_is_made(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the threshold acted under the softplus drive only."""
    build = census.build

    def picky(config: SynapticConfig, device: str = "cpu") -> torch.nn.Module:
        return build(config if config.drive == "softplus" else dataclasses.replace(config, theta=1.0), device)

    monkeypatch.setattr(census, "build", picky)
    presyn = MECHANISMS["presyn"]
    monkeypatch.setitem(MECHANISMS, "presyn", dataclasses.replace(presyn, knobs=(*presyn.knobs, "drive")))
    monkeypatch.setattr(trained, "plan", trained.plan | {"theta": ("presyn",)})
    assert trained.measure("theta").under == (("drive", "softplus"),)


def test_values_that_the_config_refuses_are_left_out(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "points", lambda name, current: [99.0, 2.0])
    assert trained.measure("barrier_strength").value == 2.0
    monkeypatch.setattr(census, "points", lambda name, current: [99.0])
    assert trained.measure("barrier_strength").fault == "has no other value that the configuration accepts"


def test_a_value_that_breaks_the_model_is_a_fault_and_not_a_change(trained: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    build = census.build

    def breaking(config: SynapticConfig, device: str = "cpu") -> torch.nn.Module:
        model = build(config, device)
        if config.theta > 2:
            model.head.register_forward_hook(lambda module, inputs, output: output * math.nan)
        return model

    monkeypatch.setattr(census, "build", breaking)
    found = trained.measure("theta")
    assert math.isnan(found.change) and found.fault == "is not finite at theta=2.5"


# --- the table and the script ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USER_NAMES)
def test_the_names_of_the_background_are_knobs(name: str) -> None:
    assert name in KNOBS and KNOBS[name].doc


def test_a_knob_keeps_what_it_is_told() -> None:
    record = knob(0.0, "a thing", analogue="septin", source="a paper", training_only=True).metadata["knob"]
    assert (record.analogue, record.source, record.training_only, record.at_birth) == ("septin", "a paper", True, False)


def test_every_knob_has_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(census.source_of(name) for name in KNOBS)
    assert census.source_of("barrier_strength") == MECHANISMS["barrier_gated"].source
    _replaced(monkeypatch, "theta", source="a measurement")
    assert census.source_of("theta") == "a measurement"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, dict]:
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    code = 0
    try:
        param_census.main(list(words))
    except SystemExit as stopped:
        code = stopped.code
    return code, out.getvalue(), json.loads(out.getvalue().splitlines()[-1])


def test_the_script_writes_a_table_and_a_record(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "census.md"
    code, said, record = run(monkeypatch, "--steps=2", "--knobs=barrier_strength,barrier", f"--markdown={file}")
    assert code == 0 and record["inert"] == [] and list(record["knobs"]) == ["barrier", "barrier_strength"]
    assert record["knobs"]["barrier_strength"]["liveness"] >= LEAST_CHANGE and record["knobs"]["barrier"]["fault"] is None
    first = file.read_text().splitlines()
    assert first[0] == "| name | default | bounds | unit | liveness | analogue | meaning | source |"
    assert first[3].startswith("| barrier_strength | 1 | [0, 4] | ") and "forgetting attention" in first[3]
    assert "| barrier_strength | distant keys count less |" in file.read_text() and "distant keys count less" in said


def test_the_script_fails_on_a_dead_knob_and_names_it(monkeypatch, capsys) -> None:
    _blind_to(monkeypatch, "theta")
    code, _, record = run(monkeypatch, "--steps=1", "--knobs=theta")
    complaint = capsys.readouterr().err
    assert code == 1 and record["inert"] == ["theta"]
    assert complaint.startswith("error: theta changes nothing") and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"), [("--knobs=thta", "did you mean 'theta'?"), ("--steps=0", "--steps=0"), ("--markdown=.", "is a folder")]
)
def test_the_script_refuses_in_one_line(words, said, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        param_census.main([words])
    complaint = capsys.readouterr().err
    assert stopped.value.code == 2 and said in complaint and complaint.count("\n") == 1
