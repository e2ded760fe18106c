"""The CPU kernels in Rust equal the reference: operators, decoding steps and chunks; bad calls are exceptions."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import PresynState, rust
from tests import contract
from tests.contract import make_ids, make_model
from tests.kernels.terminals import CONFIGS, adversarial, kinetics
from tests.kernels.test_executions import LENGTHS, TICKS, make_params, make_qkv

pytestmark = pytest.mark.skipif(not rust.available(), reason=rust.why_not() or "built")
contract.SYNAPSES["soft"] = SynapticConfig(drive="softplus", barrier="linear", barrier_strength=0.5, beta_max=0.0, syt_mix=1.0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def near(got, want, tolerance, relative=True):
    bound = tolerance * (want.double().abs().clamp(min=1) if relative else 1)
    error = (got.double() - want.double()).abs()
    assert torch.isfinite(got).all() and (error <= bound).all(), f"off by {float(error.max()):.1e}"


def whole_layer(q, k, v, theta, params, backend, **options):
    tick, scale = params.tick, q.shape[-1] ** -0.5
    drive = kernels.tick_drive(q, k, theta, tick, scale, backend=backend, kind=options.pop("kind", "phi"), **options) / tick
    beta, state = kernels.presyn(drive, params, closed=q.shape[2] // tick, causal=True, backend=backend)
    return drive, beta, state, kernels.tick_biased_attention(q, k, v, beta, tick, scale, backend=backend, **options)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"window": 5, "kind": "softplus"}], ids=str)
def test_operators_equal_the_reference(length, tick, dtype, options):
    q, k, v = (x.to(dtype) for x in make_qkv(length, dtype=torch.float32))
    theta, params = torch.linspace(-0.5, 0.5, 4), make_params(4, tick, torch.float32)
    want = whole_layer(q.float(), k.float(), v.float(), theta, params, "reference", **options)
    got = whole_layer(q, k, v, theta, params, "rust", **options)
    assert got[3].dtype == dtype
    for a, b in zip([*got[:2], *got[2].parts().values()], [*want[:2], *want[2].parts().values()], strict=True):
        near(a, b, 1e-5)
    near(got[3], want[3], TOLERANCE[dtype])


@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 4), (6, 2, 20), (4, 1, 64), (2, 2, 128)])
def test_head_sizes_and_groups(heads, kv_heads, dim):
    q, k, v = make_qkv(70, heads, kv_heads, dim=dim, dtype=torch.float32)
    theta, params = torch.zeros(heads), make_params(heads, 4, torch.float32, beta_max=0.0, one_sensor=True)
    want, got = (whole_layer(q, k, v, theta, params, backend) for backend in ("reference", "rust"))
    near(got[3], want[3], 1e-5)
    near(got[1], want[1], 1e-5)


def test_rows_at_different_positions():
    tick, starts, real, size = 4, torch.tensor([0, 5, 11]), torch.tensor([9, 3, 6]), 9
    q = torch.randn(3, 4, size, 8)
    k, v = torch.randn(2, 3, 2, 20, 8)
    theta, params = torch.zeros(4), make_params(4, tick, torch.float32)
    state = PresynState.rest(3, 4, 20)._replace(open_drive=torch.rand(3, 4, 20))
    closed = (starts + real) // tick - starts // tick
    ends = []
    for backend in ("reference", "rust"):
        drive = kernels.tick_drive(q, k, theta, tick, 1.0, q_start=starts, q_len=real, backend=backend) / tick
        beta, after = kernels.presyn(drive, params, state, closed=closed, backend=backend)
        y = kernels.tick_biased_attention(q, k, v, beta, tick, 1.0, q_start=starts, backend=backend)
        ends.append([drive, beta, *after.parts().values(), *(y[row, :, :n] for row, n in enumerate(real.tolist()))])
    for got, want in zip(ends[1], ends[0], strict=True):
        near(got, want, 1e-5)


def test_what_auto_takes_where_rows_are_ragged():
    q, k, _ = make_qkv(9, dtype=torch.float32)
    args = (q, k, torch.zeros(4), 4, 1.0)
    ragged = {"q_start": torch.tensor([0, 0]), "q_len": torch.tensor([9, 4])}
    assert torch.equal(kernels.tick_drive(*args, **ragged), kernels.tick_drive(*args, **ragged, backend="rust"))


@pytest.mark.parametrize("tick", [1, 8, 64])
def test_adversarial_drives_keep_the_bounds(tick):
    params = kinetics(dataclasses.replace(CONFIGS["core"], tick=tick), heads=2, dtype=torch.float32, spread=0.3)
    drive = adversarial(200).float().expand(1, 2, -1, -1)
    beta, state = kernels.presyn(drive, params, backend="rust")
    want_beta, want = kernels.presyn(drive, params, backend="reference")
    near(beta, want_beta, 1e-4)
    near(state.vesicles, want.vesicles, 1e-5)
    near(state.calcium, want.calcium, 1e-5)
    assert (state.calcium >= 0).all() and (state.vesicles >= 0).all() and (state.vesicles <= 1).all()


# --- models --------------------------------------------------------------------------------------------------------------------------

MODELS = {
    "vanilla": ("vanilla", {}),
    "default": ("default", {}),
    "core": ("presyn", {"n_kv_head": 1}),
    "window": ("default", {"window_pattern": "SL", "sequence_len": 48}),
    "soft": ("soft", {"n_kv_head": 4}),
    "barrier alone": ("barrier_gated", {}),
    "xi": ("genome_xi", {}),
}


def pair(name, tick=4, dtype=torch.float32):
    synapses, overrides = MODELS[name]
    return [make_model(synapses, tick=tick, backend=b, **overrides).set_compute_dtype(dtype) for b in ("reference", "rust")]


def same_states(got, want, tolerance):
    assert torch.equal(got.pos, want.pos)
    for a, b in zip(got.layers, want.layers, strict=True):
        for name, value in a.tensors().items():
            near(value, b.tensors()[name], tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tick", [1, 4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hand_over_in_the_middle_of_a_sequence(name, tick, dtype):
    """Prefill in PyTorch, decode in Rust, back, and a chunk in Rust; every switch inside of a tick."""
    plain, native = pair(name, tick, dtype)
    ids = make_ids()
    state, mixed = plain.init_state(2, 45), native.init_state(2, 45)
    edges = [0, 13, *range(14, 27), 30, *range(31, 36), 40]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        want = plain.step(ids[:, a:b], state)
        got = (native if 0 < number < 14 or number > 18 else plain).step(ids[:, a:b], mixed)
        if dtype == torch.float32:
            near(got, want, tolerance)
        else:  # logits in the order of ten: the norm says more than the largest of them
            assert (got - want).norm() <= 1e-2 * want.norm()
    if dtype == torch.float32:
        same_states(mixed, state, 2e-5)


@pytest.mark.parametrize("name", ["default", "soft"])
def test_ragged_rows(name):
    plain, native = pair(name)
    ids, ends = make_ids(3, 20), []
    for model in (plain, native):
        state = model.init_state(3, 20)
        first = model.step(ids[:, :9], state, lengths=[9, 4, 1])
        logits = [first[0, :9], first[1, :4], first[2, :1]]
        logits += [model.step(ids[:, at : at + 1], state).flatten(1) for at in range(9, 15)]
        logits.append(model.step(ids[:, 15:18], state, lengths=[3, 3, 3]).flatten(1))
        ends.append((logits, state))
    for got, want in zip(ends[1][0], ends[0][0], strict=True):
        near(got, want, 1e-5)
    same_states(ends[1][1], ends[0][1], 2e-5)


def test_threads_do_not_change_a_bit_and_neighbours_nothing(monkeypatch):
    model = pair("default")[1]
    ids = make_ids(2, 40)
    said = []
    for threads, rows in ((1, 2), (2, 2), (3, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)  # PyTorch itself keeps its own
        state = model.init_state(rows, 40)
        said.append(torch.cat([model.step(ids[:rows, a : a + 1], state)[:1] for a in range(40)], dim=1))
    assert torch.equal(said[0], said[1])
    near(said[2], said[0], 1e-5)


def test_a_changed_parameter_is_noticed():
    plain, native = pair("default")
    ids = make_ids()
    for model in (plain, native):
        model.step(ids, model.init_state(2, 40))
        for block in model.blocks:
            block.attn.synapse.gain_release.data += 1.0
            block.attn.synapse.theta.data -= 0.5
    near(native.step(ids, native.init_state(2, 40)), plain.step(ids, plain.init_state(2, 40)), 1e-5)


def test_auto_takes_rust_for_running_sequences_and_says_nothing(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(rust, "advance", lambda *args, _run=rust.advance: calls.append(args[1].shape[2]) or _run(*args))
    for synapses, expected in (("default", [5, 5, 1, 1]), ("vanilla", []), ("energy", [])):
        model = make_model(synapses)
        state = model.init_state(1, 8)
        model.step(make_ids(1, 5), state)
        model.step(make_ids(1, 1), state)
        assert calls == expected
        calls.clear()
    assert capsys.readouterr().out == ""


# --- bad calls -----------------------------------------------------------------------------------------------------------------------


def good():
    q, k, v = make_qkv(6, dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "theta": torch.zeros(4), "beta": torch.zeros(2, 4, 2, 6)}


def operators(given, **options):
    kernels.tick_drive(given["q"], given["k"], given["theta"], 4, 1.0, backend="rust", **options)
    kernels.tick_biased_attention(given["q"], given["k"], given["v"], given["beta"], 4, 1.0, backend="rust", **options)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"q": torch.zeros(2, 4, 6, 8, dtype=torch.float64)}, "float64"),
        ({"theta": torch.zeros(4, dtype=torch.bfloat16)}, "not float32"),
        ({"k": torch.zeros(2, 2, 6, 9)}, "do not fit"),
        ({"k": torch.zeros(2, 3, 6, 8)}, "do not fit"),
        ({"k": torch.zeros(2, 6, 8)}, "3 dimensions"),
        ({"theta": torch.zeros(3)}, "do not fit"),
        ({"v": torch.zeros(2, 2, 5, 8)}, "do not fit"),
        ({"v": torch.zeros(2, 2, 6, 8, dtype=torch.bfloat16)}, "differ in their format"),
        ({"beta": torch.zeros(2, 4, 1, 6)}, "do not fit"),
        ({"q": torch.zeros(2, 4, 6, 8, device="meta")}, "meta"),
        ({"beta": torch.zeros(2, 4, 2, 6, dtype=torch.float64)}, "float64"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, said):
    operators(good())
    with pytest.raises((UserError, IndexError), match=said):
        operators(good() | changes)


def test_documents_gradients_and_optional_parts_are_refused():
    with pytest.raises(UserError, match="documents"):
        operators(good(), doc=torch.zeros(2, 6, dtype=torch.long))
    q, k, _ = make_qkv(6, dtype=torch.float32)
    with torch.enable_grad(), pytest.raises(UserError, match="no gradients"):
        kernels.tick_drive(q, k, torch.zeros(4), 4, 1.0, backend="rust")
    with pytest.raises(UserError, match="optional parts"):
        kernels.presyn(torch.zeros(1, 1, 2, 3), kinetics(CONFIGS["energy"], dtype=torch.float32), backend="rust")
    for synapses, overrides in (("energy", {}), ("default", {"doc_mask": True})):
        model = make_model(synapses, backend="rust", **overrides)
        with pytest.raises(UserError, match=r"optional parts|documents"):
            model.step(make_ids(1, 3), model.init_state(1, 4))


def test_strided_inputs_are_read_in_their_own_order():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(21, dtype=torch.float32))
    theta, params = torch.zeros(4), make_params(4, 4, torch.float32)
    near(whole_layer(q, k, v, theta, params, "rust")[3], whole_layer(q, k, v, theta, params, "reference")[3], 1e-5)


def test_a_state_that_is_not_contiguous_goes_to_pytorch():
    model, explicit = make_model("default"), make_model("default", backend="rust")
    ids, state = make_ids(1, 6), model.init_state(1, 8)
    want = model.step(ids, model.init_state(1, 8))
    for layer in state.layers:
        layer.k = layer.k.transpose(2, 3).contiguous().transpose(2, 3)
    near(model.step(ids, state.clone()), want, 1e-5)
    state.pos.zero_()
    with pytest.raises(UserError, match="not contiguous"):
        explicit.step(ids, state)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_drive_that_is_not_finite_is_reported(size, value):
    model = make_model("default", backend="rust")
    state = model.init_state(1, 16)
    model.step(make_ids(1, 4), state)
    state.layers[1].k[0, 0, 2] = value
    with pytest.raises(FloatingPointError, match="layer 1: the presynaptic drive is not finite"):
        model.step(make_ids(1, size), state)


def test_raw_calls_never_panic():
    """Calls that the Python side would not make: each is an exception that names what is wrong."""
    module = rust._load()[0]
    shape = {"heads": 2, "kv_heads": 1, "dim": 4, "tick": 4, "scale": 1.0, "window": None, "soft": False, "barrier": "none"}
    for wrong in ({"heads": 0}, {"heads": 3, "kv_heads": 2}, {"tick": 0}, {"dim": 0}, {"window": 0}, {"barrier": "wall"}, {"heads": -1}):
        with pytest.raises((ValueError, TypeError)):
            module.Layer(shape | wrong, [], [], None)
    with pytest.raises(ValueError, match="sizes of a layer"):
        module.Layer(shape, [0.0, 0.0], [], None)
    layer = module.Layer(shape, [], [], None)
    parts = dict.fromkeys(("calcium", "vesicles", "open_drive", "beta", "barrier"))
    held = {"k": np.zeros((1, 1, 8, 4), np.float32), "v": np.zeros((1, 1, 8, 4), np.float32)} | parts
    tokens = {"q": np.zeros((1, 2, 1, 4), np.float32), "y": np.zeros((1, 2, 1, 4), np.float32), "gate": None, "starts": [3], "counts": [1]}
    assert module.advance(layer, held, tokens, 1)
    for wrong_held, wrong_tokens in (
        ({}, {"starts": [8]}),
        ({}, {"starts": [2**64 - 1]}),
        ({}, {"starts": [1, 2]}),
        ({}, {"counts": [0]}),
        ({}, {"counts": [2]}),
        ({}, {"q": np.zeros((1, 2, 1, 5), np.float32)}),
        ({}, {"q": np.zeros((2, 1, 4), np.float32)}),
        ({}, {"q": np.zeros((1, 2, 1, 4))}),
        ({}, {"y": np.zeros((1, 2, 1, 8), np.float32)[..., ::2]}),
        ({}, {"gate": np.zeros((1, 1, 2), np.float32)}),
        ({"v": np.zeros((1, 1, 7, 4), np.float32)}, {}),
        ({"v": np.zeros((1, 1, 8, 4), np.uint16)}, {}),
        ({"beta": np.zeros((1, 2, 8), np.float32)}, {}),
    ):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            module.advance(layer, held | wrong_held, tokens | wrong_tokens, 1)
    with pytest.raises(ValueError, match="constants"):
        module.Terminals(np.zeros((10, 2), np.float32), 4, 8.0, 1e-4)
