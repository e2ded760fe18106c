"""The kernels of decoding compile for data-centre and consumer cards, without a GPU, and fit into a consumer card's shared memory."""

import dataclasses
import importlib.util
import inspect
import re
import subprocess

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.synaptic import Presynaptic
from tests.kernels import test_compile

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

HALF = ("new_k_ptr", "new_v_ptr", "x_ptr", "gate_ptr", "shift_ptr")
TYPES = dict.fromkeys(HALF, "*bf16") | {"level_ptr": "*fp64", "position_ptr": "*i64"}


def launches():
    """Every kernel with its compile-time arguments."""
    from bio_inspired_nanochat.kernels import decode_triton, presyn_codegen

    for dim, own in (
        (64, {"TERMINALS": False, "BARRIER": 0}),
        (64, {"TERMINALS": True, "BARRIER": 2}),
        (128, {"TERMINALS": True, "BARRIER": 1}),
    ):
        block, _ = decode_triton.splits_of(96, 8192, torch.empty(1, 1, 1, dim, dtype=torch.bfloat16))
        sizes = {"D": dim, "K": block, "WINDOW": dim > 64, "KIND": own["BARRIER"] // 2, "CHUNK": 32, "SHIFTED": dim > 64, "WIDTH": 1024}
        yield decode_triton._attend, sizes | own
    yield decode_triton._join, sizes
    for cfg in (SynapticConfig.preset("core"), dataclasses.replace(SynapticConfig.preset("full"), lateral_strength=0.0)):
        module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=cfg))
        module.init_weights()
        yield decode_triton.TokenSite(8, 1.0, terminals=module.params()).advance, {"BLOCK": presyn_codegen.BLOCK}


def registers(binary, folder):
    """Of a thread of a compiled kernel."""
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    used, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
    assert stack == "0", "nothing spills"
    return int(used)


def types_of(monkeypatch):
    for name, kind in TYPES.items():
        monkeypatch.setitem(test_compile.WHOLE, name, kind)
    monkeypatch.setattr(test_compile, "REALS", test_compile.REALS | {"share"})


@pytest.mark.parametrize(("terminals", "barrier", "programs"), [(False, 0, 5), (True, 1, 4)], ids=["vanilla", "default"])
def test_enough_programs_share_a_multiprocessor_to_keep_its_memory_busy(terminals, barrier, programs, monkeypatch, tmp_path):
    """Loads that are under way are what decoding waits for: a thread may use 64 Ki registers / (programs x 128 threads)."""
    from bio_inspired_nanochat.kernels import decode_triton, tiles

    types_of(monkeypatch)
    block, _ = decode_triton.splits_of(96, 8192, torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    constants = {
        "D": 64,
        "K": block,
        "WINDOW": False,
        "KIND": 0,
        "TERMINALS": terminals,
        "BARRIER": barrier,
        "SHIFTED": False,
        "WIDTH": 1024,
    }
    binary = test_compile.compiled(decode_triton._attend, 90, constants, tiles.Tile(0, 0, 4, 3))
    used = registers(binary, tmp_path)
    assert -(-used // 8) * 8 * 128 * programs <= 1 << 16, f"{used} registers"


@pytest.mark.parametrize("capability", [89, 90])
def test_decoding_kernels_fit(capability, monkeypatch):
    from bio_inspired_nanochat.kernels import tiles

    types_of(monkeypatch)
    for kernel, constants in launches():
        constants = {name: value for name, value in constants.items() if name in inspect.signature(kernel.fn).parameters}
        binary = test_compile.compiled(kernel, capability, constants, tiles.Tile(0, 0, 4, 3))
        shared = binary.metadata.shared
        assert binary.asm["cubin"] and shared <= test_compile.SHARED_LIMIT, f"{kernel.fn.__name__}: {shared} bytes"
