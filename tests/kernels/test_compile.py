"""Every Triton kernel compiles for data-centre and consumer cards, without a GPU, and fits into a consumer card's shared memory."""

import importlib.util
import inspect

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.kernels import PresynState
from bio_inspired_nanochat.synaptic import Presynaptic

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SHARED_LIMIT = 99 * 1024  # of an Ada card (sm_89); data-centre cards have more
HALF = {
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "gy_ptr",
    "y_ptr",
    "gq_ptr",
    "gk_ptr",
    "gv_ptr",
    "plane_ptr",
    "gdrive_ptr",
    "side_ptr",
    "u_ptr",
    "m_ptr",
    "z_ptr",
}
ALIGNED = {
    "queries",
    "keys",
    "size",
    "ticks",
    "q_start",
    "first",
    *(f"{x}_{axis}" for x in ("q", "k", "v", "y", "gy", "gk", "gv") for axis in "bht"),
}
REALS = {"scale", "limit", "inverse"}
WHOLE = {"doc_ptr": "*i64", "key_ptr": "*i64", "first_ptr": "*i64", "layer_ptr": "*i64", "count_ptr": "*i32", "document_ptr": "*i32"}


def compiled(kernel, capability: int, constants: dict, tile):
    """The binary of a kernel for one compute capability; pointers are aligned and sizes multiples of 16, as in training."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in HALF else WHOLE.get(name, "*fp32")
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in REALS else "i32"
            if name in ALIGNED:
                aligned[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True} | (
        {"maxnreg": tile.registers} if tile.registers else {}
    )
    return triton.compile(ASTSource(kernel, signature, fixed, aligned), target=target, options=options)


def tiled(dim: int, masked: bool):
    """Every tiled kernel with its compile-time arguments and its tile, as in training with c = 8, with or without masks."""
    from bio_inspired_nanochat.kernels import attention_adjoint_triton as adjoint
    from bio_inspired_nanochat.kernels import attention_triton as attention
    from bio_inspired_nanochat.kernels import drive_triton as drive
    from bio_inspired_nanochat.kernels import tiles

    q = torch.zeros(1, 1, 1024, dim, dtype=torch.bfloat16)
    site = tiles.Site(8, dim**-0.5, 0, None, None, 0, 1)
    launches = {
        attention._forward: ("attention", {"P": 2, "BOUNDED": True, "BARRIER": True}),
        adjoint._backward_keys: ("attention_keys", {"P": 2, "NB": 16, "STATS": 3, "FILL": False}),
        adjoint._backward_queries: ("attention_queries", {"P": 2, "GR": 16, "KIND": 0, "ROWS": True}),
        drive._forward: ("drive", {"NB": 16, "FILL": False, "KIND": 0}),
        drive._backward_keys: ("drive_keys", {"ADD": True, "KIND": 0}),
        drive._backward_queries: ("drive_queries", {"KIND": 0}),
    }
    for kernel, (name, own) in launches.items():
        tile = tiles.tile_for(name, q, 8)
        masks = {"WINDOW": True, "DOC": True, "EXACT": False} if masked else {}
        yield kernel, {**site.static(q, q, tile, own.get("P", 1)), **own, **masks}, tile
    yield adjoint._row_products, {"D": dim, "M": 64, "STATS": 3, "P": 2}, tiles.Tile(64, 64, 4, 3)


def params_of(preset: str):
    module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=SynapticConfig.preset(preset)))
    module.init_weights()
    return module.params()


@pytest.mark.parametrize("capability, dim, masked", [(89, 128, True), (90, 64, False)])
def test_tiled_kernels_fit(capability, dim, masked):
    for kernel, constants, tile in tiled(dim, masked):
        constants = {name: value for name, value in constants.items() if name in inspect.signature(kernel.fn).parameters}
        binary = compiled(kernel, capability, constants, tile)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_LIMIT, f"{kernel.fn.__name__}: {binary.metadata.shared} bytes"


@pytest.mark.parametrize(
    "preset, site, last", [("core", "layer", False), ("core", "layer", True), ("full", "layer", True), ("core", "young", False)]
)
def test_generated_kernels_of_the_terminals_fit(preset, site, last):
    from bio_inspired_nanochat.kernels import presyn_codegen, presyn_kernels, tiles

    params = params_of(preset)
    names = list(presyn_codegen.states_of(PresynState.rest(1, 2, 4, params=params)))
    signature = presyn_codegen.signature_of(params, names, ["bias"], params.sampler is not None, site)
    made = presyn_kernels.kernels_for(signature)
    constants = {"BLOCK": presyn_codegen.BLOCK, "BARRIER": True, "P": 2, "EXACT": not last, "CHECK": not last, "FINAL": last}
    for kernel in (made.forward, made.backward, made.finish):
        fixed = {name: value for name, value in constants.items() if name in inspect.signature(kernel.fn).parameters}
        binary = compiled(kernel, 89, fixed, tiles.Tile(0, 0, presyn_codegen.WARPS, 3))
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize("capability, modes, delta", [(89, 64, True), (90, 16, False)])
def test_the_kernels_of_the_fast_weights_fit(capability, modes, delta):
    from bio_inspired_nanochat.kernels import fast_triton, tiles

    constants = fast_triton.static(modes, delta, None)
    tile = tiles.Tile(0, 0, constants.pop("num_warps"), constants.pop("num_stages"))
    for kernel, own in (
        (fast_triton._transfer, {"BACK": False}),
        (fast_triton._transfer, {"BACK": True}),
        (fast_triton._read, {}),
        (fast_triton._adjoint, {}),
    ):
        binary = compiled(kernel, capability, {**constants, **own}, tile)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_LIMIT, f"{kernel.fn.__name__}: {binary.metadata.shared} bytes"
