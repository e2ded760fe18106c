"""Verdicts on predictions from planted values, and the report from planted runs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study.models import VARIANTS
from bio_inspired_nanochat.study.plan import read_plan
from bio_inspired_nanochat.study.predictions import PREDICTIONS
from bio_inspired_nanochat.study.queue import RunConfig, run_queue
from bio_inspired_nanochat.study.report import ReportConfig, report
from bio_inspired_nanochat.study.scorecard import KINDS, score
from bio_inspired_nanochat.study.sources import STUDIED, kernel_facts
from bio_inspired_nanochat.study.speed import Speed, Speeds, write_speeds
from bio_inspired_nanochat.study.statistics import Rule
from bio_inspired_nanochat.training.faults import Fault, diverged
from tests.study.planned import HONEST, full, plan, pretend

BY_ID = {one.id: one for one in PREDICTIONS}


def values(**metrics: dict[str, float | list[float]]) -> dict:
    """Values at depth 6: metric (dots as __) -> condition -> mean, with a spread of seeds, or values."""
    found: dict = {}
    for metric, by_condition in metrics.items():
        for name, value in by_condition.items():
            seeds = value if isinstance(value, list) else [value * (1 + 1e-4 * shift) for shift in (-1, 0, 1)]
            own = full().aliases.get(name, name)
            found.setdefault(metric.replace("__", "."), {})[own] = {seed: (one, f"{own}-{seed}") for seed, one in enumerate(seeds)}
    return {6: found}


def verdict(identity: str, found: dict):
    return score(found, full().aliases, Rule(), predictions=[BY_ID[identity]])[0]


def test_every_prediction_names_conditions_and_metrics_that_exist() -> None:
    for one in PREDICTIONS:
        assert one.kind in KINDS and one.source and one.statement and one.metrics, one.id
        for name in (one.condition, one.reference, *one.series):
            known = name in full().aliases or name == "cumulative" or str(name).removeprefix(STUDIED) in VARIANTS
            assert name is None or known, (one.id, name)
    assert len(BY_ID) == len(PREDICTIONS)


@pytest.mark.parametrize(("change", "expected"), [(0.12, "success"), (0.07, "neutral"), (-0.03, "neutral"), (-0.08, "failure")])
def test_bdnf_and_the_gini_coefficient(change: float, expected: str) -> None:
    found = verdict("bdnf-gini", values(experts__gini={"experts_static": 0.35, "experts_bdnf": 0.35 + change}))
    assert found.verdict == expected and found.value == pytest.approx(change, abs=1e-6)
    assert set(found.runs) == {f"experts_{kind}-{seed}" for kind in ("static", "bdnf") for seed in range(3)}


def test_the_log_serves_where_the_suite_was_not_run() -> None:
    one = values(**{"experts/gini": {"experts_static": 0.3, "experts_bdnf": 0.5}})
    assert verdict("bdnf-gini", one).verdict == "success"


@pytest.mark.parametrize(
    ("ece", "perplexity", "expected"),
    [(0.090, 20.2, "success"), (0.099, 20.2, "neutral"), (0.090, 21.0, "neutral"), (0.090, 22.5, "failure"), (0.110, 20.0, "neutral")],
)
def test_half_of_the_releases_at_random(ece: float, perplexity: float, expected: str) -> None:
    found = verdict(
        "release-50",
        values(calibration__ece={"release:12": 0.1, "release:50": ece}, perplexity={"release:12": 20.0, "release:50": perplexity}),
    )
    assert found.verdict == expected


def test_what_was_not_measured_is_said_to_be_so() -> None:
    found = verdict("release-50", values(calibration__ece={"release:12": 0.1, "release:50": 0.05}))
    assert found.verdict == "not measured" and "perplexity" in found.why
    few = values(calibration__mc_auroc={"release:12": [0.8, 0.9]})
    assert verdict("uncertainty", few).verdict == "not measured"
    assert {one.verdict for one in score({}, full().aliases, Rule())} == {"not measured"}


@pytest.mark.parametrize(("auroc", "expected"), [(0.72, "success"), (0.65, "neutral"), (0.45, "failure")])
def test_uncertainty(auroc: float, expected: str) -> None:
    assert verdict("uncertainty", values(calibration__mc_auroc={"release:12": auroc})).verdict == expected


@pytest.mark.parametrize(("ratio", "expected"), [(3.0, "success"), (7.0, "neutral"), (11.0, "failure")])
def test_gradient_variance(ratio: float, expected: str) -> None:
    one = values(train__grad_norm_variance={"default": 0.1, "release:12": 0.1 * ratio})
    assert verdict("release-gradient-variance", one).verdict == expected


def test_the_temperature_must_be_better_than_both_ends() -> None:
    ends = {"temperature:0.1": 3.1, "temperature:0.3": 3.0, "temperature:0.5": 2.9, "temperature:0.7": 3.0, "temperature:1.0": 3.1}
    assert verdict("temperature", values(val_loss=ends | {"default": 3.0})).verdict == "success"
    assert verdict("temperature", values(val_loss=ends | {"temperature:1.0": 2.8, "default": 3.0})).verdict == "neutral"
    falling = {name: 3.5 - 0.1 * i for i, name in enumerate(ends)}
    assert verdict("temperature", values(val_loss=falling | {"default": 3.0})).verdict == "failure"


def test_recall_by_the_rule() -> None:
    assert verdict("fast-recall", values(needle__accuracy_1024={"default": 0.1, "default_fast": 0.5})).verdict == "success"
    assert verdict("fast-recall", values(needle__accuracy_1024={"default": 0.5, "default_fast": 0.1})).verdict == "failure"
    noisy = {"default": [0.1, 0.2, 0.3], "default_fast": [0.2, 0.1, 0.35]}
    assert verdict("fast-recall", values(needle__accuracy_1024=noisy)).verdict == "neutral"


def test_dropout_suffices_only_where_a_loss_that_matters_is_excluded() -> None:
    assert verdict("dropout-suffices", values(val_loss={"all_on": 3.0, "default_dropout": 3.0001})).verdict == "success"
    assert verdict("dropout-suffices", values(val_loss={"all_on": 3.0, "default_dropout": 3.2})).verdict == "failure"
    noisy = {"all_on": [3.0, 3.1, 3.2], "default_dropout": [3.1, 3.0, 3.25]}
    assert verdict("dropout-suffices", values(val_loss=noisy)).verdict == "neutral"


def test_saturation() -> None:
    steps = sorted(name for name in full().aliases if name.startswith("cumulative:"))
    early = {name: 3.0 - 0.5 * min(1.0, i / 5) for i, name in enumerate(steps)} | {"vanilla": 3.0, "all_on": 2.5}
    late = {name: 3.0 - 0.01 * i for i, name in enumerate(steps)} | {"vanilla": 3.0, "all_on": 2.0}
    assert verdict("saturation", values(val_loss=early)).verdict == "success"
    assert verdict("saturation", values(val_loss=late)).verdict == "failure"


def test_two_benchmarks_by_a_tenth() -> None:
    def found(perplexity: float, copying: float, needle: float):
        conditions = ("vanilla", "all_on")
        pairs = {"perplexity": (20, perplexity), "copy.accuracy_512": (0.5, copying), "needle.accuracy_512": (0.5, needle)}
        return verdict("overall", values(**{name: dict(zip(conditions, pair, strict=True)) for name, pair in pairs.items()})).verdict

    assert found(17, 0.6, 0.5) == "success" and found(17, 0.5, 0.4) == "neutral"
    assert found(20, 0.5, 0.4) == "failure" and found(20, 0.51, 0.5) == "neutral"


def test_lengths_of_one_benchmark_are_one() -> None:
    """Twice as good at two lengths of one task, and nothing gained elsewhere: one benchmark of two."""
    two = {"needle.accuracy_256": {"vanilla": 0.2, "all_on": 0.4}, "needle.accuracy_512": {"vanilla": 0.2, "all_on": 0.4}}
    found = verdict("overall", values(**two, perplexity={"vanilla": 20.0, "all_on": 20.0}))
    assert (found.verdict, found.value) == ("neutral", 1.0)
    never = {"needle.accuracy_256": {"vanilla": 0.2, "all_on": 0.2}, "needle.accuracy_512": {"vanilla": [0.0] * 3, "all_on": 0.2}}
    found = verdict("overall", values(**never, perplexity={"vanilla": 20.0, "all_on": 17.0}))
    assert found.verdict == "success", "a length at which vanilla finds nothing counts with the others"


def test_what_shares_fewer_seeds_than_the_rule_asks_for_is_not_measured() -> None:
    ends = {"temperature:0.1": 3.1, "temperature:0.3": 3.0, "temperature:0.5": 2.9, "temperature:0.7": 3.0, "temperature:1.0": 3.1}
    found = values(val_loss=ends | {"default": 3.0})
    losses = found[6]["val_loss"]
    losses["temperature:1.0"] = {seed + 2: pair for seed, pair in losses["temperature:1.0"].items()}
    one = verdict("temperature", found)
    assert one.verdict == "not measured" and "share 1 seeds of 3" in one.why


def test_halves_are_compared_at_the_seeds_that_all_have() -> None:
    """The middle has two more seeds, of a much lower loss: unpaired, all of the gain would be the first half's."""
    steps = sorted(name for name in full().aliases if name.startswith("cumulative:"))
    losses = {name: 3.0 - 0.01 * i for i, name in enumerate(steps)} | {"vanilla": 3.0, "all_on": 2.0}
    found = values(val_loss=losses)
    middle = found[6]["val_loss"][full().aliases[steps[len(steps) // 2]]]
    middle |= {3: (0.5, "lucky-3"), 4: (0.5, "lucky-4")}
    one = verdict("saturation", found)
    assert one.verdict == "failure" and not {"lucky-3", "lucky-4"} & set(one.runs)


def test_the_kernels_come_from_a_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    rows = [
        {"operator": name, "backend": backend, "context": 2048, "head_dim": 64, "tick": 8, "forward_ms": ms}
        for name, backend, ms in (("layer", "triton", 2.0), ("layer", "fused", 0.5), ("presyn", "triton", 0.4))
    ]
    file.write_text(json.dumps({"rows": rows}))
    plan(tmp_path / "m")
    assert kernel_facts(str(file))["kernel.forward_gain"] == (0.75, "bench.json: T=2048, D=64, c=8"), "layer against layer"
    assert report(ReportConfig(out=str(tmp_path / "m"), bench=str(file)))["scorecard"]["success"] == 1
    file.write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        report(ReportConfig(out=str(tmp_path / "m"), bench=str(file)))


def test_relearning_comes_from_a_memory_study(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    plan(tmp_path / "m")

    def judged(gain: float, failed: str | None = None) -> tuple[str, str]:
        file.write_text(
            "".join(
                json.dumps(
                    {"task": "switching", "variant": variant, "seed": seed, "failed": failed, "accuracy": 0.9, "config": {"n_layer": 2}}
                    | {"by_group": {"A": 0.9, "A again": 0.6 + 0.001 * seed + (gain + 1e-4 * (seed % 2) if "bdnf" in variant else 0)}}
                )
                + "\n"
                for variant in ("delta", "delta_bdnf", "hebb")
                for seed in range(5)
            )
        )
        report(ReportConfig(out=str(tmp_path / "m"), memory=str(file)))
        scores = json.loads((tmp_path / "m" / "report" / "scorecard.json").read_text())["scores"]
        (one,) = (score for score in scores if score["id"] == "bdnf-relearn")
        assert one["verdict"] == "not measured" or len(one["runs"]) == 10
        return one["verdict"], one["why"]

    assert [judged(gain)[0] for gain in (0.1, -0.1)] == ["success", "failure"]
    assert judged(0.1, failed="loss is nan") == ("not measured", "no run counts: each is missing, failed or listed apart")
    for content in ("", "[1]\n", '{"task": "switching"}\n'):
        file.write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            report(ReportConfig(out=str(tmp_path / "m"), memory=str(file)))


# --- the report -----------------------------------------------------------------------------------------------------------------------

BIG = {"tokens": 8_000_000, "smoke": False, "sets": ("anchors",), "conditions": ("vanilla", "default", "all_on"), "seeds": (0, 1, 2, 3, 4)}


def finished(folder: Path, workers: int = 1, **changes) -> dict:
    plan(folder, **BIG | changes)
    run_queue(RunConfig(out=str(folder), workers=workers), pretend())
    return report(ReportConfig(out=str(folder)))


def test_a_report_finds_what_was_planted(tmp_path: Path) -> None:
    said = finished(tmp_path)
    assert (said["counted"], said["apart"], said["missing"]) == (15, 0, 0) and said["decided"] == said["comparisons"] == 3
    rows = {(row["metric"], row["what"]): row for row in csv.DictReader((tmp_path / "report/comparisons.csv").open())}
    better, worse = rows["val_loss", "the default preset"], rows["val_loss", "all mechanisms"]
    assert (better["verdict"], worse["verdict"]) == ("lower", "higher") and float(better["mean"]) == pytest.approx(-0.05, abs=2e-3)
    slow = rows["view.seconds", "the default preset"]
    assert slow["verdict"] == "higher", "it needs twice the time: at equal time vanilla has gone on"
    text = (tmp_path / "report/report.md").read_text()
    assert "| all mechanisms | all_on − vanilla | 5 | +0.0" in text and "not a result" not in text, "negative results are there"
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".md", ".csv", ".json", ".png"}
    scores = json.loads((tmp_path / "report/scorecard.json").read_text())["scores"]
    assert {one["id"]: one["verdict"] for one in scores}["goal-clock"] == "failure"
    assert sum(path.stat().st_size for path in (tmp_path / "report").iterdir()) < 500_000


def test_runs_that_shared_a_device_are_compared_in_time_once_their_speed_was_measured_alone(tmp_path: Path) -> None:
    def view(**said) -> dict[str, str]:
        rows = list(csv.DictReader((tmp_path / "report/comparisons.csv").open()))
        return {row["what"]: row["verdict"] for row in rows if row["metric"] == "view.seconds"}

    finished(tmp_path, workers=3)
    text = (tmp_path / "report/report.md").read_text()
    assert view() == {} and "15 runs shared their device with others" in text and list((tmp_path / "report").glob("curves-*.png"))
    slow, fast = Speed(0.01, 2.0, (2.0, 1.9, 2.1)), Speed(0.005, 1.0, (1.0, 1.0, 1.0))
    write_speeds(tmp_path, Speeds("another device", "abc", {2: {"vanilla": fast, "default": slow}}))
    report(ReportConfig(out=str(tmp_path)))
    text = (tmp_path / "report/report.md").read_text()
    assert view() == {"the default preset": "higher"}, "all_on has no speed"
    assert (
        "measured alone on another device (git abc), while runs were done on pretended" in text
        and "5 runs have no speed in speed.json" in text
    )
    runs = list(csv.DictReader((tmp_path / "report/runs.csv").open()))
    assert {row["tok_per_s"] for row in runs if "default" in row["conditions"].split()} == {"100"}
    (tmp_path / "speed.json").write_text("{")
    with pytest.raises(UserError, match=r"speed\.json.*measure again"):
        report(ReportConfig(out=str(tmp_path)))


def test_small_runs_and_few_seeds_enter_no_table(tmp_path: Path) -> None:
    said = finished(tmp_path / "small", tokens=512)
    text = (tmp_path / "small/report/report.md").read_text()
    assert (said["counted"], said["apart"], said["comparisons"]) == (0, 15, 0) and "512 tokens, below 8,000,000 of depth 2" in text
    said = finished(tmp_path / "few", seeds=(0, 1))
    assert (said["counted"], said["apart"], said["comparisons"]) == (0, 6, 0)
    assert "2 of 3 seeds" in (tmp_path / "few/report/report.md").read_text()


def test_a_rule_that_changed_after_the_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path, seeds=(0, 1, 2))
    path = tmp_path / "plan.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"rule": before["rule"] | {"alpha": 0.2}}))
    with pytest.raises(UserError, match="was changed after it was made"):
        report(ReportConfig(out=str(tmp_path)))
    path.write_text(json.dumps(before))
    assert read_plan(tmp_path)["digest"] == before["digest"]
    with pytest.raises(UserError, match="runs of another plan"):
        plan(tmp_path, **BIG | {"conditions": ("vanilla", "default")})
    more = plan(tmp_path, **BIG)  # seeds may join
    assert more.seeds == (0, 1, 2, 3, 4) and report(ReportConfig(out=str(tmp_path)))["missing"] == 6
    record = tmp_path / "runs/d2-vanilla-s0/record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"digest": "0" * 16}))
    with pytest.raises(UserError, match="made under another rule or plan"):
        report(ReportConfig(out=str(tmp_path)))


DAMAGE = {
    "'digest'": {},
    "val_loss is 'low', which is no number": {"metrics": {"val_loss": "low"}},
    "val_loss is True": {"metrics": {"val_loss": True}},
    "has no attribute 'items'": {"metrics": [3.0]},
    "4 losses": {"curve": {"tokens": [1.0], "flops": [1.0], "seconds": [], "loss": [4.0, 3.0, 2.0, 1.0]}},
    "flops of its curve": {"curve": {"tokens": [1.0, 2.0], "flops": [2.0, 1.0], "seconds": [], "loss": [4.0, 3.0]}},
    "a loss of its curve": {"curve": {"tokens": [1.0, 2.0], "flops": [1.0, 2.0], "seconds": [], "loss": [None, 3.0]}},
    "tokens is '8 M'": {"tokens": "8 M"},
    "has conditions=.*the plan": {"conditions": ["default"]},
    "has seed=1, the plan 0": {"seed": 1},
}


def test_a_record_that_is_none_is_one_line(tmp_path: Path) -> None:
    finished(tmp_path, seeds=(0, 1, 2))
    path = tmp_path / "runs/d2-vanilla-s0/record.json"
    whole = json.loads(path.read_text())
    for message, change in DAMAGE.items():
        path.write_text(json.dumps(whole | change if change else {}))
        with pytest.raises(UserError, match=message):
            report(ReportConfig(out=str(tmp_path)))
    for content in ("", path.read_text()[:99], "[]", "null"):
        path.write_text(content)
        said = report(ReportConfig(out=str(tmp_path)))
        assert (said["counted"], said["apart"], said["missing"]) == (6, 2, 1)
        assert "the record of d2-vanilla-s0 cannot be read: it counts as missing" in (tmp_path / "report/report.md").read_text()
    path.write_text(json.dumps(whole | {"metrics": whole["metrics"] | {"val_loss": float("nan")}}))
    said = report(ReportConfig(out=str(tmp_path)))
    assert (said["counted"], said["apart"]) == (6, 3) and "no validation loss" in (tmp_path / "report/report.md").read_text()
    path.write_text(json.dumps(whole))
    lines = ('{"why": 1}', '{"why": "x", "last_lines": [1]}', "{", '{"why": "exit code 1", "last_lines": []}')
    (tmp_path / "runs/d2-vanilla-s1/record.json").unlink()
    (tmp_path / "runs/d2-vanilla-s1/attempts.jsonl").write_text("\n".join(lines))
    assert report(ReportConfig(out=str(tmp_path)))["failed"] == ["d2-vanilla-s1"]


def test_a_plan_edited_by_hand_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, seeds=(0, 1, 2))
    path = tmp_path / "plan.json"
    whole = path.read_text()

    def swapped(plan: dict) -> None:
        sides = [[run for run in plan["runs"] if run["conditions"][0] == name] for name in ("vanilla", "default")]
        for one, other in zip(*sides, strict=True):
            one["conditions"], other["conditions"] = other["conditions"], one["conditions"]

    edits = {
        "has conditions=": swapped,
        "default stands for vanilla": lambda plan: plan["aliases"].update(default="vanilla"),
        "KeyError: 'key'": lambda plan: plan["runs"][0].pop("key"),
        r"a run is called '\.\./x'": lambda plan: plan["runs"][0].update(id="../x"),
        "two runs have one name": lambda plan: plan["runs"].append(plan["runs"][0]),
        "KeyError: 'matches'": lambda plan: plan.pop("matches"),
    }
    for message, edit in edits.items():
        edit(plan := json.loads(whole))
        path.write_text(json.dumps(plan))
        with pytest.raises(UserError, match=message):
            report(ReportConfig(out=str(tmp_path)))
    path.write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="is damaged"):
        report(ReportConfig(out=str(tmp_path)))


def test_a_training_that_diverges_is_a_failure_of_its_prediction(tmp_path: Path) -> None:
    fault = Fault(7, "the loss is nan", {})
    crash = f"def behave(run):\n    if run['conditions'] == ['default']:\n        sys.exit({str(diverged(fault, None))!r})\n    return honest(run)"
    plan(tmp_path, **BIG | {"conditions": ("vanilla", "default"), "seeds": (0, 1, 2)})
    said = run_queue(RunConfig(out=str(tmp_path), workers=3), pretend(HONEST.replace("def behave", "def honest") + crash))
    assert len(said["failed"]) == 3
    report(ReportConfig(out=str(tmp_path)))
    scores = json.loads((tmp_path / "report/scorecard.json").read_text())["scores"]
    (found,) = (one for one in scores if one["id"] == "goal-vanilla")
    assert found["verdict"] == "failure" and found["runs"] == said["failed"] and "diverged" in found["why"]
    assert "what is said of default at depth 2 is of the other seeds alone" in (tmp_path / "report/report.md").read_text()


def test_another_rule_gives_another_verdict() -> None:
    one = replace(BY_ID["goal-vanilla"], success=(None, -0.2))
    found = values(val_loss={"default": 2.95, "vanilla_params_default": 3.0})
    assert verdict("goal-vanilla", found).verdict == "success"
    assert score(found, full().aliases, Rule(), predictions=[one])[0].verdict == "neutral"
