"""Training in turns: whatever the machine does, both models end with equally many steps, in time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.data.corpus import write_corpus
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig, lr_multiplier
from bio_inspired_nanochat.training import TrainConfig, rounds, train
from bio_inspired_nanochat.training.plan import make_plan
from bio_inspired_nanochat.training.rounds import ROUNDS, Curve, Deadline, Entrant, OutOfTime, train_in_turns

SECONDS = 500.0
PACES = (0.5, 0.8)  # seconds of a step of either model on the machine as it was measured
PLANNED = int(0.85 * SECONDS / sum(PACES))
START = 1.0


class _Machine:
    """A clock, and how many times slower than measured the machine is at a time."""

    def __init__(self, slower: Callable[[float], float]) -> None:
        self.now, self.slower = 0.0, slower

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds * self.slower(self.now)


class _Simulated(Entrant):
    """Trains on a `_Machine`."""

    machine: _Machine
    signal_at: int | None = None

    def advance(self, stop: int, total: int, eval_tokens: int, callbacks: Sequence[Any]) -> str | None:
        began, first = self.machine.now, self.step
        true_pace = PACES[0] if self.kind == "vanilla" else PACES[1]
        self.machine.work(START)
        for step in range(first + 1, stop + 1):
            self.machine.work(true_pace)
            for callback in callbacks:
                callback.after_update(step, None, None)
            if step == self.signal_at:
                stop = step
                break
        self.rounds.append({"steps": stop, "total": total, "checkpoint": f"step_{stop}"})
        self.pace = (self.machine.now - began) / max(1, stop - first)
        return "SIGTERM" if stop == self.signal_at else None


def _simulate(
    monkeypatch: pytest.MonkeyPatch, slower: Callable[[float], float], most: int = 10**9, signal_at: int | None = None
) -> tuple[list[_Simulated], _Machine, str | None]:
    machine = _Machine(slower)
    monkeypatch.setattr(rounds, "time", machine)
    entrants = [_Simulated(kind, None, kind, pace) for kind, pace in zip(("vanilla", "synaptic"), PACES, strict=True)]  # type: ignore[arg-type]
    for entrant in entrants:
        entrant.machine, entrant.signal_at = machine, signal_at
    signal = train_in_turns(entrants, min(PLANNED, most), most, SECONDS, 100, list)
    return entrants, machine, signal


def test_a_steady_machine_trains_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    entrants, machine, _ = _simulate(monkeypatch, lambda now: 1.0)
    assert [entrant.step for entrant in entrants] == [PLANNED, PLANNED]
    assert {done["total"] for entrant in entrants for done in entrant.rounds} == {PLANNED}
    assert 0.8 * SECONDS < machine.now < SECONDS


@pytest.mark.parametrize("change", range(0, 500, 25))
@pytest.mark.parametrize("factor", [0.4, 1.3, 2.0, 5.0])
def test_a_machine_that_changes_its_pace_keeps_steps_equal_and_the_time(
    monkeypatch: pytest.MonkeyPatch, change: float, factor: float
) -> None:
    entrants, machine, _ = _simulate(monkeypatch, lambda now: factor if now >= change else 1.0)
    assert entrants[0].step == entrants[1].step > 0.04 * PLANNED
    assert machine.now < SECONDS + factor * max(PACES) + 1e-6
    used = [done["total"] for done in entrants[0].rounds]
    assert used == [done["total"] for done in entrants[1].rounds]  # the same learning rates


@pytest.mark.parametrize("factor, least, most", [(0.5, 1.5, 2.0), (2.0, 0.4, 0.6)])
def test_the_plan_follows_a_pace_that_was_measured_wrong(monkeypatch: pytest.MonkeyPatch, factor: float, least: float, most: float) -> None:
    entrants, machine, _ = _simulate(monkeypatch, lambda now: factor)
    assert least * PLANNED < entrants[0].step == entrants[1].step < most * PLANNED
    assert 0.75 * SECONDS < machine.now < SECONDS


def test_a_restless_machine_lets_the_learning_rate_fall_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = 0
    for seed in range(60):
        noise = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        speeds = (0.2 * torch.stack([noise[max(0, i - 4) : i + 1].mean() * 5**0.5 for i in range(200)])).exp().tolist()
        entrants, _, _ = _simulate(monkeypatch, lambda now, speeds=speeds: speeds[min(199, int(now / 10))])
        rates, before = [], 0
        for done in entrants[0].rounds:
            total, decay = done["total"], OptimConfig().decay_frac
            rates += [lr_multiplier(step, total, 0, decay, 0.05) for step in range(before, done["steps"])]
            before = done["steps"]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(rates))
        unfinished += entrants[0].step < entrants[0].rounds[-1]["total"]
    assert unfinished <= 6


def test_when_time_is_up_inside_a_round_both_stay_at_the_end_of_the_round_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants, _, _ = _simulate(monkeypatch, lambda now: 1.0 if now < 300 else 1e3)
    steps = {round(PLANNED * share) for share in ROUNDS[:-1]}
    assert entrants[0].step == entrants[1].step and entrants[0].step in steps
    assert [entrant.rounds[-1]["checkpoint"] for entrant in entrants] == [f"step_{entrants[0].step}"] * 2
    assert "both models stay" in capsys.readouterr().out


def test_time_that_ends_in_the_first_round_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--minutes"):
        _simulate(monkeypatch, lambda now: 1e4)


def test_never_more_steps_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (1, 2, 7, 40):
        entrants, _, _ = _simulate(monkeypatch, lambda now: 0.1, most=most)
        assert [entrant.step for entrant in entrants] == [most, most]


def test_a_signal_ends_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    entrants, _, signal = _simulate(monkeypatch, lambda now: 1.0, signal_at=round(0.2 * PLANNED))
    assert signal == "SIGTERM" and [len(entrant.rounds) for entrant in entrants] == [2, 1]


def test_a_deadline_ends_a_run_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine(lambda now: 1.0)
    monkeypatch.setattr(rounds, "time", machine)
    deadline = Deadline(10.0)
    machine.now = 10.0
    deadline.after_update(1, None, None)
    machine.now = 10.1
    with pytest.raises(OutOfTime):
        deadline.after_update(2, None, None)


def test_a_curve_forgets_what_came_after_a_step() -> None:
    curve = Curve()
    curve.train, curve.val = [(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 2.0)]
    curve.cut(2)
    assert curve.train == [(1, 3.0), (2, 2.0)] and curve.val == [(2, 2.5)]


def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    texts = [(f"Sentence number {i} of a small text about {i % 7} vesicles.", i % 5 == 0) for i in range(60)]
    write_corpus(tmp_path / "data", texts, shard_chars=10_000)
    sizes = {"depth": 1, "n_embd": 16, "head_dim": 16, "max_seq_len": 16, "vocab_size": 280, "device_batch_size": 2}
    paths = {"data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "runs")}
    return TrainConfig(synapses=True, device="cpu", sample_every=0, save_every=0, num_iterations=9, **sizes, **paths)


def test_rounds_together_are_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, monkeypatch)
    entrant = Entrant("synaptic", make_plan(config, torch.device("cpu"), 1, 280, 0), "turns", 0.01)
    for stop in (2, 5, 9):
        assert entrant.advance(stop, 9, 32, []) is None
    whole = train(dataclasses.replace(entrant.plan.config, run_name="whole", eval_tokens=32))
    in_turns, at_once = (load_checkpoint(record["checkpoint"]).model for record in (entrant.record(), whole))
    assert all(torch.equal(in_turns[name], at_once[name]) for name in at_once)
    record = entrant.record()
    assert record["steps"] == whole["steps"] == 9 and record["val_bpb"] == whole["val_bpb"] and record["tokens"] == whole["tokens"]
    assert [step for step, _ in entrant.curve.val] == [2, 5, 9]
    assert [done["resumed_from"] for done in entrant.rounds] == [None, 2, 5]
    assert record["tok_per_s"] > 0 and record["seconds"] >= max(done["seconds"] for done in entrant.rounds)


def test_a_round_that_runs_out_of_time_falls_back_to_a_checkpoint_that_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, monkeypatch)
    plan = make_plan(config, torch.device("cpu"), 1, 280, 0)
    entrants = [Entrant(kind, plan, kind, 0.01) for kind in ("first", "second")]
    calls = itertools.count()

    class Late(Deadline):
        def after_update(self, step: int, model: Any, optimizer: Any) -> None:
            if self._late and step == 8:
                raise OutOfTime

        def __init__(self, at: float) -> None:
            self._late = next(calls) % 2 == 1  # the second model's parts

    monkeypatch.setattr(rounds, "Deadline", Late)
    assert train_in_turns(entrants, 9, 9, 100.0, 32, list) is None
    assert entrants[0].step == entrants[1].step == round(9 * rounds.FEW_ROUNDS[1])
    for entrant in entrants:
        assert load_checkpoint(entrant.record()["checkpoint"]).step == entrant.step
        assert max(step for step, _ in entrant.curve.train) <= entrant.step
