"""Running a kernel test in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os

import pytest

from tests import forked

LOADED = ("torch._dynamo", "torch.fx.experimental.proxy_tensor", "pytest", "tests.contract", "tests.kernels.patched_once")
VARIABLE = ("TRITON_INTERPRET", "1")


def run_interpreted(code: str) -> None:
    """Run Python code from the root of the repository on CPU tensors; skips where there is no working interpreter.

    Memory that a kernel reads and nothing has written is NaN, so that it cannot pass for a result.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    code = f"import torch\ntorch.use_deterministic_algorithms(True, warn_only=True)\n{code}"
    env = {**os.environ, VARIABLE[0]: VARIABLE[1], "PYTHONPATH": str(forked.ROOT)}
    result = forked.run(["-c", code], env=env, preload=LOADED, at_import=(VARIABLE,))
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("this Triton's interpreter does not work with the installed NumPy")
    assert result.returncode == 0, result.stderr[-2000:]
