"""Evaluators without a training: the answer's loss is a bowl over two knobs. Workers import them by name."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.tuning.config import OptimizeConfig
from bio_inspired_nanochat.tuning.objectives import ObjectiveConfig, Score

KNOBS = ("tau_c", "theta", "release_bias")


def bowl(candidate: SynapticConfig, seed: int) -> float:
    """Loss with its minimum of 1 at tau_c = 200, theta = -1, release_bias = 2; the seed shifts all alike."""
    away = (math.log(candidate.tau_c / 200) / 8, (candidate.theta + 1) / 4.5, (candidate.release_bias - 2) / 9)
    return 1 + 5 * sum(x * x for x in away) + seed % 7


def score_all(
    config: ObjectiveConfig, candidates: Sequence[SynapticConfig], seeds: Sequence[int], device: torch.device
) -> list[list[Score]]:
    """Scores of the bowl."""
    return [[Score(answer_loss=bowl(candidate, seed)) for seed in seeds] for candidate in candidates]


def die_or_sleep(
    config: ObjectiveConfig, candidates: Sequence[SynapticConfig], seeds: Sequence[int], device: torch.device
) -> list[list[Score]]:
    """A worker that is killed by a candidate with tau_c = 5 and does not come back from one with tau_c = 6."""
    if any(candidate.tau_c == 5.0 for candidate in candidates):
        os._exit(9)
    if any(candidate.tau_c == 6.0 for candidate in candidates):
        time.sleep(600)
    return score_all(config, candidates, seeds, device)


class Fake:
    """Evaluates the bowl; candidates in `broken` (by number of call and place) diverge, and call `dies` raises KeyboardInterrupt."""

    def __init__(self, dies: int | None = None, broken: Sequence[tuple[int, int]] = (), flat: bool = False) -> None:
        self.dies, self.broken, self.flat, self.calls = dies, set(broken), flat, 0

    def __call__(self, candidates: Sequence[SynapticConfig], seeds: Sequence[int]) -> list[list[Score]]:
        self.calls += 1
        if self.calls == self.dies:
            raise KeyboardInterrupt
        found = score_all(None, candidates, seeds, None)
        if self.flat:
            found = [[Score(answer_loss=1.0) for _ in seeds] for _ in candidates]
        for call, place in self.broken:
            if call == self.calls:
                found[place] = [Score(diverged=True)] * len(seeds)
        return found

    def close(self) -> None:
        pass


def settings(folder: Path, **changes: Any) -> OptimizeConfig:
    """A search over the bowl's knobs."""
    quiet = {"tensorboard": False, "live": False, "device": "cpu", "early_stop": False}
    return OptimizeConfig(**{"run_dir": str(folder), "knobs": KNOBS, "generations": 6, "popsize": 6, "seed": 0} | quiet | changes)
