"""A GPU that is not there: tensors without data stand for its own, so that what a CUDA graph cannot hold shows on any machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoCopies(TorchDispatchMode):
    """Operations that move values between host and device raise."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        devices = {value.device.type for value in tensors}
        travels = "copy" in str(function) or any(value.device.type == "cpu" and value.dim() for value in tensors)  # numbers are arguments
        assert not travels or len(devices) < 2, f"{function} copies between {devices}"
        return out


@contextmanager
def phantom_gpu(model: nn.Module) -> Iterator[None]:
    """Within, the tensors of `model` and new ones on "cuda" have no data: to read one raises DataDependentOutputException."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    if value is not None:
                        there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        values[name] = nn.Parameter(there) if isinstance(value, nn.Parameter) else there
        yield
