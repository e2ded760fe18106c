"""Every Triton kernel compiles for data-centre and consumer cards, without a GPU, and fits into a consumer card's shared memory."""

import importlib.util
import inspect

import pytest

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.kernels import PresynState
from bio_inspired_nanochat.synaptic import Presynaptic

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SHARED_LIMIT = 99 * 1024  # of an Ada card (sm_89); data-centre cards have more
HALF = {"q_ptr", "k_ptr", "v_ptr", "gy_ptr", "y_ptr", "gq_ptr", "gk_ptr", "gv_ptr"}
REALS = {"scale", "limit"}
WHOLE = {"doc_ptr": "*i64", "barrier_ptr": "*fp64", "key_ptr": "*i64", "first_ptr": "*i64", "layer_ptr": "*i64"}


def compiled(kernel, capability: int, constants: dict, warps: int, stages: int):
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
            if name in ("tokens", "queries", "keys", "size", "ticks"):
                aligned[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, signature, fixed, aligned), target=target, options={"num_warps": warps, "num_stages": stages})


def tiled(dim: int):
    from bio_inspired_nanochat.kernels import attention_triton, drive_triton, presyn_fused, tiles

    common = {"C": 8, "D": dim, "PRECISION": "tf32"}
    where = {"WINDOW": True, "DOC": True}
    for module, sets in (
        (drive_triton, {"drive": ("_forward",), "drive_backward": ("_backward_keys", "_backward_queries")}),
        (attention_triton, {"attention": ("_forward",), "attention_backward": ("_backward_keys", "_backward_queries")}),
    ):
        for name, kernels in sets.items():
            tile = tiles.tile_for(name, dim, 2, 8)
            for kernel in kernels:
                yield getattr(module, kernel), {**common, **where, "KIND": 0, "M": tile.queries, "K": tile.keys}, tile
    made = presyn_fused.kernels_for(spec_of("core"))
    for name, kernels in {"fused": ("states", "attend"), "fused_backward": ("keys", "queries")}.items():
        tile = tiles.tile_for(name, dim, 2, 8)
        for kernel in kernels:
            yield getattr(made, kernel), {**common, "KIND": 0, "BARRIER": True, "M": tile.queries, "K": tile.keys}, tile
    yield made.finish, {"BLOCK": 128}, tiles.Tile(0, 0, 4, 3)


def params_of(preset: str):
    module = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=SynapticConfig.preset(preset)))
    module.init_weights()
    return module.params()


def spec_of(preset: str) -> str:
    from bio_inspired_nanochat.kernels import fused

    return fused._spec(params_of(preset))[0].text


@pytest.mark.parametrize("capability", [89, 90])
def test_tiled_and_fused_kernels_fit(capability):
    seen = set()
    for kernel, constants, tile in tiled(128):
        constants = {name: value for name, value in constants.items() if name in inspect.signature(kernel.fn).parameters}
        binary = compiled(kernel, capability, constants, tile.warps, tile.stages)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_LIMIT, f"{kernel.fn.__name__}: {binary.metadata.shared} bytes"
        seen.add((kernel.fn.__module__, kernel.fn.__name__))
    assert len(seen) == 11


@pytest.mark.parametrize("preset", ["core", "full"])
def test_generated_kernels_of_the_terminals_fit(preset):
    from bio_inspired_nanochat.kernels import presyn_triton

    params = params_of(preset)
    state = PresynState.rest(1, 2, 4, params=params)
    plain = [name for name in state.parts() if name not in ("open_drive", "ring")]
    names = [*plain, *(f"ring{slot}" for slot in range(params.endo_slots))]
    signature = presyn_codegen.signature_of(params, names, ["bias"], params.sampler is not None, "young")
    made = presyn_triton.kernels_for(signature)
    for kernel in (made.forward, made.backward, made.finish):
        binary = compiled(kernel, 89, {"BLOCK": presyn_triton.BLOCK}, presyn_triton.WARPS, 3)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_LIMIT
