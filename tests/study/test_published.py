"""The committed report of the study against its records, worked out by other means, and against what RESULTS says of it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from bio_inspired_nanochat.study.archive import UnpackConfig, unpack
from bio_inspired_nanochat.study.report import ReportConfig, report

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs/study"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report made anew from the packed matrix."""
    folder = tmp_path_factory.mktemp("depth6")
    unpack(UnpackConfig(out=str(folder), file=str(STUDY / "depth6/matrix.json.gz")))
    report(ReportConfig(out=str(folder), bench=str(STUDY / "bench_kernels.json"), memory=str(STUDY / "memory_bdnf.jsonl")))
    return folder


def runs(folder: Path) -> dict[tuple[str, int], dict]:
    every = [json.loads(path.read_text()) for path in folder.glob("runs/*/record.json")]
    return {(name, one["seed"]): one for one in every for name in one["conditions"]}


def comparisons(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "report/comparisons.csv").open()))


def loss_at(run: dict, flops: float) -> float:
    return float(np.interp(math.log(flops), np.log(run["curve"]["flops"]), run["curve"]["loss"]))


def test_the_committed_page_is_what_the_records_say(made: Path) -> None:
    for name in ("report.md", "runs.csv"):
        assert (made / "report" / name).read_text() == (STUDY / "depth6" / name).read_text(), f"make {name} anew"


def test_every_headline_figure_follows_from_the_records(made: Path) -> None:
    """Three seeds: the p of |t| with two degrees of freedom is 1 - |t| / sqrt(2 + t^2), and the 95 % percentile interval of 27 equally
    likely resamples, of which one is the smallest value thrice, is the range."""
    found, rows = runs(made), comparisons(made)
    for metric in ("val_loss", "view.flops"):
        families: dict[str, list] = {}
        for row in (row for row in rows if row["metric"] == metric):
            gaps = []
            for seed in range(3):
                ours, theirs = found[row["condition"], seed], found[row["reference"], seed]
                budget = min(ours["curve"]["flops"][-1], theirs["curve"]["flops"][-1])
                sides = [one["metrics"]["val_loss"] if metric == "val_loss" else loss_at(one, budget) for one in (ours, theirs)]
                gaps.append(sides[0] - sides[1])
            mean, sd = np.mean(gaps), np.std(gaps, ddof=1)
            t = mean / sd * math.sqrt(3)
            p = 1 - abs(t) / math.sqrt(2 + t * t)
            said = [float(row[name]) for name in ("mean", "sd", "low", "high", "p_t", "g_z")]
            assert said == pytest.approx([mean, sd, min(gaps), max(gaps), p, mean / sd / math.sqrt(math.pi)], rel=1e-4), row
            families.setdefault(row["set"], []).append((p, row, mean))
        for family in families.values():
            worst = 0.0
            for rank, (p, row, mean) in enumerate(sorted(family, key=lambda one: one[0])):
                worst = max(worst, min(1.0, (len(family) - rank) * p))
                assert float(row["p_holm"]) == pytest.approx(worst, rel=1e-4)
                one_side = float(row["low"]) * float(row["high"]) > 0
                assert row["verdict"] == (("lower" if mean < 0 else "higher") if worst < 0.05 and one_side else "undecided")


def test_a_reader_is_told_what_the_correction_covers(made: Path) -> None:
    text = (made / "report/report.md").read_text()
    rows = [row for row in comparisons(made) if row["metric"] == "val_loss"]
    anchors = sum(row["set"] == "anchors" for row in rows)
    assert f"Holm's correction is over {anchors} comparisons of 8 planned" in text
    assert "default − vanilla and default − vanilla_params_default are the same runs and count 2 times in it" in text
    pair = ("add:barrier_gated", "vanilla")
    twice = {row["set"]: (row["verdict"], float(row["p_holm"])) for row in rows if (row["condition"], row["reference"]) == pair}
    assert set(twice) == {"baselines", "add_one"}
    said = ", ".join(f"{verdict} in {name} (p {p:.3g})" for name, (verdict, p) in twice.items())
    assert f"add:barrier_gated − vanilla at depth 6 is judged in several sets, each with its own correction: {said}" in text


def test_results_repeat_the_report() -> None:
    text = (ROOT / "RESULTS.md").read_text()
    section = text[text.index("## The study so far: depth 6") :]
    rows = [line for line in section[: section.index("\n## ", 5)].splitlines() if line.startswith("|") and "…" in line]
    report_text = (STUDY / "depth6/report.md").read_text()
    assert len(rows) > 15
    for row in rows:
        _, difference, interval, *_, verdict = [cell.strip().replace("−", "-") for cell in row.strip("|").split("|")]
        (line, *_) = [line for line in report_text.splitlines() if f"| {difference} | {interval} |" in line] or [""]
        assert line and {"better": "lower", "worse": "higher"}.get(verdict, verdict) in line, row


def test_results_repeat_the_scorecard() -> None:
    text = (ROOT / "RESULTS.md").read_text()
    section = text[text.index("## The study so far: depth 6") :]
    said = [line.rstrip("| ").rpartition("| ")[2] for line in section[: section.index("\n## ", 5)].splitlines() if line.startswith("| ")]
    found = [score["verdict"] for score in json.loads((STUDY / "depth6/scorecard.json").read_text())["scores"]]
    decided = [verdict for verdict in found if verdict != "not measured"]
    assert f"Of the scorecard's {len(found)} predictions {len(decided)} are decided" in section
    assert sorted(verdict for verdict in said if verdict in ("success", "neutral", "failure")) == sorted(decided)
