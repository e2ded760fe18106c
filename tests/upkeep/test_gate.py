"""The quality gate finds what changed and fails where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.upkeep import changes
from bio_inspired_nanochat.upkeep import gate as gates
from bio_inspired_nanochat.upkeep.gate import GateConfig, gate
from scripts import quality_gate

ROOT = Path(__file__).resolve().parents[2]
GOOD = '"""A module."""\n\nVALUE = 1\n'


def git(root: Path, *words: str) -> str:
    """Run git as nobody in particular."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "core.hooksPath=/dev/null")
    return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny repository of this one's shape, on a branch off main."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "project"
    files = {
        "pyproject.toml": '[tool.pyrefly]\nproject-includes = ["bio_inspired_nanochat"]\n',
        "bio_inspired_nanochat/__init__.py": "",
        "bio_inspired_nanochat/data/__init__.py": "",
        "bio_inspired_nanochat/data/rows.py": GOOD,
        "bio_inspired_nanochat/data/shards.py": GOOD,
        "tests/data/test_rows.py": "from bio_inspired_nanochat.data.rows import VALUE\n\n\ndef test_value():\n    assert VALUE == 1\n",
        "tests/data/test_shards.py": "def test_nothing():\n    pass\n",
        "tests/helper.py": "from bio_inspired_nanochat.data import shards\n\nSHARDS = shards\n",
        "tests/test_far.py": "from tests.helper import SHARDS\n\n\ndef test_far():\n    assert SHARDS.VALUE == 1\n",
        "tests/test_architecture.py": "def test_nothing():\n    pass\n",
        "README.md": "words\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    git(root, "checkout", "-qb", "work")
    return root


def outcomes(record: dict) -> dict[str, str]:
    return {name: check["result"] for name, check in record["checks"].items()}


def test_tests_are_found_by_folder_and_by_import(project: Path) -> None:
    everything = ["tests/data/test_rows.py", "tests/data/test_shards.py"]
    assert changes.tests_of(project, ["bio_inspired_nanochat/data/rows.py"], narrow=True) == everything[:1]
    assert changes.tests_of(project, ["bio_inspired_nanochat/data/rows.py"], narrow=False) == everything
    # through a helper, however the module is imported
    assert changes.tests_of(project, ["bio_inspired_nanochat/data/shards.py"], narrow=True) == [everything[1], "tests/test_far.py"]
    assert changes.tests_of(project, ["tests/helper.py"], narrow=True) == ["tests/test_far.py"]
    assert changes.tests_of(project, ["tests/test_far.py", "notes.txt"], narrow=True) == ["tests/test_far.py"]
    (project / "tests/data/test_rows.py").unlink()  # deleted, or broken beyond reading
    (project / "tests/test_far.py").write_text("def (")
    assert changes.tests_of(project, ["tests/data/test_rows.py"], narrow=True) == []


def test_every_test_of_this_repository_can_be_reached() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    files = [path for folder in ("bio_inspired_nanochat", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    touched = [path.relative_to(ROOT).as_posix() for path in files if not path.name.startswith("test_")]
    found = set(
        changes.tests_of(
            ROOT, [*touched, "README.md", "pyproject.toml", "rust_src/src/lib.rs", "notebooks/one_terminal.ipynb"], narrow=False
        )
    )
    assert sorted(there - found) == []


def test_a_clean_commit_passes_and_a_broken_one_does_not(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = project / "bio_inspired_nanochat/data/rows.py"
    rows.write_text(GOOD + "MORE = 2\n")
    git(project, "add", "-A")
    skip = ("imports", *(("types",) if gates.importlib.util.find_spec("pyrefly") is None else ()))
    record = gate(GateConfig(mode="staged", skip=(*skip, "tests")), project / "tests")
    assert record["ok"] and record["files"] == 1 and outcomes(record)["format"] == "passed" and outcomes(record)["clippy"] == "skipped"
    rows.write_text("import os\nVALUE: int = 'two'\n")
    record = gate(GateConfig(mode="branch", skip=skip), project)
    said = capsys.readouterr().out
    assert not record["ok"] and set(record["failed"]) == {"lint", "format", "tests", *({"types"} - set(skip))}
    assert "F401" in said and "would be reformatted" in said and "assert 'two' == 1" in said
    assert "also have changes that are not staged" not in said
    gate(GateConfig(mode="staged", skip=gates.CHECKS), project)
    assert "rows.py also have changes that are not staged" in capsys.readouterr().out


def test_untracked_and_deleted_files_belong_to_a_branch(project: Path) -> None:
    (project / "bio_inspired_nanochat/new.py").write_text("")
    (project / "tests/helper.py").unlink()
    revision, said = changes.base_revision(project, None)
    assert said == "the merge base with main" and changes.since(project, revision) == ["bio_inspired_nanochat/new.py", "tests/helper.py"]
    git(project, "checkout", "-q", "--detach")  # no branch is needed
    assert changes.since(project, changes.base_revision(project, None)[0]) == ["bio_inspired_nanochat/new.py", "tests/helper.py"]


def test_a_base_without_common_ancestor_is_compared_as_a_whole(project: Path) -> None:
    git(project, "checkout", "-q", "--orphan", "alone")
    git(project, "rm", "-q", "--cached", "README.md")
    git(project, "commit", "-qm", "another beginning")
    revision, said = changes.base_revision(project, "main")
    assert "shares no ancestor" in said and changes.since(project, revision) == ["README.md"]


def test_wrong_places_and_names_are_one_line(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for config, folder, said in (
        (GateConfig(mode="staged"), outside, "not inside a git working tree"),
        (GateConfig(mode="all"), outside, "not inside a copy of this repository"),
        (GateConfig(base="nowhere"), project, "base=nowhere is no revision"),
    ):
        with pytest.raises(UserError, match=said):
            gate(config, folder)
    git(project, "branch", "-D", "main")
    with pytest.raises(UserError, match="base=main or origin/main"):
        gate(GateConfig(), project)
    with pytest.raises(UserError, match="did you mean 'tests'"):
        GateConfig(skip=("test",))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="git is not on PATH"):
        gate(GateConfig(mode="staged"), project)


def test_a_missing_tool_fails_and_says_what_installs_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = gates.importlib.util.find_spec
    monkeypatch.setattr(gates.importlib.util, "find_spec", lambda name: None if name in ("pyrefly", "ruff") else found(name))
    monkeypatch.setattr(gates.shutil, "which", lambda name: None)
    (project / "Cargo.toml").write_text("")
    (project / "bio_inspired_nanochat/new.py").write_text("")
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as ended:
        quality_gate.main(["--skip=tests,imports"])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and json.loads(out.splitlines()[-1])["failed"] == ["lint", "format", "types", "clippy", "rustfmt"]
    assert "pip install -c constraints.txt pyrefly" in out and "rustup component add clippy" in out


@pytest.mark.parametrize(
    "code, outcome",
    [("pass", "passed"), ("raise SystemExit(5)", "passed"), ("raise SystemExit(1)", "failed"), ("import time; time.sleep(60)", "late")],
)
def test_the_end_of_a_check_decides(project: Path, code: str, outcome: str) -> None:
    check = gates.Check("tests", (sys.executable, "-S", "-c", code), "nothing")  # pytest ends with 5 when it has nothing to run
    assert gates._run(check, project, 2.0).outcome == outcome


def test_the_hook_runs_the_gate() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert "entry: python -m scripts.quality_gate --mode=staged" in hooks and "repo: local" in hooks and "://" not in hooks
