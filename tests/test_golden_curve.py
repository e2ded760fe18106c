"""Loss curves on the CPU that catch an accidental change of the numbers.

After an intended change: `python -m tests.test_golden_curve` writes the file anew.
"""

import json
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tasks.phrases import VOCAB, train

GOLDEN = Path(__file__).parent / "golden" / "loss_curves.json"
STEPS = 15
MODELS = {
    "vanilla": {},
    "synaptic": {"synapses": True, "syn_cfg": SynapticConfig(tick=4)},
    "synaptic_linear_barrier": {"synapses": True, "syn_cfg": SynapticConfig(tick=4, barrier="linear", drive="softplus", syt_mix=1.0)},
}


def curve(name: str) -> list[float]:
    torch.set_num_threads(1)
    sizes = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    return train(GPT(GPTConfig(**sizes, **MODELS[name])), STEPS)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_loss_curve_is_the_stored_one(name):
    stored = json.loads(GOLDEN.read_text())[name]
    torch.testing.assert_close(torch.tensor(curve(name)), torch.tensor(stored), rtol=2e-3, atol=0)


def test_the_curves_differ_by_more_than_the_tolerance():
    """The tolerance leaves room for other processors, not for another model."""
    stored = json.loads(GOLDEN.read_text())
    assert abs(stored["vanilla"][-1] - stored["synaptic"][-1]) > 0.01


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: curve(name) for name in MODELS}, indent=1) + "\n")
