"""The search: it finds, it stops for a reason that it says, and a run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.evolver import Watcher, optimize
from bio_inspired_nanochat.tuning.strategy import load_state, make_strategy, ranked, save_state
from scripts import tune_bio_params
from tests.tuning.fakes import Fake, settings

ROOT = Path(__file__).resolve().parents[2]


def search(folder: Path, evaluator: Fake | None = None, watchers=(), **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    config = settings(folder, **changes)
    return optimize(config, config.space(), evaluator or Fake(), folder, watchers)


def written(folder: Path) -> list[dict[str, Any]]:
    """The generations of a run, without their clock."""
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_search_finds_the_bottom_of_a_bowl(tmp_path: Path) -> None:
    record = search(tmp_path, generations=25, popsize=8)
    assert record["best"]["tau_c"] == pytest.approx(200, rel=0.3)
    assert record["best"]["theta"] == pytest.approx(-1, abs=0.3) and record["best"]["release_bias"] == pytest.approx(2, abs=0.6)
    assert record["best_fitness"] < -0.8 and record["sigma"] < 0.1


@pytest.mark.parametrize("dies", [1, 2, 5, 8])
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(tmp_path: Path, dies: int) -> None:
    """Each generation calls the evaluator twice: for its candidates, and for the best of them again."""
    whole = search(tmp_path / "whole")
    cut = search(tmp_path / "cut", Fake(dies=dies))
    assert cut["stop_reason"].startswith("interrupted") and cut["generation"] == (dies - 1) // 2
    np.random.seed(99)  # what the process drew in between must not matter
    resumed = search(tmp_path / "cut", resume=True)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    assert resumed["best"] == whole["best"] and resumed["sigma"] == whole["sigma"] and resumed["evaluations"] == whole["evaluations"]
    assert (tmp_path / "cut/best_params.json").read_text() == (tmp_path / "whole/best_params.json").read_text()


def test_a_line_of_a_generation_that_was_not_saved_is_dropped(tmp_path: Path) -> None:
    search(tmp_path / "whole")
    search(tmp_path / "cut", Fake(dies=5))
    with open(tmp_path / "cut/progress.jsonl", "a") as file:
        file.write('{"generation": 3, "best": -9')
    search(tmp_path / "cut", resume=True)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_is_continued_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    small = ["--steps=3", "--rows=4", "--eval_rows=8", "--n_layer=1", "--n_embd=16", "--head_dim=8", "--seeds=1", "--tasks=recall"]
    small += [
        "--recall.distance=8",
        "--popsize=4",
        "--device=cpu",
        "--knobs=tau_c,theta",
        "--reevaluate=1",
        "--tensorboard=0",
        "--early_stop=0",
    ]
    command = [sys.executable, "-m", "scripts.tune_bio_params", "optimize", *small]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, "--generations=500", f"--run_dir={killed}"], env=environment, stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not (killed / "es_gen0002.pkl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, threads = len(written(killed)) + 2, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder, words in ((killed, ["--resume=1"]), (whole, [])):
            tune_bio_params.main([*command[3:], f"--generations={done}", f"--run_dir={folder}", *words])
    finally:
        torch.set_num_threads(threads)
    assert len(written(killed)) == done and written(killed) == written(whole)
    assert (killed / "best_params.json").read_text() == (whole / "best_params.json").read_text()


@pytest.mark.parametrize(
    "changes, flat, said, generations",
    [
        ({"generations": 3}, False, "all 3 generations are done", 3),
        ({"budget_minutes": 1e-9}, False, "the budget of", 1),
        ({"generations": 50, "stagnation_gens": 4}, True, "stagnation: no improvement by 0.01 in 4", 5),
        ({"generations": 8, "stagnation_gens": 3, "stagnation_action": "none"}, True, "all 8", 8),
        ({"generations": 400, "early_stop": True, "stagnation_gens": 0}, True, "converged, says CMA-ES", None),
    ],
)
def test_the_search_says_why_it_stopped(tmp_path: Path, capsys, changes: dict, flat: bool, said: str, generations: int | None) -> None:
    record = search(tmp_path, Fake(flat=flat), **changes)
    assert said in record["stop_reason"] and f"stopped: {record['stop_reason']}" in capsys.readouterr().out
    assert record["generation"] == generations or (generations is None and record["generation"] < 400)


def test_stagnation_can_widen_the_search_again(tmp_path: Path, capsys) -> None:
    search(tmp_path, Fake(flat=True), generations=12, stagnation_gens=3, stagnation_action="sigma_reset")
    assert capsys.readouterr().out.count("the step size is set back to 0.2") >= 2


def test_a_diverged_candidate_ranks_worst_and_never_in_the_middle(tmp_path: Path) -> None:
    assert ranked([3.0, math.nan, 1.0, math.inf]) == [3.0, 6.0, 1.0, 6.0]
    assert ranked([math.inf, math.nan]) == [1.0, 1.0]
    told: list[list[float]] = []

    class Listener(Watcher):
        def on_start(self, config, space, folder, generation) -> None:
            self.space = space

        def on_generation(self, progress, candidates, strategy) -> None:
            told.append([one.fitness for one in candidates])
            assert list(strategy.fit.fit) == sorted(ranked(told[-1]))
            worst = max(strategy.fit.fit)
            assert list(strategy.fit.fit).count(worst) == sum(map(math.isinf, told[-1])) or not any(map(math.isinf, told[-1]))

    record = search(tmp_path, Fake(broken=[(1, 1), (1, 4), (3, 2)]), [Listener()], generations=3)
    assert [sum(map(math.isinf, one)) for one in told] == [2, 1, 0] and record["diverged"] == 3
    assert math.isinf(told[0][0]) and math.isinf(told[0][3])


def test_the_first_setting_must_not_diverge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begins with diverges"):
        search(tmp_path, Fake(broken=[(1, 0)]))


def test_seed_zero_is_a_seed() -> None:
    first, again, other = (np.array(make_strategy([0.5] * 3, 0.2, 5, seed).ask()) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).all()


def test_a_state_is_only_read_from_its_own_folder_and_undamaged(tmp_path: Path) -> None:
    search(tmp_path / "run", generations=1)
    latest = tmp_path / "run/es_latest.pkl"
    load_state(latest, tmp_path / "run")
    with pytest.raises(UserError, match="does not lie in the run's folder"):
        load_state(latest, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/es_latest.pkl").symlink_to(latest)
    with pytest.raises(UserError, match="does not lie in the run's folder"):
        load_state(tmp_path / "other/es_latest.pkl", tmp_path / "other")
    for wrong in (latest.read_bytes()[:-1], latest.read_bytes().replace(b"sha256 ", b"sha256 0"), pickle.dumps({"a": 1})):
        latest.write_bytes(wrong)
        with pytest.raises(UserError, match="is damaged"):
            search(tmp_path / "run", resume=True)
    save_state(latest, {"strategy": None})


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no search"):
        search(tmp_path / "run", resume=True)
    search(tmp_path / "run", generations=1)
    with pytest.raises(UserError, match="add --resume=1"):
        search(tmp_path / "run")
    with pytest.raises(UserError, match="popsize differs"):
        search(tmp_path / "run", resume=True, popsize=7)
    assert search(tmp_path / "run", resume=True, generations=2)["new_generations"] == 1
