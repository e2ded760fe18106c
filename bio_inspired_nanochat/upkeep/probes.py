"""Looks at one part of the machine that may crash a process: `python -m bio_inspired_nanochat.upkeep.probes NAME [DEPTH CONTEXT]`.

Each prints one JSON object, so that the doctor can run it in a process of its own. Values are lines for a person; a key `problem`
says what is broken, and how to mend it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

DEEPEST = 64
MOST_ROWS = 4096


def torch_probe() -> dict[str, Any]:
    """PyTorch, its devices, threads and C compiler."""
    import torch

    from bio_inspired_nanochat.common import compute_dtype, pick_device

    found: dict[str, Any] = {"version": torch.__version__, "built for CUDA": torch.version.cuda or "no"}
    found["CPU threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    if torch.cuda.is_available():
        found["CUDA driver"] = _driver(torch)
        for index in range(torch.cuda.device_count()):
            properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
            found[f"GPU {index}"] = (
                f"{properties.name}, capability {properties.major}.{properties.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            )
    else:
        found["CUDA"] = "no device that this build of PyTorch can use"
    found["MPS"] = "yes" if torch.backends.mps.is_available() else "no"
    device = pick_device("auto")
    if torch.cuda.is_available() and device.type != "cuda":
        found["problem"] = "a GPU is visible, but a test launch fails on it: check that PyTorch's CUDA build suits driver and card"
    found["device=auto takes"] = f"{device}, {str(compute_dtype(device)).removeprefix('torch.')}"
    compiler = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    found["C++ compiler (torch.compile on a CPU)"] = compiler or "none"
    return found


def _driver(torch: Any) -> str:
    try:
        number = torch._C._cuda_getDriverVersion()
        return f"serves CUDA up to {number // 1000}.{number % 1000 // 10}"
    except (AttributeError, RuntimeError):
        return "unknown"


def triton_probe() -> dict[str, Any]:
    """Triton, by a launch of a kernel of this project that is compared with its reference."""
    import torch

    found: dict[str, Any] = {}
    try:
        import triton
    except ImportError as error:
        said = f"not importable ({error}): everything runs without it, slower on CUDA"
        return {
            "version": said,
            **({"problem": "Triton is missing on a machine with CUDA: pip install triton"} if torch.cuda.is_available() else {}),
        }
    from bio_inspired_nanochat.kernels import tick_drive, triton_obstacle

    found["version"] = triton.__version__
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 16, generator=generator).to(device) for _ in range(2))
    theta = torch.zeros(2, device=device)
    if obstacle := triton_obstacle(q, 8):
        return found | {"probe launch": f"none ({obstacle})"}
    kernel, reference = (tick_drive(q, k, theta, 8, 0.25, backend=backend) for backend in ("triton", "reference"))
    error = float((kernel - reference).abs().max() / reference.abs().max())
    found["probe launch"] = f"ran on {device}, {error:.1e} from the reference"
    if not error < 1e-2:
        found["problem"] = (
            f"a Triton kernel computes something else than its reference (error {error:.1e}): use --backend=sdpa, and report this"
        )
    return found


def rust_probe() -> dict[str, Any]:
    """The Rust extension, by a call that is compared with its reference."""
    import torch

    from bio_inspired_nanochat.kernels import phi, rust

    found: dict[str, Any] = {"cargo": "yes" if shutil.which("cargo") else "no"}
    if not rust.available():
        return found | {"extension": rust.why_not()}
    x = torch.linspace(-3, 3, 101)
    error = float((rust.phi(x) - phi(x)).abs().max())
    found["extension"] = f"loads, {error:.1e} from the reference"
    if not error < 1e-5:
        found["problem"] = (
            f"the Rust extension computes something else than the reference (error {error:.1e}): run bash scripts/env.sh to build it anew"
        )
    return found


def execution_probe(depth: int, context: int) -> dict[str, Any]:
    """What training and decoding would run on, and why; what fits. depth: layers; context: tokens of a sequence, 0 for the default."""
    import torch

    from bio_inspired_nanochat.common import pick_device
    from bio_inspired_nanochat.decoding import graph_obstacle
    from bio_inspired_nanochat.gpt import GPT
    from bio_inspired_nanochat.synaptic.execution import describe_execution
    from bio_inspired_nanochat.training.config import TrainConfig
    from bio_inspired_nanochat.training.plan import make_plan

    device, found = pick_device("auto"), {}
    for kind in (False, True):
        plan = make_plan(TrainConfig(depth=depth, synapses=kind, max_seq_len=context or None), device, 1)
        found["synaptic" if kind else "vanilla"] = describe_execution(plan.model, device, plan.dtype)
    small = dataclasses.replace(plan.model, n_layer=1, vocab_size=64, sequence_len=plan.model.syn_cfg.tick)
    model = GPT(small).to(device).set_compute_dtype(plan.dtype).eval()
    with torch.no_grad():
        obstacle = graph_obstacle(model, model.init_state(1, small.sequence_len))
    found["decoding as a CUDA graph"] = "yes" if obstacle is None else f"no ({obstacle})"
    return found | _fits(depth, context, device)


def _fits(depth: int, context: int, device: Any) -> dict[str, str]:
    """The largest batch of the wanted model, and the deepest model for one row, by the estimates that training uses."""
    from bio_inspired_nanochat.training.config import TrainConfig
    from bio_inspired_nanochat.training.hardware import GIB, bytes_per_row, fitting_rows, static_bytes, total_memory
    from bio_inspired_nanochat.training.plan import make_plan

    memory = total_memory(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, str] = {}
    for name, kind in (("vanilla", False), ("synaptic", True)):

        def plan(layers: int, kind: bool = kind) -> Any:
            return make_plan(TrainConfig(depth=layers, synapses=kind, max_seq_len=context or None, device_batch_size=1), device, 1)

        def need(layers: int) -> float:
            made = plan(layers)
            return static_bytes(made.params) + bytes_per_row(made.model, made.dtype)

        low, high = 0, DEEPEST + 1  # fits, does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if need(middle) <= 0.8 * memory else (low, middle)
        wanted = plan(depth)
        rows = fitting_rows(wanted.model, wanted.dtype, wanted.params, memory, MOST_ROWS) if need(depth) <= 0.8 * memory else 0
        size = f"depth {depth}, context {wanted.model.sequence_len}: {rows} rows"
        deepest = f"{'at least ' if low == DEEPEST else ''}{low} for one row" if low else "none"
        found[f"largest {name}"] = f"{size}; deepest --depth: {deepest} (estimates, of {memory / GIB:.1f} GiB)"
    return found


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": torch_probe,
    "triton": triton_probe,
    "rust": rust_probe,
    "execution": execution_probe,
}


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*(int(word) for word in sys.argv[2:]))))
