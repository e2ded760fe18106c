"""What the device can do: peak operations for the MFU, memory in use and how much a run will need."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch

from bio_inspired_nanochat.config import GPTConfig

GIB = 1 << 30
STAT = Path("/proc/stat")  # what Linux says about the work of all cores
# glibc's options M_MMAP_THRESHOLD (32 MiB is the most that it takes), M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
MALLOPT = ((-3, 1 << 25), (-1, 1 << 30), (-2, 1 << 26))
WATCH = 0.25  # seconds for which `busy_cores` watches the machine

# Dense bfloat16 matrix products with float32 accumulation, in 1e12 operations per second, from the vendors' data sheets.
# The first name that occurs in the device's name counts, so longer names stand before shorter ones.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 5080", 112.6),
    ("RTX 4090", 165.2),
    ("RTX 4080", 97.5),
    ("RTX 3090", 71.0),
    ("RTX 3080", 59.5),
)


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a step on the CPU frees for the next one. Of glibc only, and unless MALLOC_* or GLIBC_TUNABLES are set.

    By default it gives large blocks back to the system at once, which then clears the same memory page by page for every step.
    """
    if device.type != "cpu" or sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOPT:
            mallopt(option, value)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations per second of one device in `dtype`, or None where it is not known (then there is no MFU)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def crowded(device: torch.device) -> list[str]:
    """A notice where threads of PyTorch would wait for cores that other work keeps busy, else nothing. Looks for WATCH seconds.

    Threads meet after every product; one that has lost its core makes all others wait, ten times as long as all of them compute.
    """
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or os.environ.get("OMP_NUM_THREADS"):
        return []
    load = busy_cores()
    free = max(1, round(cores - load))
    if threads <= free:
        return []
    busy = f"other work keeps {load:.1f} of {cores} cores busy, and {threads} threads would wait for each other"
    return [f"notice: {busy}: OMP_NUM_THREADS={free} before the command may be several times as fast"]


def busy_cores() -> float:
    """How many cores do something else than this process, over WATCH seconds; 0 where the system does not say."""
    before = _work()
    time.sleep(WATCH)
    after = _work()
    if before is None or after is None:
        return 0.0
    return max(0.0, (after - before) / WATCH)


def _work() -> float | None:
    """Seconds of work of all cores since the machine started, without this process's own."""
    try:
        counts = [int(count) for count in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = sum(counts[3:5])  # doing nothing, or waiting for a disk
    return (sum(counts) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_by_name(name: str) -> float | None:
    """Peak bfloat16 operations per second of a GPU by its marketing name, or None for one that is not in the table."""
    words = name.replace("-", " ").upper()
    for known, tflops in PEAK_TFLOPS:
        if known.upper() in words:
            return tflops * 1e12
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far, in GiB: allocated tensors on CUDA and MPS, the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a CUDA device; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def total_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that this process could use: what is free and what it holds; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def static_bytes(params: int) -> int:
    """Parameters, gradients and optimizer state, all float32: at most two moments per parameter."""
    return params * 16


def bytes_per_row(config: GPTConfig, dtype: torch.dtype) -> int:
    """Rough need of one row of a batch in training, without recomputation: what the backward keeps.

    Per token and layer about 10 vectors of the width and the hidden units twice, and for each chosen expert its input, hidden units and output; per token the
    logits and their gradient in float32; a synaptic layer also what its terminals keep per (head, tick, key). An estimate to choose a
    first batch size by, good to about a third.
    """
    tokens, size = config.sequence_len, torch.finfo(dtype).bits // 8
    chosen = config.moe_top_k * (2 + config.expert_ratio) if config.num_experts else 0
    layers = config.n_layer * tokens * (10 + 2 * config.mlp_ratio + chosen) * config.n_embd * size
    head = tokens * config.vocab_size * (3 * 4 + size)
    synaptic = 0
    if config.synapses and config.syn_cfg.in_attention:
        ticks = -(-tokens // config.syn_cfg.tick)
        synaptic = config.n_layer * config.n_head * tokens * ticks * _kept_by_terminals(config, ticks, dtype)
    return layers + head + synaptic


def _kept_by_terminals(config: GPTConfig, ticks: int, dtype: torch.dtype) -> int:
    """Bytes per (head, tick, key): drive, bias and states operator by operator; the fused layer keeps the drive, in short contexts.

    Training runs in bfloat16 on GPUs alone, where the fused layer serves all terminals.
    """
    split = not config.syn_cfg.presyn or config.backend not in ("auto", "fused")
    if dtype != torch.bfloat16 or split:
        return 8 * 4
    return 2 if ticks <= 4 * config.head_dim else 0


def fitting_rows(config: GPTConfig, dtype: torch.dtype, params: int, memory: int, most: int = 64) -> int:
    """The largest power of two of rows, up to `most`, that is estimated to fit in 80 % of `memory` bytes; at least 1."""
    room = int(0.8 * memory) - static_bytes(params)
    rows = max(1, min(most, room // bytes_per_row(config, dtype)))
    return 1 << (rows.bit_length() - 1)
