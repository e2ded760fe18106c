"""What only a CUDA device shows: compiled bfloat16 training, memory, and an out-of-memory error with a batch that fits."""

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import dry_run, train
from tests.training.ranks import LIVING
from tests.training.tiny import small

pytestmark = pytest.mark.gpu
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


def test_a_batch_that_does_not_fit_names_one_that_does(tmp_path):
    torch.cuda.empty_cache()
    with pytest.raises(UserError, match="--device_batch_size="):
        dry_run(small(tmp_path, **{**GPU, "max_seq_len": 8192, "vocab_size": 32768}, device_batch_size=1 << 14))
