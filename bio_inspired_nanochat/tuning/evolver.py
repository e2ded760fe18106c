"""The search: generations of candidates, their fitness, when to stop, and what is written down.

A generation is asked, trained and told as one; its state is saved at its end. A run that is killed in the middle of a generation asks the
same candidates again and goes on as if nothing had happened, because seeds and candidates follow from the saved state alone.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say, stable_hash, write_atomic
from bio_inspired_nanochat.config import SynapticConfig, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.config import OptimizeConfig
from bio_inspired_nanochat.tuning.objectives import ObjectiveConfig, Score, evaluate, fitness
from bio_inspired_nanochat.tuning.space import Space
from bio_inspired_nanochat.tuning.strategy import load_state, make_strategy, ranked, save_state
from bio_inspired_nanochat.tuning.workers import Evaluator, Local

# What may differ between a run and its continuation.
FREE = frozenset(
    ("generations", "budget_minutes", "resume", "run_dir", "device", "eval_timeout", "optuna", "live", "tensorboard", "early_stop")
    + ("stagnation_gens", "stagnation_min_improve", "stagnation_action", "graph")
)


@dataclass(frozen=True)
class Candidate:
    """One candidate of a generation. values: its knobs; each: fitness per seed; fitness: their mean, infinite when one diverged."""

    number: int
    point: list[float]
    values: dict[str, float]
    each: list[float]
    scores: list[Score]

    @property
    def fitness(self) -> float:
        """Mean over the seeds; infinite for a candidate that diverged under one of them."""
        return statistics.fmean(self.each) if all(map(math.isfinite, self.each)) else math.inf


@dataclass
class Progress:
    """Where a search is. best: the best candidate so far; improved: the generation that last improved it enough."""

    generation: int = 0
    best: Candidate | None = None
    best_generation: int = 0
    improved: int = 0
    bar: float = math.inf
    seconds: float = 0.0
    evaluations: int = 0
    diverged: int = 0


class Watcher:
    """Gets told of a search: of a population before it is trained, of every generation, and of the end. A watcher overrides what it needs."""

    def on_start(self, config: OptimizeConfig, space: Space, folder: Path, generation: int) -> None:
        """Before the first generation of this process."""

    def on_asked(self, generation: int, points: Sequence[Sequence[float]]) -> None:
        """A population is about to be trained."""

    def on_generation(self, progress: Progress, candidates: Sequence[Candidate], strategy: Any) -> None:
        """A generation is over."""

    def close(self) -> None:
        """The search is over."""


def measure(
    config: ObjectiveConfig,
    evaluator: Evaluator,
    base: SynapticConfig,
    candidates: Sequence[SynapticConfig],
    seeds: Sequence[int],
    device: str,
) -> tuple[list[list[float]], list[list[Score]]]:
    """Fitness and scores [candidate][seed]; the base is trained beside them under the same seeds.

    A base that was lost with its worker is trained again, here. Raises UserError when the base itself diverges.
    """
    reference, *scores = evaluator([base, *candidates], seeds)
    if any(one.lost for one in reference):
        (reference,) = evaluate(config, [base], seeds, Local(config, device).device)
    if any(one.diverged for one in reference):
        raise UserError("the configuration that the search begins with diverges: use another --syn_preset or a smaller --optim.matrix_lr")
    return [[fitness(config, score, against) for score, against in zip(row, reference, strict=True)] for row in scores], scores


def optimize(config: OptimizeConfig, space: Space, evaluator: Evaluator, folder: Path, watchers: Sequence[Watcher] = ()) -> dict[str, Any]:
    """Run or resume a search; returns the record of the script's last line. The stop reason is printed in any case."""
    strategy, progress = _begin(config, space, folder)
    for watcher in watchers:
        watcher.on_start(config, space, folder, progress.generation)
    reason, first = None, progress.generation
    try:
        while reason is None:
            reason = stop_reason(config, progress, strategy)
            if reason is None:
                _generation(config, space, evaluator, folder, strategy, progress, watchers)
    except KeyboardInterrupt:
        reason = f"interrupted in generation {progress.generation + 1}; --resume=1 goes on"
    finally:
        for watcher in watchers:
            watcher.close()
    say(f"stopped: {reason}")
    best = progress.best
    record = {"stop_reason": reason, "generation": progress.generation, "new_generations": progress.generation - first}
    record |= {"best_fitness": None if best is None else best.fitness, "best": {} if best is None else best.values}
    record |= {"evaluations": progress.evaluations, "diverged": progress.diverged, "sigma": float(strategy.sigma)}
    return record | {"run_dir": str(folder), "seconds": round(progress.seconds, 3)}


def stop_reason(config: OptimizeConfig, progress: Progress, strategy: Any) -> str | None:
    """Why the search ends now, or None. A stagnating search whose action is sigma_reset gets its first step size back."""
    if progress.generation >= config.generations:
        return f"all {config.generations} generations are done"
    if config.budget_minutes and progress.seconds >= 60 * config.budget_minutes:
        return f"the budget of {config.budget_minutes:g} minutes is used up"
    stuck = progress.generation - progress.improved
    if config.stagnation_gens and stuck >= config.stagnation_gens:
        said = f"no improvement by {config.stagnation_min_improve:g} in {stuck} generations"
        if config.stagnation_action == "stop":
            return f"stagnation: {said}"
        if config.stagnation_action == "sigma_reset":
            say(f"notice: {said}: the step size is set back to {config.sigma0:g}")
            strategy.sigma = config.sigma0
            progress.improved = progress.generation
    if config.early_stop and (reasons := strategy.stop()):
        return "converged, says CMA-ES: " + ", ".join(f"{name}={value}" for name, value in reasons.items())
    return None


def _begin(config: OptimizeConfig, space: Space, folder: Path) -> tuple[Any, Progress]:
    """The strategy and its progress, new or as saved."""
    latest, asked = folder / "es_latest.pkl", folder / "config.json"
    settings = {name: value for name, value in to_dict(config).items() if name not in FREE} | {"searched": space.names}
    settings = json.loads(json.dumps(settings))
    if not config.resume:
        if latest.exists():
            raise UserError(f"run_dir={str(folder)!r} holds a search: add --resume=1 to go on, or give another folder")
        write_atomic(asked, json.dumps(settings | {"config": to_dict(config)}) + "\n")
        (folder / "progress.jsonl").write_text("")
        strategy, progress = make_strategy(space.start(), config.sigma0, config.popsize, config.seed), Progress()
        save_state(latest, {"strategy": strategy, "progress": progress})
        return strategy, progress
    if not latest.exists():
        raise UserError(f"resume=1: {folder} holds no search: leave out --resume, or give the --run_dir of one")
    saved = json.loads(asked.read_text())
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UserError(f"{name} differs from the run in {folder} that --resume=1 goes on with: give the same flags, or another folder")
    state = load_state(latest, folder)
    progress = state["progress"]
    _cut(folder / "progress.jsonl", progress.generation)
    say(f"resuming after generation {progress.generation}")
    return state["strategy"], progress


def _cut(path: Path, generations: int) -> None:
    """Drop what was written after the last saved generation."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_atomic(path, "".join(lines[:generations]))


def _generation(
    config: OptimizeConfig, space: Space, evaluator: Evaluator, folder: Path, strategy: Any, progress: Progress, watchers: Sequence[Watcher]
) -> None:
    """Ask, train, measure the best again, tell, write down."""
    began, number = time.perf_counter(), progress.generation + 1
    points = [[float(u) for u in point] for point in strategy.ask()]
    for watcher in watchers:
        watcher.on_asked(number, points)
    candidates = measured(
        config, space, evaluator, points, [stable_hash(config.seed, "generation", number, i) for i in range(config.seeds)]
    )
    progress.evaluations += len(points) * config.seeds
    again = sorted((one for one in candidates if math.isfinite(one.fitness)), key=lambda one: one.fitness)[: config.reevaluate]
    if again:
        seeds = [stable_hash(config.seed, "again", number, i) for i in range(config.seeds)]
        for one, second in zip(again, measured(config, space, evaluator, [one.point for one in again], seeds), strict=True):
            candidates[one.number] = replace(one, each=one.each + second.each, scores=one.scores + second.scores)
        progress.evaluations += len(again) * config.seeds
    strategy.tell(points, ranked([one.fitness for one in candidates]))
    progress.generation = number
    progress.diverged += sum(not math.isfinite(one.fitness) for one in candidates)
    surest = max(len(one.each) for one in candidates)  # a value under few seeds may be luck
    _compare(config, progress, min((one for one in candidates if len(one.each) == surest), key=lambda one: one.fitness))
    progress.seconds += time.perf_counter() - began
    _write(space, folder, strategy, progress, candidates)
    for watcher in watchers:
        watcher.on_generation(progress, candidates, strategy)


def measured(
    config: OptimizeConfig, space: Space, evaluator: Evaluator, points: Sequence[Sequence[float]], seeds: Sequence[int]
) -> list[Candidate]:
    """The candidates at some points with their fitness under some seeds."""
    configs = [space.config(point) for point in points]
    each, scores = measure(config, evaluator, space.base, configs, seeds, config.device)
    return [Candidate(i, list(point), space.values(point), each[i], scores[i]) for i, point in enumerate(points)]


def _compare(config: OptimizeConfig, progress: Progress, found: Candidate) -> None:
    """Take over a better candidate; note when the best has improved enough."""
    if math.isfinite(found.fitness) and (progress.best is None or found.fitness < progress.best.fitness):
        progress.best, progress.best_generation = found, progress.generation
    if progress.best is not None and progress.best.fitness <= progress.bar - config.stagnation_min_improve:
        progress.bar, progress.improved = progress.best.fitness, progress.generation


def _write(space: Space, folder: Path, strategy: Any, progress: Progress, candidates: Sequence[Candidate]) -> None:
    """The line of a generation, the best parameters, and the state, which comes last: it says that the generation is over."""
    finite = [one.fitness for one in candidates if math.isfinite(one.fitness)]
    line = {
        "generation": progress.generation,
        "best": min(finite) if finite else None,
        "mean": statistics.fmean(finite) if finite else None,
    }
    line |= {"best_so_far": progress.best.fitness if progress.best else None, "sigma": float(strategy.sigma)}
    line |= {
        "diverged": len(candidates) - len(finite),
        "seconds": round(progress.seconds, 3),
        "candidates": [told(one) for one in candidates],
    }
    with open(folder / "progress.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if progress.best is not None:
        best = told(progress.best) | {"generation": progress.best_generation, "searched": space.names}
        write_atomic(
            folder / "best_params.json", json.dumps(best | {"syn_cfg": to_dict(space.config(progress.best.point))}, indent=1) + "\n"
        )
    state = {"strategy": strategy, "progress": progress}
    save_state(folder / f"es_gen{progress.generation:04d}.pkl", state)
    save_state(folder / "es_latest.pkl", state)


def told(one: Candidate) -> dict[str, Any]:
    """A candidate for a JSON record; what is not finite is null."""
    scores = [{name: value for name, value in asdict(score).items() if not math.isnan(value)} for score in one.scores]
    value = one.fitness if math.isfinite(one.fitness) else None
    return {"fitness": value, "each": [x if math.isfinite(x) else None for x in one.each], "values": one.values, "scores": scores}
