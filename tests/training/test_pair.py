"""Two processes meet trouble alike: they stop, skip and resume at the same step, and neither waits for the other for ever."""

import json
import os

import pytest
from filelock import FileLock

from tests.training.launch import seen_by
from tests.training.pair import KINDS


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """What two ranks saw; workers of one test session share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "seen.json").exists():
            (folder / "seen.json").write_text(json.dumps(seen_by(2, "tests.training.pair", out=folder)))
        return json.loads((folder / "seen.json").read_text())


def test_nan_on_one_rank_stops_both_at_the_same_step_and_names_its_batch(pair):
    first, second = (seen["stop"] for seen in pair)
    assert first == second and first["step"] == 3
    assert "step 3: the loss is not finite" in first["said"] and "batch of rank 1: 4 documents, rows:20, rows:21" in first["said"]


@pytest.mark.parametrize("kind", ["skip", "skip experts"])
def test_nan_on_one_rank_is_skipped_by_both(pair, kind):
    first, second = (seen[kind] for seen in pair)
    assert first["faults"] == [[3, "the loss is not finite", [1]]] and second["faults"] == []  # rank 0 alone logs
    assert (first["steps"], first["skipped"]) == (second["steps"], second["skipped"]) == (6, 1)
    assert first["weight"] == second["weight"] and "nan" not in first["weight"], "the ranks hold the same weights"


@pytest.mark.parametrize(("phase", "steps", "owed"), [("train", 4, []), ("life", 4, []), ("eval", 3, ["eval"]), ("sample", 3, ["sample"])])
def test_a_signal_to_one_rank_in_any_phase_stops_both(pair, phase, steps, owed):
    first, second = (seen[phase] for seen in pair)
    assert first["fired"] != second["fired"], "one of them got it"
    assert first["steps"] == second["steps"] == steps
    assert {first["stopped"], second["stopped"]} == {"SIGTERM", "signal"} or phase == "sample" and first["stopped"] == "SIGTERM"
    assert first["owed"] == second["owed"] == owed


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_twice_bit_for_bit(pair, kind):
    seen = pair[0][kind]
    assert seen["parts"] == seen["whole"] and len(set(seen["whole"])) == len(seen["whole"]) >= 5
    assert seen["ends"][0] == seen["ends"][1] == pair[1][kind]["ends"][0] == pair[1][kind]["ends"][1]
    if kind == "experts":
        assert seen["record"]["lineage_events"] > 0, "the life cycle ran between the stops"
