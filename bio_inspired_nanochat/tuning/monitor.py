"""What a search shows while it runs: curves in TensorBoard, the population on the terminal, trials in an Optuna journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.common.console import on_terminal
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.config import OptimizeConfig
from bio_inspired_nanochat.tuning.evolver import Candidate, Progress, Watcher
from bio_inspired_nanochat.tuning.space import Space


def watchers_of(config: OptimizeConfig) -> list[Watcher]:
    """The watchers that the flags ask for. Raises UserError for a mirror whose package is missing."""
    watchers: list[Watcher] = [Lines()]
    if config.tensorboard:
        watchers.append(Curves())
    if config.live and on_terminal():
        watchers.append(Live())
    if config.optuna:
        watchers.append(Mirror())
    return watchers


class Lines(Watcher):
    """A line per generation."""

    def on_generation(self, progress: Progress, candidates: Sequence[Candidate], strategy: Any) -> None:
        """See `Watcher`."""
        values = sorted(one.fitness for one in candidates)
        best = math.inf if progress.best is None else progress.best.fitness
        lost = sum(not math.isfinite(value) for value in values)
        say(
            f"generation {progress.generation}: best {values[0]:+.4g}, median {values[len(values) // 2]:+.4g}, so far {best:+.4g}, "
            f"sigma {strategy.sigma:.3g}{f', {lost} diverged or lost' if lost else ''}, {progress.seconds:.0f} s"
        )


class Curves(Watcher):
    """TensorBoard: fitness, step size, mean and spread of every knob, covariance and correlation, eigenvalues, time."""

    def on_start(self, config: OptimizeConfig, space: Space, folder: Path, generation: int) -> None:
        """See `Watcher`. Without the package tensorboard it says so and stays silent."""
        self.writer, self.space, self.config = None, space, config
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("notice: no TensorBoard log, because the package tensorboard is not installed")
            return
        self.writer = SummaryWriter(str(folder), purge_step=generation + 1 if generation else None)

    def on_generation(self, progress: Progress, candidates: Sequence[Candidate], strategy: Any) -> None:
        """See `Watcher`."""
        if self.writer is None:
            return
        step, values = progress.generation, [one.fitness for one in candidates if math.isfinite(one.fitness)]
        scalars = {"sigma": float(strategy.sigma), "diverged": len(candidates) - len(values), "budget/minutes": progress.seconds / 60}
        scalars["budget/evaluations"] = progress.evaluations
        if values:
            scalars |= {"fitness/best": min(values), "fitness/mean": float(np.mean(values)), "fitness/worst": max(values)}
        if progress.best is not None:
            scalars["fitness/best_so_far"] = progress.best.fitness
        covariance = np.asarray(strategy.sm.covariance_matrix, dtype=float) * strategy.sigma**2
        spread = np.sqrt(np.diag(covariance))
        mean = np.asarray(strategy.result.xfavorite, dtype=float)
        for axis, u, sd in zip(self.space.axes, mean, spread, strict=True):
            scalars |= {f"knobs/{axis.name}/mean": axis.value(u), f"knobs/{axis.name}/low": axis.value(u - sd)}
            scalars[f"knobs/{axis.name}/high"] = axis.value(u + sd)
        for index, value in enumerate(np.sort(np.linalg.eigvalsh(covariance))[::-1]):
            scalars[f"eigenvalues/{index}"] = float(value)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self._heat_map("covariance", covariance, float(np.abs(covariance).max()), step)
        self._heat_map("correlation", covariance / np.outer(spread, spread), 1.0, step)
        self.writer.flush()

    def _heat_map(self, name: str, matrix: np.ndarray, limit: float, step: int) -> None:
        from matplotlib.figure import Figure

        size = 2 + 0.35 * len(matrix)
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(matrix)), self.space.names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(matrix)), self.space.names, fontsize=7)
        axes.set_title(f"{name} of the search distribution, on axes from 0 to 1", fontsize=8)
        figure.colorbar(image)
        assert self.writer is not None
        self.writer.add_figure(name, figure, step)

    def close(self) -> None:
        """See `Watcher`."""
        if self.writer is not None:
            self.writer.close()


class Live(Watcher):
    """The population on a terminal: where each candidate lies on each axis, and, once it is trained, its fitness."""

    def on_start(self, config: OptimizeConfig, space: Space, folder: Path, generation: int) -> None:
        """See `Watcher`."""
        from rich.live import Live as Display

        self.space = space
        self.display = Display(refresh_per_second=4)
        self.display.start()

    def on_asked(self, generation: int, points: Sequence[Sequence[float]]) -> None:
        """See `Watcher`."""
        self.display.update(population(self.space, f"generation {generation}, in training", points, [None] * len(points)))

    def on_generation(self, progress: Progress, candidates: Sequence[Candidate], strategy: Any) -> None:
        """See `Watcher`."""
        ordered = sorted(candidates, key=lambda one: one.fitness)
        title = f"generation {progress.generation}, sigma {strategy.sigma:.3g}"
        self.display.update(population(self.space, title, [one.point for one in ordered], [one.fitness for one in ordered]))

    def close(self) -> None:
        """See `Watcher`."""
        self.display.stop()


def population(space: Space, title: str, points: Sequence[Sequence[float]], values: Sequence[float | None]) -> Any:
    """A rich table with a row per candidate: its fitness, dots while it is in training, and its knobs."""
    from rich.table import Table

    grid = Table(title=title)
    for name in ("fitness", *space.names):
        grid.add_column(name, justify="right", overflow="ellipsis", max_width=12)
    for point, value in zip(points, values, strict=True):
        shown = "..." if value is None else f"{value:+.4g}"
        grid.add_row(shown, *(f"{axis.value(u):.3g}" for axis, u in zip(space.axes, point, strict=True)))
    return grid


class Mirror(Watcher):
    """Every candidate as a trial of an Optuna study in the journal file `optuna.log`, for optuna-dashboard and its plots of importance."""

    def on_start(self, config: OptimizeConfig, space: Space, folder: Path, generation: int) -> None:
        """See `Watcher`. Trials of generations that a resumed run does again are not written twice.

        Raises UserError without the package optuna.
        """
        try:
            import optuna
        except ImportError:
            raise UserError("optuna=1 needs the package optuna: install the extra tune, or leave out --optuna") from None
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.space = optuna, space
        storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
        self.study = optuna.create_study(storage=storage, study_name="tune_bio_params", load_if_exists=True)
        self.known = {trial.user_attrs.get("generation") for trial in self.study.get_trials(deepcopy=False)}
        self.ranges = {a.name: optuna.distributions.FloatDistribution(a.lo, a.hi, log=a.log) for a in space.axes}

    def on_generation(self, progress: Progress, candidates: Sequence[Candidate], strategy: Any) -> None:
        """See `Watcher`."""
        if progress.generation in self.known:
            return
        states = self.optuna.trial.TrialState
        for one in candidates:
            sound = math.isfinite(one.fitness)
            self.study.add_trial(
                self.optuna.trial.create_trial(
                    state=states.COMPLETE if sound else states.FAIL,
                    value=one.fitness if sound else None,
                    params=one.values,
                    distributions=self.ranges,
                    user_attrs={"generation": progress.generation, "number": one.number},
                )
            )
