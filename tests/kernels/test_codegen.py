"""What is traced from a definition computes what the definition computes, however it was written."""

import torch

from bio_inspired_nanochat.kernels import codegen


def test_copies_of_one_value_that_are_overwritten_apart_stay_apart():
    def two(x):
        first, second = x.clone(), x.clone()
        first.masked_fill_(x > 0.5, 0.0)
        second.masked_fill_(x < 0.5, 1.0)
        return [first, second]

    module, x = codegen.trace(two, 1), torch.tensor([0.2, 0.7])
    assert [value.tolist() for value in module(x)] == [value.tolist() for value in two(x)]
    names = {codegen._operation(node) for node in module.graph.nodes if node.op == "call_function"}
    assert not {name for name in names if name.endswith("_")}


def test_equal_work_is_done_once():
    module = codegen.trace(lambda x: [torch.exp(x) + 1, torch.exp(x) + 2], 1)
    assert [codegen._operation(node) for node in module.graph.nodes].count("exp") == 1


def test_what_the_caller_has_set_for_autograd_does_not_matter():
    body = codegen.trace(lambda x: [x * x], 1)
    wanted = codegen.derivative(body, 0, 1, 1)(torch.tensor([3.0]), torch.tensor([1.0]))[0]
    for setting in (torch.no_grad(), torch.inference_mode(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
        with setting:
            found = codegen.derivative(body, 0, 1, 1)
        assert torch.equal(found(torch.tensor([3.0]), torch.tensor([1.0]))[0], wanted) and wanted == 6
