"""The sequential sums: custom operators that torch.compile may rely on."""

import pytest
import torch

from bio_inspired_nanochat.kernels.scan import linear_scan, linear_scan_op, running_sum, running_sum_op
from tests.kernels.interpreter import run_interpreted


def scan_inputs(shape_a):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape_a, (2, 3, 5, 4), (2, 3, 4))
    return [torch.rand(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def test_the_operators_keep_their_promises_to_the_compiler():
    torch.library.opcheck(linear_scan_op, scan_inputs((2, 3, 5, 1)))
    torch.library.opcheck(linear_scan_op, scan_inputs((2, 3, 5, 4)))
    strided = torch.rand(2, 4, 3, requires_grad=True).transpose(1, 2)
    torch.library.opcheck(running_sum_op, (strided,))


def test_gradients_of_the_scan_match_finite_differences():
    assert torch.autograd.gradcheck(linear_scan, scan_inputs((2, 3, 5, 4)))


def test_decoding_computes_what_training_computes():
    inputs = scan_inputs((2, 3, 5, 4))
    with torch.no_grad():
        assert torch.equal(linear_scan(*inputs), linear_scan_op(*inputs))
        assert torch.equal(running_sum(inputs[0]), running_sum_op(inputs[0]))


def test_running_sum_keeps_differences_of_distant_sums():
    x = torch.full((1, 1, 200_000), 0.1)
    total = running_sum(x)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total[..., -1] - total[..., -2], x[..., -1].double(), rtol=0, atol=1e-9)


def test_a_synaptic_model_compiles_without_a_graph_break_and_once_for_all_layers():
    from torch._dynamo.utils import counters

    from tests.contract import make_ids, make_model

    torch._dynamo.reset()
    counters.clear()
    model, ids = make_model("default", n_layer=4, value_embeds=False), make_ids()
    want = torch.autograd.grad(model(ids, ids.roll(-1, 1)), list(model.parameters()))
    model.compile_regions("aot_eager")
    got = torch.autograd.grad(model(ids, ids.roll(-1, 1)), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # one block, one loss


def check_triton_sums(device):
    """The Triton execution in both directions, at odd lengths and over several chunks."""
    from bio_inspired_nanochat.kernels import scan_triton

    for length in (1, 7, 1024, 2500):
        x = torch.rand(2, 3, length, device=device)
        high, low = scan_triton.running_sum(x).double()
        torch.testing.assert_close(high + low, x.double().cumsum(-1), rtol=1e-12, atol=0)
        torch.testing.assert_close(scan_triton.sum_from_end(x), x.double().flip(-1).cumsum(-1).flip(-1).float())


@pytest.mark.gpu
def test_triton_sums_on_the_gpu():
    check_triton_sums("cuda")


def test_triton_sums_in_the_interpreter():
    run_interpreted("from tests.kernels.test_scan import check_triton_sums\ncheck_triton_sums('cpu')")
