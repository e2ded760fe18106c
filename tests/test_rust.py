"""The Rust extension: built wherever there is a toolchain, equal to PyTorch, and never needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import tomllib
import types
from pathlib import Path

import pytest
import torch

import bio_inspired_nanochat
from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import rust

ROOT = Path(__file__).resolve().parents[1]
needs_extension = pytest.mark.skipif(not rust.available(), reason=rust.why_not() or "built")


def test_a_toolchain_means_an_extension() -> None:
    """Without this, a broken build would only show as skipped tests."""
    toolchain = shutil.which("cargo") and subprocess.run(["cargo", "--version"], check=False, capture_output=True).returncode == 0
    if not toolchain:
        pytest.skip("no Rust toolchain here")
    assert rust.available(), rust.why_not()
    assert rust.why_not() == ""


def test_package_crate_and_extension_carry_one_version() -> None:
    version = bio_inspired_nanochat.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"] == version


@needs_extension
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5, 63), (2, 0, 4)])
def test_drive_equals_the_reference_to_the_bit(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3
    assert torch.equal(rust.phi(x), kernels.phi(x))


@needs_extension
def test_drive_equals_the_reference_at_joints_and_extremes() -> None:
    x = torch.tensor([-1e30, -1.0, -1 + 1e-6, 0.0, 1 - 1e-6, 1.0, 1 + 1e-6, 1e30, float("inf"), float("-inf"), float("nan")])
    torch.testing.assert_close(rust.phi(x), kernels.phi(x), rtol=0, atol=0, equal_nan=True)


@needs_extension
def test_strided_input_is_read_in_its_own_order_and_left_alone() -> None:
    base = torch.randn(6, 8)
    before = base.clone()
    view = base.t()[1::2]
    assert torch.equal(rust.phi(view), kernels.phi(view))
    assert torch.equal(base, before)


@needs_extension
def test_threads_may_call_together() -> None:
    x = torch.randn(200_000)
    wanted, results = kernels.phi(x), []
    threads = [threading.Thread(target=lambda: results.append(rust.phi(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, wanted) for result in results)


@needs_extension
@pytest.mark.parametrize(
    "x, said",
    [
        (torch.zeros(2, dtype=torch.float64), "float64"),
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(2, requires_grad=True), "requires_grad"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_what_it_cannot_take_is_named(x: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rust.phi(x)


def test_without_the_extension_there_is_one_notice_and_a_reason() -> None:
    """In a child whose import of the extension fails, as on a machine without Rust."""
    code = """
import sys
sys.modules["bio_inspired_nanochat._rust"] = None
import torch
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import phi, rust
assert not rust.available() and "env.sh" in rust.why_not() and "\\n" not in rust.why_not()
rust.notice()
rust.notice()
assert phi(torch.zeros(1)).item() == 0.25
try:
    rust.phi(torch.zeros(1))
except UserError as error:
    assert "not available" in str(error)
else:
    raise AssertionError("a missing extension answered")
from bio_inspired_nanochat.gpt import GPT, GPTConfig
sizes = dict(sequence_len=8, vocab_size=9, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, synapses=True)
for backend in ("auto", "rust"):
    model = GPT(GPTConfig(backend=backend, **sizes))
    try:
        model.step(torch.zeros(1, 3, dtype=torch.long), model.init_state(1, 8))
    except UserError as error:
        assert backend == "rust" and "env.sh" in str(error)
    else:
        assert backend == "auto"
"""
    child = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert len(child.stdout.splitlines()) == 1 and "PyTorch" in child.stdout


def test_an_extension_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rust, "__version__", "0.0.0-other")
    monkeypatch.setattr(rust, "_load", rust._load.__wrapped__)
    assert not rust.available()
    assert "0.0.0-other" in rust.why_not() or "not built" in rust.why_not()


def test_an_extension_from_older_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    older = types.SimpleNamespace(version=lambda: rust.__version__, phi=None)
    monkeypatch.setitem(sys.modules, "bio_inspired_nanochat._rust", older)
    monkeypatch.setattr(rust, "_load", rust._load.__wrapped__)
    assert not rust.available()
    assert rust.why_not().startswith("the Rust extension was built from older sources (it has no Terminals): run `bash scripts/env.sh`")


def test_crates_are_pinned_exactly() -> None:
    crate = tomllib.loads((ROOT / "rust_src/Cargo.toml").read_text())
    versions = [spec["version"] if isinstance(spec, dict) else spec for spec in crate["dependencies"].values()]
    assert versions and all(re.fullmatch(r"=\d+\.\d+\.\d+", version) for version in versions)
