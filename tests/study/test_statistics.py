"""The statistics of a study against values worked out by other means, and the rule under the null hypothesis."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study.statistics import Rule, bootstrap_interval, detectable, digest, hedges_factor, holm, judge, paired

RULE = Rule()


def seeded(values) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_paired_comparison_is_that_of_the_textbook() -> None:
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt 3 with two degrees of freedom, whose p is 1 - t / sqrt(2 + t^2)."""
    found = paired({0: 2.0, 1: 5.0, 2: 8.0, 7: 1.0}, {0: 1.0, 1: 3.0, 2: 5.0, 9: 0.0}, RULE)
    assert found.seeds == (0, 1, 2) and found.differences == (1.0, 2.0, 3.0)
    t = 2 * math.sqrt(3)
    assert (found.mean, found.sd, found.d_z) == (2.0, 1.0, 2.0)
    assert found.p_t == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert found.p_wilcoxon is None, "three differences cannot be significant by ranks"
    assert found.g_z == pytest.approx(2.0 / math.sqrt(math.pi), rel=1e-9)  # gamma(1) / (sqrt(1) gamma(1/2))


def test_ranks_are_counted_exactly() -> None:
    """Six differences of one sign: two of the 2^6 assignments of signs are as extreme."""
    found = paired(seeded([0.1, 0.5, 0.2, 0.9, 0.4, 0.3]), seeded([0.0] * 6), RULE)
    assert found.p_wilcoxon == pytest.approx(2 / 64)


def test_the_interval_is_that_of_all_resamples() -> None:
    gaps = [-0.03, -0.01, 0.02, -0.05]
    every = sorted(np.mean(one) for one in itertools.product(gaps, repeat=4))
    low, high = bootstrap_interval(gaps)
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.0015) and high == pytest.approx(np.quantile(every, 0.975), abs=0.0015)
    assert bootstrap_interval(gaps) == (low, high), "its seed is fixed"
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_small_samples_shrink_the_effect() -> None:
    assert hedges_factor(10) == pytest.approx(1 - 3 / (4 * 10 - 1), rel=2e-3)  # Hedges' own approximation
    assert hedges_factor(1) == 0.0


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_detectable_difference_is_found_as_often_as_it_says(n: int) -> None:
    shift = detectable(1.0, n, RULE)
    rng = np.random.default_rng(n)
    draws = rng.normal(shift, 1.0, (20000, n))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(n))
    limit = {3: 4.302653, 5: 2.776445, 10: 2.262157}[n]  # 97.5 % points of t, from a table
    assert abs(np.mean(np.abs(t) > limit) - RULE.power) < 0.015
    assert detectable(2.0, n, RULE) == pytest.approx(2 * shift)


def verdicts(shift: float, n: int, family: int, repeats: int) -> list[str]:
    rng, found = np.random.default_rng(5), []
    for _ in range(repeats):
        sides = [(seeded(rng.normal(shift, 1.0, n)), seeded(np.zeros(n))) for _ in range(family)]
        found += [one.verdict for one in judge([paired(*side, RULE, resamples=200) for side in sides], RULE)]
    return found


@pytest.mark.parametrize("n", [3, 5])
def test_without_an_effect_the_rule_rarely_finds_one(n: int) -> None:
    """The bootstrap interval alone excludes zero in a quarter of the cases at n = 3, which is why the rule asks for more."""
    repeats = 200
    found = verdicts(0.0, n, 1, repeats)
    assert sum(one != "undecided" for one in found) / repeats <= RULE.alpha + 3 * math.sqrt(0.05 * 0.95 / repeats)
    if n == 3:
        rng = np.random.default_rng(5)
        alone = [bootstrap_interval(rng.normal(size=3), resamples=200) for _ in range(200)]
        assert sum(low > 0 or high < 0 for low, high in alone) / 200 > 0.15


def test_a_family_without_an_effect_rarely_has_a_finding() -> None:
    found = verdicts(0.0, 5, 10, 40)
    families = [found[i : i + 10] for i in range(0, len(found), 10)]
    assert sum(any(one != "undecided" for one in family) for family in families) / 40 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 40)


def test_a_large_effect_is_found_with_its_direction() -> None:
    assert set(verdicts(-12.0, 5, 3, 5)) == {"lower"} and set(verdicts(12.0, 5, 3, 5)) == {"higher"}


def test_two_seeds_decide_nothing_and_do_not_count_in_the_family() -> None:
    two = paired(seeded([-9.0, -9.1]), seeded([0.0, 0.0]), RULE)
    three = paired(seeded([-1.0, -1.2, -1.1]), seeded([0.0, 0.0, 0.0]), RULE)
    few, many = judge([two, three], RULE)
    assert (few.verdict, few.p_holm) == ("too few seeds", None)
    assert (many.verdict, many.p_holm) == ("lower", many.p_t)


def test_equal_differences_and_missing_values_are_no_finding() -> None:
    same = judge([paired(seeded([1.0, 1.0, 1.0]), seeded([0.0] * 3), RULE)], RULE)[0]
    assert (same.p_t, same.d_z, same.verdict) == (None, None, "undecided")
    assert paired({0: math.nan, 1: 1.0}, {0: 0.0, 1: 0.0}, RULE).seeds == (1,)
    assert paired({}, {}, RULE).mean is None


def test_a_margin_is_asked_for() -> None:
    sides = (seeded([-0.010, -0.011, -0.012]), seeded([0.0] * 3))
    assert judge([paired(*sides, RULE)], RULE)[0].verdict == "lower"
    strict = Rule(margin=0.02)
    assert judge([paired(*sides, strict)], strict)[0].verdict == "undecided"


def test_a_digest_depends_on_every_value() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_without_scipy_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match="extra study"):
        paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}, RULE)
