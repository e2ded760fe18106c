"""The queue: crashes, signals, budgets and several workers, with runs that only pretend; and one real run of two conditions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study import job, queue
from bio_inspired_nanochat.study.job import NO_TEXT
from bio_inspired_nanochat.study.queue import Queue, ResumeConfig, RunConfig, read_attempts, run_queue
from scripts import eval_matrix
from tests import standin
from tests.study.planned import HONEST, TINY, plan, pretend, started
from tests.training.tiny import corpus

CRASH = "def behave(run):\n    if run['conditions'] == ['default'] and run['seed'] == 1:\n        sys.exit('no luck')\n"
ONCE = "def behave(run):\n    if len(open(folder + '/started').read()) == 1 and run['seed'] == 2:\n        os.kill(os.getpid(), 9)\n    return honest(run)"


def honest(tail: str) -> str:
    """A behaviour that falls back on the honest one."""
    return HONEST.replace("def behave", "def honest") + tail


def test_all_runs_are_done_once_and_recorded_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tmp_path)
    said = run_queue(RunConfig(out=str(tmp_path), workers=3), pretend())
    left = [line.split("; ")[1] for line in capsys.readouterr().out.splitlines() if ": done in" in line]
    assert len(left) == 9 and "0 left" in left and all(re.fullmatch(r"0 left|[1-8] left, \d+s at this pace", one) for one in left)
    assert (said["done"], said["new"], said["waiting"], said["failed"], said["smoke"]) == (9, 9, 0, [], True)
    assert set(started(tmp_path).values()) == {1} and len(started(tmp_path)) == 9
    again = run_queue(ResumeConfig(out=str(tmp_path)), pretend())
    assert (again["done"], again["new"]) == (9, 0) and set(started(tmp_path).values()) == {1}


@pytest.mark.parametrize(("workers", "gpus", "shared"), [(1, [], False), (2, [], True), (2, ["0"], True), (2, ["0", "1"], False)])
def test_runs_that_share_a_device_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, gpus: list, shared: bool) -> None:
    plan(tmp_path, conditions=("vanilla",), seeds=(0,))
    monkeypatch.setattr(queue, "_visible_gpus", lambda: gpus)
    run_queue(RunConfig(out=str(tmp_path), workers=workers), pretend())
    (job,) = tmp_path.glob("runs/*/job.json")
    assert json.loads(job.read_text())["shared"] == shared


def test_a_run_that_crashes_is_tried_again_and_costs_no_other(tmp_path: Path) -> None:
    plan(tmp_path)
    said = run_queue(RunConfig(out=str(tmp_path), workers=2), pretend(honest(CRASH + "    return honest(run)\n")))
    assert said["done"] == 8 and said["failed"] == ["d2-default-s1"] and started(tmp_path)["d2-default-s1"] == 2
    attempts = read_attempts(tmp_path / "runs/d2-default-s1")
    assert [one["why"] for one in attempts] == ["exit code 1 without a record"] * 2 and attempts[0]["last_lines"][-1] == "no luck"
    assert run_queue(ResumeConfig(out=str(tmp_path)), pretend())["new"] == 0, "a failed run stays failed"
    said = run_queue(ResumeConfig(out=str(tmp_path), retry_failed=True), pretend())
    assert (said["new"], said["done"], said["failed"]) == (1, 9, [])


def test_a_killed_run_is_begun_anew_at_once(tmp_path: Path) -> None:
    plan(tmp_path, conditions=("vanilla",))
    said = run_queue(RunConfig(out=str(tmp_path)), pretend(honest("\n" + ONCE)))
    assert said["done"] == 3 and started(tmp_path) == {"d2-vanilla-s0": 1, "d2-vanilla-s1": 1, "d2-vanilla-s2": 2}


def test_a_run_that_hangs_is_ended(tmp_path: Path) -> None:
    plan(tmp_path, conditions=("vanilla",), seeds=(0,))
    config = RunConfig(out=str(tmp_path), run_minutes=0.5 / 60, grace=0.2)
    said = run_queue(config, pretend("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef behave(run):\n    time.sleep(60)"))
    assert said["failed"] == ["d2-vanilla-s0"] and read_attempts(tmp_path / "runs/d2-vanilla-s0")[0]["why"] == "took too long"


def test_a_budget_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    plan(tmp_path)
    queue = Queue(RunConfig(out=str(tmp_path), budget_minutes=2.0), pretend(seconds=70.0))
    queue.runs = [run | {"seconds": 1.0} for run in queue.runs]
    said = queue.work()
    assert said["left_out"] == 0 and said["done"] == 9, "70 of the 120 seconds fit"
    plan(tmp_path / "b")
    slow = honest("\ndef behave(run):\n    time.sleep(0.3)\n    return honest(run)")
    queue = Queue(RunConfig(out=str(tmp_path / "b"), budget_minutes=2.0), pretend(slow, seconds=120.0))
    queue.runs = [run | {"seconds": 1.0} for run in queue.runs]
    said = queue.work()
    assert said["done"] == 1 and said["left_out"] == said["waiting"] == 8, "the first run has shown what the others will take"


def test_two_queues_share_a_folder(tmp_path: Path) -> None:
    plan(tmp_path)
    slow = pretend(honest("\ndef behave(run):\n    time.sleep(0.15)\n    return honest(run)"))
    results: list[dict] = []
    threads = [threading.Thread(target=lambda: results.append(run_queue(RunConfig(out=str(tmp_path)), slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(started(tmp_path).values()) == {1} and sum(one["new"] for one in results) == 9
    assert all(one["new"] for one in results), "both have worked"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_queue_that_is_stopped_or_killed_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    plan(tmp_path, conditions=("vanilla",), seeds=(0,))
    place, told = tmp_path / "runs/d2-vanilla-s0", tmp_path / "told"
    queue = os.fork()  # a process of its own without another import of torch
    if queue == 0:
        try:
            slow = pretend("open(folder + '/pid', 'w').write(str(os.getpid()))\ndef behave(run):\n    time.sleep(60)")
            told.write_text(str(run_queue(RunConfig(out=str(tmp_path), grace=5), slow)["stopped"]))
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while not ((place / "pid").exists() and (place / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(queue, number)
    os.waitpid(queue, 0)
    if number == signal.SIGTERM:
        assert told.read_text() == "SIGTERM"
    else:  # its run is still there, as after a crash of the queue alone
        os.kill(int((place / "pid").read_text()), signal.SIGKILL)
    assert read_attempts(place) == [], "neither is a failure of the run"
    assert run_queue(ResumeConfig(out=str(tmp_path)), pretend())["done"] == 1


def test_a_text_that_is_gone_stops_the_queue_and_is_no_run_s_fault(tmp_path: Path) -> None:
    plan(tmp_path)
    gone = (
        f"    if run['seed'] == 1:\n        print('error: data_dir=x does not exist')\n        sys.exit({NO_TEXT})\n    return honest(run)"
    )
    with pytest.raises(UserError, match=r"data_dir=x does not exist; 1 of 9 runs are done, no other counts as failed: restore the text"):
        run_queue(RunConfig(out=str(tmp_path)), pretend(honest("\ndef behave(run):\n" + gone)))
    assert len(started(tmp_path)) == 2 and not list(tmp_path.glob("runs/*/attempts.jsonl"))
    assert run_queue(ResumeConfig(out=str(tmp_path)), pretend())["done"] == 9


@pytest.mark.parametrize("moment", ["before", "on the way"])
def test_numbers_of_another_text_than_the_plan_s_are_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(corpus(), texts)
    monkeypatch.chdir(tmp_path)
    plan(tmp_path / "study", conditions=("vanilla",), seeds=(0,), data_dir="texts")
    monkeypatch.chdir(tmp_path / "study")  # a plan's paths hold from everywhere
    evaluated = job.evaluated
    first = min(texts.iterdir())

    def lose(*inputs: Any) -> Any:
        found = evaluated(*inputs)
        first.unlink()
        return found

    if moment == "before":
        first.unlink()
    else:
        monkeypatch.setattr(job, "evaluated", lose)
    codes = []
    monkeypatch.setattr(queue, "_visible_gpus", list)

    def here(folders: Sequence[Path]) -> list[str]:
        codes.append(job.main(folders))
        return [sys.executable, "-S", "-c", f"print('error: the text has changed'); raise SystemExit({codes[-1]})"]

    with pytest.raises(UserError, match="the text has changed"):
        run_queue(RunConfig(out=str(tmp_path / "study")), here)
    assert codes == [NO_TEXT] and not first.exists() and not list(tmp_path.glob("study/runs/*/record.json"))


def test_seeds_that_share_a_process_are_what_they_are_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", standin.python())  # of the runs
    found = {}
    for workers, processes in ((1, 1), (2, 2)):
        folder, asked = tmp_path / str(workers), []
        plan(folder, conditions=("default",), seeds=(0, 1), evaluations=())

        def command(folders: Sequence[Path], asked: list = asked) -> list[str]:
            asked.append(folders)
            return queue.work_command(folders)

        assert run_queue(RunConfig(out=str(folder), workers=workers), command)["done"] == 2 and len(asked) == processes
        for place in folder.glob("runs/*"):
            assert (place / "log.txt").read_text().count("step 00001/00002") == 1, "a run's log is its own"
            record = json.loads((place / "record.json").read_text())
            curve, metrics = record["curve"], record["metrics"]
            found.setdefault(place.name, []).append(curve["loss"] + [metrics[name] for name in ("val_loss", "final_loss", "params")])
    assert len(found) == 2 and all(together == alone for together, alone in found.values())


@pytest.mark.slow
def test_two_real_conditions_from_plan_to_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", standin.python())  # of the runs

    def run(*words: str) -> dict:
        eval_matrix.main([*words, f"--out={tmp_path}"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    def flag(value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, tuple) else int(value) if isinstance(value, bool) else value

    tiny = TINY | {"seeds": (0,), "conditions": ("vanilla", "default")}
    assert run("plan", *[f"--{name}={flag(value)}" for name, value in tiny.items()])["runs"] == 2
    said = run("run", "--workers=2")
    assert said["done"] == 2 and said["failed"] == [], [path.read_text()[-2000:] for path in tmp_path.glob("runs/*/log.txt")]
    record = json.loads((tmp_path / "runs/d2-default-s0/record.json").read_text())
    assert record["smoke"] and record["config"]["seed"] == 0 and record["data"]["fingerprint"] and record["versions"]["torch"]
    assert record["metrics"]["val_loss"] > 0 and len(record["curve"]["loss"]) == 2 and record["tokens"] == 512
    assert record["shared"] and record["curve"]["seconds"] == [] and record["metrics"]["tok_per_s"] is None
    said = run("report")
    assert said["smoke"] and said["apart"] == 2 and said["scorecard"]["not measured"] == sum(said["scorecard"].values())
    assert "not a result" in (tmp_path / "report/report.md").read_text()
