"""The fused layer equals the three operators of the reference in a row: output and every gradient."""

import dataclasses
import importlib.util
import unittest.mock

import pytest
import torch
import torch.nn.functional as F

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import PresynParams, PresynState, ReleaseNoise
from bio_inspired_nanochat.synaptic import Presynaptic, auxiliary_loss
from tests.contract import make_ids, make_model
from tests.kernels.interpreter import run_interpreted

if importlib.util.find_spec("triton"):
    from bio_inspired_nanochat.kernels import fused, presyn_codegen, presyn_kernels


def run(
    execution,
    device,
    dtype,
    length,
    tick,
    dim,
    heads=2,
    kv_heads=2,
    batch=2,
    barrier=True,
    kind="phi",
    preset="core",
    bounded=True,
    **options,
):
    """The output and all gradients by name. execution: fused; portable, operator by operator from PyTorch's own parts; or
    reference, in float64 from the same numbers; nudged, the reference from numbers that differ by one more rounding.
    """
    exact = execution in ("reference", "nudged")
    torch.manual_seed(0)
    constants = {name: value for name, value in options.items() if name not in ("window", "docs", "aux")}
    cfg = dataclasses.replace(
        SynapticConfig.preset(preset),
        **{"tick": tick, "release_rate": 0.2, "alpha_ca": 0.3, "theta": 0.0, "lateral_strength": 0.0} | constants,
    )
    module = Presynaptic(GPTConfig(n_head=heads, n_kv_head=kv_heads, n_embd=dim * heads, synapses=True, syn_cfg=cfg))
    module.init_weights()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    module.gain_depletion.data += 1
    module.to(device)
    q, k, v = (torch.randn(batch, h, length, dim) for h in (heads, kv_heads, kv_heads))
    q, k = (F.rms_norm(side, (dim,)) * 1.2 for side in (q, k))
    cost, weight = torch.rand(batch, heads, length) * 0.3, torch.randn(batch, heads, length, dim).to(device)
    q, k, v = (value.to(device, dtype).to(torch.float64 if exact else dtype) for value in (q, k, v))
    if execution == "nudged":
        q, k, v = (value * (1 + torch.finfo(dtype).eps * (torch.rand(value.shape).to(value) - 0.5)) for value in (q, k, v))
    q, k, v = (value.requires_grad_() for value in (q, k, v))
    cost = cost.to(device).to(torch.float64 if exact else torch.float32).requires_grad_()
    strength = torch.linspace(0.5, 1.5, heads, device=device).requires_grad_()
    scale, params, theta, total = dim**-0.5, module.params(), module.theta_value(), cost.double().cumsum(-1)
    gate = {"cost": cost, "strength": strength} if barrier else {}
    doc = (torch.rand(batch, length) < 0.1).cumsum(1).to(device) if options.get("docs") else None
    where = {"window": options.get("window"), "doc": doc}
    noise = ReleaseNoise.of(torch.arange(batch, device=device), 5).at(3, 0) if params.sampler is not None else None
    record = {} if options.get("aux") else None
    if execution == "fused":
        largest = 1.45 * dim**0.5 if bounded else None
        y = kernels.fused_attention(q, k, v, theta, params, scale, largest, kind=kind, noise=noise, record=record, **gate, **where)
    else:
        real, backend = (torch.float64, "reference") if exact else (torch.float32, "sdpa")
        params = PresynParams(*[value.to(real) if isinstance(value, torch.Tensor) else value for value in params])
        drive = kernels.tick_drive(q, k, theta.to(real), tick, scale, kind=kind, backend=backend, **where) / tick
        beta, _ = kernels.presyn(drive, params, closed=length // tick, doc=doc, noise=noise, record=record, backend=backend)
        if barrier:
            first = torch.arange(0, length, tick, device=device)
            beta = beta + (strength.double()[:, None, None] * (total[:, :, None] - total[:, :, first][..., None])).to(real)
        y = kernels.tick_biased_attention(q, k, v, beta, tick, scale, backend=backend, **where)
    leaves = {"q": q, "k": k, "v": v, "cost": cost, "strength": strength, **dict(module.named_parameters())}
    loss, extra = (y * weight.to(y)).sum(), {}
    if record is not None:
        extra["aux"] = auxiliary_loss(record, 0.7, 1.3)
        loss = loss + 300 * extra["aux"]
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y, **extra, **dict(zip(leaves, grads, strict=True))}


def compare(device, dtype, length, tick, dim, tolerance, **options):
    got, want = (run(execution, device, dtype, length, tick, dim, **options) for execution in ("fused", "reference"))
    again = run("fused", device, dtype, length, tick, dim, **options) if device == "cuda" else got
    usual = [run(execution, device, dtype, length, tick, dim, **options) for execution in ("portable", "nudged") if device == "cuda"]
    for name, value in want.items():
        error, *others = ((side[name].double() - value).norm() / value.norm().clamp(min=1) for side in (got, *usual))
        # a gradient per head is a small sum of large terms, which any execution rounds and any rounding of the inputs moves
        allowed = tolerance if name in ("y", "q", "k", "v") else max([2 * tolerance, *(3 * other for other in others)])
        assert error <= allowed, f"{name} is off by {error:.1e}, not {allowed:.1e} (T={length}, c={tick}, D={dim}, {options})"
        assert torch.equal(got[name], again[name]), f"{name} differs between two runs"


def compare_opening(device, dtype, tolerance, synapses, lengths, **overrides):
    """Prompts read by one operator leave the states that the operators in a row leave, and decoding goes on alike."""
    model, plain = (make_model(synapses, backend=backend, sequence_len=256, **overrides) for backend in ("fused", "reference"))
    for each in (model, plain):
        each.to(device).set_compute_dtype(dtype)
    for length in lengths:
        ids = make_ids(batch=2, length=length + 5).to(device)
        states = [each.init_state(2, length + 5) for each in (model, plain)]
        for chunk in (ids[:, :length], ids[:, length : length + 1], ids[:, length + 1 :]):
            got, want = (each.step(chunk, state) for each, state in zip((model, plain), states, strict=True))
            assert (got - want).abs().max() <= tolerance, f"{synapses}, prompt of {length}: logits"
            for layer, other in zip(states[0].layers, states[1].layers, strict=True):
                for name, value in layer.tensors().items():
                    gap = (value.double() - other.tensors()[name].double()).abs().max()
                    assert gap <= tolerance * max(1, other.tensors()[name].abs().max()), (
                        f"{synapses}, prompt of {length}: {name} is off by {gap:.1e}"
                    )


OPTIONS = {
    "window": {"window": 19},
    "documents": {"docs": True, "window": 40},
    "unbounded": {"bounded": False},
    "all parts": {"preset": "full", "endo_delay": 20.0},
    "stochastic": {"stochastic_train_frac": 0.5},
    "lateral": {"lateral_strength": 0.7, "lateral_window": 5},
    "lateral, documents": {"lateral_strength": -0.6, "lateral_window": 9, "docs": True, "window": 40},
    "all parts, lateral": {"preset": "full", "endo_delay": 20.0, "lateral_strength": 0.4},
    "auxiliary losses": {"aux": True, "release_rate": 0.9},
    "all parts, auxiliary losses": {"preset": "full", "endo_delay": 20.0, "lateral_strength": 0.4, "aux": True, "release_rate": 0.9},
}


def interpreted():
    one = {"heads": 1, "kv_heads": 1, "batch": 1}
    compare("cpu", torch.float32, 65, 8, 16, 1e-5, **one)
    compare("cpu", torch.float32, 33, 4, 16, 1e-5, batch=1, kv_heads=1, syt_mix=1.0)
    compare("cpu", torch.float32, 20, 16, 16, 1e-5, kind="softplus", barrier=False, **one)
    compare("cpu", torch.float32, 3, 1, 16, 1e-5, **one)
    compare("cpu", torch.float32, 256, 32, 16, 1e-5, **one)  # whole blocks of keys, walked without masks
    compare("cpu", torch.float32, 72, 1, 16, 1e-5, **one)  # so many ticks that the drive is computed twice instead of kept
    compare("cpu", torch.float32, 50, 4, 16, 2e-5, docs=True, window=19, bounded=False, **one)
    compare("cpu", torch.float32, 24, 8, 16, 2e-5, **OPTIONS["all parts, lateral"], **OPTIONS["stochastic"], **one)
    compare("cpu", torch.float32, 41, 4, 16, 1e-5, batch=1, kv_heads=1, **OPTIONS["lateral"])
    compare("cpu", torch.float32, 256, 32, 16, 1e-5, **OPTIONS["lateral"], **one)
    compare("cpu", torch.float32, 50, 4, 16, 2e-5, **OPTIONS["lateral, documents"], **one)
    compare("cpu", torch.float32, 43, 8, 16, 2e-5, batch=1, kv_heads=1, **OPTIONS["auxiliary losses"])
    compare("cpu", torch.float32, 256, 32, 16, 1e-5, **OPTIONS["auxiliary losses"], **one)
    compare("cpu", torch.float32, 43, 8, 16, 2e-5, **OPTIONS["all parts, auxiliary losses"], **one)
    sizes = {"n_embd": 32, "n_head": 2, "n_kv_head": 1, "n_layer": 1}
    for synapses, overrides in (("default", {"window_pattern": "SL"}), ("bias_limit", {"doc_mask": True})):
        model, plain = (make_model(synapses, backend=backend, **sizes, **overrides) for backend in ("fused", "reference"))
        ids = make_ids(batch=1, length=40)
        assert torch.allclose(model(ids), plain(ids), rtol=0, atol=1e-4)


def test_the_fused_layer_equals_the_reference_in_the_interpreter():
    run_interpreted("from tests.kernels.test_fused import interpreted\ninterpreted()")


def opened():
    sizes = {"n_embd": 32, "n_head": 2, "n_kv_head": 1, "n_layer": 1}
    compare_opening("cpu", torch.float32, 1e-4, "default", (16, 19), window_pattern="SL", **sizes)
    compare_opening("cpu", torch.float32, 1e-4, "rab", (8, 10), doc_mask=True, **sizes)
    compare_opening("cpu", torch.float32, 1e-4, "lateral", (16, 19), doc_mask=True, **sizes)
    model = make_model("default", backend="fused", **sizes)
    with unittest.mock.patch.object(fused, "opening", side_effect=fused.opening) as reader:
        state = model.init_state(2, 40)
        model.step(make_ids(batch=2, length=8), state)
        model.step(make_ids(batch=2, length=8), state)
        model.step(make_ids(batch=2, length=8), model.init_state(2, 40), lengths=[8, 5])
    assert reader.call_count == 1  # what goes on and what is ragged is read operator by operator


def test_prompts_are_read_by_the_fused_layer_in_the_interpreter():
    run_interpreted("from tests.kernels.test_fused import opened\nopened()")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("synapses", ["default", "seed", "rab", "lateral"])
def test_prompts_are_read_by_the_fused_layer_on_the_gpu(synapses, dtype, tolerance):
    compare_opening("cuda", dtype, tolerance, synapses, (8, 9, 128, 200), n_embd=64, n_head=4, n_kv_head=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tick", [1, 4, 8, 16, 64])
def test_the_fused_layer_equals_the_reference_on_the_gpu(dtype, tolerance, dim, tick):
    for length in (1, 7, 63, 64, 65, 500):
        compare("cuda", dtype, length, tick, dim, tolerance, heads=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_fused_layer_equal_the_reference_on_the_gpu(dtype, tolerance, options):
    compare("cuda", dtype, 300, 8, 64, tolerance, **OPTIONS[options])


@pytest.mark.parametrize(
    "synapses, reason", [("default", "the tensors are on cpu|Triton is not installed"), ("barrier_gated", "no presynaptic terminals")]
)
def test_what_the_fused_layer_cannot_serve_is_an_error_with_the_reason(synapses, reason):
    with pytest.raises(UserError, match=f"backend='fused' cannot serve this synaptic layer: .*({reason})"):
        make_model(synapses, backend="fused")(make_ids())


def poisoned():
    """Whatever memory holds before a kernel writes it changes nothing."""
    fused._Layer.buffer = lambda self, count, *front, dtype=torch.float32: torch.full(
        (count, *front, self.ticks, self.k.shape[2]), float("nan"), dtype=dtype
    )
    one = {"heads": 1, "kv_heads": 1, "batch": 1}
    for length, options in ((64, {}), (50, {}), (50, {"docs": True, "window": 19}), (50, OPTIONS["lateral, documents"])):
        compare("cpu", torch.float32, length, 8, 16, 2e-5, **options, **one)


def promised():
    """Shapes, layouts and gradients are what torch.compile is told."""
    fused._Layer.buffer = lambda self, count, *front, dtype=torch.float32: torch.zeros(
        count, *front, self.ticks, self.k.shape[2], dtype=dtype
    )
    p = Presynaptic(GPTConfig(n_head=2, n_kv_head=2, synapses=True, syn_cfg=SynapticConfig.preset("core")))
    p.init_weights()
    p = p.params()
    names = list(presyn_codegen.states_of(PresynState.rest(1, 1, 1, params=p)))
    signatures = {
        outputs: presyn_codegen.signature_of(p, names, list(outputs), False, "layer")
        for outputs in (("bias",), ("bias", "activity", "low_pool"))
    }
    for signature in signatures.values():
        presyn_kernels.kernels_for(signature)
    constants = torch.stack(list(presyn_codegen.constants_of(p).values())).detach().requires_grad_()
    theta = torch.zeros(2, requires_grad=True)
    for kv_heads, gated, outputs in ((2, True, ("bias",)), (1, False, ("bias",)), (2, False, ("bias", "activity", "low_pool"))):
        q, k = (torch.randn(1, heads, 20, 16, requires_grad=True) for heads in (2, kv_heads))
        v = torch.randn(1, 20, kv_heads, 16).transpose(1, 2).requires_grad_()  # as the projections leave it
        gate = (torch.rand(1, 2, 20, requires_grad=True), torch.ones(2, requires_grad=True)) if gated else (None, None)
        drawn = (None, None, None, None)
        lateral = (torch.full((2,), 0.5, requires_grad=True), 3) if len(outputs) > 1 else (None, 0)
        options = (signatures[outputs], 0.25, 30.0, None, "phi")
        torch.library.opcheck(fused.fused_op, (q, k, v, theta, constants, *gate, *drawn, *lateral, *options))


def unbroken():
    """A whole model with fused layers is one graph for the compiler, with the same gradients."""
    for synapses in ("default", "aux_pool_loss"):
        model, ids = make_model(synapses, backend="fused", n_embd=32, n_head=2, n_kv_head=2, n_layer=1), make_ids(batch=1, length=16)
        want = torch.autograd.grad(model(ids, ids.roll(-1, 1)), list(model.parameters()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(ids, ids.roll(-1, 1)), list(model.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_kernels_read_nothing_that_was_not_written_and_keep_their_promises_to_the_compiler():
    run_interpreted("from tests.kernels.test_fused import poisoned, promised, unbroken\nunbroken()\npoisoned()\npromised()")


def served_by(synapses: str, **options) -> list[str]:
    """The operators that a forward with backend=auto calls, in order."""
    calls: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "bio_inspired_nanochat":
                calls.append(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    model = make_model(synapses, n_embd=32, n_head=2, n_kv_head=2, n_layer=1)
    with Names(), torch.no_grad():
        model.run(make_ids(batch=1, length=16), **options)
    return calls


def chosen():
    assert served_by("default") == ["fused_attention"]
    assert served_by("lateral") == served_by("aux_pool_loss", targets=make_ids(batch=1, length=16)) == ["fused_attention"]
    split = served_by("default", telemetry=True)  # which reads every tick
    assert "fused_attention" not in split and {"tick_drive", "presyn", "tick_biased_attention"} <= set(split)


def test_auto_fuses_what_it_can_and_falls_to_the_split_path_by_rule():
    run_interpreted("from tests.kernels.test_fused import chosen\nchosen()")
