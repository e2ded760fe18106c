"""The mechanism of examples/dendrites.py keeps every contract of the built-in ones, does something, and is found from the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT, GPTConfig
from bio_inspired_nanochat.kernels import rust
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms, add_gate_drive, config_with, config_without, inert_fields
from bio_inspired_nanochat.tuning.stack import obstacle
from tests import contract, forked
from tests import test_contracts as contracts
from tests.contract import SIZES, make_ids, make_model
from tests.training.tiny import flags

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/dendrites.py"
WITH = dataclasses.replace(SynapticConfig(), extra=("dendrites",))


@pytest.fixture(autouse=True)
def dendrites(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's mechanism, registered by naming its file, as long as a test runs."""
    monkeypatch.setenv("NANOCHAT_MECHANISMS", str(EXAMPLE))
    assert "dendrites" in active_mechanisms(WITH)
    monkeypatch.setitem(contract.SYNAPSES, "dendrites", WITH)
    yield
    del MECHANISMS["dendrites"]


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_it_keeps_the_contracts_of_attention(backend: str) -> None:
    contracts.test_prefill_equals_decode_equals_any_chunking("dendrites", "plain", backend)
    contracts.test_the_future_never_changes_the_past("dendrites", "plain", backend)
    contracts.test_appended_tokens_change_nothing("dendrites", "plain", backend)


def test_it_keeps_the_contracts_of_a_model(tmp_path: Path) -> None:
    contracts.test_a_batch_neighbour_never_changes_a_row("dendrites", "plain")
    contracts.test_evaluating_twice_gives_the_same_bits_and_changes_nothing("dendrites", "plain")
    contracts.test_zero_gains_reproduce_vanilla_logits_exactly("dendrites", "plain")
    contracts.test_ragged_rows_equal_each_row_alone("dendrites", "documents")
    contracts.test_state_copies_and_files_continue_the_same("dendrites", "window", tmp_path)
    contracts.test_every_parameter_has_a_role_and_a_gradient("dendrites")
    assert {role for name, role in make_model("dendrites").param_roles().items() if ".extra." in name} == {"gate"}


def test_the_contracts_see_a_drive_that_knows_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(make_model("dendrites").blocks[0].attn.synapse.extra["dendrites"])
    honest = module.forward
    monkeypatch.setattr(module, "forward", lambda self, x: honest(self, x.roll(-1, 1)))
    monkeypatch.setattr(contracts, "shared", contracts.shared.__wrapped__)  # what the honest one made is kept there
    with pytest.raises(AssertionError):
        contracts.test_the_future_never_changes_the_past("dendrites", "plain", "reference")


def test_its_gradients_match_finite_differences() -> None:
    net, ids = make_model("dendrites", n_layer=1).double(), make_ids(1, 12)
    net(ids[:, :-1], ids[:, 1:]).backward()
    generator = torch.Generator().manual_seed(0)
    own = [(name, parameter) for name, parameter in net.named_parameters() if ".extra." in name]
    assert len(own) == 2
    for name, parameter in own:
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -2):
            parameter.data += sign * 1e-6 * direction
            losses.append(net(ids[:, :-1], ids[:, 1:]).item())
        parameter.data += 1e-6 * direction
        want = (parameter.grad * direction).sum().item()
        assert abs(want) > 1e-7 and abs((losses[0] - losses[1]) / 2e-6 - want) <= 1e-5 * max(1, abs(want)), name


def test_it_is_absent_at_birth_and_moves_the_output_once_it_has_learned() -> None:
    ids = make_ids()
    newborn = make_model("dendrites", live=False)
    assert torch.equal(newborn(ids), make_model("default", live=False)(ids))
    assert not torch.equal(*[GPT(newborn.config, seed=s).blocks[0].attn.synapse.extra["dendrites"].branches for s in (0, 1)])
    live = make_model("dendrites")
    moved = live(ids)
    for block in live.blocks:
        block.attn.synapse.extra["dendrites"].gain.data.zero_()
    assert (live(ids) - moved).abs().max() > 1e-3


def test_single_tokens_in_rust_have_it_too() -> None:
    if rust.obstacle(torch.zeros(1)):
        pytest.skip("the Rust extension is not built")
    net, ids = make_model("dendrites", backend="rust"), make_ids()
    logits, _ = contracts.decode(net, ids, range(1, 40))
    contracts.assert_near(logits, make_model("dendrites", backend="reference")(ids))


def test_the_registry_treats_it_like_its_own() -> None:
    add_gate_drive("second", "another", "none", MECHANISMS["dendrites"].build)
    try:
        both = config_with("dendrites", "second")
        assert (both.extra, both.barrier) == (("dendrites", "second"), "gated")
        assert config_without(both, "dendrites").extra == ("second",)
        assert active_mechanisms(config_with("second")) == ["barrier_gated", "second"]
        assert active_mechanisms(config_with("dendrites")) == ["barrier_gated", "dendrites"]
    finally:
        del MECHANISMS["second"]
    lonely = dataclasses.replace(WITH, barrier="none")
    assert inert_fields(lonely, ["syn_cfg.extra"]) == [
        "--syn_cfg.extra has no effect while barrier_gated is off: add --syn_cfg.barrier=gated"
    ]
    assert "one model" in obstacle(GPTConfig(**SIZES, synapses=True, syn_cfg=WITH))


@pytest.mark.parametrize(
    ("extra", "files", "said"),
    [
        (("dendrite",), str(EXAMPLE), "did you mean 'dendrites'"),
        (("axons",), "nowhere.py", "'nowhere.py' is not a Python file"),
        (("axons",), str(ROOT / "README.md"), "is not a Python file"),
        (("axons",), "broken.py", r"cannot be run \(ZeroDivisionError"),
        (("dendrites", "dendrites"), "", "names a mechanism twice"),
        (("presyn",), "", "is not known"),
    ],
)
def test_mistakes_are_one_line(extra: tuple[str, ...], files: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.setenv("NANOCHAT_MECHANISMS", files)
    with pytest.raises(UserError, match=said) as error:
        GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=dataclasses.replace(SynapticConfig(), extra=extra)))
    assert "\n" not in str(error.value)


def test_names_of_the_package_are_taken() -> None:
    with pytest.raises(UserError, match="choose another name"):
        add_gate_drive("presyn", "mine", "none", MECHANISMS["dendrites"].build)


def test_training_from_the_command_line_learns_it_and_a_checkpoint_needs_its_file(tmp_path: Path) -> None:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "OMP_NUM_THREADS": "1"}
    words = flags(tmp_path, depth=1, num_iterations=4, device_batch_size=2, eval_tokens=128, vitals_every=0)
    done = forked.run(["-m", "scripts.base_train", *words, "--synapses=1", "--syn_cfg.extra=dendrites"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    model = GPT.from_checkpoint(folder)
    assert model.blocks[0].attn.synapse.extra["dendrites"].gain.abs().max() > 0
    del environment["NANOCHAT_MECHANISMS"]
    refused = forked.run(["-m", "scripts.base_eval", f"--checkpoint={folder}", "--device=cpu"], cwd=tmp_path, env=environment)
    assert refused.returncode == 2 and "NANOCHAT_MECHANISMS" in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
