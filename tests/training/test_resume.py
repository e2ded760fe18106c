"""N steps are k steps and N - k more, bit for bit, logs included."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.structural import read_lineage
from bio_inspired_nanochat.training import Callback, TrainConfig, train
from bio_inspired_nanochat.training import run as run_module
from bio_inspired_nanochat.training.loop import Trainer
from tests.training.ranks import LIVING
from tests.training.tiny import corpus, small

FAST = SynapticConfig(hebb="delta", rank_eligibility=4, stochastic_train_frac=0.5)
KINDS = {
    "vanilla": {},
    "synaptic": {"synapses": True, "doc_mask": True, "value_embeds": True},
    "fast weights": {"synapses": True, "syn_cfg": FAST, "consolidate_every": 3, "consolidate_strength": 0.5},
    "experts": LIVING,
}
STOPS = {"one": (3,), "two": (2, 5)}


class Losses(Callback):
    """The exact loss of every step of one process."""

    def __init__(self) -> None:
        self.hex: list[str] = []

    def on_step(self, record) -> None:
        self.hex.append(record.loss.hex())


def run(config: TrainConfig, given: set[str] | None = None) -> tuple[dict, list[str]]:
    losses = Losses()
    return train(config, [losses], given), losses.hex


def flat(tree, prefix="") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return {name: tensor for key, value in items for name, tensor in flat(value, f"{prefix}/{key}").items()}


def same_checkpoint(left: str, right: str) -> None:
    a, b = load_checkpoint(left), load_checkpoint(right)
    assert a.model.keys() == b.model.keys()
    for name, value in a.model.items():
        assert torch.equal(value, b.model[name]), name
    first, second = flat(load_optimizer(left)), flat(load_optimizer(right))
    assert first.keys() == second.keys() and len(first) > 4
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert a.meta["loop"]["ranks"] == b.meta["loop"]["ranks"], "data position and random generators"
    assert a.meta["loop"].get("ballots") == b.meta["loop"].get("ballots"), "decisions about experts"


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_resuming_changes_no_bit(tmp_path, kind):
    changes = {**KINDS[kind], "log_every": 1, "num_iterations": 7}
    whole, losses = run(small(tmp_path / "whole", **changes))
    assert len(set(losses)) == 7
    for name, stops in STOPS.items():
        parts: list[str] = []
        for stop_after, resume in zip((*stops, 0), ("", *["auto"] * len(stops)), strict=True):
            record, more = run(small(tmp_path / name, **changes, stop_after=stop_after, resume=resume))
            parts += more
        assert parts == losses, f"{name}: {parts} is not {losses}"
        assert record["resumed_from"] == stops[-1] and record["steps"] == 7
        for field in ("final_loss", "val_bpb", "val_loss", "tokens"):
            assert record[field] == whole[field], field
        same_checkpoint(whole["checkpoint"], record["checkpoint"])
        if kind == "experts":
            events = [read_lineage(each["log_dir"]) for each in (whole, record)]
            between = [event for event in events[0] if stops[0] < event["step"] <= (stops[1] if stops[1:] else 7)]
            assert events[0] == events[1] and between, "events of the life cycle lie between the stops"
            assert load_checkpoint(Path(record["checkpoint"])).meta["loop"]["ballots"]["cast"], "what was decided before the stops is kept"


def test_what_has_state_is_registered_once_and_all_of_it(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(run_module, "Trainer", lambda job, *rest: jobs.append(job) or Trainer(job, *rest))
    train(small(tmp_path, **LIVING))
    (job,) = jobs
    registered = job.states.parts()
    assert len({id(part) for part in registered}) == len(registered)
    own = [value for value in vars(job).values() if hasattr(value, "state_dict")]
    elsewhere = [job.model, job.optimizer]  # files of their own
    assert [type(value).__name__ for value in own if not any(value is part for part in [*registered, *elsewhere])] == []
    assert set(job.states.of_run()) | set(job.states.of_rank()) == {"progress", "loader", "rng", "ballots"}
    kept = {name for name, _ in job.model.named_buffers()} & set(job.model.state_dict())
    assert any("accounts.energy" in name for name in kept), "accounts of experts are buffers that checkpoints hold"
    with pytest.raises(AssertionError, match="loader is registered twice"):
        job.states.add("loader", job.loader)
    with pytest.raises(UserError, match="no state of the loader"):
        job.states.load(job.states.of_run(), {})


def test_a_checkpoint_that_lacks_the_position_of_a_process_is_refused(tmp_path):
    record, _ = run(small(tmp_path, num_iterations=2, save_every=0))
    path = Path(record["checkpoint"])
    saved = load_checkpoint(path)
    loop = json.loads(json.dumps(saved.meta["loop"]))
    loop["ranks"][0]["loader"]["of"] = 2
    meta = {**saved.meta, "loop": loop}
    save_checkpoint(
        path.parent,
        3,
        saved.model,
        {**meta, "step": 3},
        load_optimizer(path),
        {"tokenizer.json": saved.file("tokenizer.json").read_bytes()},
    )
    with pytest.raises(UserError, match="no stream 1 of 2: the checkpoint is not whole"):
        run(small(tmp_path, resume="3"))


def test_what_a_signal_prevented_is_done_by_the_run_that_resumes(tmp_path, capsys):
    class Signal(Callback):
        def after_update(self, step, model, optimizer) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    changes = {"log_every": 1, "num_iterations": 6, "eval_every": 2, "sample_every": 4}
    whole = train(small(tmp_path / "a", **changes), [Losses()])
    first = train(small(tmp_path / "b", **changes), [Signal()])
    assert first["stopped"] == "SIGTERM" and first["steps"] == 4
    out = capsys.readouterr().out
    assert out.count("\nend ") == 1  # of the run that was cut off, not of the whole one
    assert "end 00004 | SIGTERM ends the run at step 4 of 6: --resume=auto goes on from there\n" in out
    logs = []
    for record in (whole, train(small(tmp_path / "b", **changes, resume="auto"), [Losses()])):
        events = [json.loads(line) for line in (Path(record["log_dir"]) / "metrics.jsonl").read_text().splitlines()]
        logs.append([(e["kind"], e["step"], e.get("val_bpb"), e.get("texts")) for e in events if e["kind"] in ("eval", "sample")])
    assert logs[0] == logs[1] and [step for kind, step, *_ in logs[0] if kind == "eval"] == [2, 4, 6]


def test_what_is_done_twice_stands_in_the_log_once(tmp_path):
    changes = {"log_every": 1, "num_iterations": 4, "save_every": 2, "eval_every": 2, "keep_checkpoints": 0}
    record, _ = run(small(tmp_path, **changes))
    run(small(tmp_path, **changes, resume="2"))  # a process that died after the evaluation of step 2
    run(small(tmp_path, **changes, resume="auto"))  # and one that had finished
    events = [json.loads(line) for line in (Path(record["log_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "eval"] == [2, 4]


def test_a_periodic_checkpoint_in_mid_run_is_as_good_as_a_stop(tmp_path):
    changes = {"log_every": 1, "num_iterations": 6, "save_every": 2, "eval_every": 2, "sample_every": 2, "keep_checkpoints": 0}
    whole, losses = run(small(tmp_path, **changes))
    at = Path(whole["checkpoint"]).parent / "step_000004"
    again, tail = run(small(tmp_path, **changes, resume=str(at)))
    assert tail == losses[4:] and again["resumed_from"] == 4
    same_checkpoint(whole["checkpoint"], again["checkpoint"])


def test_a_resumed_run_needs_none_of_its_flags_again(tmp_path):
    record, _ = run(small(tmp_path, num_iterations=4, stop_after=2, seed=5, synapses=True))
    places = {"checkpoint_dir": str(tmp_path / "checkpoints"), "log_dir": str(tmp_path / "runs"), "device": "cpu"}
    again, _ = run(TrainConfig(resume=str(Path(record["checkpoint"]).parent), **places, log_every=0, sample_every=0), set(places))
    meta = load_checkpoint(again["checkpoint"]).meta["train_config"]
    assert again["steps"] == 4 and (meta["depth"], meta["seed"], meta["synapses"]) == (2, 5, True)
    assert meta["data_dir"] == str(corpus())


def test_more_steps_than_before_can_be_asked_for(tmp_path):
    run(small(tmp_path, num_iterations=3))
    record, _ = run(small(tmp_path, num_iterations=5, resume="auto"))
    assert record["resumed_from"] == 3 and record["steps"] == 5


def test_a_finished_run_resumes_to_its_own_result_and_says_that_nothing_is_left(tmp_path, capsys):
    whole, _ = run(small(tmp_path, num_iterations=3))
    assert "notice: step" not in capsys.readouterr().out
    again, losses = run(small(tmp_path, num_iterations=3, resume="auto"))
    assert losses == [] and again["val_bpb"] == whole["val_bpb"] and again["checkpoint"] == whole["checkpoint"]
    assert "notice: step 3 of 3 is done, nothing is left to train: give a larger --num_iterations\n" in capsys.readouterr().out


def test_a_step_can_be_named(tmp_path):
    run(small(tmp_path, num_iterations=4, save_every=1, keep_checkpoints=0))
    record, _ = run(small(tmp_path, num_iterations=4, resume="2"))
    assert record["resumed_from"] == 2
    with pytest.raises(UserError, match="no checkpoint of step 9"):
        run(small(tmp_path, num_iterations=4, resume="9"))


def test_auto_without_a_checkpoint_starts_afresh(tmp_path, capsys):
    record, _ = run(small(tmp_path, num_iterations=2, resume="auto"))
    assert record["resumed_from"] is None and "found no checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"), [({"n_embd": 48}, "n_embd=48 differs from 32"), ({"synapses": True}, "synapses=True differs from False")]
)
def test_another_model_than_the_checkpoints_is_an_error(tmp_path, changes, said):
    run(small(tmp_path, num_iterations=2, run_name="r"))
    with pytest.raises(UserError, match=said):
        run(small(tmp_path, run_name="r", resume="auto", **changes))


def test_the_log_holds_every_step_once(tmp_path):
    changes = {"log_every": 1, "num_iterations": 6, "save_every": 3, "keep_checkpoints": 0}
    record, losses = run(small(tmp_path, **changes))
    log = Path(record["log_dir"]) / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "step", "st')  # a process that died while it wrote
    run(small(tmp_path, **changes, resume="3"))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event["loss"].hex() for event in steps] == losses
    assert [event["step"] for event in events if event["kind"] == "save"] == [3, 6]
    assert [event["kind"] for event in events].count("end") == 1


def test_tensorboard_shows_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard

    config = {"log_every": 1, "num_iterations": 4, "save_every": 2, "keep_checkpoints": 0, "synapses": True}
    record = train(small(tmp_path, **config), [TensorBoard()])
    train(small(tmp_path, **config, resume="2"), [TensorBoard()])
    events = EventAccumulator(record["log_dir"]).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"val/bpb", "gains/layer0/gain_release", "train/tok_per_s"} <= set(events.Tags()["scalars"])
    assert "train/mfu" not in events.Tags()["scalars"], "nothing is shown for what is not known"
