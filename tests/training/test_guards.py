"""The ends of a run, one by one."""

import gc
import os
import signal
import time

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import guards
from bio_inspired_nanochat.training.clock import Clock


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C: the background job of a shell is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_caught_unless_it_is_an_echo_of_the_first(ctrl_c):
    with guards.StopSignals(echo=0.2) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # as a launcher does that got the same Ctrl-C
        assert signals.received == "SIGINT"
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_stop_that_takes_too_long_happens_in_the_middle():
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(guards.Interrupted), guards.StopSignals(grace=0.2) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert time.monotonic() - began < 5 and signals.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_worth_its_time_has_no_deadline():
    with guards.StopSignals(grace=0.1) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.relax()
        time.sleep(0.3)  # the deadline would raise here
    assert signals.received == "SIGTERM"


def test_before_the_loop_a_signal_ends_at_once_and_signals_nest():
    with pytest.raises(guards.Interrupted), guards.StopSignals() as signals:
        signals.at_once = True
        with signals:
            pass
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


def test_one_bad_weight_among_many_is_found():
    weights = [torch.ones(3), torch.ones(2, 2)]
    assert guards.all_finite(weights)
    weights[1][1, 0] = float("-inf")
    assert not guards.all_finite(weights)


@pytest.fixture
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.freeze()


def test_the_garbage_collector_is_as_before_afterwards(nothing_frozen):
    with guards.frozen_garbage() as garbage:
        garbage.freeze()
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_what_the_process_had_frozen_stays_frozen(nothing_frozen):
    gc.freeze()
    before = gc.get_freeze_count()
    with guards.frozen_garbage() as garbage:
        garbage.freeze()
    assert gc.get_freeze_count() == before


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
