"""The settings of the tuner's commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.config import PRESETS, REQUIRED, SynapticConfig, device_knob, knob, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.objectives import ObjectiveConfig
from bio_inspired_nanochat.tuning.space import GROUPS, Space, make_space, winners_of

STAGNATION_ACTIONS = ("stop", "sigma_reset", "none")


@dataclass(frozen=True)
class SearchConfig(ObjectiveConfig):
    """What all commands share: the knobs, the objective, and where it runs."""

    syn_preset: str = knob("memory", f"where the search begins: one of {', '.join(PRESETS)}, or a preset file")
    syn_cfg: SynapticConfig = knob(lambda: SynapticConfig.preset("memory"), "constants that the search begins with")
    knobs: tuple[str, ...] = knob((), "knobs to search, without syn_cfg in front; none given: those of --group that act")
    group: str = knob(
        "all", "part of the synapse to search; the winners of a preset file stay fixed then", choices=("all", *GROUPS), off="all"
    )
    seeds: int = knob(2, "seeds that every candidate is measured under", lo=1, hi=1000)
    seed: int = knob(0, "seed of the search and of all that it draws", lo=0, hi=1 << 40)
    device: str = device_knob()
    run_dir: str | None = knob(None, "folder of the run; auto is tuning/COMMAND in the base folder")
    workers: int = knob(0, "processes that train candidates; 0 trains in this one", lo=0, hi=256, off=0)
    eval_timeout: float = knob(3600.0, "a worker that takes longer loses its candidates, which rank worst", lo=0.1, hi=1e6, unit="seconds")

    def space(self) -> Space:
        """The search space. Raises UserError for knobs that cannot be searched."""
        fixed = winners_of(self.syn_preset) if self.group != "all" else []
        return make_space(self.syn_cfg, self.knobs, self.group, fixed)

    def folder(self, command: str) -> Path:
        """The folder of the run, made. Raises UserError when it cannot be."""
        path = base_dir() / "tuning" / command if self.run_dir is None else Path(self.run_dir).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={str(path)!r} cannot be made ({error.strerror}): give a writable folder") from None
        return path


@dataclass(frozen=True)
class SanityConfig(SearchConfig):
    """Check the optimizer and the objective: known functions, two generations, and whether the objective tells good from bad."""

    gate_seeds: int = knob(4, "seeds of the readiness gate", lo=2, hi=1000)
    gate_sds: float = knob(3.0, "signal that makes the objective ready, in standard deviations of seed noise", lo=0.0, hi=100.0)
    popsize: int = knob(4, "candidates of a generation of the smoke run", lo=2, hi=1000)


@dataclass(frozen=True)
class SensitivityConfig(SearchConfig):
    """Rank the knobs: one at a time and by Morris screening, under matched seeds."""

    trajectories: int = knob(4, "Morris trajectories; 0 leaves them out", lo=0, hi=1000, off=0)
    points: int = knob(2, "values that a knob is moved to, one at a time; 0 leaves it out", lo=0, hi=100, off=0)
    top: int = knob(10, "knobs to name for the search", lo=1, hi=1000)
    resume: bool = knob(False, "go on with what --run_dir holds of the same measurements", off=False)
    census_steps: int = knob(0, "reject the knobs that a census of so many training steps finds inert; 0 skips it", lo=0, hi=1 << 20, off=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trajectories and not self.points:
            raise UserError("trajectories=0 and points=0 leave nothing to measure: raise one of them")


@dataclass(frozen=True)
class OptimizeConfig(SearchConfig):
    """Search by CMA-ES."""

    screening: str | None = knob(None, "sensitivity.json whose top knobs are searched", path="file", none="none")
    generations: int = knob(12, "generations of the search", lo=1, hi=1 << 20)
    popsize: int = knob(10, "candidates of a generation", lo=2, hi=1 << 16)
    sigma0: float = knob(0.2, "first step size, as a share of each axis", lo=1e-4, hi=1.0)
    reevaluate: int = knob(
        2, "best candidates of a generation that are measured again, under as many further seeds", lo=0, hi=1 << 16, off=0
    )
    resume: bool = knob(False, "go on from the last finished generation in --run_dir", off=False)
    budget_minutes: float = knob(
        0.0, "end after the generation that passes this time; 0 is no limit", lo=0.0, hi=1e7, off=0.0, unit="minutes"
    )
    stagnation_gens: int = knob(20, "generations without improvement that count as stagnation; 0 never", lo=0, hi=1 << 20, off=0)
    stagnation_min_improve: float = knob(0.01, "least improvement of the best fitness, in its own unit", lo=0.0, hi=1e6)
    stagnation_action: str = knob("stop", "what stagnation does", choices=STAGNATION_ACTIONS)
    early_stop: bool = knob(True, "end when CMA-ES says that it has converged", off=False)
    optuna: bool = knob(False, "mirror all trials into an Optuna journal in --run_dir (needs the extra tune)", off=False)
    live: bool = knob(True, "show the population on a terminal while it is trained", off=False)
    tensorboard: bool = knob(True, "write TensorBoard curves to --run_dir", off=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.screening is not None and self.knobs:
            raise UserError("--screening and --knobs both name what is searched: give one of them")


@dataclass(frozen=True)
class ReportConfig:
    """Print what a run found."""

    run_dir: str = knob(REQUIRED, "folder of the run", path="dir")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class BestConfig:
    """Write the best candidate as a preset file, after measuring it against the start under fresh seeds."""

    run_dir: str = knob(REQUIRED, "folder of the run", path="dir")
    out: str = knob("tuned.json", "preset file to write")
    confirm_seeds: int = knob(5, "fresh seeds for a paired test against the start; 0 skips it", lo=0, hi=1000, off=0)
    device: str = device_knob()

    def __post_init__(self) -> None:
        validate(self)
        if not self.out.endswith(".json"):
            raise UserError(f"out={self.out!r} does not end with .json, by which --syn_preset knows a file: use {self.out}.json")
