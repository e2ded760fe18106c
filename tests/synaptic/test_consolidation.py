"""Consolidation and engrams: what a session holds in its fast weights goes into the slow weights and back, or into another session."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic import Engram, SynapseState, consolidate, rollback, sleep
from tests.contract import MODELS, SYNAPSES, make_ids, make_model


def fast_model(rule: str = "delta", seed: int = 0, **overrides):
    """A small model with fast weights in both projections of the MLP."""
    name = f"memory_{rule}"
    SYNAPSES[name] = dataclasses.replace(
        SYNAPSES["all_fast"], hebb=rule, fast_layers=("mlp_in", "mlp_out"), psd95_slots=0.0, fast_init=False
    )
    try:
        return make_model(name, seed=seed, **overrides)
    finally:
        del SYNAPSES[name]


def after(net, ids: torch.Tensor, **options) -> SynapseState:
    """The state of a session that has read ids."""
    state = net.init_state(*ids.shape, **options)
    net.step(ids, state)
    return state


def silent(net) -> torch.Tensor:
    """Logits without what the fast weights add."""
    outs = [layer.density.out for block in net.blocks for layer in block.fast_layers().values()]
    kept = [out.data.clone() for out in outs]
    for out in outs:
        out.data.zero_()
    try:
        return net(PROBE).detach()
    finally:
        for out, value in zip(outs, kept, strict=True):
            out.data.copy_(value)


PROBE = make_ids(4, 12, seed=5)


# --- consolidation -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["delta", "hebb"])
def test_a_layer_answers_as_its_fast_weights_did(rule):
    net = fast_model(rule)
    state = after(net, make_ids(1, 40))
    layer = net.blocks[0].mlp.w_in
    held = state.layers[0].fast["mlp_in"]
    x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(2))
    den = layer.density
    u = F.normalize(x @ den.pre.T, dim=-1)
    z = u @ held.weights[0].T
    gate = torch.sigmoid(x @ den.read_gate + (den.cfg.camkii_read + den.camkii_read) * held.camkii)
    want = (z * (torch.rsqrt(z.square().mean(-1) + 1) * gate)[..., None]) @ den.out.T
    got = x @ den.as_matrix(held).T
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.8
    assert 0.5 < got.norm() / want.norm() < 2.0


@pytest.mark.parametrize("rule", ["delta", "hebb"])
def test_a_slept_model_answers_as_the_awake_one_remembered(rule):
    """On new text without any fast weights, the change of the slow weights points where the session's engram pointed."""
    net = fast_model(rule)
    state = after(net, make_ids(1, 40))
    fresh, remembering = net.init_state(4, 12), net.init_state(4, 12, engram=state.engram())
    remembered = net.step(PROBE[:, :1], remembering) - net.step(PROBE[:, :1], fresh)  # a first token has no other memory
    before = silent(net)[:, :1]
    consolidate(net, state, 1.0)
    changed = silent(net)[:, :1] - before
    assert F.cosine_similarity(changed.flatten(), remembered.flatten(), dim=0) > 0.5
    assert remembered.norm() > 1e-2


def test_strength_scales_and_rows_are_averaged():
    net, ids = fast_model(), make_ids(3, 20)
    state = after(net, ids)
    done = [consolidate(net, state, strength) for strength in (0.0, 0.5, -0.5)]
    for delta in reversed(done):
        rollback(net, delta)
    assert all(not value.any() for value in done[0].added.values()) and done[1].norm() > 0
    alone = []
    for row in range(3):
        alone.append(consolidate(net, state.select([row]), 0.5))
        rollback(net, alone[-1])
    for name, value in done[1].added.items():
        torch.testing.assert_close(value, -done[2].added[name], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(value, torch.stack([delta.added[name] for delta in alone]).mean(0), rtol=1e-3, atol=1e-7)


def test_rollback_restores_the_bits_and_the_state_stays():
    net, ids = fast_model(), make_ids(2, 20)
    state, before = after(net, ids), {name: value.clone() for name, value in net.state_dict().items()}
    held = state.clone()
    done = consolidate(net, state, 0.3)
    assert set(done.added) == {f"blocks.{i}.mlp.{w}.weight" for i in range(2) for w in ("w_in", "w_out")}
    assert not torch.equal(net.blocks[0].mlp.w_in.weight, before["blocks.0.mlp.w_in.weight"])
    rollback(net, done)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for mine, theirs in zip(state.layers, held.layers, strict=True):
        assert all(torch.equal(value, theirs.tensors()[name]) for name, value in mine.tensors().items())


def test_only_the_last_consolidation_can_be_taken_back():
    net, ids = fast_model(), make_ids(2, 20)
    first = sleep(net, ids, 0.3)
    second = sleep(net, ids, 0.3)
    kept = net.blocks[0].mlp.w_in.weight.detach().clone()
    with pytest.raises(UserError, match="has changed since"):
        rollback(net, first)
    assert torch.equal(net.blocks[0].mlp.w_in.weight, kept)
    rollback(net, second)
    rollback(net, first)
    with pytest.raises(UserError, match="has changed since"):
        rollback(fast_model(seed=3), first)


def test_what_cannot_be_consolidated_is_said():
    net, ids = fast_model(), make_ids(2, 20)
    plain = make_model("default")
    with pytest.raises(UserError, match="no fast weights to consolidate"):
        sleep(plain, ids)
    with pytest.raises(UserError, match="another model"):
        consolidate(net, after(plain, ids))
    with pytest.raises(UserError, match="strength=nan"):
        consolidate(net, after(net, ids), float("nan"))


def test_sums_for_consolidation_are_those_of_the_running_document():
    ids = make_ids(2, 30) % 49 + 1
    net = fast_model(**MODELS["documents"])
    ids[0, 12] = 0
    whole = after(net, ids)
    chunked = net.init_state(2, 30)
    for a, b in ((0, 12), (12, 13), (13, 20), (20, 30)):
        net.step(ids[:, a:b], chunked)
    for key, fast in whole.layers[1].fast.items():
        assert fast.tokens.tolist() == [18, 30]
        for mine, theirs in zip(fast, chunked.layers[1].fast[key], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# --- engrams -----------------------------------------------------------------------------------------------------------------------------


def test_an_engram_goes_through_a_file_and_changes_the_next_session(tmp_path):
    net, ids = fast_model(), make_ids(2, 20)
    state = after(net, ids)
    state.save_engram(tmp_path / "engram.safetensors")
    loaded = SynapseState.load_engram(tmp_path / "engram.safetensors")
    sessions = [
        net.init_state(2, 12, engram=each) for each in (tmp_path / "engram.safetensors", str(tmp_path / "engram.safetensors"), loaded)
    ]
    sessions.append(net.init_state(2, 12, state.engram()))
    for session in sessions:
        for mine, theirs in zip(session.layers, state.layers, strict=True):
            for key, fast in mine.fast.items():
                assert all(
                    torch.equal(getattr(fast, part), getattr(theirs.fast[key], part)) for part in ("weights", "camkii", "pp1", "bdnf")
                )
                assert not any(getattr(fast, part).any() for part in ("open_calcium", "norm_sum", "tokens"))
        assert session.pos.tolist() == [0, 0] and not session.layers[0].k.any()
    logits = [net.step(PROBE[:2], session) for session in sessions]
    assert all(torch.equal(logits[0], other) for other in logits)
    assert (logits[0] - net(PROBE[:2])).abs().max() > 1e-2
    one = net.init_state(3, 12, engram=loaded.select(1))
    assert torch.equal(one.layers[0].fast["mlp_in"].weights[2], state.layers[0].fast["mlp_in"].weights[1])


def test_an_engram_is_a_copy():
    net, ids = fast_model(), make_ids(2, 20)
    state = net.init_state(2, 20)
    net.step(ids[:, :10], state)
    engram = state.engram()
    kept = engram.layers[0]["fast.mlp_in.weights"].clone()
    session = net.init_state(2, 20, engram=engram)
    net.step(ids[:, 10:], state)
    net.step(ids, session)
    assert torch.equal(engram.layers[0]["fast.mlp_in.weights"], kept)


def test_a_beginning_document_keeps_the_engram_only_as_the_first_token():
    """A session may begin with BOS; a later BOS starts a document that remembers nothing."""
    net = fast_model(**MODELS["documents"])
    ids = make_ids(1, 20) % 49 + 1
    engram = after(net, ids).engram()
    ids = ids.clone()
    ids[0, 0] = ids[0, 8] = 0
    with_engram, without = net.init_state(1, 20, engram=engram), net.init_state(1, 20)
    got, plain = net.step(ids, with_engram), net.step(ids, without)
    assert (got[:, :8] - plain[:, :8]).abs().max() > 1e-2
    torch.testing.assert_close(got[:, 8:], plain[:, 8:])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"n_layer": 3}, "it has 2 layers, this model 3"),
        ({"n_embd": 64}, "its heads have another number or size"),
        ({"rule": "k"}, "in layer 0 it has fast weights mlp_in of 8 modes, mlp_out of 8 modes, this model k of 8 modes"),
    ],
)
def test_an_engram_of_another_model_is_refused(other, said, tmp_path, monkeypatch):
    engram = after(fast_model(), make_ids(2, 10)).engram()
    if "rule" in other:
        monkeypatch.setitem(SYNAPSES, "keys", dataclasses.replace(SYNAPSES["fast_delta"], fast_layers=("k",)))
        net = make_model("keys")
    else:
        net = fast_model(**other)
    with pytest.raises(UserError, match="belongs to another model") as caught:
        net.init_state(2, 10, engram=engram)
    assert said in str(caught.value)


def test_bad_engrams_are_said(tmp_path):
    net, ids = fast_model(), make_ids(3, 10)
    state = after(net, ids)
    with pytest.raises(UserError, match="an engram of 3 sequences does not fit 2"):
        net.init_state(2, 10, engram=state.engram())
    with pytest.raises(UserError, match="no fast weights"):
        after(make_model("default"), ids).save_engram(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"no engram")
    with pytest.raises(UserError, match="cannot be read"):
        Engram.load(tmp_path / "broken")
    state.save(tmp_path / "state")
    with pytest.raises(UserError, match="is not an engram"):
        net.init_state(3, 10, engram=tmp_path / "state")
    with pytest.raises(UserError, match="row 3"):
        state.engram().select(3)


def test_an_engram_file_whose_tensors_are_not_those_of_its_layout_is_refused(tmp_path):
    net = fast_model()
    after(net, make_ids(2, 10)).save_engram(tmp_path / "whole")
    with safe_open(tmp_path / "whole", "pt") as file:
        whole, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)
    name = next(name for name in whole if name.endswith(".weights"))
    for changed in ({name: whole[name][:, :-1]}, {name: whole[name][:1]}, {name.replace("fast", "fest"): whole[name]}, {}):
        parts = {key: value.contiguous() for key, value in ({k: v for k, v in whole.items() if k != name} | changed).items()}
        save_file(parts, tmp_path / "flawed", metadata=meta)
        with pytest.raises(UserError, match="flawed is damaged"):
            net.init_state(2, 10, engram=tmp_path / "flawed")
