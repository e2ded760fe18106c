"""A matrix in one file: what comes out of it is what went in, wherever it is unpacked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study.archive import PackConfig, UnpackConfig, pack, unpack
from bio_inspired_nanochat.study.plan import read_plan
from bio_inspired_nanochat.study.queue import Queue, ResumeConfig, RunConfig
from bio_inspired_nanochat.study.report import ReportConfig, report
from tests.study.planned import HONEST, plan, pretend
from tests.training.tiny import corpus

CRASHING = (
    HONEST
    + """
whole = behave
def behave(run):
    assert run["id"] != "d2-default-s1", folder + "/log.txt is where to look"
    return whole(run)
"""
)


def made(folder: Path) -> Path:
    """A matrix of nine runs, of which one has failed twice, packed."""
    plan(folder / "first")
    Queue(RunConfig(out=str(folder / "first")), pretend(CRASHING)).work()
    file = folder / "matrix.json.gz"
    assert pack(PackConfig(out=str(folder / "first"), file=str(file)))["done"] == 8
    return file


def test_what_is_unpacked_reports_the_same_and_goes_on(tmp_path: Path) -> None:
    file = made(tmp_path)
    held = gzip.decompress(file.read_bytes()).decode()
    assert str(tmp_path) not in held and str(corpus()) not in held, "it says nothing of the machine"
    second = tmp_path / "second"
    assert unpack(UnpackConfig(out=str(second), file=str(file), data_dir=str(corpus())))["new"] == 8
    assert read_plan(second) == read_plan(tmp_path / "first")
    for folder in (tmp_path / "first", second):
        assert report(ReportConfig(out=str(folder)))["failed"] == ["d2-default-s1"]
    for name in ("report.md", "comparisons.csv", "runs.csv"):
        assert (second / "report" / name).read_text() == (tmp_path / "first" / "report" / name).read_text(), name
    assert ".../log.txt is where to look" in (second / "report" / "scorecard.json").read_text()
    Queue(ResumeConfig(out=str(second), retry_failed=True), pretend()).work()
    assert pack(PackConfig(out=str(second)))["done"] == 9
    again = unpack(UnpackConfig(out=str(tmp_path / "first"), file=str(second / "matrix.json.gz"), data_dir=str(corpus())))
    assert (again["done"], again["new"]) == (9, 1), "what is there stays"
    assert report(ReportConfig(out=str(tmp_path / "first")))["failed"] == []


def test_without_the_text_it_can_be_reported_on(tmp_path: Path) -> None:
    file = made(tmp_path)
    unpack(UnpackConfig(out=str(tmp_path / "second"), file=str(file)))
    assert report(ReportConfig(out=str(tmp_path / "second")))["counted"] == 6, "a condition of two seeds is listed apart"


def test_what_cannot_be_unpacked_is_one_line(tmp_path: Path) -> None:
    file, broken = made(tmp_path), tmp_path / "broken.json.gz"
    whole = json.loads(gzip.decompress(file.read_bytes()))
    cases = {
        "Not a gzipped file": b"no gzip",
        "end-of-stream marker": file.read_bytes()[:-30],
        "is damaged": gzip.compress(b"[]"),
        "version 7": {**whole, "version": 7},
        "records": {name: value for name, value in whole.items() if name != "records"},
        "was changed after it was made": {**whole, "plan": {**whole["plan"], "comparisons": []}},
        r"called '\.\./\.\./elsewhere'": {
            **whole,
            "plan": {**whole["plan"], "runs": [{**whole["plan"]["runs"][0], "id": "../../elsewhere"}]},
        },
        "is not a mapping": {**whole, "records": whole["records"] | {"d2-vanilla-s0": "done"}},
        "not iterable": {**whole, "attempts": {"d2-default-s1": 2}},
    }
    for number, (message, content) in enumerate(cases.items()):
        broken.write_bytes(content if isinstance(content, bytes) else gzip.compress(json.dumps(content).encode()))
        with pytest.raises(UserError, match=message):
            unpack(UnpackConfig(out=str(tmp_path / f"out{number}"), file=str(broken)))
        assert not (tmp_path / f"out{number}").exists() and not (tmp_path / "elsewhere").exists(), "nothing was written"
    other = tmp_path / "text"
    other.mkdir()
    (other / "shard_00000.parquet").write_bytes((corpus() / "shard_00000.parquet").read_bytes())
    with pytest.raises(UserError, match="is another text"):
        unpack(UnpackConfig(out=str(tmp_path / "out"), file=str(file), data_dir=str(other)))
    plan(tmp_path / "third", conditions=("vanilla", "default"))
    with pytest.raises(UserError, match="has another plan"):
        unpack(UnpackConfig(out=str(tmp_path / "third"), file=str(file)))
    with pytest.raises(UserError, match="cannot be written"):
        pack(PackConfig(out=str(tmp_path / "first"), file=str(broken / "below" / "x.gz")))
