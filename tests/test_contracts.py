"""What every model must keep, whatever mechanisms are on: causality, purity, independence, training equals decoding."""

import dataclasses
import functools
import itertools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms
from bio_inspired_nanochat.synaptic import SynapseState
from tests.contract import BACKENDS, EXPERTS, MODELS, SIZES, SYNAPSES, make_ids, make_model, needed_by

ALL = [(synapses, "plain") for synapses in SYNAPSES]
ALL += [(synapses, model) for synapses in ("default", "all", "all_hebb") for model in MODELS if model != "plain"]
variants = pytest.mark.parametrize("synapses, model", ALL, ids=[f"{s}-{m}" for s, m in ALL])
backends = pytest.mark.parametrize("backend", BACKENDS)
MIXED = [[], [3, 4, 5, 17, 32], [8, 16, 24], [1, 39]]
# Tokens one by one after a prompt, over several ticks and past the edge of a short window, take most of the time and are the same
# operators as single tokens among chunks: by one execution only.
CHUNKINGS = {"reference": MIXED, "sdpa": [*MIXED, list(range(22, 40))]}


def build(synapses, model="plain", **overrides):
    return make_model(synapses, **MODELS[model], **overrides)


def routed(synapses, model="plain"):
    """Whether a variant has experts: the rounding of a group's product depends on the size of the group."""
    return "experts" in model or bool(needed_by(synapses))


def baseline(synapses, model="plain", **overrides):
    """The vanilla model that a variant is compared with: one with plain experts where the variant has experts."""
    return make_model("vanilla", **{**needed_by(synapses), **MODELS[model], **overrides})


@functools.cache
def shared(synapses, model, backend):
    """A variant and what it makes of `make_ids()`, for tests that only run it: that this leaves it as it was is a test of its own."""
    net = build(synapses, model, backend=backend)
    return net, net(make_ids()).detach()


@functools.cache
def vanilla_logits(experts, model, backend):
    """What the baseline of a variant with or without experts of its own makes of `make_ids()`."""
    return baseline("bank" if experts else "default", model, backend=backend)(make_ids()).detach()


def assert_near(a, b, tolerance=1e-5):
    bound = tolerance * b.abs().clamp(min=1)
    assert torch.all((a - b).abs() <= bound), f"largest difference {(a - b).abs().max():.2e}"


def decode(model, ids, cuts, max_len=None):
    state = model.init_state(ids.shape[0], max_len or ids.shape[1])
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat([model.step(ids[:, a:b], state) for a, b in itertools.pairwise(edges)], dim=1), state


@variants
@backends
def test_prefill_equals_decode_equals_any_chunking(synapses, model, backend):
    (net, whole), ids = shared(synapses, model, backend), make_ids()
    for cuts in CHUNKINGS[backend]:
        logits, state = decode(net, ids, cuts)
        assert_near(logits, whole)
        assert state.pos.tolist() == [40, 40]


def causality_gap(net, *changed):
    """By how much the logits before a position differ when all tokens from it on are others: the largest of a row for each position."""
    ids = make_ids(batch=len(changed))
    other = ids.clone()
    for row, position in zip(other, changed, strict=True):
        row[position:] = (row[position:] + 1) % SIZES["vocab_size"]
    gaps = (net(ids) - net(other)).abs().amax(-1)
    return max(gap[:position].max().item() for gap, position in zip(gaps, changed, strict=True))


@variants
@backends
def test_the_future_never_changes_the_past(synapses, model, backend):
    gap = causality_gap(shared(synapses, model, backend)[0], 1, 13, 39)
    assert gap <= (1e-5 if routed(synapses, model) else 0.0)


def test_the_causality_test_catches_a_leak(monkeypatch):
    """Terminals whose bias already knows the drive of its own tick would leak; the check above must see that."""

    def leaking(drive, params, state=None, **options):
        beta, after = kernels.presyn(drive, params, state, **options)
        return torch.cat([beta[:, :, 1:], beta[:, :, -1:]], dim=2), after

    monkeypatch.setattr("bio_inspired_nanochat.synaptic.attention.presyn", leaking)
    assert causality_gap(build("presyn"), 1, 13, 39) > 1e-4


@variants
@backends
def test_appended_tokens_change_nothing(synapses, model, backend):
    (net, whole), ids = shared(synapses, model, backend), make_ids()
    for length in (1, 7, 21):
        assert_near(whole[:, :length], net(ids[:, :length]))


@variants
def test_a_batch_neighbour_never_changes_a_row(synapses, model):
    net, ids = build(synapses, model), make_ids(batch=3)
    whole = net(ids)
    assert_near(whole[1:2], net(ids[1:2]))
    shuffled = ids.clone()
    shuffled[[0, 2]] = make_ids(batch=2, seed=9)
    if routed(synapses, model):
        assert_near(whole[1], net(shuffled)[1])
    else:
        assert torch.equal(whole[1], net(shuffled)[1])


@variants
def test_evaluating_twice_gives_the_same_bits_and_changes_nothing(synapses, model):
    net, ids = build(synapses, model), make_ids()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(net(ids), net(ids))
    decode(net, ids, [5])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# Together these have every mechanism, those included that exclude each other: each meets each kind of model.
EVERY_MECHANISM = ("default", "all", "all_hebb", "all_fast", "barrier_linear", "genome_xi")
GAINS = [(s, m) for s in SYNAPSES for m in MODELS if s != "vanilla" and (m == "plain" or s in EVERY_MECHANISM)]


def test_every_mechanism_meets_every_kind_of_model_without_gains():
    assert set(MECHANISMS) == {name for s in EVERY_MECHANISM for name in active_mechanisms(SYNAPSES[s])}


@pytest.mark.parametrize(("synapses", "model"), GAINS)
def test_zero_gains_reproduce_vanilla_logits_exactly(synapses, model):
    ids = make_ids()
    synaptic = build(synapses, model, backend="reference").zero_gains()
    assert torch.equal(vanilla_logits(bool(needed_by(synapses)), model, "reference"), synaptic(ids))
    fast = build(synapses, model, backend="sdpa").zero_gains()
    assert_near(fast(ids), vanilla_logits(bool(needed_by(synapses)), model, "sdpa"))


def test_switched_off_equals_absence_bit_for_bit():
    off = GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=SynapticConfig.preset("off")))
    plain = GPT(GPTConfig(**SIZES))
    assert torch.equal(off(make_ids()), plain(make_ids()))
    assert {n: p.shape for n, p in off.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


@pytest.mark.parametrize("synapses", [s for s in SYNAPSES if s not in ("vanilla", "bank", "balance")])  # those two act after training steps
def test_synapses_change_the_logits_when_gains_are_not_zero(synapses):
    ids = make_ids()
    assert (build(synapses)(ids) - baseline(synapses)(ids)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "synapses", [s for s, cfg in SYNAPSES.items() if cfg is not None and cfg.barrier == "none" and cfg.hebb == "off" and not needed_by(s)]
)
def test_first_tick_equals_vanilla_without_a_barrier(synapses):
    ids = make_ids()
    got, plain = build(synapses, tick=8)(ids), build("vanilla")(ids)
    assert_near(got[:, :8], plain[:, :8])
    assert (got[:, 8:] - plain[:, 8:]).abs().max() > 1e-4


@variants
def test_ragged_rows_equal_each_row_alone(synapses, model):
    net, ids = build(synapses, model), make_ids(batch=3, length=30)
    lengths = [[5, 9, 2], [1, 1, 1], [3, 7, 6], [9, 2, 4]]
    state, alone = net.init_state(3, 30), [net(ids[row : row + 1])[0] for row in range(3)]
    for counts in lengths:
        begin = state.pos.tolist()
        chunk = torch.zeros(3, max(counts), dtype=torch.long)
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, begin[row] : begin[row] + count]
        logits = net.step(chunk, state, counts)
        for row, count in enumerate(counts):
            assert_near(logits[row, :count], alone[row][begin[row] : begin[row] + count])


@pytest.mark.parametrize("synapses", ["default", "all", "all_hebb"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_padding_that_sees_no_key_changes_nothing(synapses, backend):
    """Behind a window of two tokens most of the padding attends to nothing at all, and is not a number."""
    net, ids = make_model(synapses, sequence_len=8, window_pattern="SL", backend=backend, **EXPERTS), make_ids(length=18)
    state = net.init_state(2, 18)
    for counts in ([1, 9], [9, 1]):
        begin = state.pos.tolist()
        chunk = torch.stack([ids[row].roll(-begin[row])[:9] for row in range(2)])
        logits = net.step(chunk, state, counts)
    assert_near(logits[0], net(ids[:1, :10])[0, 1:])
    assert_near(net.step(ids[:, 10:], state), net(ids)[:, 10:])


@pytest.mark.parametrize("synapses", ["default", "lateral", "all", "all_hebb", "all_fast"])
def test_packed_documents_equal_each_document_alone(synapses):
    """With doc_mask a document in a packed row computes what it computes alone, started at the same offset modulo c."""
    net = build(synapses, "documents", tick=4)
    first, second = make_ids(1, 17, seed=1) % 49 + 1, make_ids(1, 20, seed=2) % 49 + 1
    first[0, 0] = second[0, 0] = 0
    packed = net(torch.cat([first[:, :16], second], dim=1))
    assert_near(packed[:, :16], net(first[:, :16]))
    assert_near(packed[:, 16:], net(second), 1e-4)
    assert (build(synapses, tick=4)(torch.cat([first[:, :16], second], dim=1))[:, 16:] - packed[:, 16:]).abs().max() > 1e-3


@variants
def test_state_copies_and_files_continue_the_same(synapses, model, tmp_path):
    net, ids = build(synapses, model), make_ids()
    _, state = decode(net, ids[:, :21], [5], max_len=40)
    state.save(tmp_path / "state.safetensors")
    copies = [state.clone(), SynapseState.load(tmp_path / "state.safetensors"), state.select([0, 1])]
    copies.append(SynapseState.cat([state.select([0]), state.select([1])]))
    copies.append(net.init_state(2, 40).copy_(copies[1]))
    want = net.step(ids[:, 21:], state)
    for copy in copies:
        assert torch.equal(net.step(ids[:, 21:], copy), want)
    assert state.pos.tolist() == [40, 40]


def test_selected_rows_are_independent():
    net, ids = build("default"), make_ids()
    _, state = decode(net, ids[:, :20], [], max_len=40)
    twice = state.select([1, 1, 0])
    net.step(ids[[1, 1, 0], 20:], twice)
    assert state.pos.tolist() == [20, 20]
    assert_near(net.step(ids[:, 20:], state), net(ids)[:, 20:])


def test_errors_of_step_name_the_value_and_the_fix(tmp_path):
    net, ids = build("default"), make_ids()
    state = net.init_state(2, 40)
    with pytest.raises(UserError, match="max_len=40"):
        net.step(make_ids(length=41), state)
    with pytest.raises(UserError, match=r"lengths\[1\]=9"):
        net.step(ids[:, :5], state, [1, 9])
    with pytest.raises(UserError, match="at least one token"):
        net.step(ids[:, :0], state)
    with pytest.raises(UserError, match="another model"):
        build("vanilla").step(ids, state)
    with pytest.raises(UserError, match="another model"):
        build("default", n_embd=64).step(ids, state)
    for other in (build("default", n_embd=16), build("default", n_head=2, n_embd=16), build("default", doc_mask=True)):
        with pytest.raises(UserError, match="another model"):
            other.step(ids, state)
    slower = build("default", syn_cfg=SynapticConfig(tick=2 * net.config.tick))
    with pytest.raises(UserError, match=f"another model .ticks of {net.config.tick} tokens, this model {2 * net.config.tick}"):
        slower.step(ids, state)
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="ticks of"):
        slower.step(ids, SynapseState.load(tmp_path / "state.safetensors"))
    with pytest.raises(UserError, match="torch.float32 on cpu, the model in torch.bfloat16"):
        build("default").set_compute_dtype(torch.bfloat16).step(ids, state)
    with pytest.raises(UserError, match="3 rows"):
        net.step(make_ids(batch=3), state)
    with pytest.raises(UserError, match="row 2"):
        state.select([2])
    for rows in ([], [[0, 1]]):
        with pytest.raises(UserError, match="at least one of the 2 rows"):
            state.select(rows)
    with pytest.raises(UserError, match="cannot be written"):
        state.save(tmp_path / "nowhere" / "state")
    (tmp_path / "broken").write_bytes(b"not a state")
    with pytest.raises(UserError, match="cannot be read"):
        SynapseState.load(tmp_path / "broken")
    save_file({"other": torch.zeros(1)}, tmp_path / "damaged", metadata={"format": "bio_inspired_nanochat.state"})
    with pytest.raises(UserError, match="damaged"):
        SynapseState.load(tmp_path / "damaged")
    assert state.pos.tolist() == [0, 0]


BAD_TOKENS = {
    r"token ids hold 50, out of bounds \[0, 49\]": lambda net, ids: net(ids + 50 - ids.max()),
    "token ids hold -1, ": lambda net, ids: net.step(ids[:, :3] - ids[:, :3].min() - 1, net.init_state(2, 9)),
    "token ids are torch.float32": lambda net, ids: net(ids.float()),
    "at least one token": lambda net, ids: net(ids[:0]),
    "targets hold -2, ": lambda net, ids: net(ids, ids - ids.min() - 2),
    "targets hold 50, ": lambda net, ids: net.token_losses(ids, ids + 50 - ids.max()),
    "targets are torch.int32": lambda net, ids: net(ids, ids.int()),
    "one target per token": lambda net, ids: net(ids, ids[:, 1:]),
    "one id for each": lambda net, ids: net.run(ids, noise_seed=0, sequence_ids=torch.arange(3)),
}


@pytest.mark.parametrize("said", BAD_TOKENS)
def test_tokens_that_the_vocabulary_has_not_are_named(said):
    with pytest.raises(UserError, match=said):
        BAD_TOKENS[said](shared("stochastic", "plain", "reference")[0], make_ids())


def cut(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


FLAWS = {
    "pos beyond": cut("pos", lambda pos: pos + 99),
    "pos no numbers": cut("pos", torch.Tensor.double),
    "another row": cut("layers.0.k", lambda k: k[:1]),
    "no values": lambda tensors: {name: value for name, value in tensors.items() if name != "layers.1.v"},
    "no calcium in a layer": lambda tensors: {name: value for name, value in tensors.items() if name != "layers.1.calcium"},
    "flat keys": lambda tensors: tensors | {f"layers.{layer}.k": torch.zeros(2, 40) for layer in range(2)},
    "a document per row": lambda tensors: tensors | {"doc": torch.zeros(2, dtype=torch.long)},
    "integers": lambda tensors: {name: value.long() for name, value in tensors.items()},
    "fast weights not square": lambda tensors: tensors | {f"layers.{layer}.fast.q.weights": torch.zeros(2, 8, 7) for layer in range(2)},
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_state_file_that_contradicts_itself_is_refused(flaw, tmp_path):
    state = build("all_hebb").init_state(2, 40)
    state.save(tmp_path / "state")
    SynapseState.load(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)
    save_file(FLAWS[flaw](tensors), tmp_path / "flawed", metadata=meta)
    with pytest.raises(UserError, match="flawed is damaged"):
        SynapseState.load(tmp_path / "flawed")


def test_a_state_that_was_read_does_not_follow_its_file(tmp_path):
    net, ids = build("default"), make_ids()
    _, state = decode(net, ids[:, :20], [], max_len=40)
    state.save(path := tmp_path / "state")
    held = SynapseState.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(net.step(ids[:, 20:], held), net.step(ids[:, 20:], state))


def test_shared_parameters_start_equal_for_a_seed():
    plain = dict(GPT(GPTConfig(**SIZES), seed=3).named_parameters())
    bio = dict(GPT(GPTConfig(**SIZES, synapses=True), seed=3).named_parameters())
    assert set(plain) <= set(bio)
    assert all(torch.equal(plain[name], bio[name]) for name in plain)
    assert all(".synapse." in name for name in set(bio) - set(plain))
    assert not torch.equal(plain["embed.weight"], dict(GPT(GPTConfig(**SIZES), seed=4).named_parameters())["embed.weight"])


def test_meta_construction_leaves_nothing_uninitialised():
    config = GPTConfig(**SIZES, synapses=True, value_embeds=True)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu").init_weights()
    ready = GPT(config)
    assert list(model.buffers()) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ready.parameters(), strict=True))


@pytest.mark.parametrize("synapses", list(SYNAPSES))
def test_every_parameter_has_a_role_and_a_gradient(synapses):
    net = make_model(synapses, value_embeds=True)
    roles = net.param_roles()
    assert set(roles) == {name for name, _ in net.named_parameters()}
    assert all(parameter.ndim >= 2 for name, parameter in net.named_parameters() if roles[name] == "matrix")
    ids = make_ids()
    net(ids[:, :-1], ids[:, 1:]).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_of_the_whole_model_match_finite_differences():
    net = make_model("default", n_layer=1).double()
    ids = make_ids(1, 12)
    net(ids[:, :-1], ids[:, 1:]).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        want = (parameter.grad * direction).sum().item()
        losses = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            losses.append(net(ids[:, :-1], ids[:, 1:]).item())
            parameter.data -= sign * 1e-6 * direction
        assert abs((losses[0] - losses[1]) / 2e-6 - want) <= 1e-5 * max(1, abs(want)), name


def test_not_a_number_is_reported_with_its_layer():
    net = build("default")
    net.blocks[1].attn.q.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 1"):
        net(make_ids())


def test_ignored_targets_do_not_count():
    net, ids = build("default"), make_ids()
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    losses = net.token_losses(ids, targets)
    assert torch.all(losses[:, -1] == 0)
    torch.testing.assert_close(net(ids, targets), losses[:, :-1].mean())


def test_flops_count_the_matrices_and_the_visible_pairs():
    cfg = GPTConfig(**SIZES, value_embeds=False)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 128 * 2) + 50 * 32
    pairs = (64 + 1) / 2
    assert GPT(cfg).flops_per_token() == 6 * matrices + 2 * int(12 * 32 * pairs)
    presyn_only = dataclasses.replace(cfg, synapses=True, syn_cfg=SynapticConfig.preset("core"))
    assert GPT(presyn_only).flops_per_token() == 6 * matrices + 2 * int(18 * 32 * pairs)
