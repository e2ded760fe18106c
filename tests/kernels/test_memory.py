"""What the fused layer takes and keeps on the GPU: no tensor of queries x keys, and little more than a vanilla layer."""

import dataclasses
import itertools

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.gpt import GPT

pytestmark = pytest.mark.gpu


def model_of(context: int, **options) -> GPT:
    config = GPTConfig(sequence_len=context, vocab_size=512, n_layer=1, n_embd=512, n_head=8, n_kv_head=8, **options)
    return GPT(config).cuda().set_compute_dtype(torch.bfloat16)


def kept_by_the_block(context: int, **options) -> int:
    """Bytes that the only block keeps for its backward, every storage once, parameters and their casts left out."""
    model = model_of(context, **options)
    ids = torch.randint(0, 512, (4, context), device="cuda")
    model(ids)
    model.compile_regions()
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def record(block, inputs, output):
        hooks.__exit__(None, None, None)

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: hooks.__enter__())
    model.blocks[0].register_forward_hook(record)
    model(ids)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)


def test_a_synaptic_layer_keeps_at_most_a_third_more_than_a_vanilla_one():
    vanilla, synaptic = kept_by_the_block(2048), kept_by_the_block(2048, synapses=True, backend="fused")
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
