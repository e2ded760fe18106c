"""Experts in Rust equal PyTorch: routes and outputs of running sequences, statistics, accounts; bad calls are exceptions."""

import itertools
import types

import numpy as np
import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import rust, rust_moe
from bio_inspired_nanochat.structural import update
from bio_inspired_nanochat.synaptic.state import Chunk, ExpertState, Place
from tests.contract import EXPERTS, make_ids, make_model
from tests.synaptic.test_moe import inputs, layer, twin

pytestmark = pytest.mark.skipif(not rust.available(), reason=rust.why_not() or "built")
EVERYTHING = {"expert_lateral": 0.5, "nmda": True, "snare_codes": True, "vesicle_output": True, "bank_gain": 1.0, "alpha_ca": 0.5}
MIXTURES = {
    "plain": {"synapses": False},
    "default": {},
    "everything": EVERYTHING,
    "without memory": {"expert_plasticity": False},
    "slow weights alone": {"expert_plasticity": False, "nmda": True, "router_identity": False},
    "wide ticks": EVERYTHING | {"tick": 16},
    "every token": EVERYTHING | {"tick": 1},
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def lived(name):
    """A mixture with uneven accounts, gains and genomes, and where it is synaptic a twin half grown."""
    moe = layer(**MIXTURES[name])
    generator = torch.Generator().manual_seed(9)
    moe.accounts.energy.uniform_(0.2, 0.8, generator=generator)
    moe.accounts.balance[:5].normal_(0, 0.1, generator=generator)
    if moe.synapse is not None:
        for parameter in (p for key, p in moe.synapse.named_parameters() if "gain" in key or key.endswith("xi")):
            parameter.normal_(0, 0.7, generator=generator)
        twin(moe)
        moe.router[6].normal_(0, 0.2, generator=generator)
        moe.accounts.blend[1], moe.accounts.tie[1] = 0.5, 0.3
    return moe


def by(moe, backend):
    moe.backend = backend
    return moe


def fresh(moe, rows, dtype=torch.float32):
    return types.SimpleNamespace(experts=moe.init_state(rows, torch.device("cpu"), dtype), fast={})


def near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert torch.isfinite(got).all() and (error <= tolerance * want.double().abs().clamp(min=1)).all(), f"off by {error.max():.1e}"


def same_state(got, want, tolerance=1e-5):
    for a, b in zip(got.experts or (), want.experts or (), strict=True):
        near(a, b, tolerance)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_tokens_and_chunks_in_turns_of_both_executions(name, dtype, tolerance):
    """PyTorch, Rust and back, also inside of ticks: outputs and state are those of PyTorch alone."""
    moe, x = lived(name), inputs(2, 40).to(dtype)
    state, mixed = fresh(moe, 2, dtype), fresh(moe, 2, dtype)
    edges = [0, 5, 6, 7, 8, 12, 13, 19, 27, *range(28, 40)]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        chunk = Chunk.of([a, a], [b - a, b - a], b - a, x.device)
        want = by(moe, "reference").step(x[:, a:b], state, chunk)
        got = by(moe, "rust" if number % 7 else "reference").step(x[:, a:b], mixed, chunk)
        assert got.dtype == dtype
        near(got, want, tolerance) if dtype == torch.float32 else near(got / want.norm(), want / want.norm(), tolerance)
        same_state(mixed, state, 1e-5 if dtype == torch.float32 else 1e-2)
    if moe.remembers:
        moved = state.experts.vesicles if moe.synapse.cfg.expert_plasticity else state.experts.slow
        assert state.experts.open_drive.any() == (moe.synapse.cfg.tick > 1) and not torch.equal(moved[0], moved[1])


def test_ragged_rows_at_different_positions():
    moe, x = lived("everything"), inputs(3, 9)
    states = [fresh(moe, 3), fresh(moe, 3)]
    for starts, counts in (([0, 3, 10], [9, 2, 1]), ([9, 5, 11], [4, 4, 9])):
        chunk = Chunk.of(starts, counts, 9, x.device)
        want, got = (by(moe, backend).step(x, state, chunk) for backend, state in zip(("reference", "rust"), states, strict=True))
        for row, n in enumerate(counts):
            near(got[row, :n], want[row, :n], 1e-5)
        same_state(states[1], states[0])


def test_neither_threads_nor_neighbours_change_a_bit(monkeypatch):
    moe, x = by(lived("everything"), "rust"), inputs(3, 5)
    said = []
    for threads, rows in ((1, [0, 1, 2]), (3, [0, 1, 2]), (2, [2, 0]), (1, [0])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        state = fresh(moe, len(rows))
        chunk = Chunk.of([0] * len(rows), [5] * len(rows), 5, x.device)
        said.append(rust_moe_output(moe, x[rows], state, chunk)[rows.index(0)])
    assert all(torch.equal(said[0], other) for other in said[1:])


def rust_moe_output(moe, x, state, chunk):
    from bio_inspired_nanochat.synaptic import native_moe

    return native_moe.mix(moe, x, state, chunk)


@pytest.mark.parametrize("name", ["default", "full", "vanilla"])
def test_a_model_is_handed_over_in_the_middle_of_a_sequence(name):
    """Attention and experts alike: prompt in PyTorch, tokens in Rust, a chunk in PyTorch, tokens in Rust."""
    plain = make_model(name, backend="reference", **EXPERTS)
    native = make_model(name, backend="auto" if name == "full" else "rust", **EXPERTS)
    ids = make_ids()
    state, mixed = plain.init_state(2, 45), native.init_state(2, 45)
    for number, (a, b) in enumerate(itertools.pairwise([0, 13, *range(14, 27), 30, *range(31, 41)])):
        want = plain.step(ids[:, a:b], state)
        near((plain if number in (0, 14) else native).step(ids[:, a:b], mixed), want, 2e-5)
    for got, wanted in zip(mixed.layers, state.layers, strict=True):
        same_state(got, wanted, 2e-5)


def test_auto_takes_rust_for_a_few_tokens_on_a_cpu(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(rust_moe, "mix", lambda *args, _run=rust_moe.mix: calls.append(args[1].shape[1]) or _run(*args))
    for name in ("default", "vanilla", "full"):
        model = make_model(name, **EXPERTS)
        state = model.init_state(1, 64)
        for size in (rust_moe.FEW_TOKENS + 1, 1, 3):
            model.step(make_ids(1, size), state)
        assert calls == [1, 1, 3, 3]
        calls.clear()
    make_model("default", backend="sdpa", **EXPERTS).step(make_ids(1, 1), make_model("default", **EXPERTS).init_state(1, 4))
    assert calls == [] and capsys.readouterr().out == ""


def test_changed_parameters_and_accounts_are_noticed():
    plain, native = by(lived("everything"), "reference"), by(lived("everything"), "rust")
    x, chunk = inputs(1, 3), Chunk.of([0], [3], 3, torch.device("cpu"))
    changes = (
        lambda moe: moe.accounts.energy.fill_(0.9),
        lambda moe: moe.accounts.alive[4].fill_(False),
        lambda moe: moe.synapse.identity.data.mul_(-1.0),
        lambda moe: moe.synapse.genome.xi.data.add_(1.0),
        lambda moe: moe.synapse.gate_probe.data.mul_(-1.0),
        lambda moe: moe.experts.w_in.data.mul_(0.5),
    )
    before = native.step(x, fresh(native, 1), chunk)
    for change in changes:
        for moe in (plain, native):
            change(moe)
        near(native.step(x, fresh(native, 1), chunk), plain.step(x, fresh(plain, 1), chunk), 1e-5)
    assert (native.step(x, fresh(native, 1), chunk) - before).abs().max() > 1e-2


# --- statistics and accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "default", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_equal_the_reference(name, dtype):
    moe, x = lived(name), inputs(3, 50).to(dtype)
    moe.accounts.blend[1] = 1.0  # so that some tokens would take both twins
    route = moe.route(x, Place())[0]
    want, got = (by(moe, backend).statistics(x, route) for backend in ("reference", "rust"))
    for field, a, b in zip(want._fields, got, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape, field
        near(a, b, 1e-5)
    assert want.both.any() == (moe.synapse is not None) and want.load.sum() == 300


@pytest.mark.parametrize("name", ["plain", "default", "everything"])
def test_steps_of_metabolism_equal_the_reference(name):
    pair = []
    for backend in ("reference", "rust"):
        moe = by(lived(name), backend)
        cfg = layer().synapse.cfg
        for step in range(12):
            x = inputs(2, 40, seed=step)
            update([moe], [moe.statistics(x, moe.route(x, Place())[0])], cfg)
        pair.append(moe)
    start = lived(name).accounts
    for (field, want), got, old in zip(pair[0].accounts.named_buffers(), pair[1].accounts.buffers(), start.buffers(), strict=True):
        assert got.dtype == want.dtype, field
        near(got, want, 1e-5)
        assert field in (
            "alive",
            "lead",
            "child",
            "ids",
            "next_id",
            "tie",
            "blend",
            "both",
            "benefit",
            "benefit_square",
        ) or not torch.equal(want, old), field
    near(pair[1].router, pair[0].router, 1e-5)
    if pair[0].synapse is not None:
        near(pair[1].synapse.identity, pair[0].synapse.identity, 1e-5)
        assert not torch.equal(pair[0].synapse.identity, lived(name).synapse.identity)
        assert not torch.equal(pair[0].router, lived(name).router) and start.blend[1] < pair[1].accounts.blend[1]


# --- bad calls -----------------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_serve_is_named_where_rust_was_asked_for():
    moe, x, chunk = by(lived("everything"), "rust"), inputs(1, 3), Chunk.of([0], [3], 3, torch.device("cpu"))
    with torch.enable_grad(), pytest.raises(UserError, match="no gradients"):
        moe.step(x, fresh(moe, 1), chunk)
    with pytest.raises(UserError, match="documents"):
        moe.step(x, fresh(moe, 1), Chunk([0], [3], 3, 0, 3, doc=torch.zeros(1, 3, dtype=torch.long)))
    with pytest.raises(UserError, match="float64"):
        moe.step(x.double(), fresh(moe, 1), chunk)
    state = fresh(moe, 1)
    state.experts = ExpertState(*(value.double() for value in state.experts))
    with pytest.raises(UserError, match="float64, not float32"):
        moe.step(x, state, chunk)
    state.experts = ExpertState(*(torch.zeros(moe.slots, 2).T[:1] for _ in range(4)))
    state.experts = state.experts._replace(slow=torch.zeros(1, 2 * moe.slots)[:, ::2])
    with pytest.raises(UserError, match="not contiguous"):
        moe.step(x, state, chunk)
    with pytest.raises(UserError, match="states, positions and counts"):
        moe.step(x, fresh(moe, 2), chunk)
    near(by(moe, "auto").step(x.flip(2).flip(2), fresh(moe, 1), chunk), by(moe, "reference").step(x, fresh(moe, 1), chunk), 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_demand_that_is_not_finite_is_reported(value):
    moe, x = by(lived("default"), "rust"), inputs(1, 2)
    x[0, 1, 3] = value
    with pytest.raises(FloatingPointError, match="demand for experts is not finite"):
        moe.step(x, fresh(moe, 1), Chunk.of([0], [2], 2, x.device))
    plain = by(lived("plain"), "rust")
    assert plain.step(x, fresh(plain, 1), Chunk.of([0], [2], 2, x.device))[0, 1].isnan().any()


def raw():
    """Arguments of the extension's functions that fit: a router of four slots, width 3, two hidden units."""
    single, whole = (lambda *shape: np.full(shape, 0.5, np.float32)), (lambda *shape: np.zeros(shape, np.int64))
    slots = np.arange(4)
    router = {"k": 2, "tick": 4, "fair": 4.0, "alive": np.ones(4, bool), "lead": slots, "child": slots, "bank": single(4)}
    router |= {"balance": single(4), "blend": single(4), "tie": single(4), "codes": [(1.0, single(4, 5))], "lateral": None}
    router |= {"terminals": None, "plain": None, "vesicle_gain": 0.0, "nmda": (0.5, 0.5)}
    matrices = {"router": single(4, 3), "probes": [single(5, 3)], "w_in": single(4, 2, 3), "w_out": single(4, 3, 2)}
    state = {name: single(1, 4) for name in ("calcium", "vesicles", "open_drive", "slow")}
    tokens = {"x": single(1, 2, 3), "y": single(1, 2, 3), "starts": [0], "counts": [2], "brief": False}
    route = {"x": single(6, 3), "expert": whole(6, 2), "gates": single(6, 2), "bare": single(6, 4), "separate": single(6, 4)}
    route |= {"winner": whole(6, 4), "child": slots}
    sums = {name: single(4) for name in ("load", "demand", "gates", "both")}
    sums |= {"together": single(4, 4), "inputs": single(4, 3), "common": single(3)}
    kept = {name: single(4) for name in ("energy", "balance", "blend", "tie")} | {name: np.copy(value) for name, value in sums.items()}
    kept |= {"alive": np.ones(4, bool), "lead": slots, "child": slots, "age": whole(4)}
    names = ("k", "bank_rate", "bank_decay", "balance_rate", "youth", "average", "tie_rate", "pull", "push", "estrange")
    return router, matrices, state, tokens, route, sums, kept, dict.fromkeys(names, 0.5)


def test_raw_calls_never_panic():
    module = rust._load()[0]
    router, matrices, state, tokens, route, sums, kept, knobs = raw()
    bad, single = np.array([0, 1, 2, 4]), lambda *shape: np.zeros(shape, np.float32)
    for wrong in ({"k": 0}, {"k": 5}, {"tick": 0}, {"lead": bad}, {"child": -bad}, {"bank": single(3)}, {"codes": [(1.0, single(3, 5))]}):
        with pytest.raises((ValueError, TypeError)):
            module.Router(router | wrong)
    for wrong in ({"lateral": single(4, 3)}, {"codes": [(1.0, single(4))]}, {"alive": single(4)}, {"tie": single(8)[::2]}):
        with pytest.raises((ValueError, TypeError)):
            module.Router(router | wrong)
    site = module.Router(router)
    assert module.mix_experts(site, matrices, state, tokens, 2)
    for matrices_, state_, tokens_ in (
        ({"router": single(4, 2)}, {}, {}),
        ({"probes": []}, {}, {}),
        ({"probes": [single(4, 3)]}, {}, {}),
        ({"w_in": single(4, 2, 4)}, {}, {}),
        ({"w_in": single(8, 3)}, {}, {}),
        ({"w_in": single(3, 2, 3), "w_out": single(3, 3, 2)}, {}, {}),
        ({"w_out": single(4, 2, 3)}, {}, {}),
        ({}, {"slow": single(2, 4)}, {}),
        ({}, {"calcium": single(1, 8)[:, ::2]}, {}),
        ({}, {"vesicles": np.zeros((1, 4))}, {}),
        ({}, {}, {"x": single(2, 3)}),
        ({}, {}, {"y": single(1, 2, 4)}),
        ({}, {}, {"starts": [2**64 - 1]}),
        ({}, {}, {"starts": [0, 1]}),
        ({}, {}, {"counts": [3]}),
        ({}, {}, {"counts": [0]}),
    ):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            module.mix_experts(site, matrices | matrices_, state | state_, tokens | tokens_, 1)
    with pytest.raises(ValueError, match="states"):
        module.mix_experts(site, matrices, None, tokens, 1)
    fixed = single(1, 2, 3)
    fixed.flags.writeable = False
    for shared in (tokens | {"y": tokens["x"]}, tokens | {"y": fixed}):
        with pytest.raises(TypeError):
            module.mix_experts(site, matrices, state, shared, 1)
    module.routing_sums(route, sums, 2)
    for route_, sums_ in (
        ({"expert": np.full((6, 2), 4)}, {}),
        ({"expert": np.full((6, 2), -1)}, {}),
        ({"winner": np.full((6, 4), 9)}, {}),
        ({"expert": np.zeros((6, 0), np.int64)}, {}),
        ({"gates": single(5, 2)}, {}),
        ({"x": single(18)}, {}),
        ({"child": bad}, {}),
        ({}, {"common": single(4)}),
        ({}, {"both": single(3)}),
    ):
        with pytest.raises((ValueError, TypeError)):
            module.routing_sums(route | route_, sums | sums_, 1)
    found = {name: value for name, value in sums.items() if name != "gates"} | {"tokens": 6.0}
    kept = {name: value for name, value in kept.items() if name != "gates"}
    module.settle_accounts(kept, found, single(4, 5), single(4, 3), knobs)
    for kept_, identity, rows in (
        ({"age": np.zeros(3, np.int64)}, None, single(4, 3)),
        ({"child": bad}, None, single(4, 3)),
        ({"common": single(2)}, None, single(4, 3)),
        ({}, single(3, 5), single(4, 3)),
        ({}, None, single(4, 2)),
    ):
        with pytest.raises((ValueError, TypeError)):
            module.settle_accounts(kept | kept_, found, identity, rows, knobs)
