"""Real deaths: SIGKILL at every moment of a save, a full disk and a read-only folder as the system makes them; and runs through them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bio_inspired_nanochat import checkpoint
from bio_inspired_nanochat.checkpoint import find_checkpoint
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import Callback, train
from bio_inspired_nanochat.training import run as run_module
from bio_inspired_nanochat.training.loop import Trainer
from tests import forked
from tests.training.launch import ENV, ROOT
from tests.training.tiny import flags, small


def test_the_last_good_checkpoint_survives_kills_at_every_moment_a_full_disk_and_missing_rights():
    done = forked.run(["-m", "tests.crash"], env=ENV, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    scenes = json.loads(done.stdout.splitlines()[-1])
    assert len(scenes) == 6 and not any(scenes.values()), scenes


def test_a_disk_that_fills_up_in_mid_run_ends_it_in_one_line_with_the_checkpoint_before(tmp_path, monkeypatch):
    write, calls = checkpoint.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:  # model and optimizer of step 2, model of step 4
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"checkpoint of step 4 cannot be written .*No space left on device"):
        train(small(tmp_path, save_every=2))
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "checkpoints").name == "step_000002"
    assert train(small(tmp_path, save_every=2, resume="auto"))["steps"] == 6


def test_an_evaluation_that_crashes_costs_no_step(tmp_path, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr("bio_inspired_nanochat.training.loop.bits_per_byte", crash)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        train(small(tmp_path, save_every=2, eval_every=2))
    assert find_checkpoint(tmp_path / "checkpoints").name == "step_000002"


# --- signals -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prepare", "build_model"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path, monkeypatch, where):
    whole = getattr(run_module, where)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(run_module, where, signalled)
    record = train(small(tmp_path))
    monkeypatch.undo()
    assert record["stopped"] == "SIGTERM" and record["steps"] == 0 and record["checkpoint"] is None
    assert record.keys() == train(small(tmp_path)).keys()


def test_a_step_that_takes_too_long_is_given_up_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    class Stuck(Callback):
        def after_update(self, step, model, optimizer) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)

    monkeypatch.setattr("bio_inspired_nanochat.training.guards.GRACE", 0.2)
    monkeypatch.setattr(run_module.guards.StopSignals.__init__, "__defaults__", (0.2, 2.0))
    record = train(small(tmp_path, save_every=2), [Stuck()])
    assert record["stopped"] == "SIGINT" and Path(record["checkpoint"]).name == "step_000002"
    assert train(small(tmp_path, resume="auto"))["resumed_from"] == 2


@pytest.mark.parametrize("phase", ["_evaluate", "_sample", "_save"])
def test_a_signal_between_steps_ends_the_run_there(tmp_path, monkeypatch, phase):
    whole = getattr(Trainer, phase)

    def signalled(self):
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self)

    monkeypatch.setattr(Trainer, phase, signalled)
    record = train(small(tmp_path, save_every=2, eval_every=2, sample_every=2, num_iterations=50))
    assert record["stopped"] == "SIGTERM" and record["steps"] == 4 and Path(record["checkpoint"]).name == "step_000004"


@pytest.mark.parametrize(("number", "compiled"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow)])
def test_a_process_that_gets_a_signal_saves_and_exits_with_0(tmp_path, number, compiled):
    """As the first step begins: with --compile=1 in the middle of the compiler."""
    command = [sys.executable, "-m", "scripts.base_train", *flags(tmp_path, num_iterations=100_000, compile=compiled)]
    with subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("attention:"):
                    break
            time.sleep(1.0)
            process.send_signal(number)
            began = time.monotonic()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err[-2000:]
    assert time.monotonic() - began < 30 and "Traceback" not in err
    record = json.loads(out.splitlines()[-1])
    assert record["stopped"] == number.name
    assert record["checkpoint"] is None if record["steps"] == 0 else find_checkpoint(record["checkpoint"])
