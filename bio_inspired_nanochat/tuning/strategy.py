"""CMA-ES on the unit cube, as the package `cma` has it: seeded, resumable, and told of candidates without a value."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.common import write_atomic
from bio_inspired_nanochat.errors import UserError

HEAD = b"sha256 "


def make_strategy(start: Sequence[float], sigma0: float, popsize: int, seed: int) -> Any:
    """A `cma.CMAEvolutionStrategy` within [0, 1]^n. Every seed, 0 included, is a fixed one (cma takes 0 for the time of day).

    Raises UserError for fewer than two dimensions.
    """
    import cma  # half a second that other scripts need not pay

    point = np.clip(np.asarray(start, dtype=float), 0.01, 0.99)  # a start on the boundary has no room to its other side
    options = {"bounds": [0.0, 1.0], "popsize": popsize, "seed": 1 + seed % (2**32 - 2), "verbose": -9}
    if len(point) == 1:  # cma has no covariance to adapt along a single axis and refuses it
        raise UserError("the search has a single knob: name at least two")
    return cma.CMAEvolutionStrategy(point, sigma0, options)


def ranked(values: Sequence[float]) -> list[float]:
    """Fitness values as CMA-ES is told them: what is not finite becomes worse than the worst, never the median."""
    finite = [value for value in values if math.isfinite(value)]
    worst = max(finite) + (max(finite) - min(finite)) + 1.0 if finite else 1.0
    return [value if math.isfinite(value) else worst for value in values]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state with numpy's random generator, from which cma draws, and a digest before it; whole or not at all."""
    raw = pickle.dumps(state | {"numpy": np.random.get_state()})
    write_atomic(path, HEAD + hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw)


def load_state(path: Path, folder: Path) -> dict[str, Any]:
    """The inverse of `save_state`, which also sets numpy's generator. Only files of the run's own folder are read, links are not followed.

    The digest finds a damaged file; it does not make a stranger's file safe. Raises UserError for all that is wrong.
    """
    if path.is_symlink() or path.resolve().parent != folder.resolve():
        raise UserError(f"{path} does not lie in the run's folder {folder}: only a run's own state is read")
    try:
        head, _, raw = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): there is nothing to resume; leave out --resume") from None
    if head != HEAD + hashlib.sha256(raw).hexdigest().encode():
        raise UserError(f"{path} is damaged (its digest does not fit): copy an es_gen*.pkl of the run over it, or start afresh")
    state = pickle.loads(raw)
    np.random.set_state(state.pop("numpy"))
    return state
