"""The loop: order of events, what it says, and how it ends."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import Callback, loop, train
from bio_inspired_nanochat.training.loop import Trainer
from tests.training import ranks, tiny
from tests.training.tape import Taped
from tests.training.tiny import small

LINE = re.compile(
    r"step \d{5}/\d{5} \| loss \d+\.\d{4} \| lr \d\.\d\d \| [\d,]+ tok/s \| MFU (n/a|\d+\.\d%) \| mem \d+\.\d GiB \| wait \d+\.\d% \| \S+ left"
)


class Order(Callback):
    """Names of the events, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step(self, record) -> None:
        self.events.append(f"step {record.step}")

    def on_save(self, step, path) -> None:
        assert (path / "manifest.json").exists(), "a checkpoint is told of when it is complete"
        self.events.append(f"save {step}")

    def on_eval(self, record) -> None:
        self.events.append(f"eval {record.step}")

    def on_sample(self, step, texts) -> None:
        self.events.append(f"sample {step}")

    def close(self) -> None:
        self.events.append("close")


class After(Callback):
    """Calls something after a step."""

    def __init__(self, step, action) -> None:
        self.step, self.action, self.seen = step, action, 0

    def after_update(self, step, model, optimizer) -> None:
        self.seen = step
        if step == self.step:
            self.action(model)


def damage(model) -> None:
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))


def test_saving_comes_before_evaluating_and_the_end_has_both(tmp_path):
    order = Order()
    train(small(tmp_path, num_iterations=5, log_every=2, save_every=2, eval_every=2, sample_every=4), [order])
    assert order.events == [
        *("step 1", "step 2", "save 2", "eval 2"),
        *("step 4", "save 4", "eval 4", "sample 4"),
        *("step 5", "save 5", "eval 5", "sample 5", "close"),
    ]


def test_training_learns_and_the_record_is_complete(tmp_path):
    record = train(small(tmp_path, num_iterations=25, log_every=1))
    assert record["final_loss"] < record["first_loss"] - 0.3
    assert record["val_bpb"] > 0 and record["tok_per_s"] > 0 and record["steps"] == 25 and record["tokens"] == 25 * 128
    losses = [
        e["loss"] for e in map(json.loads, (Path(record["log_dir"]) / "metrics.jsonl").read_text().splitlines()) if e["kind"] == "step"
    ]
    assert record["final_loss"] == pytest.approx(sum(losses[-20:]) / 20) and record["first_loss"] == losses[0]
    assert Path(record["checkpoint"]).name == "step_000025" and record["resumed_from"] is None


def test_step_lines_keep_their_form(tmp_path, capsys):
    train(small(tmp_path, num_iterations=4, log_every=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and all(LINE.fullmatch(line) for line in lines), lines


def test_zero_turns_every_periodic_thing_off(tmp_path, capsys):
    order = Order()
    record = train(small(tmp_path, num_iterations=3, log_every=0, eval_every=0, save_every=0, sample_every=0, eval_tokens=0), [order])
    assert order.events == ["save 3", "close"] and record["val_bpb"] is None
    assert "step 0" not in capsys.readouterr().out


def test_minus_one_never_saves(tmp_path):
    record = train(small(tmp_path, num_iterations=3, save_every=-1))
    assert record["checkpoint"] is None and not (tmp_path / "checkpoints").exists()


def test_a_second_run_leaves_the_first_alone(tmp_path, capsys):
    first, second = (train(small(tmp_path, num_iterations=2)) for _ in range(2))
    assert (first["run_name"], second["run_name"]) == ("d2", "d2-2")
    assert Path(first["checkpoint"]).exists() and "this one is called d2-2" in capsys.readouterr().out


def test_equal_seeds_train_equally_and_others_do_not(tmp_path):
    a, b, c = (train(small(tmp_path, num_iterations=3, seed=seed, save_every=-1))["final_loss"] for seed in (1, 1, 2))
    assert a == b != c


def test_accumulating_gives_the_loss_of_the_whole_batch():
    whole, halves = ranks.run(ranks.ALONE, 8), ranks.run(ranks.ALONE, 2)
    assert halves["accumulation"] == 4
    assert halves["losses"] == pytest.approx(whole["losses"], abs=1e-5) and halves["norm"] == pytest.approx(whole["norm"], rel=1e-5)


def test_accumulating_makes_one_step_of_the_optimizer(monkeypatch):
    job, calls = ranks.job(ranks.ALONE, 2, num_iterations=3), []
    step = job.optimizer.step
    monkeypatch.setattr(job.optimizer, "step", lambda: (calls.append(1), step()))
    Trainer(job).run()
    assert len(calls) == 3 and job.progress.tokens == 3 * ranks.GLOBAL_ROWS * tiny.SMALL["max_seq_len"]


def test_divergence_names_the_step_and_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step 4: the loss is not finite.*step_000002"):
        train(small(tmp_path, num_iterations=8, save_every=2, log_every=0), [After(3, damage)])
    found = sorted(path.name for path in (tmp_path / "checkpoints" / "d2").iterdir())
    assert found == ["step_000002"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(UserError, match="step 4: the weights are not finite"):
        train(small(tmp_path, num_iterations=8, save_every=4), [After(4, damage)])
    assert not list((tmp_path / "checkpoints").rglob("step_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    record = train(small(tmp_path, num_iterations=50), [After(3, lambda _: os.kill(os.getpid(), number))])
    assert record["steps"] == 3 and record["stopped"] == number.name and record["val_bpb"] is None
    assert Path(record["checkpoint"]).name == "step_000003"
    assert signal.getsignal(number) == before


def test_a_gpu_that_is_not_there_is_no_matter_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda is not usable: .*; use --device=cpu"):
        train(small(tmp_path, device="cuda"))


def test_time_ends_the_run_with_an_evaluation(tmp_path, capsys):
    record = train(small(tmp_path, num_iterations=100_000, max_minutes=0.02))
    assert f"| max_minutes ends the run at step {record['steps']} of 100000\n" in capsys.readouterr().out
    assert record["stopped"] == "max_minutes" and 0 < record["steps"] < 100_000
    assert record["val_bpb"] > 0 and record["checkpoint"]


def test_the_learning_rate_falls_with_the_time_that_is_left():
    trainer = Trainer(ranks.job(ranks.ALONE, 8, num_iterations=1000, max_minutes=1.0))
    assert [trainer._schedule_step(seconds) for seconds in (0, 6, 30, 59, 61)] == [0, 100, 500, 983, 999]
    trainer.progress.step = 700
    assert trainer._schedule_step(30) == 700


@pytest.mark.parametrize(("rows", "replayed"), [(8, False), (8, True), (1, True)])
def test_memory_that_runs_out_is_one_line_with_what_would_fit(monkeypatch, rows, replayed):
    def full(_):
        torch.empty(10**15)

    monkeypatch.setattr(loop, "Gradients", Taped if replayed else loop.Gradients)
    trainer = Trainer(ranks.job(ranks.ALONE, rows, total=rows, num_iterations=6), [After(5, full)])
    smaller = "--device_batch_size=4 (" if rows > 1 else "a shorter --max_seq_len"
    with pytest.raises(UserError, match="out of memory on cpu") as ended:
        trainer.run()
    assert f"use {smaller}" in str(ended.value) and ("or --graph=0" in str(ended.value)) == replayed


def test_other_errors_pass_and_close_the_callbacks(tmp_path):
    def fail(_):
        raise RuntimeError("something else")

    order = Order()
    with pytest.raises(RuntimeError, match="something else"):
        train(small(tmp_path), [order, After(1, fail)])
    assert order.events == ["close"]


def test_evaluation_and_samples_do_not_change_training(tmp_path):
    quiet = train(small(tmp_path, num_iterations=4, save_every=-1, synapses=True))
    busy = train(small(tmp_path, num_iterations=4, save_every=-1, synapses=True, eval_every=1, sample_every=1))
    assert busy["final_loss"] == quiet["final_loss"] and busy["val_bpb"] == quiet["val_bpb"]


def test_samples_are_text_with_their_prompt(tmp_path, capsys):
    train(small(tmp_path, num_iterations=2, sample_every=1, save_every=-1))
    assert "sample 00002 | 'The" in capsys.readouterr().out


def test_training_sleeps_when_asked_to(tmp_path, capsys):
    cfg = SynapticConfig(hebb="delta", rank_eligibility=4)
    fast = {"synapses": True, "syn_cfg": cfg, "num_iterations": 6, "save_every": -1, "seed": 1}
    plain, zero, asleep = (
        train(small(tmp_path, **fast, **sleeping))
        for sleeping in ({}, {"consolidate_every": 2, "consolidate_strength": 0.0}, {"consolidate_every": 2, "consolidate_strength": 1.0})
    )
    assert plain["final_loss"] == zero["final_loss"] != asleep["final_loss"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sleep")]
    assert [line[:11] for line in lines] == ["sleep 00002", "sleep 00004", "sleep 00006"] * 2
    events = map(json.loads, (Path(asleep["log_dir"]) / "metrics.jsonl").read_text().splitlines())
    changes = {event["step"]: event["change"] for event in events if event["kind"] == "consolidate"}
    assert list(changes) == [2, 4, 6] and changes[6] > 0


def test_only_fast_weights_can_be_consolidated(tmp_path):
    with pytest.raises(UserError, match=r"consolidate_every=2 needs fast weights: add --synapses=1 --syn_cfg.hebb=delta"):
        small(tmp_path, consolidate_every=2)
