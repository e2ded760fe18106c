"""`scripts.tune_bio_params` from the command line: a search from its screening to a model that is trained with the winner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.tuning.monitor import Curves, Mirror, population
from scripts import bench_stack, tune_bio_params
from tests.tuning.fakes import settings
from tests.tuning.test_evolver import search

SMALL = ["--steps=2", "--rows=2", "--eval_rows=4", "--n_layer=1", "--n_embd=16", "--head_dim=8", "--tasks=recall", "--recall.distance=8"]
SMALL += ["--device=cpu"]


def run(capsys, *words: str) -> dict:
    tune_bio_params.main(list(words))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_search_ends_in_a_preset_that_training_takes(capsys, tmp_path: Path) -> None:
    knobs = "--knobs=tau_c,barrier_strength,theta"
    said = run(capsys, "sanity", *SMALL, knobs, "--gate_seeds=2", "--popsize=2", "--seeds=1", f"--run_dir={tmp_path / 'sane'}")
    assert said["ready"] in (True, False) and said["smoke"]["generation"] == 2 and said["rosenbrock"]["least"] < 1e-8
    screen = run(capsys, "sensitivity", *SMALL, knobs, "--points=1", "--trajectories=1", "--top=2", f"--run_dir={tmp_path}")
    flags = [*SMALL, f"--screening={tmp_path / 'sensitivity.json'}", "--popsize=3", "--seeds=1", f"--run_dir={tmp_path / 'run'}"]
    first = run(capsys, "optimize", *flags, "--generations=1")
    assert sorted(first["best"]) == sorted(screen["top"]) and first["stop_reason"] == "all 1 generations are done"
    second = run(capsys, "optimize", *flags, "--generations=2", "--resume=1")
    assert second["new_generations"] == 1 and list((tmp_path / "run").glob("events.out.tfevents.*"))
    report = run(capsys, "report", f"--run_dir={tmp_path / 'run'}")
    assert report["generations"] == 2 and report["best"] == second["best"]
    out = tmp_path / "tuned.json"
    best = run(capsys, "best", f"--run_dir={tmp_path / 'run'}", f"--out={out}", "--confirm_seeds=2", "--device=cpu")
    assert len(best["confirmed"]["differences"]) == 2 and best["confirmed"]["p"] >= 0.25 and not best["confirmed"]["wins"]
    winner = SynapticConfig.preset(str(out))
    assert {name: getattr(winner, name) for name in best["values"]} == best["values"]
    config = TrainConfig(synapses=True, syn_preset=str(out), syn_cfg=winner)
    assert config.default_run_name().endswith("-synaptic-tuned")


@pytest.mark.parametrize(
    "words, said",
    [
        (["optimise"], "did you mean 'optimize'"),
        (["optimize", "--knobs=tau_rpp"], "did you mean 'tau_rrp'"),
        (["optimize", "--sigma0=2"], "out of bounds"),
        (["sensitivity", "--points=0", "--trajectories=0"], "leave nothing to measure"),
        (["best", "--run_dir=.", "--out=x.txt"], "does not end with .json"),
        (["report", "--run_dir=nowhere"], "does not exist"),
        (["optimize", "--syn_preset=none.json"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(capsys, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as error:
        tune_bio_params.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_the_population_bench_reports_its_ratio(capsys) -> None:
    words = ["--models=2", "--rows=1", "--context=8", "--n_layer=1", "--n_embd=16", "--head_dim=8", "--seconds=0", "--device=cpu"]
    bench_stack.main(words)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["stack_ratio"]["2"] > 0 and set(record["step_ms"]) == {"one model", "2 as one"}


def test_tensorboard_gets_every_curve_and_both_heat_maps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    search(tmp_path, watchers=[Curves()], generations=3)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "sigma",
        "fitness/best",
        "fitness/best_so_far",
        "budget/minutes",
        "eigenvalues/2",
        "knobs/tau_c/mean",
        "knobs/theta/high",
    } <= tags
    assert set(events.Tags()["images"]) == {"covariance", "correlation"} and len(events.Scalars("sigma")) == 3
    low, mean, high = (events.Scalars(f"knobs/tau_c/{name}")[1].value for name in ("low", "mean", "high"))
    assert 1 <= low < mean < high <= 4096


def test_the_population_is_shown_with_its_knobs() -> None:
    from rich.console import Console

    space = settings(Path("x")).space()
    console = Console(width=100)
    with console.capture() as captured:
        console.print(population(space, "generation 1", [[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]], [-0.25, None]))
    assert all(text in captured.get() for text in ("generation 1", "-0.25", "...", "4.1e+03", "tau_c"))


def test_trials_are_mirrored_into_a_journal(tmp_path: Path) -> None:
    try:
        import optuna
    except ImportError:
        with pytest.raises(UserError, match="install the extra tune"):
            search(tmp_path, watchers=[Mirror()], generations=1)
        return
    for generations, resume in ((2, False), (3, True)):
        search(tmp_path, watchers=[Mirror()], generations=generations, resume=resume)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.log"))
    study = optuna.load_study(study_name="tune_bio_params", storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 18 and study.best_value < 0 and set(study.best_params) == {"tau_c", "theta", "release_bias"}
