"""What a search found, from the files of its folder: the table of generations, and the winner as a preset file."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import check_writable, say, stable_hash, table
from bio_inspired_nanochat.config import SynapticConfig, from_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tuning.config import BestConfig, OptimizeConfig, ReportConfig
from bio_inspired_nanochat.tuning.evolver import measure
from bio_inspired_nanochat.tuning.space import write_preset
from bio_inspired_nanochat.tuning.workers import Local


def report(config: ReportConfig) -> dict[str, Any]:
    """Print the generations and the best candidate; returns the script's last line. Raises UserError for a folder without a search."""
    folder = Path(config.run_dir)
    lines = [json.loads(line) for line in _read(folder / "progress.jsonl").splitlines()]
    columns = ("generation", "best", "mean", "best_so_far", "sigma", "diverged", "seconds")
    table(columns, [tuple(line[name] for name in columns) for line in lines])
    if not lines or lines[-1]["best_so_far"] is None:
        return {"generations": len(lines), "best_fitness": None, "best": {}, "run_dir": str(folder)}
    best = json.loads(_read(folder / "best_params.json"))
    default = from_dict(OptimizeConfig, json.loads(_read(folder / "config.json"))["config"]).syn_cfg
    table(("knob", "start", "best"), [(name, getattr(default, name), value) for name, value in best["values"].items()])
    if best["fitness"] >= 0:
        say("the best candidate is no better than the start")
    found = {"generations": len(lines), "best_fitness": best["fitness"], "best_generation": best["generation"], "best": best["values"]}
    return found | {"diverged": sum(line["diverged"] for line in lines), "run_dir": str(folder)}


def best(config: BestConfig) -> dict[str, Any]:
    """Write the preset file, with the outcome of the paired test in it; returns the script's last line."""
    folder, out = Path(config.run_dir), check_writable("out", config.out)
    found = json.loads(_read(folder / "best_params.json"))
    run = from_dict(OptimizeConfig, json.loads(_read(folder / "config.json"))["config"])
    winner = from_dict(SynapticConfig, found["syn_cfg"], prefix="syn_cfg.")
    about = {"searched": found["searched"], "fitness": found["fitness"], "objective": run.objective}
    if config.confirm_seeds:
        seeds = [stable_hash(run.seed, "confirm", i) for i in range(config.confirm_seeds)]
        (differences,), _ = measure(run, Local(run, config.device), run.syn_cfg, [winner], seeds, config.device)
        p = sign_flip(differences)
        wins = all(map(math.isfinite, differences)) and statistics.fmean(differences) < 0 and p <= 0.05
        about["confirmed"] = {"differences": differences, "mean": statistics.fmean(differences), "p": p, "wins": wins}
        verdict = "better than the start" if wins else "not shown to be better than the start"
        numbers = f"mean difference {statistics.fmean(differences):+.4g}, p = {p:.3g} (paired, one-sided)"
        say(f"{config.confirm_seeds} fresh seeds: {verdict}, {numbers}")
    write_preset(out, winner, about)
    say(f"wrote {config.out}: train with --synapses=1 --syn_preset={config.out}")
    return about | {"out": config.out, "values": found["values"]}


def sign_flip(differences: Sequence[float]) -> float:
    """One-sided p of "the mean is below zero" by flipping signs: the share of all 2^n assignments with a mean at most as large.

    Exact up to 16 differences, beyond that from 4096 random assignments; 1 when one is not finite.
    Source: Fisher's randomisation test for pairs.
    """
    if not all(map(math.isfinite, differences)):
        return 1.0
    total, sizes = sum(differences), [abs(value) for value in differences]
    sums = [sum(s * value for s, value in zip(signs, sizes, strict=True)) for signs in _signs(len(sizes))]
    return sum(value <= total + 1e-12 for value in sums) / len(sums)


def _signs(count: int) -> list[tuple[int, ...]]:
    if count <= 16:
        return list(itertools.product((-1, 1), repeat=count))
    return [tuple(1 if stable_hash(draw, i) % 2 else -1 for i in range(count)) for draw in range(4096)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give --run_dir=FOLDER of `tune_bio_params optimize`") from None
