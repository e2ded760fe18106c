"""What only a CUDA device shows: compiled bfloat16 training, memory, and an out-of-memory error with a batch that fits."""

from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.training import TuneConfig, dry_run, train, tune
from bio_inspired_nanochat.training.gradients import WARM_RUNS
from bio_inspired_nanochat.training.job import Objective
from bio_inspired_nanochat.training.pace import Rehearsal
from bio_inspired_nanochat.training.plan import make_plan
from tests.training.ranks import LIVING
from tests.training.tiny import small

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GPU = {"device": "cuda", "max_seq_len": 128, "head_dim": 32, "n_embd": 64, "save_every": 0}


@pytest.mark.parametrize("synapses", [False, True])
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_training_learns_on_the_gpu(tmp_path, synapses, compiled):
    record = train(small(tmp_path, **GPU, synapses=synapses, compile=compiled, num_iterations=40))
    assert record["final_loss"] < record["first_loss"] - 0.5 and record["device"].startswith("cuda")
    assert 0 < record["peak_memory_gib"] < 4 and record["val_bpb"] > 0


def test_a_resumed_run_continues_on_the_gpu(tmp_path):
    whole = train(small(tmp_path / "a", **GPU, synapses=True, compile="0", num_iterations=12))
    train(small(tmp_path / "b", **GPU, synapses=True, compile="0", num_iterations=12, stop_after=6))
    parts = train(small(tmp_path / "b", **GPU, synapses=True, compile="0", num_iterations=12, resume="auto"))
    assert parts["final_loss"] == pytest.approx(whole["final_loss"], abs=0.02)


def test_steps_do_not_wait_for_the_device(tmp_path):
    mode = torch.cuda.get_sync_debug_mode()
    seen = []

    class Strict:
        """Turns every wait inside of steps 12 to 18 into an error; nothing is read there with log_every=20."""

        def __getattr__(self, name):
            return lambda *args: None

        def after_update(self, step, model, optimizer):
            seen.append(step)
            torch.cuda.set_sync_debug_mode("error" if 12 <= step < 18 else "default")

    try:
        train(small(tmp_path, **GPU, compile="0", num_iterations=20, log_every=20), [Strict()])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert seen == list(range(1, 21))


REPLAYED = {
    "vanilla": {},
    "synaptic": {"synapses": True},
    "memory": {"synapses": True, "syn_cfg": SynapticConfig.preset("memory")},
    "random release": {"synapses": True, "syn_cfg": SynapticConfig.preset("full"), "total_batch_size": 4 * 128 * 2},
    "experts": LIVING | {"eval_every": 5},
    "plain experts, accumulated": {"num_experts": 4, "total_batch_size": 4 * 128 * 3},
    "documents, clipped": {"synapses": True, "doc_mask": True, "optim": OptimConfig(grad_clip=0.3), "total_batch_size": 4 * 128 * 2},
    "plain documents": {"doc_mask": True, "window_pattern": "SL"},
    "asleep at times": {"synapses": True, "syn_cfg": SynapticConfig.preset("memory"), "consolidate_every": 5, "sample_every": 7},
}


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("kind", REPLAYED)
def test_a_replayed_step_is_the_step(tmp_path, capsys, kind, compiled):
    records = [
        train(small(tmp_path / graph, **{**REPLAYED[kind], **GPU, "num_iterations": 12}, compile=compiled, graph=graph)) for graph in "01"
    ]
    assert "not replayed" not in capsys.readouterr().out
    weights = [load_checkpoint(record["checkpoint"]).model for record in records]
    worst = max(float((weights[0][name].double() - weights[1][name].double()).abs().max()) for name in weights[0])
    assert records[1]["final_loss"] == pytest.approx(records[0]["final_loss"], abs=2e-3), worst
    assert records[1]["lineage_events"] == records[0]["lineage_events"]


@pytest.mark.parametrize("graph", ["auto", "1"])
def test_a_replayed_step_of_a_fine_tuning_is_the_step(tmp_path, capsys, graph):
    source = train(small(tmp_path, **GPU, synapses=True, compile="0", num_iterations=3))["checkpoint"]
    places = {"source": source, "checkpoint_dir": str(tmp_path / "sft"), "log_dir": str(tmp_path / "runs")}
    batch = {"device_batch_size": 2, "total_batch_size": 3 * 2 * 128, "num_iterations": 12, "eval_every": 5}
    records = [tune(TuneConfig(**places, **batch, device="cuda", compile="0", graph=one)) for one in ("0", graph)]
    assert "not replayed" not in capsys.readouterr().out
    assert [load_checkpoint(record["checkpoint"]).meta["train_config"]["graph"] for record in records] == ["0", "1"]
    assert records[1]["final_loss"] == pytest.approx(records[0]["final_loss"], abs=2e-3)


def drawn(graph: str, compiled: str, passes: int = 10) -> tuple[list[float], torch.Tensor]:
    """Losses of one batch in a model with dropout whose weights stay as they are, so that they differ by what is drawn; the generator then."""
    plan = make_plan(small(Path(), **GPU, dropout=0.5, dtype="float32", compile=compiled, graph=graph), CUDA, 1)
    rehearsal, found = Rehearsal(plan, CUDA), []
    for index, parameter in enumerate(rehearsal.model.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.copy_(0.1 * values)
    torch.manual_seed(5)
    for _ in range(passes):
        found.append(rehearsal.gradients(rehearsal.idx, rehearsal.targets).item())
        rehearsal.optimizer.zero_grad()
    assert rehearsal.gradients.holds == (graph == "1")
    return found, torch.cuda.get_rng_state()


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_every_replay_drops_out_anew_and_what_an_ordinary_step_would(compiled):
    (eager, goes_on), (replayed, same) = drawn("0", compiled), drawn("1", compiled)
    assert max(replayed[WARM_RUNS:]) - min(replayed[WARM_RUNS:]) > 1e-3
    assert replayed == pytest.approx(eager, abs=1e-4)
    assert torch.equal(goes_on, same), "a checkpoint holds where the draws have come to"


def reserved() -> int:
    """Bytes that the allocator cannot return."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def large(graph: str = "1") -> Rehearsal:
    """A model whose step takes more than a GiB, most of it for logits, before its first recording."""
    sizes = {"max_seq_len": 1024, "vocab_size": 8192, "device_batch_size": 16, "total_batch_size": 16 * 1024, "dropout": 0.1}
    rehearsal = Rehearsal(make_plan(small(Path(), **{**GPU, **sizes}, compile="0", graph=graph), CUDA, 1), CUDA)
    for _ in range(WARM_RUNS):
        rehearsal.step()
    return rehearsal


def test_released_recordings_return_their_memory_however_often():
    rehearsal = large()
    before, after = reserved(), []
    for _ in range(4):
        rehearsal.step()
        recorded = reserved()
        rehearsal.gradients.release()
        after.append(reserved())
    step = recorded - before
    assert step > 1 << 30 and max(after) - before < step / 4 and after[-1] - after[1] < 1 << 24


def test_a_refused_recording_leaves_streams_memory_and_random_numbers_as_they_were(monkeypatch, capsys):
    forward = Objective.forward

    def kept_by_three_steps(graph: str) -> int:
        empty = reserved()
        rehearsal = large(graph)
        for _ in range(3):
            rehearsal.step()
        return reserved() - empty

    def asking(self, *args):
        out = forward(self, *args)
        if torch.cuda.is_current_stream_capturing():
            out[1].item()
        return out

    ordinary = kept_by_three_steps("0")
    monkeypatch.setattr(Objective, "forward", asking)
    refused = kept_by_three_steps("1")
    assert capsys.readouterr().out.count("notice: steps are not replayed as a CUDA graph") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert refused - ordinary < 1 << 28, f"{refused >> 20} MiB, where steps that are never recorded keep {ordinary >> 20}"
    room, card = 1 << 31, torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved() + room) / card)  # of its own: neighbours on the card do not count
    try:
        for share in (0.5, 0.7):  # the second fits where the allocator returns the first
            assert torch.empty(int(share * room), dtype=torch.uint8, device=CUDA).numel() > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_runs_one_after_the_other_leave_no_memory_behind(tmp_path):
    held = []
    for number in range(3):
        train(small(tmp_path / str(number), **LIVING | GPU, compile="0", eval_tokens=0))
        held.append((torch.cuda.memory_allocated(), reserved()))
    assert all(last - first < 1 << 21 for first, last in zip(held[1], held[2], strict=True)), held


def test_a_batch_that_does_not_fit_names_one_that_does(tmp_path):
    torch.cuda.empty_cache()
    with pytest.raises(UserError, match="--device_batch_size="):
        dry_run(small(tmp_path, **{**GPU, "max_seq_len": 8192, "vocab_size": 32768}, device_batch_size=1 << 14))
