"""The quality gate: lint, format, types, imports, Rust and the tests of what changed, as one table and one exit code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say, table
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.upkeep import changes

CHECKS = ("lint", "format", "types", "imports", "clippy", "rustfmt", "tests")
MODES = ("staged", "branch", "all")
SHOWN_LINES = 60
_RUST = (".rs", "Cargo.toml", "rustfmt.toml")
_DEV = "pip install -c constraints.txt {}  (or bash tests/run.sh, which makes .venv with it)"
_RUSTUP = "rustup component add {}  (rustup comes with the Rust toolchain)"
# What is left out of the suite, and of a quick look at what changed.
_SUITE = "not gpu and not soak"
_QUICK = f"{_SUITE} and not slow and not browser"


@dataclass(frozen=True)
class GateConfig:
    """What is checked."""

    mode: str = knob(
        "branch",
        "staged: files of the next commit, with the tests named like them or importing them; branch: files that differ from --base, "
        "with the tests of their rooms; all: everything, with the whole suite",
        choices=MODES,
    )
    base: str | None = knob(None, "revision that a branch is compared with; auto is main, origin/main, master or origin/master")
    skip: tuple[str, ...] = knob((), f"checks to leave out, separated by commas: {', '.join(CHECKS)}")
    minutes: float = knob(20.0, "longest time for one check", lo=0.1, hi=600.0, unit="minutes")

    def __post_init__(self) -> None:
        validate(self)
        for name in self.skip:
            if name not in CHECKS:
                raise UserError(f"skip={name!r} is no check: one of {', '.join(CHECKS)}{nearest(name, CHECKS)}")
        if self.base is not None and self.mode != "branch":
            raise UserError(f"base={self.base!r} is for --mode=branch: leave it out with --mode={self.mode}")


@dataclass(frozen=True)
class Check:
    """One command to run. needs: a Python module or a program that must be there; install: the command that brings it."""

    name: str
    command: tuple[str, ...]
    what: str
    needs: str = ""
    install: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a check. outcome: "passed", "failed", "missing", "late" or "skipped"; text: what it printed, or why not."""

    name: str
    outcome: str
    seconds: float
    what: str
    text: str = ""


def gate(config: GateConfig, folder: Path | None = None) -> dict[str, Any]:
    """Run the checks that the changed files need and print the table; the record has `ok`.

    folder: somewhere inside the repository (None: the working directory). UserError outside of it, or for an unknown base.
    """
    root, changed = _scope(config, (folder or Path.cwd()).resolve())
    results = []
    for name in CHECKS:
        found = "left out by --skip" if name in config.skip else _check(name, config.mode, root, changed)
        if isinstance(found, str):
            results.append(Result(name, "skipped", 0.0, found))
            continue
        say(f"{name}: {found.what} ...")
        results.append(_run(found, root, 60 * config.minutes))
        if results[-1].text:
            say(results[-1].text)
    table(("check", "result", "seconds", "of"), [(r.name, r.outcome, round(r.seconds, 1), r.what) for r in results])
    bad = [result.name for result in results if result.outcome not in ("passed", "skipped")]
    say(f"gate: {', '.join(bad)} did not pass" if bad else "gate: everything passed")
    return {
        "ok": not bad,
        "mode": config.mode,
        "files": None if changed is None else len(changed),
        "failed": bad,
        "checks": {result.name: {"result": result.outcome, "seconds": round(result.seconds, 2)} for result in results},
    }


def _scope(config: GateConfig, folder: Path) -> tuple[Path, list[str] | None]:
    """The root, and the paths that changed, or None for everything."""
    if config.mode == "all":
        return changes.project(folder), None
    root = changes.repository(folder, ", or use --mode=all")
    changes.project(root)
    if config.mode == "staged":
        changed = changes.staged(root)
        say(f"{_count(changed, 'staged file')}")
        if both := sorted(set(changed) & set(changes.unstaged(root))):
            say(f"notice: {', '.join(both[:5])} also have changes that are not staged: the working copies are checked")
        return root, changed
    revision, said = changes.base_revision(root, config.base)
    changed = changes.since(root, revision)
    say(f"{_count(changed, 'file')} changed since {said}")
    return root, changed


def _check(name: str, mode: str, root: Path, changed: list[str] | None) -> Check | str:
    """The check of that name, or why there is nothing to do."""
    if name in ("clippy", "rustfmt"):
        return _rust_check(name, root, changed)
    if name == "tests":
        return _tests(mode, root, changed)
    python = None if changed is None else [path for path in changed if path.endswith((".py", ".pyi"))]
    if name in ("lint", "format"):
        there = ["."] if python is None else [path for path in python if (root / path).exists()]
        if not there:
            return "no Python file changed"
        words = ("check",) if name == "lint" else ("format", "--check")
        command = (sys.executable, "-m", "ruff", *words, "--force-exclude", "--", *there)
        return Check(name, command, _count(there, "Python file"), "ruff", _DEV.format("ruff"))
    if not (python is None or python or {"pyproject.toml", "constraints.txt"} & set(changed or ())):
        return "no Python file changed"
    if name == "types":
        command = (sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable)
        return Check(name, (*command, "--output-format", "min-text"), "package and scripts", "pyrefly", _DEV.format("pyrefly"))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_architecture.py")
    return Check(name, command, "import directions and file lengths", "pytest", _DEV.format("pytest"))


def _rust_check(name: str, root: Path, changed: list[str] | None) -> Check | str:
    if changed is not None and not any(path.endswith(_RUST) for path in changed):
        return "no Rust file changed"
    if not (root / "Cargo.toml").exists():
        return "no Rust workspace here"
    if name == "rustfmt":
        return Check(name, ("cargo", "fmt", "--check"), "Rust sources", "cargo-fmt", _RUSTUP.format("rustfmt"))
    command = ("cargo", "clippy", "--quiet", "--release", "--all-targets", "--features", "python", "--", "-D", "warnings")
    return Check(name, command, "Rust sources", "cargo-clippy", _RUSTUP.format("clippy"))


def _tests(mode: str, root: Path, changed: list[str] | None) -> Check | str:
    files = [] if changed is None else changes.tests_of(root, changed, narrow=mode == "staged")
    if changed is not None and not files:
        return "no test belongs to what changed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", _SUITE if changed is None else _QUICK]
    if importlib.util.find_spec("xdist") and (changed is None or len(files) > 3):
        command += ["-n", str(min(2, os.cpu_count() or 1)), "--dist", "worksteal"]
    what = "the whole suite" if changed is None else _count(files, "test file")
    return Check("tests", (*command, *files), what, "pytest", _DEV.format("pytest"))


def _count(files: Sequence[str], noun: str) -> str:
    return "all files" if list(files) == ["."] else f"{len(files)} {noun}{'' if len(files) == 1 else 's'}"


def _run(check: Check, root: Path, seconds: float) -> Result:
    if check.needs and not _has(check.needs):
        return Result(check.name, "missing", 0.0, check.what, f"{check.name}: {check.needs} is not installed: {check.install}")
    began = time.monotonic()
    try:
        done = subprocess.run(
            check.command,
            cwd=root,
            env=_environment(check.command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Result(check.name, "late", time.monotonic() - began, check.what, f"{check.name}: not done within --minutes={seconds / 60:g}")
    took = time.monotonic() - began
    nothing_ran = check.name == "tests" and done.returncode == 5  # all that was found is slow, or needs what is not here
    if done.returncode == 0 or nothing_ran:
        return Result(check.name, "passed", took, check.what + (", all of them slow or skipped" if nothing_ran else ""))
    return Result(check.name, "failed", took, check.what, "\n".join(done.stdout.splitlines()[-SHOWN_LINES:]))


def _has(tool: str) -> bool:
    return shutil.which(tool) is not None if tool.startswith("cargo") else importlib.util.find_spec(tool) is not None


def _environment(command: Sequence[str]) -> dict[str, str]:
    """The variables of a check, without git's own: a hook sets them, and they would lead tests to the wrong repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    if command[0] == "cargo":
        kept["PYO3_PYTHON"] = sys.executable
    elif "pyrefly" in command:
        kept.pop("PYTHONPATH", None)  # its configuration says where modules are
    return {"OMP_NUM_THREADS": "1"} | kept
