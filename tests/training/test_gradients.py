"""Replayed micro-batches are the ordinary ones: same gradients, same losses, same lives of experts, whatever changes between steps."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import Ledger
from bio_inspired_nanochat.training import gradients, loop, train
from bio_inspired_nanochat.training.gradients import WARM_RUNS, Gradients
from bio_inspired_nanochat.training.job import Objective
from bio_inspired_nanochat.training.plan import make_plan
from tests.phantom import NoCopies, phantom_gpu
from tests.training.ranks import LIVING
from tests.training.tiny import small

CPU = torch.device("cpu")
KINDS = {
    "vanilla": {"num_iterations": 8},
    "experts": LIVING | {"eval_every": 5},
    "experts, accumulated": LIVING | {"total_batch_size": 4 * 32 * 3},
    "random release": {"synapses": True, "syn_cfg": SynapticConfig.preset("full"), "total_batch_size": 4 * 32 * 2, "num_iterations": 8},
}


class Tape:
    """A CUDA graph for CPUs: `replay` does again what was recorded, with inputs, results and gradients in the same memory."""

    played = 0

    def __init__(self, run, leaves) -> None:
        self.run, self.leaves = run, leaves
        self.fresh = [leaf.grad is None for leaf in leaves]
        self.made = run()
        self.grads = [leaf.grad for leaf in leaves]
        for grad in self.grads:
            if grad is not None:
                grad.fill_(torch.nan)  # a recording computes nothing

    def replay(self) -> None:
        Tape.played += 1
        for leaf, fresh, grad in zip(self.leaves, self.fresh, self.grads, strict=True):
            leaf.grad = None if fresh else grad
        loss, routing = self.run()
        self.made[0].copy_(loss)
        for held, found in zip(self.made[1], routing, strict=True):
            for mine, new in zip(held, found, strict=True):
                mine.copy_(new)
        for leaf, grad in zip(self.leaves, self.grads, strict=True):
            if grad is not None and grad is not leaf.grad:
                grad.copy_(leaf.grad)
            leaf.grad = None


class Taped(Gradients):
    """Gradients that record on a CPU."""

    def __init__(self, engine, keeper, plan) -> None:
        super().__init__(engine, keeper, plan)
        self.wanted = True

    def _record(self, batch) -> None:
        leaves = [*self.engine.model.parameters(), *([] if self.keeper is None else self.keeper.taps())]

        def capture(run):
            tape = Tape(run, leaves)
            return tape, tape.made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "capture", capture)
            super()._record(batch)

    def _aside(self):
        return contextlib.nullcontext()


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_train_the_same_model(tmp_path, monkeypatch, kind):
    told = train(small(tmp_path / "a", **KINDS[kind]))
    monkeypatch.setattr(loop, "Gradients", Taped)
    monkeypatch.setattr(Tape, "played", 0)
    replayed = train(small(tmp_path / "b", **KINDS[kind]))
    forwards = KINDS[kind]["num_iterations"] * max(1, KINDS[kind].get("total_batch_size", 0) // 128)
    assert Tape.played >= forwards - WARM_RUNS - 2 > 0
    assert replayed["final_loss"] == told["final_loss"] and replayed["lineage_events"] == told["lineage_events"]
    ours, theirs = (load_checkpoint(record["checkpoint"]).model for record in (replayed, told))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if "splitmerge_every" in KINDS[kind]:
        assert told["lineage_events"] > 0


class Places:
    """Where a model's tensors lie, after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def after_update(self, step, model, optimizer) -> None:
        self.seen.append({name: value.data_ptr() for name, value in (*model.named_parameters(), *model.named_buffers())})

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize("kind", ["experts", "memory", "rollback"])
def test_what_a_recording_reads_stays_where_it_is(tmp_path, monkeypatch, kind):
    """Lives of experts, sleep and rollbacks change values in place: a recording knows addresses."""
    changes = {
        "experts": LIVING,
        "memory": {"synapses": True, "syn_cfg": SynapticConfig.preset("memory"), "consolidate_every": 2, "num_iterations": 4},
        "rollback": {"on_nonfinite": "rollback", "save_every": 2, "num_iterations": 8, "loss_spike": 0.0},
    }[kind]
    faults = iter([None, None, None, "the loss is a test"])
    if kind == "rollback":
        monkeypatch.setattr("bio_inspired_nanochat.training.faults.judge", lambda *args: next(faults, None))
    places = Places()
    record = train(small(tmp_path, **changes), [places])
    assert len(places.seen) >= record["steps"] and all(seen == places.seen[0] for seen in places.seen)
    assert record["rollbacks"] == (kind == "rollback") and (kind != "experts" or record["lineage_events"] > 0)


def test_a_recording_that_fails_leaves_ordinary_steps_and_one_notice(tmp_path, monkeypatch, capsys):
    told = train(small(tmp_path / "a", num_iterations=8))

    class Broken(Taped):
        def _record(self, batch) -> None:
            Gradients._record(self, batch)

    def refuse(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(loop, "Gradients", Broken)
    monkeypatch.setattr(gradients, "capture", refuse)
    capsys.readouterr()
    record = train(small(tmp_path / "b", num_iterations=8))
    assert record["final_loss"] == told["final_loss"]
    assert capsys.readouterr().out.count("notice: steps are not replayed as a CUDA graph") == 1


STEPS = {
    "vanilla": {},
    "default": {"synapses": True},
    "full": {"synapses": True, "syn_cfg": SynapticConfig.preset("full")},
    "memory": {"synapses": True, "syn_cfg": SynapticConfig.preset("memory")},
    "vesicles": {"synapses": True, "syn_cfg": SynapticConfig(stochastic_train_frac=0.3, stochastic_mode="gumbel_sigmoid_ste")},
    "proteins": {"synapses": True, "syn_cfg": SynapticConfig(genome="proteins")},
    "documents": {"synapses": True, "doc_mask": True},
    "experts": {"synapses": True, "num_experts": 4, "syn_cfg": SynapticConfig(nmda=True, snare_codes=True, vesicle_output=True)},
    "plain experts": {"num_experts": 4},
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_on_cuda_neither_waits_for_the_host_nor_copies_from_it(kind):
    """What a recording cannot hold."""
    model = GPT(GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, **STEPS[kind]))
    with phantom_gpu(model):
        idx, number = (torch.zeros(shape, dtype=torch.long, device="cuda") for shape in ((4, 64), ()))
        probes = Ledger(model).probes() if model.experts() else None
        objective = Objective(model.set_compute_dtype(torch.bfloat16))
        with NoCopies():
            loss, _, _ = objective(idx, idx, number, number, probes)
        assert loss.device.type == "cuda" and loss.shape == ()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize(("world", "named"), [(1, "device=cpu"), (2, "2 processes")])
def test_asking_for_a_graph_where_there_is_none_is_an_error(tmp_path, world, named):
    with pytest.raises(UserError, match=f"graph=1 is for one process on CUDA, and this is {named}"):
        make_plan(small(tmp_path, graph="1"), CPU, world)
    assert make_plan(small(tmp_path), CPU, world).config.graph == "0"
