"""A worker that dies or is slow costs its candidates, not the run; among several ranks as well."""

from __future__ import annotations

import json
import time

import pytest

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.tuning.objectives import LOST, ObjectiveConfig
from bio_inspired_nanochat.tuning.workers import Pool, shares
from tests.training.launch import run_ranks
from tests.tuning.fakes import bowl, die_or_sleep, score_all


def test_shares_are_nearly_equal_and_complete() -> None:
    for count in range(12):
        for workers in range(1, 6):
            parts = shares(count, workers)
            assert [i for part in parts for i in part] == list(range(count)) and len(parts) == workers
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_dead_and_a_slow_worker_cost_their_candidates_only() -> None:
    config = ObjectiveConfig()
    pool = Pool(config, "cpu", 3, 150.0, die_or_sleep)
    try:
        sound = [SynapticConfig(tau_c=value) for value in (10.0, 20.0, 30.0)]
        expected = score_all(config, sound, [1, 2], None)
        assert repr(pool(sound, [1, 2])) == repr(expected)  # NaN is not equal to itself
        pool.timeout, began = 3.0, time.monotonic()
        found = pool([sound[0], SynapticConfig(tau_c=5.0), SynapticConfig(tau_c=6.0)], [1, 2])
        assert repr(found) == repr([expected[0], [LOST] * 2, [LOST] * 2]) and pool.lost == 2 and time.monotonic() - began < 20
        pool.timeout = 150.0
        assert repr(pool(sound, [1, 2])) == repr(expected), "both were started anew"
    finally:
        pool.close()


@pytest.mark.slow
def test_a_rank_whose_worker_dies_costs_its_candidates_only() -> None:
    said, _ = run_ranks(2, "tests.tuning.ranks")
    first, second = json.loads(said.splitlines()[-1])
    expected = [[bowl(SynapticConfig(tau_c=value), 1)] for value in (10.0, 20.0, 30.0, 40.0)]
    assert first == expected and second == [*expected[:2], None, None]
