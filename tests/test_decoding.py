"""The captured step computes what `GPT.step` computes, on the same state, and takes turns with it at any token."""

import dataclasses
import importlib.util

import pytest
import torch

from bio_inspired_nanochat.benchmarks.decoding import Decoding
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.decoding import GraphDecoder, NotRecorded, _Held, _Reader, _Token, graph_obstacle
from bio_inspired_nanochat.engine import generate_batch, generation
from bio_inspired_nanochat.engine.generation import Stepper
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.registry import MECHANISMS, config_with
from tests import contract
from tests.contract import EXPERTS, make_ids, make_model
from tests.kernels.interpreter import run_interpreted
from tests.phantom import NoCopies, phantom_gpu

TICK = 3
PROMPT, LENGTH = 5, 12  # a tick is open at the first token; three ticks end
contract.SYNAPSES["parts"] = dataclasses.replace(
    SynapticConfig.preset("full"), lateral_strength=0.0, barrier="linear", barrier_strength=0.5, drive="softplus"
)
COLONY = config_with(*[name for name, mechanism in MECHANISMS.items() if mechanism.experts], tick=TICK, tau_c=12.0, tau_rrp=24.0)
CASES = {
    "vanilla": ("vanilla", {"sequence_len": 24, "window_pattern": "SL"}),
    "default": ("default", {"n_kv_head": 2, "n_layer": 1}),
    "window": ("default", {"sequence_len": 24, "window_pattern": "SL", "value_embeds": False}),
    "barrier alone": ("barrier_gated", {"n_layer": 1}),
    "parts": ("parts", {"n_layer": 1}),
    "fast weights": ("all_fast", {"n_layer": 1}),
    "latch": ("camkii_latch", {"n_layer": 1}),
    "plain experts": ("vanilla", {"n_layer": 1, **EXPERTS}),
    "experts": ("default", {"n_layer": 1, "syn_cfg": COLONY, **EXPERTS}),
    "twins": ("default", {"n_layer": 1, "syn_cfg": COLONY, **EXPERTS}),
}


def model_of(case):
    synapses, overrides = CASES[case]
    model = make_model(synapses, tick=TICK, **{"backend": "reference", "n_head": 2, "n_kv_head": 1, "n_embd": 32, **overrides})
    if case == "twins":  # slot 4 is free, and its matrices are others than the leader's
        kept = model.blocks[0].mlp.accounts
        kept.alive[4], kept.lead[4], kept.child[1] = True, 1, 4
        kept.blend[1] = 0.5
    return model


def read(model, rows=2, device="cpu"):
    """Ids, and the state after the prompt."""
    ids = make_ids(rows, LENGTH).to(device)
    state = model.init_state(rows, LENGTH)
    model.step(ids[:, :PROMPT], state)
    return ids, state


def off(a, b):
    """Largest difference between two states, relative to the norm of each tensor."""
    assert torch.equal(a.pos, b.pos)
    errors = [0.0]
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        for name, value in mine.tensors().items():
            other = theirs.tensors()[name]
            assert torch.isfinite(value).all() and torch.isfinite(other).all(), name
            errors.append(float((value.double() - other.double()).norm() / other.double().norm().clamp(min=1)))
    return max(errors)


def close(got, want, tolerance):
    error = (got - want).norm() / want.norm()
    assert error <= tolerance, f"logits are off by {float(error):.1e}"


@torch.no_grad()
def equality(device="cpu", dtype=torch.float32, tolerance=1e-5, cases=tuple(CASES)):
    for case in cases:
        model = model_of(case).to(device).set_compute_dtype(dtype)
        ids, ordinary = read(model, device=device)
        prompt, captured = ordinary.clone(), ordinary.clone()
        decoder = GraphDecoder(model, captured)
        assert all((standing.router is None) == (case == "twins") for standing in decoder._held.experts.values())
        decoder._positions.fill_(-1)
        decoder._read(True)
        assert off(captured, prompt) == 0, "rows that are not there, as in the runs before a capture, stay as they are"
        for at in range(PROMPT, LENGTH):
            close(decoder.step(ids[:, at]), model.step(ids[:, at : at + 1], ordinary)[:, 0], tolerance)
        assert off(captured, ordinary) <= tolerance, case
        assert off(prompt, read(model, device=device)[1]) == 0, "a copy follows the state that it was made from"


def turns(device="cpu", tolerance=1e-5):
    """Both ways of reading take turns inside of a tick, and a decoder follows a selection of rows."""
    model = model_of("default").to(device)
    ids, ordinary = read(model, device=device)
    mixed = ordinary.clone()
    decoder = GraphDecoder(model, mixed)
    for at in range(PROMPT, LENGTH - 2):
        want = model.step(ids[:, at : at + 1], ordinary)[:, 0]
        close(model.step(ids[:, at : at + 1], mixed)[:, 0] if at % 2 else decoder.step(ids[:, at]), want, tolerance)
        assert off(mixed, ordinary) <= tolerance, f"after token {at}"
    one = mixed.select([1])
    decoder = decoder.follow(one)
    for at in range(LENGTH - 2, LENGTH):
        want = model.step(ids[:, at : at + 1], ordinary)[1:, 0]
        close(decoder.step(ids[1:, at]), want, tolerance)
    with pytest.raises(UserError, match="past this state's max_len=12"):
        decoder.step(ids[1:, 0])


def poison(device="cpu"):
    """What lies in the caches beyond the tokens read does not matter, and is left alone."""
    model = model_of("default").to(device)
    ids, clean = read(model, device=device)
    dirty = clean.clone()
    stop = PROMPT + TICK + 1
    for layer in dirty.layers:
        for name, value in layer.tensors().items():
            value[:, :, PROMPT if name in ("k", "v", "barrier") else stop :] = float("nan")
    decoders = GraphDecoder(model, clean), GraphDecoder(model, dirty)
    for at in range(PROMPT, stop):
        a, b = (decoder.step(ids[:, at]) for decoder in decoders)
        assert torch.equal(a, b)
    assert all(value[:, :, stop:].isnan().all() for layer in dirty.layers for value in layer.tensors().values())


def ragged(device="cpu", tolerance=1e-5):
    """Rows at different positions end their ticks at different tokens."""
    model = model_of("default").to(device)
    ids = make_ids(2, LENGTH).to(device)
    ordinary = model.init_state(2, LENGTH)
    model.step(ids[:, :PROMPT], ordinary, lengths=[PROMPT, PROMPT - 2])
    captured = ordinary.clone()
    decoder = GraphDecoder(model, captured)
    for at in range(PROMPT, PROMPT + TICK):
        close(decoder.step(ids[:, at]), model.step(ids[:, at : at + 1], ordinary)[:, 0], tolerance)
    assert off(captured, ordinary) <= tolerance


def refusals(device="cpu"):
    documents, lateral, noisy = make_model("default", doc_mask=True), make_model("lateral"), make_model("stochastic")
    for model, noise_seed, reason in (
        (documents, None, "documents"),
        (lateral, None, "lateral"),
        (noisy, 1, "random"),
        (make_model("vanilla"), None, "head size 8"),
    ):
        model.to(device)
        state = model.init_state(1, 8, noise_seed=noise_seed)
        assert reason in graph_obstacle(model, state)
        with pytest.raises(UserError, match=reason):
            GraphDecoder(model, state)
    noisy = make_model("stochastic", n_head=2, n_kv_head=2).to(device)
    assert graph_obstacle(noisy, noisy.init_state(1, 8)) is None, "expectations need no draws"


def windows(device="cpu"):
    """Any window at any position, down to the new token alone; what lies outside of it may be anything."""
    from bio_inspired_nanochat.kernels.decode_triton import TokenSite, attend

    heads, dim, length = 2, 16, 20
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, size, dim, generator=make).to(device) for size in (1, length, length))
    for window in (1, 2, 3, 5, 8, 9, length):
        for now in range(length):
            low = max(0, now - window + 1)
            cache = {"k": torch.full_like(k, float("nan")), "v": torch.full_like(v, float("nan"))}
            for name, whole in (("k", k), ("v", v)):
                cache[name][:, :, low:now] = whole[:, :, low:now]
            at = torch.tensor([now], device=device)
            got = attend(q, k[:, :, now : now + 1], v[:, :, now : now + 1], cache, at, TokenSite(4, dim**-0.5, window=window))
            seen = slice(low, now + 1)
            want = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])
            assert (got - want).abs().max() < 1e-5, (window, now)
            assert torch.equal(cache["k"][:, :, now], k[:, :, now]) and torch.equal(cache["v"][:, :, now], v[:, :, now])


def gates(device="cpu"):
    """The running cost of the gate, also of a wide input, and with what mechanisms of one's own add to its logit."""
    from bio_inspired_nanochat.kernels.decode_triton import TokenSite, attend

    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, size, 16, generator=make).to(device) for size in (1, 12, 12))
    x, weight, bias, shift = (torch.randn(*shape, generator=make).to(device) for shape in ((2, 1, 40), (2, 40), (2,), (2, 1, 4)))
    site = TokenSite(4, 0.25, barrier="gated", strength=torch.ones(2, device=device), gate_weight=weight, gate_bias=bias)
    for more in (None, shift[..., :2], shift[..., ::2], shift[:1, :, 1:3], shift[..., :1]):
        cache = {"k": k.clone(), "v": v.clone(), "barrier": torch.full((2, 2, 12), 3.0, device=device, dtype=torch.float64)}
        attend(q, k[:, :, 9:10], v[:, :, 9:10], cache, torch.tensor([9, 0], device=device), site, x, more)
        logit = (x @ weight.T)[:, 0] + bias + (0 if more is None else more[:, 0])
        cost = torch.nn.functional.softplus(-logit).double()
        want = torch.full_like(cache["barrier"], 3.0)
        want[0, :, 9], want[1, :, 0] = 3 + cost[0], cost[1]
        assert (cache["barrier"] - want).abs().max() < 1e-5


def rehearsal(device="cpu"):
    """The benchmark reads the same prompt again and again with one decoder."""
    model = model_of("default").to(device)
    prompt = make_ids(2, PROMPT).to(device)
    works = [Decoding(model, prompt, TICK, graph) for graph in (False, True, True)]
    for work, runs in zip(works, (1, 1, 2), strict=True):
        for _ in range(runs):
            work.prepare()
            work.run(lambda: None)
    ordinary, once, twice = (work.state for work in works)
    assert off(once, ordinary) <= 1e-5 and off(twice, once) == 0
    before = once.clone()
    assert works[0].recording() is None and works[1].recording() > 0
    assert off(once, before) == 0, "recording leaves the text as it is"


def test_a_captured_step_is_an_ordinary_step_in_the_interpreter():
    # one process for all: starting one and making the kernels takes as long as running them
    run_interpreted(
        "from tests.test_decoding import *\nequality()\nturns()\npoison()\nragged()\nrefusals()\nwindows()\ngates()\nrehearsal()"
    )


def test_without_triton_the_reason_is_given():
    model = make_model("default")
    with pytest.raises(UserError, match=r"Triton.*use model.step"):
        GraphDecoder(model, model.init_state(1, 8))


class Bare(_Token):
    """A token whose attention, which is a Triton kernel, is left out."""

    def attend(self, layer, x, q, k, v, state):
        return torch.empty_like(q)


@pytest.mark.parametrize("case", ["default", "plain experts", "experts"])
def test_a_step_neither_waits_for_the_host_nor_copies_from_it(case, monkeypatch):
    """What a graph cannot hold. Fast weights, Triton kernels themselves, would be launched. Experts as where a slot has twins."""
    if importlib.util.find_spec("triton") is not None:
        for module in ("glue_triton", "moe_triton"):
            monkeypatch.setattr(f"bio_inspired_nanochat.kernels.{module}.launch", lambda *_, **__: None)
    model = model_of(case)
    with phantom_gpu(model):
        reader = _Reader(model, torch.bfloat16)
        layers = model.set_compute_dtype(torch.bfloat16).init_state(2, LENGTH).layers
        idx = torch.zeros(2, 1, dtype=torch.long, device="cuda")
        experts = {block.mlp: block.mlp.standing() for block in model.blocks if hasattr(block.mlp, "standing")}
        with NoCopies(), torch.no_grad():
            logits = reader.read(idx, Bare(idx - 1, _Held([], experts), True), layers)
        assert logits.device.type == "cuda" and logits.shape == (2, model.config.vocab_size)


def test_a_foreign_state_is_refused():
    with pytest.raises(UserError, match="another model"):
        GraphDecoder(make_model("default"), make_model("vanilla").init_state(1, 8))


@pytest.mark.parametrize("case", ["plain experts", "experts"])
def test_what_a_mixture_makes_of_its_parameters_is_made_once_for_all_tokens(case, monkeypatch):
    """A captured step that made it for every token would take twice the launches."""
    model = model_of(case)
    held = _Held([], {block.mlp: block.mlp.hold(torch.float32) for block in model.blocks})
    calls = []
    monkeypatch.setattr(type(model.blocks[0].mlp), "standing", lambda *_, **__: calls.append("standing"))
    monkeypatch.setattr("bio_inspired_nanochat.synaptic.expert_synapse.ExpertSynapse.params", lambda *_: calls.append("params"))
    idx = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        _Reader(model, torch.float32).read(idx, Bare(idx, held, True), model.init_state(2, LENGTH).layers)
    assert not calls


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_a_captured_step_is_an_ordinary_step_on_the_gpu(case, dtype, tolerance):
    equality("cuda", dtype, tolerance, [case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_graph_gives_the_same_twice(case):
    model = model_of(case).to("cuda").set_compute_dtype(torch.bfloat16)
    ids, state = read(model, device="cuda")
    states = state.clone(), state
    decoders = [GraphDecoder(model, one) for one in states]
    decoders[1].record()
    assert off(*states) == 0 and len(decoders[1]._graphs) == (1 if decoders[1]._tick is None else 2)
    for at in range(PROMPT, LENGTH):
        assert torch.equal(*(decoder.step(ids[:, at]) for decoder in decoders))
    assert off(*states) == 0


@pytest.mark.gpu
def test_captured_and_ordinary_steps_take_turns_on_the_gpu():
    turns("cuda", 1e-4)
    poison("cuda")
    ragged("cuda", 1e-4)
    refusals("cuda")
    rehearsal("cuda")


@pytest.mark.gpu
def test_windows_and_gates_on_the_gpu():
    windows("cuda")
    gates("cuda")


@pytest.mark.gpu
def test_a_long_context_on_the_gpu():
    """Many splits, and many keys per program."""
    model = make_model("default", tick=8, n_head=2, n_kv_head=1, n_embd=128, sequence_len=4096, window_pattern="SL").to("cuda")
    ids = make_ids(16, 3000).to("cuda")
    for rows in (1, 16):
        ordinary = model.init_state(rows, 4096)
        model.step(ids[:rows, :2980], ordinary)
        captured = ordinary.clone()
        decoder = GraphDecoder(model, captured)
        for at in range(2980, 3000):
            close(decoder.step(ids[:rows, at]), model.step(ids[:rows, at : at + 1], ordinary)[:, 0], 1e-4)
        assert off(captured, ordinary) <= 1e-4


def test_a_step_that_cannot_be_recorded_is_an_ordinary_one(monkeypatch, capsys):
    class Refused:
        def __init__(self, model, state) -> None:
            self.state = state

        def step(self, ids):
            raise NotRecorded("operation not permitted when stream is capturing")

    model = make_model("default")
    prompt, state = read(model)
    monkeypatch.setattr(generation, "GraphDecoder", Refused)
    monkeypatch.setattr(generation, "graph_obstacle", lambda *_: None)
    logits = []
    for graph in (False, True):
        stepper = Stepper(model, state.clone())
        stepper._graph = graph
        logits.append(torch.stack([stepper.step([5] * len(prompt), 50) for _ in range(3)]))
    assert torch.equal(*logits) and not stepper._graph and model in generation._REFUSED
    assert capsys.readouterr().out.count("notice: tokens are not decoded by a CUDA graph") == 1


@pytest.mark.gpu
def test_a_refused_recording_leaves_the_text_as_it_is_and_is_said_once(monkeypatch, capsys):
    model, plain = make_model("default", n_head=2, n_kv_head=1).to("cuda"), GPT._logits

    def asking(self, x):
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return plain(self, x)

    monkeypatch.setattr(GPT, "_logits", asking)
    said = [list(generate_batch(model, [[1, 2, 3], [5]], 50, temperature=1.0, graph=graph)) for graph in (True, False, True)]
    assert said[0] == said[1] == said[2]
    assert capsys.readouterr().out.count("notice: tokens are not decoded by a CUDA graph") == 1


@pytest.mark.gpu
def test_generation_says_the_same_with_and_without_graphs():
    model = make_model("default", n_head=2, n_kv_head=1).to("cuda")
    said = [list(generate_batch(model, [[1, 2, 3, 4], [5]], 50, temperature=1.0, stop_ids=[7], graph=graph)) for graph in (True, False)]
    assert said[0] == said[1]
