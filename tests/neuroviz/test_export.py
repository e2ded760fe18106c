"""The summary of a run's log folder, and its report as static HTML."""

from __future__ import annotations

import json
import shutil

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.export import ExportConfig, export
from bio_inspired_nanochat.neuroviz.rundir import read_metrics
from bio_inspired_nanochat.neuroviz.summary import RunFolder, _thin
from scripts import viz_export


def test_the_summary_holds_what_the_log_says(trained):
    seen = RunFolder(trained.logs).summary()
    lines = read_metrics(trained.logs)
    looks = [line for line in lines if line["kind"] == "vitals"]
    assert (seen["state"], seen["step"]) == ("finished", trained.record["steps"])
    source = seen["sources"]["vitals"]
    assert source["x"] == [line["step"] for line in looks]
    assert source["y"]["rrp_mean/layer1"] == [pytest.approx(line["layers"]["rrp_mean"][1], rel=1e-4) for line in looks]
    gains = [sum(held) / len(held) for held in (line["constants"][1]["gain_release"] for line in looks)]
    assert source["y"]["gains/gain_release/layer1"] == [pytest.approx(gain, rel=1e-4) for gain in gains]
    tags = {chart["tag"] for chart in seen["charts"]}
    assert {"train/loss", "val/bpb", "calcium_mean", "experts/population", "neuroscore/best", "gains/gain_release"} <= tags
    assert sorted(row["id"] for row in seen["experts"]) == sorted(row["id"] for row in looks[-1]["experts"])
    assert seen["experts"][0]["contribution"] == max(row["contribution"] for row in looks[-1]["experts"])
    assert str(RunFolder(trained.logs).checkpoint()) == trained.record["checkpoint"]


def test_long_curves_are_thinned_with_both_ends():
    kept = _thin([{"step": step, "train/loss": float(step)} for step in range(1, 5001)], 100)
    assert len(kept["x"]) == 100 and (kept["x"][0], kept["x"][-1]) == (1, 5000)
    assert kept["y"]["train/loss"] == kept["x"]


@pytest.mark.parametrize("content", [None, "", '{"kind": "st'])
def test_an_empty_or_half_written_folder_is_told_of(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
        (tmp_path / "config.json").write_text('{"depth": ')
    seen = RunFolder(tmp_path).summary()
    assert seen["state"] == "empty" and "wait for its first step" in seen["message"]
    record = export(ExportConfig(log=str(tmp_path), out=str(tmp_path / "out")))
    assert record["charts"] == 0 and "wait for its first step" in (tmp_path / "out" / "index.html").read_text()


def test_a_run_that_goes_on_is_running(trained, tmp_path):
    lines = (trained.logs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if '"end"' not in line))
    assert RunFolder(tmp_path).summary()["state"] == "running"


def test_a_damaged_log_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(SystemExit) as ended:
        viz_export.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 2 and "no record of training" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another"):
        export(ExportConfig(log=str(trained.logs), out=str(tmp_path / "file" / "out")))


@pytest.mark.browser
@pytest.mark.timeout(240)
def test_the_report_opens_from_a_file_and_shows_everything(browser, trained, tmp_path, capsys):
    viz_export.main([str(trained.logs), f"--out={tmp_path / 'report'}"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    moved = shutil.move(tmp_path / "report", tmp_path / "elsewhere")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((moved / "index.html").as_uri())
    page.wait_for_function("document.body.dataset.ready")
    assert page.locator("figure.chart").count() == record["charts"] > 20
    assert all("L" in path for path in page.eval_on_selector_all("figure.chart path", "all => all.map(one => one.getAttribute('d'))"))
    assert page.locator("#map .expert").count() == record["experts"] == sum(trained.record["experts"])
    assert page.locator("#leaders tbody tr").count() == min(20, record["experts"])
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 200)")
    assert page.locator("#pictures img").count() == record["pictures"] == 11
    assert page.locator("#samples pre").count() > 0 and page.locator("#family a").get_attribute("href") == "family.html"
    assert problems == [] and all(url.startswith("file:") for url in requests)
    page.close()
