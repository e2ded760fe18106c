"""The factors of the residual stream: the first layer's cannot turn the stream around."""

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import LEAST_SHARE, stream_scales

SMALL = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


@pytest.fixture
def model() -> GPT:
    model = GPT(SMALL).eval()
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", "w_out.weight", "head.weight")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_a_step_of_the_optimizer_across_zero_does_not_turn_the_stream_around(model):
    idx = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))
    logits = []
    for entering in (LEAST_SHARE + 0.02, LEAST_SHARE - 0.02, -0.02):
        model.resid_scale.data[0], model.x0_scale.data[0] = 0.4, entering - 0.4
        logits.append(model(idx).detach())
    above, below, across = logits
    assert torch.allclose(below, across, atol=1e-5)
    assert torch.corrcoef(torch.stack([above.flatten(), across.flatten()]))[0, 1] > 0.9


def test_it_learns_its_way_back_from_below(model):
    idx = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(2))
    model.resid_scale.data[0], model.x0_scale.data[0] = 0.4, -0.6
    model(idx[:, :-1], idx[:, 1:]).backward()
    assert model.resid_scale.grad[0] != 0
    assert torch.isclose(model.resid_scale.grad[0], model.x0_scale.grad[0], rtol=1e-4)


def test_other_factors_are_what_was_learned():
    resid, x0 = torch.tensor([[0.9, -0.3, 0.0], [0.1, 1.0, 2.0]]), torch.tensor([[-0.2, 0.3, -2.0], [-0.1, -1.0, 0.0]])
    scales = stream_scales(resid, x0)
    assert torch.equal(scales[0], torch.stack([resid[0], x0[0]], dim=-1))
    assert torch.equal(scales[1, 1:], torch.stack([resid[1, 1:], x0[1, 1:]], dim=-1))
    assert torch.isclose(scales[1, 0].sum(), torch.tensor(LEAST_SHARE))
