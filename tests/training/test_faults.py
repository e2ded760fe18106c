"""Steps that go wrong: found before the weights change, named by their batch, and left behind as --on_nonfinite says."""

import errno
import json
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import Callback, faults, train
from bio_inspired_nanochat.training import run as run_module
from bio_inspired_nanochat.training.callbacks import JsonLog
from bio_inspired_nanochat.training.loop import Trainer
from tests.training.ranks import EXPERTS
from tests.training.tiny import small

HEALTHY = [2.0] * faults.FEWEST


class Spoil(Callback):
    """Makes the logits of some forwards, counted over the whole run, something else; in training only."""

    def __init__(self, *forwards: int, factor: float = float("nan")) -> None:
        self.forwards, self.factor, self.count = forwards, factor, 0

    def on_start(self, run) -> None:
        run.model.head.register_forward_hook(self._hook)

    def _hook(self, module, inputs, output):
        if not torch.is_grad_enabled():
            return None
        self.count += 1
        return output * self.factor if self.count in self.forwards else None


class Weights(Callback):
    """Keeps the embedding and what was heard of faults after every step."""

    def __init__(self) -> None:
        self.seen, self.faults = {}, []

    def after_update(self, step, model, optimizer) -> None:
        self.seen[step] = model.head.weight.detach().clone()

    def on_fault(self, record) -> None:
        self.faults.append(record)


def events(record, kind):
    lines = (Path(record["log_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize(
    ("loss", "norm", "recent", "spike", "said"),
    [
        (2.0, 1.0, HEALTHY, 5.0, None),
        (6.9, 1.0, HEALTHY, 5.0, None),
        (7.1, 1.0, HEALTHY, 5.0, "spike above 2"),
        (7.1, 1.0, HEALTHY, 0.0, None),
        (7.1, 1.0, HEALTHY[1:], 5.0, None),
        (float("nan"), 1.0, [], 0.0, "the loss is not finite"),
        (float("inf"), 1.0, [], 0.0, "the loss is not finite"),
        (2.0, float("inf"), [], 0.0, "the gradient is not finite"),
    ],
)
def test_what_is_a_fault(loss, norm, recent, spike, said):
    found = faults.judge(loss, norm, recent, spike)
    assert found is None if said is None else said in found


def test_a_fault_stops_the_run_and_names_the_documents_of_its_batch(tmp_path):
    with pytest.raises(UserError) as caught:
        train(small(tmp_path, save_every=1), [Spoil(4)])
    said = str(caught.value)
    assert "step 4: the loss is not finite" in said and "step_000003" in said and "--on_nonfinite=skip" in said
    assert "batch of rank 0: " in said and "documents, shard_00000.parquet:" in said and said.count("\n") == 0


def test_losses_that_are_read_late_name_the_step_and_its_documents_all_the_same(tmp_path, monkeypatch):
    """As on a GPU, where nothing waits for a step's loss before the next log line."""
    read, late = Trainer._read_losses, []

    def counted(self):
        late.append(len(self._unread))
        return read(self)

    monkeypatch.setattr(Trainer, "_read_losses", counted)
    monkeypatch.setattr(Trainer, "_careful", property(lambda self: False, lambda self, value: None), raising=False)
    with pytest.raises(UserError, match=r"step 6: the loss is not finite.*batch of rank 0: \d+ documents, shard_0") as caught:
        train(small(tmp_path, num_iterations=20, log_every=8), [Spoil(6)])
    assert max(late) > 2 and "no checkpoint" in str(caught.value)


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch, capsys):
    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush = write

    class Fill(Callback):
        def on_start(self, run) -> None:
            log = next(callback for callback in logs if isinstance(callback, JsonLog))
            log.close()
            log._file = Full()

    logs = []
    monkeypatch.setattr(run_module, "JsonLog", lambda: logs.append(JsonLog()) or logs[-1])
    record = train(small(tmp_path), [Fill()])
    assert record["steps"] == 6 and "metrics.jsonl cannot be written (No space left on device)" in capsys.readouterr().out


def test_the_documents_of_a_batch_are_those_in_it():
    from bio_inspired_nanochat.data import ensure_tokenizer, resolve_data
    from bio_inspired_nanochat.data.shards import read_rows
    from tests.training.tiny import corpus

    source = resolve_data(corpus())
    tokenizer = ensure_tokenizer(source, 280)
    texts = {f"{part.path.name}:{row}": text for part in source.train_paths for row, text in enumerate(read_rows(part))}
    loader = source.loader("train", tokenizer, 4, 32, 0, 1)
    for _ in range(80):  # into the second shard
        batch = loader.next_batch()[0]
    loader.close()
    assert any(name.startswith("shard_00001") for name in loader.documents)
    joined = [texts[name] for name in loader.documents]
    for row in batch.tolist():
        for piece in tokenizer.decode(row).split("<|bos|>"):
            assert not piece or any(piece in text for text in joined), piece


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path):
    weights = Weights()
    record = train(small(tmp_path, on_nonfinite="skip", log_every=1), [Spoil(3), weights])
    assert torch.equal(weights.seen[3], weights.seen[2]) and not torch.equal(weights.seen[4], weights.seen[3])
    assert record["skipped_steps"] == 1 and record["steps"] == 6 and record["rollbacks"] == 0
    (fault,) = events(record, "fault")
    assert (fault["at"], fault["step"], fault["action"], fault["count"]) == (3, 3, "skip", 1) and fault["batches"]["0"]
    assert all(value.isfinite().all() for value in load_checkpoint(record["checkpoint"]).model.values() if value.is_floating_point())


def test_experts_take_no_account_of_a_skipped_step(tmp_path):
    record = train(small(tmp_path, on_nonfinite="skip", **EXPERTS), [Spoil(2, 5)])
    model = load_checkpoint(record["checkpoint"]).model
    assert record["skipped_steps"] == 2 and all(value.isfinite().all() for value in model.values() if value.is_floating_point())
    ages = [value for name, value in model.items() if name.endswith("accounts.age")]
    assert ages and all(age.max() == 4 for age in ages)


def _placed(saved) -> int:
    """Tokens of text that a run has met."""
    return sum(stream["counts"]["tokens"] for stream in saved.meta["loop"]["ranks"][0]["loader"]["streams"].values())


def test_a_rollback_returns_to_the_checkpoint_but_not_to_the_data(tmp_path):
    weights = Weights()
    changes = {"on_nonfinite": "rollback", "save_every": 2, "log_every": 1, "num_iterations": 8, "keep_checkpoints": 0}
    record = train(small(tmp_path, **changes), [Spoil(6), weights])
    assert record["steps"] == 8 and record["rollbacks"] == 1 and record["skipped_steps"] == 0
    at4, again = (load_checkpoint(Path(record["checkpoint"]).parent / f"step_00000{step}") for step in (4, 8))
    assert again.meta["loop"]["progress"]["faults"] == 1 and at4.meta["loop"]["progress"]["faults"] == 0
    (fault,) = events(record, "fault")
    assert (fault["at"], fault["step"], fault["action"]) == (6, 4, "rollback")
    assert [event["step"] for event in events(record, "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    placed = _placed(again)
    straight = train(small(tmp_path / "straight", **{**changes, "num_iterations": 10}), [])
    assert _placed(load_checkpoint(straight["checkpoint"])) == placed, "8 steps and 2 that were undone are 10 batches: none is met twice"


def test_a_rollback_before_the_first_checkpoint_returns_to_the_start(tmp_path):
    weights = Weights()
    record = train(small(tmp_path, on_nonfinite="rollback", save_every=4, log_every=1), [Spoil(3), weights])
    assert record["steps"] == 6 and weights.faults[0].step == 0
    assert [event["step"] for event in events(record, "step")] == [1, 2, 3, 4, 5, 6]


def test_rollback_mends_weights_that_are_not_finite_any_more(tmp_path):
    class Break(Callback):
        broken = False

        def after_update(self, step, model, optimizer) -> None:
            if step == 5 and not self.broken:
                self.broken = True
                with torch.no_grad():
                    model.head.weight.fill_(float("nan"))

    record = train(small(tmp_path, on_nonfinite="rollback", save_every=2), [Break()])
    assert record["rollbacks"] == 1 and record["steps"] == 6


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_faults_stop_the_run(tmp_path, policy):
    spoil = Spoil(*range(3, 100))
    with pytest.raises(UserError, match=r"it is fault 4 of this run, --max_faults=3"):
        train(small(tmp_path, on_nonfinite=policy, save_every=2, max_faults=3, num_iterations=50), [spoil])
    assert spoil.count == 6


def test_the_count_of_faults_survives_a_restart(tmp_path):
    changes = {"on_nonfinite": "skip", "max_faults": 2, "num_iterations": 8}
    train(small(tmp_path, **changes, stop_after=4), [Spoil(2, 3)])
    with pytest.raises(UserError, match="fault 3 of this run"):
        train(small(tmp_path, **changes, resume="auto"), [Spoil(1)])


def test_a_loss_spike_is_a_fault(tmp_path):
    record = train(small(tmp_path, on_nonfinite="skip", num_iterations=14, loss_spike=3.0), [Spoil(12, factor=-100.0)])
    assert record["skipped_steps"] == 1 and "spike" in events(record, "fault")[0]["what"]
    calm = train(small(tmp_path, on_nonfinite="skip", num_iterations=14, loss_spike=0.0), [Spoil(12, factor=-100.0)])
    assert calm["skipped_steps"] == 0


def test_rollback_needs_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"--on_nonfinite=rollback needs checkpoints.*give --save_every"):
        small(tmp_path, on_nonfinite="rollback", save_every=0)
