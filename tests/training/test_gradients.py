"""Replayed micro-batches are the ordinary ones: same gradients, same losses, same lives of experts, whatever changes between steps."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.structural import Ledger
from bio_inspired_nanochat.training import Callback, gradients, loop, pace, train
from bio_inspired_nanochat.training.config import COMPILE
from bio_inspired_nanochat.training.gradients import WARM_RUNS, Gradients
from bio_inspired_nanochat.training.job import Job, Objective
from bio_inspired_nanochat.training.pace import measure
from bio_inspired_nanochat.training.plan import graph_setting, make_plan
from tests.phantom import NoCopies, phantom_gpu
from tests.training.ranks import LIVING
from tests.training.tape import Tape, Taped
from tests.training.tiny import small

CPU = torch.device("cpu")
KINDS = {
    "vanilla": {"num_iterations": 8},
    "experts": LIVING | {"eval_every": 5},
    "experts, accumulated": LIVING | {"total_batch_size": 4 * 32 * 3},
    "random release": {"synapses": True, "syn_cfg": SynapticConfig.preset("full"), "total_batch_size": 4 * 32 * 2, "num_iterations": 8},
    "documents, clipped": {
        "synapses": True,
        "doc_mask": True,
        "optim": OptimConfig(grad_clip=0.3),
        "total_batch_size": 4 * 32 * 3,
        "num_iterations": 8,
        "eval_every": 3,
    },
    "dropout, asleep at times": {
        "synapses": True,
        "syn_cfg": SynapticConfig.preset("memory"),
        "dropout": 0.2,
        "init": "rule30",
        "value_embeds": False,
        "num_iterations": 9,
        "consolidate_every": 4,
    },
}


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


def test_a_run_that_stops_and_resumes_replays_the_same_steps(tmp_path, monkeypatch):
    changes = LIVING | {"dropout": 0.1}
    told = train(small(tmp_path / "a", **changes))
    monkeypatch.setattr(loop, "Gradients", Taped)
    monkeypatch.setattr(Tape, "played", 0)
    train(small(tmp_path / "b", **changes, stop_after=5))
    resumed = train(small(tmp_path / "b", **changes, resume="auto"))
    assert resumed["resumed_from"] == 5 and Tape.played == 10 - 2 * WARM_RUNS
    ours, theirs = (load_checkpoint(record["checkpoint"]).model for record in (resumed, told))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Watched(Taped):
    """Notes what is held by those that are in training."""

    living: ClassVar[list[Gradients]] = []

    def __init__(self, engine, keeper, plan) -> None:
        super().__init__(engine, keeper, plan)
        self.living.append(self)


@pytest.fixture
def held(monkeypatch) -> dict[str, list[bool]]:
    """By what needs memory beside a step: whether a recording held that of a step each time."""
    found: dict[str, list[bool]] = {}

    def watch(place, name):
        plain = getattr(place, name)

        def called(*args, **kwargs):
            found.setdefault(name, []).append(Watched.living[-1].holds)
            return plain(*args, **kwargs)

        monkeypatch.setattr(place, name, called)

    for place, name in ((GPT, "token_losses"), (loop, "sleep_on"), (Job, "sample")):
        watch(place, name)
    monkeypatch.setattr(Watched, "living", [])
    monkeypatch.setattr(Tape, "played", 0)
    for module in (loop, pace):
        monkeypatch.setattr(module, "Gradients", Watched)
    return found


def test_a_recording_gives_its_memory_to_whatever_needs_that_of_a_step(tmp_path, held):
    train(small(tmp_path / "a", **LIVING, eval_every=5), [Callback()])
    assert True not in held["token_losses"] and len(held["token_losses"]) > 2 * 2 and Tape.played > 2
    fast = {"synapses": True, "syn_cfg": SynapticConfig.preset("memory"), "consolidate_every": 5, "sample_every": 7, "num_iterations": 8}
    train(small(tmp_path / "b", **fast, eval_tokens=0), [Callback()])
    assert held["sleep_on"] == [False] and held["sample"] == [False, False]


def test_pace_is_measured_without_a_recording_beside_the_evaluation(tmp_path, held):
    measure(make_plan(small(tmp_path), CPU, 1), CPU, 5.0)
    assert Tape.played > 0 and len(held["token_losses"]) > 1 and True not in held["token_losses"]


class Places:
    """Where a model's tensors lie, after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def after_update(self, step, model, optimizer) -> None:
        self.seen.append({name: value.data_ptr() for name, value in (*model.named_parameters(), *model.named_buffers())})

    def __getattr__(self, name):
        return lambda *args: None


@pytest.mark.parametrize(("compile", "expected"), [("0", []), ("1", [False]), ("max-autotune", [True])])
def test_training_and_its_pace_compile_as_they_are_asked_to(tmp_path, monkeypatch, compile, expected):
    asked = []
    monkeypatch.setattr(GPT, "compile_regions", lambda self, options: asked.append(bool(options)))
    train(small(tmp_path, compile=compile, num_iterations=1, eval_tokens=0, save_every=-1))
    assert asked == expected
    pace.Rehearsal(make_plan(small(tmp_path, compile=compile), CPU, 1), CPU)
    assert asked == 2 * expected


def test_a_tuned_compilation_asks_for_options_that_the_compiler_has(monkeypatch):
    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: options.append(given["options"]))
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.append(given["options"]) or function)
    GPT(GPTConfig(sequence_len=8, vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)).compile_regions(
        options=COMPILE["max-autotune"]
    )
    assert len(options) == 2 and all(one["max_autotune"] and set(one) <= set(torch._inductor.list_options()) for one in options)


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


def test_a_recording_ends_with_its_run(tmp_path, monkeypatch):
    """At once, and not when the garbage collector comes by: the next model of the process needs the memory."""
    runs: list[weakref.ref] = []

    class Noted(Gradients):
        def __init__(self, engine, keeper, plan) -> None:
            super().__init__(engine, keeper, plan)
            runs.extend(map(weakref.ref, (self, engine.model)))

    monkeypatch.setattr(loop, "Gradients", Noted)
    gc.disable()
    try:
        train(small(tmp_path, **LIVING))
        assert [run() for run in runs] == [None, None]
    finally:
        gc.enable()


STEPS = {
    "vanilla": {},
    "default": {"synapses": True},
    "full": {"synapses": True, "syn_cfg": SynapticConfig.preset("full")},
    "memory": {"synapses": True, "syn_cfg": SynapticConfig.preset("memory")},
    "vesicles": {"synapses": True, "syn_cfg": SynapticConfig(stochastic_train_frac=0.3, stochastic_mode="gumbel_sigmoid_ste")},
    "proteins": {"synapses": True, "syn_cfg": SynapticConfig(genome="proteins")},
    "documents": {"synapses": True, "doc_mask": True},
    "plain documents": {"doc_mask": True, "dropout": 0.1, "window_pattern": "SL"},
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
    assert graph_setting("auto", torch.device("cuda"), world) == str(int(world == 1))
