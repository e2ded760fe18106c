"""Schedules are exact at their edges."""

from __future__ import annotations

import pytest

from bio_inspired_nanochat.optim import lr_multiplier, muon_momentum


def test_warm_up_plateau_and_decay_meet_exactly() -> None:
    values = [lr_multiplier(step, 100, warmup=10, decay_frac=0.4, final=0.1) for step in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0
    assert values[9:61] == [1.0] * 52
    assert values[61] == pytest.approx(1 - 0.9 / 40)
    assert values[99] == pytest.approx(0.1 + 0.9 / 40)
    assert values[61:] == sorted(values[61:], reverse=True)
    assert [lr_multiplier(step, 100, 10, 0.4, 0.1) for step in (100, 101, 5000)] == [0.1] * 3


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert {lr_multiplier(step, 7, 0, 0.0, 0.0) for step in range(20)} == {1.0}


def test_decay_may_take_the_whole_run_and_overlap_the_warm_up() -> None:
    values = [lr_multiplier(step, 10, warmup=5, decay_frac=1.0, final=0.0) for step in range(11)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_train_at_every_step(total: int) -> None:
    assert all(0 < lr_multiplier(step, total, 0, 0.65, 0.0) <= 1 for step in range(total))


def test_momentum_rises_to_its_peak_and_stays() -> None:
    assert muon_momentum(0, 300, 0.85, 0.95) == 0.85
    assert muon_momentum(150, 300, 0.85, 0.95) == pytest.approx(0.9)
    assert [muon_momentum(step, 300, 0.85, 0.95) for step in (300, 301, 9999)] == [0.95] * 3
    assert muon_momentum(0, 0, 0.85, 0.95) == 0.95


def test_impossible_arguments_are_assertions() -> None:
    for arguments in ((0, 0, 0, 0.5, 0.1), (-1, 10, 0, 0.5, 0.1), (0, 10, 0, 1.5, 0.1), (0, 10, -1, 0.5, 0.1)):
        with pytest.raises(AssertionError):
            lr_multiplier(*arguments)
