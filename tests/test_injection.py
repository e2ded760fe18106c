"""Synapses put into trained models: the function stays, training goes on, upstream's checkpoints read right or are refused."""

import dataclasses
import io
import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bio_inspired_nanochat.checkpoint import load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.config import PRESETS, GPTConfig, SynapticConfig, from_dict, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.injection import EnableConfig, enable_synapses, inject
from bio_inspired_nanochat.nanochat_import import NAMES, read_nanochat
from bio_inspired_nanochat.synaptic import GAINS
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training import TrainConfig, train
from bio_inspired_nanochat.training.config import model_config
from scripts import enable_synapses as script
from tests.training.tiny import SMALL, TEXT, corpus, small

SIZES = {"sequence_len": 24, "vocab_size": 280, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}


def enable(source, out, **changes) -> dict:
    return enable_synapses(EnableConfig(source=str(source), out=str(out), **changes))


def filled(model: GPT) -> GPT:
    """The model with values in the matrices that are zero at birth, so that every layer matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", "w_out.weight", "head.weight", ".gate")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def complaint(capsys, *words: str) -> str:
    """The one line on stderr of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        script.main(list(words))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and len(said.err.strip().splitlines()) == 1, said.err
    return said.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a vanilla run of 4 steps."""
    return Path(train(small(tmp_path_factory.mktemp("vanilla"), num_iterations=4, doc_mask=True, window_pattern="SL"))["checkpoint"])


# --- vanilla models of this project ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in PRESETS if SynapticConfig.preset(name).active])
@pytest.mark.parametrize("kind", ["plain", "window", "documents"])
def test_a_model_with_new_synapses_computes_what_it_did(preset, kind):
    changes = {"plain": {}, "window": {"window_pattern": "SL"}, "documents": {"doc_mask": True, "value_embeds": False}}[kind]
    ids = torch.randint(280, (2, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 17] = 0
    for backend, tolerance in (("reference", 0.0), ("sdpa", 1e-5)):
        vanilla = filled(GPT(GPTConfig(**{**SIZES, "sequence_len": 64}, backend=backend, **changes)))
        model = inject(vanilla, SynapticConfig.preset(preset))
        difference = (model(ids) - vanilla(ids)).abs().max().item()
        assert difference <= tolerance * max(1.0, vanilla(ids).abs().max().item()), backend
        assert model.config == dataclasses.replace(vanilla.config, synapses=True, syn_cfg=SynapticConfig.preset(preset))
        assert all(value == 0 for gains in model.gains() for values in gains.values() for value in values) and len(model.gains()) == 3


def test_a_checkpoint_keeps_weights_tokenizer_and_metadata(trained, tmp_path):
    record = enable(trained, tmp_path / "out", syn_preset="core", syn_cfg=SynapticConfig.preset("core"))
    old, new = load_checkpoint(trained), load_checkpoint(tmp_path / "out")
    assert all(torch.equal(new.model[name], value) for name, value in old.model.items())
    assert (new.path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert new.step == old.step == record["step"] and new.meta["loop"] == old.meta["loop"] and new.meta["kind"] == old.meta["kind"]
    expected = dataclasses.replace(from_dict(GPTConfig, old.meta["model_config"]), synapses=True, syn_cfg=SynapticConfig.preset("core"))
    assert from_dict(GPTConfig, new.meta["model_config"]) == expected
    run = {"synapses": True, "syn_preset": "core", "syn_cfg": to_dict(expected.syn_cfg)}
    assert from_dict(TrainConfig, new.meta["train_config"]) == from_dict(TrainConfig, {**old.meta["train_config"], **run})
    added = [value for name, value in new.model.items() if name not in old.model]
    assert record["added_params"] == sum(value.numel() for value in added) > 0
    assert record["params"] == sum(value.numel() for value in new.model.values()) and record["max_logit_difference"] <= 1e-5


def test_what_else_lies_in_the_folder_of_a_checkpoint_is_no_part_of_it(trained, tmp_path):
    source = shutil.copytree(trained, tmp_path / trained.name)
    (source / ".hidden").write_bytes(b"x")
    (source / "notes").mkdir()
    enable(source, tmp_path / "out")
    new = load_checkpoint(tmp_path / "out")
    assert new.file("tokenizer.json").exists() and not (new.path / ".hidden").exists() and not (new.path / "notes").exists()


def test_training_goes_on_and_the_gains_wake_up(trained, tmp_path):
    out = Path(enable(trained, tmp_path / "run")["out"])
    before, after = load_optimizer(trained)["parameters"], load_optimizer(out)["parameters"]
    for name, entry in before.items():
        assert all(torch.equal(after[name]["state"][key], value) for key, value in entry["state"].items()), name
    assert all(not entry["state"] for name, entry in after.items() if name not in before)
    config = TrainConfig(resume=str(tmp_path / "run"), num_iterations=8, device="cpu", log_dir=str(tmp_path / "logs"), log_every=0)
    record = train(config, given={"resume", "num_iterations", "device", "log_dir", "log_every"})
    assert (record["resumed_from"], record["steps"]) == (4, 8) and Path(record["checkpoint"]).parent == tmp_path / "run"
    model = GPT.from_checkpoint(record["checkpoint"])
    for gains in model.gains():
        assert all(any(value != 0 for value in gains[name]) for name in ("gain_release", "gain_depletion", "barrier_strength")), gains


def test_a_model_without_training_state_is_a_start_at_step_0(trained, tmp_path):
    """The configuration of a run follows from the model's alone."""
    shape = GPTConfig(**{**SIZES, "n_embd": 48, "window_pattern": "SL", "value_embeds": False, "bos_token_id": 271, "backend": "sdpa"})
    root = save_checkpoint(tmp_path / "a", 7, GPT(shape).state_dict(), {"model_config": to_dict(shape)}).parent
    record = enable(root, tmp_path / "b")
    meta = load_checkpoint(record["out"]).meta
    assert record["step"] == meta["step"] == 0 and not record["resumable"] and meta["made_from"]["step"] == 7
    made = model_config(from_dict(TrainConfig, meta["train_config"]), shape.vocab_size, shape.bos_token_id)
    assert made == from_dict(GPTConfig, meta["model_config"]) == dataclasses.replace(shape, synapses=True)


def test_a_gain_that_is_not_zero_is_noticed_before_anything_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "zero_gains", lambda self: self)
    with pytest.raises(UserError, match="logits differ by"):
        enable(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_noticed(tmp_path):
    model = GPT(GPTConfig(**SIZES))
    model.embed.weight.data[5] = math.nan
    model.head.weight.data.fill_(0.1)
    save_checkpoint(tmp_path / "a", 1, model.state_dict(), {"model_config": to_dict(model.config)})
    with pytest.raises(UserError, match="not finite"):
        enable(tmp_path / "a", tmp_path / "out")


def test_the_command_ends_with_one_json_line_and_takes_overrides(trained, tmp_path, capsys):
    script.main([f"--source={trained.parent}", f"--out={tmp_path / 'out'}", "--syn_preset=core", "--syn_cfg.tau_rrp=70"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"source", "out", "params", "added_params", "max_logit_difference"} <= set(record)
    assert record["layout"] == "bio_inspired_nanochat"
    cfg = GPT.from_checkpoint(record["out"]).config.syn_cfg
    assert (cfg.tau_rrp, cfg.barrier) == (70.0, "none")


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0 and "--syn_preset" in capsys.readouterr().out


def test_what_cannot_be_done_is_one_line(trained, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert "does not exist" in complaint(capsys, f"--source={tmp_path / 'nothing'}", out)
    assert "--source is required" in complaint(capsys, out)
    assert "no checkpoint under" in complaint(capsys, f"--source={tmp_path}", out)
    assert "--synapses=0 would only copy it" in complaint(capsys, f"--source={trained}", out, "--synapses=0")
    assert "no mechanism on" in complaint(capsys, f"--source={trained}", out, "--syn_preset=off")
    assert "do nothing without synapses" in complaint(capsys, f"--source={trained}", out, "--synapses=0", "--syn_preset=core")
    assert "has its own tokenizer" in complaint(capsys, f"--source={trained}", out, f"--tokenizer={trained / 'tokenizer.json'}")
    assert "no checkpoint of step 9" in complaint(capsys, f"--source={trained.parent}", out, "--step=9")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    script.main([f"--source={trained}", out])
    capsys.readouterr()
    assert "is in use" in complaint(capsys, f"--source={trained}", out)
    assert "synaptic already" in complaint(capsys, f"--source={tmp_path / 'out'}", f"--out={tmp_path / 'more'}")


# --- upstream nanochat -------------------------------------------------------------------------------------------------------------------


def upstream_state(seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """A small model of upstream's current form: its names, its padded tables in bfloat16, no zero matrix."""
    size = {**SIZES, **changes}
    width, layers, head = size["n_embd"], size["n_layer"], size["n_embd"] // size["n_head"]
    key, padded = size["n_kv_head"] * head, -(-size["vocab_size"] // 64) * 64
    shapes = {"transformer.wte.weight": (padded, width), "lm_head.weight": (padded, width)}
    for i in range(layers):
        block = f"transformer.h.{i}."
        shapes |= {f"{block}attn.c_q.weight": (width, width), f"{block}attn.c_proj.weight": (width, width)}
        shapes |= {f"{block}attn.{name}.weight": (key, width) for name in ("c_k", "c_v")}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * width, width), f"{block}mlp.c_proj.weight": (width, 4 * width)}
        if i % 2 == (layers - 1) % 2:
            shapes |= {f"{block}attn.ve_gate.weight": (size["n_kv_head"], 12), f"value_embeds.{i}.weight": (padded, key)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 * 1.5 for name, shape in shapes.items()}
    state |= {"resid_lambdas": torch.linspace(1.15, 1.05, layers), "x0_lambdas": torch.linspace(0.2, 0.05, layers)}
    state |= {"smear_gate.weight": torch.rand(1, 24, generator=generator), "smear_lambda": torch.zeros(1), "backout_lambda": torch.zeros(1)}
    tables = ("transformer.wte.weight", *(name for name in state if name.startswith("value_embeds")))
    return state | {name: state[name].bfloat16() for name in tables}


def upstream_logits(state: dict[str, torch.Tensor], idx: torch.Tensor, n_head: int = 2, vocab: int = 280, window: int | None = None):
    """Upstream's forward in plain functions over its own names: [B, T] to [B, T, vocab], in float32."""
    w = {name: tensor.float() for name, tensor in state.items()}
    layers, length = len(w["resid_lambdas"]), idx.shape[1]

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x):  # [B, T, heads, D]
        half = x.shape[-1] // 2
        angle = torch.arange(length)[:, None] / 100_000 ** (torch.arange(half) * 2 / x.shape[-1])
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    x = norm(w["transformer.wte.weight"][idx])
    gate = w["smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
    x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
    x0, middle = x, None
    back = torch.arange(length)[:, None] - torch.arange(length)
    for i in range(layers):
        at = f"transformer.h.{i}."
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = norm(x)
        q, k, v = ((h @ w[f"{at}attn.{name}.weight"].T).unflatten(-1, (-1, x.shape[-1] // n_head)) for name in ("c_q", "c_k", "c_v"))
        if f"value_embeds.{i}.weight" in w:
            share = 3 * torch.sigmoid(h[..., :12] @ w[f"{at}attn.ve_gate.weight"].T)
            v = v + share[..., None] * w[f"value_embeds.{i}.weight"][idx].view_as(v)
        q, k = norm(rotate(q)) * 1.2, norm(rotate(k)) * 1.2
        k, v = (side.repeat_interleave(n_head // side.shape[2], 2) for side in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        hidden = (back < 0) | ((back > window) if window is not None and i < layers - 1 else False)
        y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
        x = x + y.flatten(2) @ w[f"{at}attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ w[f"{at}mlp.c_fc.weight"].T).square() @ w[f"{at}mlp.c_proj.weight"].T
        middle = x if i == layers // 2 else middle
    x = x - w["backout_lambda"] * middle
    return 15 * torch.tanh((norm(x) @ w["lm_head.weight"].T)[..., :vocab] / 15)


def write(folder: Path, state: dict, step: int = 10, config: dict | None = None, **meta) -> Path:
    """A folder in upstream's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    torch.save({"exp_avg": torch.zeros(3)}, folder / f"optim_{step:06d}_rank0.pt")
    record = {"step": step, "val_bpb": 1.0, "model_config": {**SIZES, "window_pattern": "SSSL"} if config is None else config, **meta}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(record))
    return folder


def probe() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (2, SIZES["sequence_len"]), generator=torch.Generator().manual_seed(5))


def imported_logits(folder: Path, out: Path, **changes) -> torch.Tensor:
    return GPT.from_checkpoint(enable(folder, out, **changes)["out"])(probe()).detach()


@pytest.mark.parametrize("synapses", [True, False])
def test_an_imported_model_computes_what_upstreams_forward_does(tmp_path, synapses):
    state = upstream_state()
    expected = upstream_logits(state, probe())
    assert expected.std() > 1
    found = imported_logits(write(tmp_path / "d3", state), tmp_path / "out", synapses=synapses)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    checkpoint = load_checkpoint(tmp_path / "out")
    assert ("blocks.0.attn.synapse.theta" in checkpoint.model) == synapses and checkpoint.meta["upstream"]["val_bpb"] == 1.0
    assert checkpoint.step == 0 and checkpoint.meta["made_from"]["step"] == 10


def test_every_parameter_of_the_mapping_carries_over(tmp_path):
    """Moving any one of upstream's tensors moves the imported model exactly as it moves upstream's."""
    base = upstream_state()
    before = upstream_logits(base, probe())
    for number, name in enumerate(name for name in base if not name.startswith(("smear", "backout"))):
        old = base[name]
        state = {**base, name: (old.float() * torch.linspace(0.3, 2.0, old.numel()).view_as(old)).to(old.dtype)}
        expected = upstream_logits(state, probe())
        assert (expected - before).abs().max() > 1e-3, name
        found = read_nanochat(write(tmp_path / str(number), state))
        model = GPT(found.config)
        model.load_state_dict(found.weights)
        torch.testing.assert_close(model(probe()), expected, atol=2e-5, rtol=1e-5, msg=name)
    kinds = {".".join("{i}" if part.isdigit() else part for part in name.split(".")) for name in base}
    assert set(NAMES) < kinds and kinds - set(NAMES) == {"smear_gate.weight", "smear_lambda", "backout_lambda"}


@pytest.mark.parametrize("kind", ["compiled", "root", "file", "float16", "short_windows_that_hide_nothing", "no_window_pattern"])
def test_forms_of_the_same_checkpoint(tmp_path, kind):
    state, config = upstream_state(), {**SIZES, "window_pattern": "SSSL"}
    expected = upstream_logits(state, probe(), window=128)
    if kind == "compiled":
        state = {f"_orig_mod.{name}": value for name, value in state.items()}
    if kind == "float16":
        state = {name: value.half() for name, value in state.items()}
        expected = upstream_logits(state, probe())
    if kind == "no_window_pattern":
        del config["window_pattern"]
    folder = write(tmp_path / "base_checkpoints" / "d3", state, config=config)
    source = {"root": folder.parent, "file": folder / "model_000010.pt"}.get(kind, folder)
    torch.testing.assert_close(imported_logits(source, tmp_path / "out"), expected, atol=2e-5, rtol=1e-5)


def test_the_highest_step_is_taken_unless_one_is_named(tmp_path):
    first, second = upstream_state(1), upstream_state(2)
    write(tmp_path / "d3", first, 9)
    folder = write(tmp_path / "d3", second, 10)
    torch.testing.assert_close(imported_logits(folder, tmp_path / "a"), upstream_logits(second, probe()), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(imported_logits(folder, tmp_path / "b", step=9), upstream_logits(first, probe()), atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no checkpoint of step 8 .* choose one of 9, 10"):
        enable(folder, tmp_path / "c", step=8)


def test_an_older_form_is_read_when_someone_vouches_for_its_constants(tmp_path):
    absent = ("resid", "x0", "smear", "backout", "value_embeds")
    state = {name: value for name, value in upstream_state().items() if not name.startswith(absent) and "ve_gate" not in name}
    folder = write(tmp_path / "d3", state)
    with pytest.raises(UserError, match="rotary base 10000"):
        enable(folder, tmp_path / "out")
    neutral = {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3), "smear_gate.weight": torch.zeros(1, 24)}
    neutral |= {"smear_lambda": torch.zeros(1), "backout_lambda": torch.zeros(1)}
    expected = upstream_logits(state | neutral, probe())
    torch.testing.assert_close(imported_logits(folder, tmp_path / "out", constants="current"), expected, atol=2e-5, rtol=1e-5)


def _without(*starts: str) -> dict:
    return {name: value for name, value in upstream_state().items() if not name.startswith(starts)}


REFUSED = {
    "smear": ({"smear_lambda": torch.ones(1) * 0.1}, {}, "smear is on .smear_lambda=0.1"),
    "backout": ({"backout_lambda": torch.ones(1) * 0.2}, {}, "backout is on"),
    "short_windows": ({}, {"sequence_len": 1024}, "show 257 of 1024 tokens, those here 256"),
    "letters": ({}, {"window_pattern": "SXL"}, "other letters"),
    "empty_pattern": ({}, {"window_pattern": ""}, "other letters"),
    "wide_gate": ({"transformer.h.0.attn.ve_gate.weight": torch.zeros(1, 32)}, {}, "reads 12 channels"),
    "norm_gains": ({"transformer.h.0.attn_norm.weight": torch.ones(32)}, {}, "a parameter transformer.h.0.attn_norm.weight"),
    "extra_layer": ({"transformer.h.3.mlp.c_fc.weight": torch.ones(128, 32)}, {}, "a parameter transformer.h.3"),
    "field": ({}, {"moe_top_k": 2}, "model_config has moe_top_k"),
    "size": ({}, {"n_head": "2"}, "n_head='2'"),
    "heads": ({}, {"n_head": 5}, "n_head=5"),
    "vocabulary": ({}, {"vocab_size": 400}, "shape"),
    "turned_stream": ({"x0_lambdas": torch.full((3,), -1.2)}, {}, "resid_lambdas.0. . x0_lambdas.0. is -0.05"),
    "integers": ({"resid_lambdas": torch.ones(3, dtype=torch.int64)}, {}, "torch.int64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_represented_is_refused_with_the_reason(tmp_path, capsys, what):
    tensors, sizes, reason = REFUSED[what]
    write(tmp_path / "d3", upstream_state() | tensors, config={**SIZES, "window_pattern": "SSSL", **sizes})
    with pytest.raises(UserError, match=reason):
        enable(tmp_path / "d3", tmp_path / "out")
    assert "error: " in complaint(capsys, f"--source={tmp_path / 'd3'}", f"--out={tmp_path / 'out'}") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_without("smear", "backout"), "QK scale was 1.15"),
        (_without("lm_head"), "nothing for head.weight"),
        (_without("value_embeds.2"), "nothing for blocks.2.value_embed.table.weight"),
        ([1, 2], "no dictionary of parameters"),
        ({"model": {}}, "no dictionary of parameters"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, state, reason):
    with pytest.raises(UserError, match=reason):
        enable(write(tmp_path / "d3", state), tmp_path / "out")


def test_two_models_in_a_folder_have_to_be_told_apart(tmp_path):
    write(tmp_path / "d3", upstream_state())
    write(tmp_path / "d4", upstream_state())
    with pytest.raises(UserError, match="several models .d3, d4."):
        enable(tmp_path, tmp_path / "out")


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    folder = write(tmp_path / "d3", upstream_state())
    words = (f"--source={folder}", f"--out={tmp_path / 'out'}")
    model, meta = folder / "model_000010.pt", folder / "meta_000010.json"
    data, rng = model.read_bytes(), random.Random(0)
    for broken in (b"", b"hello", data[:1000], data[: len(data) // 2], rng.randbytes(500)):
        model.write_bytes(broken)
        assert "is damaged" in complaint(capsys, *words)
    model.write_bytes(data)
    whole = meta.read_bytes()
    meta.write_bytes(b"[" * 100_000)
    assert "is damaged" in complaint(capsys, *words)
    meta.write_bytes(whole)
    for _ in range(40):
        at = rng.randrange(3000)
        model.write_bytes(data[:at] + rng.randbytes(20) + data[at + 20 :])
        try:
            read_nanochat(folder)
        except UserError as error:
            assert "\n" not in str(error)
    model.write_bytes(data)
    for text, said in (("{", "is not JSON"), ("[]", "no named values"), ("{}", "no model_config")):
        meta.write_text(text)
        assert said in complaint(capsys, *words)
    meta.unlink()
    assert "cannot be read" in complaint(capsys, *words)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = write(tmp_path / "d3", upstream_state())
    stream = io.BytesIO()
    torch.save({"transformer.wte.weight": Trap()}, stream)
    for data in (stream.getvalue(), pickle.dumps(Trap())):
        (folder / "model_000010.pt").write_bytes(data)
        assert "no code is run" in complaint(capsys, f"--source={folder}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "sprung").exists()


def test_training_an_import_needs_its_tokenizer_and_starts_at_step_0(tmp_path, capsys):
    tokenizer = Tokenizer.train([TEXT], 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size}
    folder = write(tmp_path / "d3", upstream_state(vocab_size=tokenizer.vocab_size), config=sizes, bpb=math.nan)
    script.main([f"--source={folder}", f"--out={tmp_path / 'bare'}"])
    assert "no tokenizer" in capsys.readouterr().out
    script.main([f"--source={folder}", f"--out={tmp_path / 'run'}", f"--tokenizer={tmp_path / 'tokenizer.json'}"])
    given = {name: SMALL[name] for name in ("device", "device_batch_size", "eval_tokens", "sample_every", "log_every")}
    given |= {"num_iterations": 3, "log_dir": str(tmp_path / "logs"), "data_dir": str(corpus())}
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        train(TrainConfig(resume=str(tmp_path / "bare"), **given), given={*given, "resume"})
    record = train(TrainConfig(resume=str(tmp_path / "run"), **given), given={*given, "resume"})
    assert (record["resumed_from"], record["steps"]) == (0, 3)
    again = train(TrainConfig(resume=str(tmp_path / "run"), **(given | {"num_iterations": 4})), given={*given, "resume"})
    assert (again["resumed_from"], again["steps"]) == (3, 4)
    gains = GPT.from_checkpoint(again["checkpoint"]).gains()
    assert all(any(value != 0 for value in layer[name]) for layer in gains for name in GAINS if name in layer)


def test_another_vocabulary_than_the_models_is_refused(tmp_path, capsys):
    Tokenizer.train([TEXT], 270).save(tmp_path / "tokenizer.json")
    folder = write(tmp_path / "d3", upstream_state())
    words = (f"--source={folder}", f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer.json'}")
    assert "give the model's own" in complaint(capsys, *words)
