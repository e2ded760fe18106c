"""The conditions of the matrix: what each comparison differs in, and how anchors are matched."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from bio_inspired_nanochat.config import SynapticConfig, from_dict, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms
from bio_inspired_nanochat.study.matrix import ALTERNATIVES, Options, build_matrix, dense_mechanisms, subset
from bio_inspired_nanochat.study.plan import PlanConfig, fewest_tokens, make_matrix_plan, read_plan
from bio_inspired_nanochat.training import TrainConfig
from tests.study.planned import TINY, full


def active(name: str) -> set[str]:
    changes = full().conditions[name].changes
    if not changes["synapses"]:
        return set()
    on = active_mechanisms(from_dict(SynapticConfig, changes["syn_cfg"]))
    return {one for one in on if changes.get("num_experts") or not MECHANISMS[one].experts}


def test_every_mechanism_of_the_registry_is_added_alone_and_left_out() -> None:
    added = {one.what: one for one in full().comparisons if one.set == "add_one"}
    left = {one.what: one for one in full().comparisons if one.set == "leave_one"}
    assert list(added) == list(MECHANISMS) and set(left) == set(MECHANISMS) - set(ALTERNATIVES)
    for name, one in added.items():
        assert active(one.condition) - active(one.reference) == {name}, one
        assert active(one.reference) <= active(one.condition), one
    for name, one in left.items():
        assert name in active(one.condition) and name not in active(one.reference), one
        assert active(one.reference) < active(one.condition), one


def test_each_mechanism_is_judged_beside_the_default() -> None:
    ones = {one.what: one for one in full().comparisons if one.set == "beside_default"}
    assert list(ones) == list(MECHANISMS)
    usual = set(active_mechanisms(SynapticConfig()))
    for name, one in ones.items():
        with_it, without = active(one.condition), active(one.reference)
        assert name in with_it and name not in without, one
        if name in usual:
            assert with_it <= usual and without < with_it, one
        elif name not in ALTERNATIVES:
            assert with_it - without == {name} and {one for one in usual if not MECHANISMS[one].experts} <= without <= with_it, one


def test_all_on_holds_everything_that_does_not_exclude_something_else() -> None:
    assert active("all_on") == set(dense_mechanisms())
    assert active("all_on_experts") == set(MECHANISMS) - set(ALTERNATIVES)
    for name in ALTERNATIVES:
        taken = {field for other in active("all_on") for field in MECHANISMS[other].off}
        assert set(MECHANISMS[name].off) & taken or name in ("drive_softplus", "tied_gains", "genome_xi", "genome_proteins")


def test_the_factorial_has_all_sixteen_cells_and_differs_in_one_factor() -> None:
    cells = [one for one in full().aliases if one.startswith("factorial:")]
    assert len(cells) == 16 and len({full().aliases[one] for one in cells}) == 16
    ones = [one for one in full().comparisons if one.set == "factorial"]
    assert len(ones) == 32 and len({(one.condition, one.reference) for one in ones}) == 32


def test_the_series_begins_with_vanilla_and_ends_with_all() -> None:
    steps = [one for one in full().comparisons if one.set == "cumulative"]
    assert (steps[0].reference, steps[-1].condition) == ("vanilla", "all_on")
    assert all(one.reference == before.condition for before, one in itertools.pairwise(steps))
    assert all(len(active(one.condition)) > len(active(one.reference)) for one in steps)


def test_equal_conditions_are_one_under_all_their_names() -> None:
    assert full().aliases["default_fast"] == "factorial:rates"
    assert len({one.key for one in full().conditions.values()}) == len(full().conditions)
    names = set(full().conditions)
    assert all({one.condition, one.reference} <= names for one in full().comparisons)


def test_a_baseline_is_in_the_same_code() -> None:
    baselines = build_matrix(["baselines"]).conditions
    assert active("add:barrier_gated") == {"barrier_gated"} and active("add:barrier_linear") == {"barrier_linear"}
    assert baselines["vanilla_dropout"].changes == {"synapses": False, "dropout": 0.1}


def test_names_that_do_not_exist_are_one_line() -> None:
    with pytest.raises(UserError, match=r"mechanism='presin'.*did you mean 'presyn'"):
        Options(mechanisms=("presin",))
    with pytest.raises(UserError, match=r"conditions='all_off' is not part of the chosen sets: one of vanilla, .*did you mean 'all_on'"):
        subset(full(), ["all_off"])
    with pytest.raises(UserError, match="each once"):
        PlanConfig(seeds=(1, 1))


# --- the plan -------------------------------------------------------------------------------------------------------------------------


def test_the_default_plan_has_enough_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: value for name, value in TINY.items() if name not in ("seeds", "sets", "depths", "smoke", "tokens", "conditions")}
    matrix = PlanConfig().matrix()
    assert len(matrix.conditions) * len(PlanConfig().seeds) >= 40
    few = ("vanilla", "default", "vanilla_flops_default", "vanilla_params_default", "vanilla_params_all_on")
    sizes["tok_per_s"] = 1000.0
    config = PlanConfig(**sizes, out=str(tmp_path), tokens=20000, depths=(2,), conditions=few)
    said = make_matrix_plan(config)
    plan = read_plan(tmp_path)
    assert said["runs"] == len(plan["runs"]) == 15, "the match that needs no change shares its runs, all_on joins as what is matched to"
    assert said["tokens"] == sum(run["tokens"] for run in plan["runs"]) and said["hours"] > 0 and not said["measured"]
    assert "fewer tokens than the least" in capsys.readouterr().out
    shared = [run for run in plan["runs"] if "vanilla_params_default" in run["conditions"]]
    assert [run["conditions"] for run in shared] == [["vanilla", "vanilla_params_default"]] * 3
    trained = [from_dict(TrainConfig, run["train"]) for run in plan["runs"]]
    assert len({(one.total_batch_size, one.device_batch_size, one.max_seq_len) for one in trained}) == 1, "all read the same tokens"


def test_matches_are_within_two_percent_and_shown(tmp_path: Path) -> None:
    config = PlanConfig(**TINY | {"conditions": ("vanilla_flops_all_on", "vanilla_params_all_on"), "tokens": 20000}, out=str(tmp_path))
    make_matrix_plan(config)
    plan = read_plan(tmp_path)
    runs = {run["conditions"][0]: run for run in plan["runs"]}
    spent = {name: run["tokens"] * run["flops_per_token"] for name, run in runs.items()}
    assert (
        abs(spent["vanilla_flops_all_on"] / spent["all_on"] - 1) <= 0.02
        and runs["vanilla_flops_all_on"]["tokens"] > runs["all_on"]["tokens"]
    )
    assert abs(runs["vanilla_params_all_on"]["params"] / runs["all_on"]["params"] - 1) <= 0.02
    assert len(plan["matches"]) == 2 and "%" in plan["matches"]["vanilla_flops_all_on at depth 2"]


@pytest.mark.parametrize(("seeds", "told"), [((0, 1), True), ((0, 1, 2), False)])
def test_too_few_seeds_are_told_of_before_the_runs_in_a_smoke_test_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seeds: tuple[int, ...], told: bool
) -> None:
    make_matrix_plan(PlanConfig(**TINY | {"seeds": seeds, "conditions": ("default",)}, out=str(tmp_path)))
    assert ("notice: 2 seeds are fewer than 3: nothing of this plan can enter a table" in capsys.readouterr().out) is told


def test_a_match_that_is_too_far_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be matched to the flops of all_on.*more than 2%"):
        make_matrix_plan(PlanConfig(**TINY | {"conditions": ("vanilla_flops_all_on",), "tokens": 256}, out=str(tmp_path)))


def test_a_speed_is_measured_where_none_is_given(tmp_path: Path) -> None:
    said = make_matrix_plan(PlanConfig(**TINY | {"tok_per_s": 0.0, "measure_seconds": 0.0, "conditions": ("default",)}, out=str(tmp_path)))
    assert said["measured"] and all(rate > 0 for rate in said["tok_per_s"].values())


def test_a_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    make_matrix_plan(PlanConfig(**TINY, out=str(tmp_path)))
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    for name, value in (("rule", {**plan["rule"], "alpha": 0.2}), ("comparisons", plan["comparisons"][:-1])):
        path.write_text(json.dumps(plan | {name: value}))
        with pytest.raises(UserError, match="was changed after it was made"):
            read_plan(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_plan(tmp_path)
    with pytest.raises(UserError, match=r"has no plan\.json"):
        read_plan(tmp_path / "nowhere")


def test_the_least_tokens_are_those_of_the_study() -> None:
    assert [fewest_tokens(depth) for depth in (2, 6, 8, 10, 20)] == [8_000_000, 8_000_000, 12_000_000, 16_000_000, 16_000_000]
    assert to_dict(PlanConfig())["tokens"] is None
