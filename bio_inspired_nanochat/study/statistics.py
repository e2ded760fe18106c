"""Paired statistics of a few seeds, and the rule by which a difference counts, fixed before the runs.

A difference is a condition's value minus its reference's at equal seed. With three to five seeds a bootstrap interval alone is not a
test: at n = 3 all differences share a sign by chance in one case of four, and then every resample has that sign. So the rule asks for
a paired t test as well, and Holm's correction over all comparisons of a family. The interval is the percentile one: BCa takes its
acceleration from n jackknife values, which for n <= 5 is an estimate of skewness from five numbers or fewer, and is undefined where
they are equal.

S seeds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bio_inspired_nanochat.errors import UserError

FEWEST_FOR_WILCOXON = 6  # below, the exact two-sided p is at least 1/16 whatever the data
RESAMPLES = 9999


@dataclass(frozen=True)
class Rule:
    """When a difference counts. `margin` is in units of the metric; `power` is what the smallest detectable difference is given for.

    statement says in words what `verdict` computes; `version` changes with that code, so that a digest covers it.
    """

    alpha: float = 0.05
    confidence: float = 0.95
    margin: float = 0.0
    min_seeds: int = 3
    power: float = 0.8
    version: int = 1
    statement: str = (
        "better or worse if, over at least min_seeds paired seeds, the percentile bootstrap interval of the mean difference lies wholly on "
        "one side of zero, the mean is on that side by more than margin, and the paired t test has a Holm-corrected p below alpha within the "
        "comparisons of the same metric, view, depth and set; else undecided"
    )


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values in a canonical form, 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Paired:
    """One comparison over seeds.

    seeds: those that both sides have; low, high: bootstrap interval of the mean; p_t, p_wilcoxon: two-sided, None where n does not allow
    it or all differences are equal; p_holm: p_t corrected for its family; d_z: mean over standard deviation of the differences; g_z: the
    same corrected for small samples; detectable: smallest mean difference that a paired t test would find at this spread with the rule's
    power, uncorrected; verdict: lower, higher or undecided, or "too few seeds".
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    sd: float | None
    low: float | None = None
    high: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None
    p_holm: float | None = None
    d_z: float | None = None
    g_z: float | None = None
    detectable: float | None = None
    verdict: str = "too few seeds"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"seeds": list(self.seeds), "differences": list(self.differences)}


def scipy_stats() -> Any:
    """The module scipy.stats. Raises UserError when SciPy is missing."""
    try:
        from scipy import stats  # imported late: an optional package, and a third of a second
    except ImportError:
        raise UserError("the statistics of a study need the package scipy: install the extra study (pip install '.[study]')") from None
    return stats


def paired(condition: Mapping[int, float], reference: Mapping[int, float], rule: Rule, resamples: int = RESAMPLES) -> Paired:
    """Compare values by seed; not yet corrected for its family (`judge` does that). Values that are not finite count as missing."""
    stats = scipy_stats()
    seeds = tuple(
        seed for seed in sorted(condition) if seed in reference and math.isfinite(condition[seed]) and math.isfinite(reference[seed])
    )
    gaps = np.array([condition[seed] - reference[seed] for seed in seeds])
    if len(gaps) < 2:
        return Paired(seeds, tuple(gaps.tolist()), float(gaps[0]) if len(gaps) else None, None)
    n, mean, sd = len(gaps), float(gaps.mean()), float(gaps.std(ddof=1))
    flat = sd <= 1e-12 * max(1.0, abs(mean))  # equal differences: no test can be computed, which is left undecided
    low, high = bootstrap_interval(gaps, rule.confidence, resamples)
    d_z = None if flat else mean / sd
    return Paired(
        seeds,
        tuple(gaps.tolist()),
        mean,
        sd,
        low,
        high,
        p_t=None if flat else float(stats.ttest_1samp(gaps, 0.0).pvalue),
        p_wilcoxon=float(stats.wilcoxon(gaps, method="exact").pvalue) if n >= FEWEST_FOR_WILCOXON and not flat and np.all(gaps) else None,
        d_z=d_z,
        g_z=None if d_z is None else d_z * hedges_factor(n - 1),
        detectable=None if flat else detectable(sd, n, rule),
    )


def bootstrap_interval(gaps: Sequence[float] | np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of [S] differences, with a fixed seed. With equal differences it is a point."""
    gaps = np.asarray(gaps, dtype=float)
    if np.ptp(gaps) == 0:
        return float(gaps[0]), float(gaps[0])
    options = {"confidence_level": confidence, "n_resamples": resamples, "method": "percentile", "vectorized": True}
    found = scipy_stats().bootstrap((gaps,), np.mean, rng=np.random.default_rng(0), **options).confidence_interval
    return float(found.low), float(found.high)


def hedges_factor(dof: int) -> float:
    """Exact correction of a standardised mean for small samples (Hedges 1981), Γ(m/2) / (√(m/2) Γ((m−1)/2)); 0 for one degree of freedom."""
    if dof < 2:
        return 0.0
    return math.exp(math.lgamma(dof / 2) - math.lgamma((dof - 1) / 2)) / math.sqrt(dof / 2)


def detectable(sd: float, n: int, rule: Rule) -> float:
    """Smallest true mean difference that a two-sided paired t test of n differences of standard deviation sd finds with `rule.power`."""
    return _detectable_shift(n, rule.alpha, rule.power) * sd / math.sqrt(n)


@functools.cache
def _detectable_shift(n: int, alpha: float, power: float) -> float:
    """Noncentrality at which |t| with n - 1 degrees of freedom exceeds its critical value with that power. The side away from the shift,
    which holds less than alpha / 2, is left out: its distribution is not computed reliably far out, and power is never overstated by it."""
    stats = scipy_stats()
    from scipy.optimize import root_scalar

    limit = stats.t.ppf(1 - alpha / 2, n - 1)
    high = float(limit)
    while stats.nct.sf(limit, n - 1, high) < power:
        high *= 1.5
    return float(root_scalar(lambda shift: stats.nct.sf(limit, n - 1, shift) - power, bracket=(0.0, high)).root)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) of a family; None stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p))
        found[i] = worst
    return found


def judge(family: Sequence[Paired], rule: Rule) -> list[Paired]:
    """The comparisons of one family with corrected p values and verdicts by the rule."""
    corrected = holm([one.p_t if len(one.seeds) >= rule.min_seeds else None for one in family])
    return [replace(one, p_holm=p, verdict=_verdict(one, p, rule)) for one, p in zip(family, corrected, strict=True)]


def _verdict(one: Paired, p: float | None, rule: Rule) -> str:
    if len(one.seeds) < rule.min_seeds:
        return "too few seeds"
    if p is None or p >= rule.alpha or one.mean is None or one.low is None or one.high is None:
        return "undecided"
    if one.high < 0 and one.mean < -rule.margin:
        return "lower"
    if one.low > 0 and one.mean > rule.margin:
        return "higher"
    return "undecided"
