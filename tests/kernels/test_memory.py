"""What the fused layer takes and keeps on the GPU: no tensor of queries x keys, and little more than a vanilla layer."""

import dataclasses
import itertools

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.gpt import GPT

pytestmark = pytest.mark.gpu


def model_of(context: int, device: str = "cuda", layers: int = 1, **options) -> GPT:
    sizes = {"vocab_size": 512, "n_embd": 512, "n_head": 8, "n_kv_head": 8, "value_embeds": False}
    return GPT(GPTConfig(sequence_len=context, n_layer=layers, **sizes, **options)).to(device).set_compute_dtype(torch.bfloat16)


def kept_by_a_layer(context: int, device: str = "cuda", **options) -> int:
    """Bytes that one more layer keeps for the backward, every storage once, parameters left out."""
    totals = []
    for layers in (1, 2):
        model = model_of(context, device, layers, **options)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        alive = []  # so that no storage is freed and its address used again

        def keep(tensor: torch.Tensor, weights: set = weights, alive: list = alive) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(0, 512, (4, context), device=device))
        totals.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values()))
    return totals[1] - totals[0]


def test_a_synaptic_layer_keeps_at_most_a_third_more_than_a_vanilla_one():
    vanilla, synaptic = kept_by_a_layer(2048), kept_by_a_layer(2048, synapses=True, backend="fused")
    assert synaptic <= 1.3 * vanilla, f"{synaptic / 2**20:.1f} MiB, {synaptic / vanilla:.2f} times {vanilla / 2**20:.1f} MiB"


@pytest.mark.parametrize("tick", [8, 1])
def test_twice_the_context_at_the_same_tokens_takes_at_most_twice_the_memory(tick):
    peaks = []
    for context in (1024, 2048, 4096):
        cfg = dataclasses.replace(SynapticConfig(), tick=tick)
        model = model_of(context, synapses=True, syn_cfg=cfg, backend="fused")
        ids = torch.randint(0, 512, (8192 // context, context), device="cuda")
        model(ids, ids).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, ids).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert all(b <= 2 * a for a, b in itertools.pairwise(peaks)), [peak >> 20 for peak in peaks]
