"""The ends of a run, one by one."""

import gc
import os
import signal

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import guards
from bio_inspired_nanochat.training.clock import Clock


def test_the_second_signal_is_not_caught():
    with guards.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("rows", "fits", "said"),
    [(8, 4, "--device_batch_size=4"), (64, 16, "--device_batch_size=16"), (8, 100, "--device_batch_size=4"), (1, 1, "--max_seq_len")],
)
def test_memory_errors_name_a_batch_that_fits(rows, fits, said):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()):
        with pytest.raises(UserError, match=said), guards.out_of_memory_as_user_error(rows, lambda: fits, "cuda:0"):
            raise error


def test_other_errors_are_not_memory_errors():
    with pytest.raises(RuntimeError, match="shape"), guards.out_of_memory_as_user_error(8, lambda: 4, "cpu"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("rows", "bad"), [([[1.0, 2.0], [3.0, 4.0]], None), ([[1.0, 2.0], [3.0, float("inf")]], 1), ([[float("nan"), 0]], 0)]
)
def test_the_first_row_that_is_not_finite(rows, bad):
    assert guards.first_not_finite(rows) == bad


def test_one_bad_weight_among_many_is_found():
    weights = [torch.ones(3), torch.ones(2, 2)]
    assert guards.all_finite(weights)
    weights[1][1, 0] = float("-inf")
    assert not guards.all_finite(weights)


def test_the_garbage_collector_is_as_before_afterwards():
    before = gc.get_freeze_count()
    with guards.frozen_garbage() as garbage:
        garbage.freeze()
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_the_clock_leaves_out_the_first_steps_and_the_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock(steps=100)
    for step in range(20):
        clock.start()
        now[0] += 10.0 if step < clock.warm else 1.0
        clock.steps += 1
        clock.stop()
        now[0] += 100.0  # an evaluation
    assert clock.warm == 10 and (clock.timed_steps, clock.timed_seconds) == (10, 10.0)
    assert clock.seconds_per_step() == 1.0 and (clock.lap_steps, clock.lap_seconds) == (20, 110.0)


@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (2, 1), (10, 2), (1000, 10)])
def test_short_runs_still_have_a_rate(steps, warm):
    assert Clock(steps).warm == warm
