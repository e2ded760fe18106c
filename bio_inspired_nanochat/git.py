"""What git says about a folder, and about the sources of this package."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bio_inspired_nanochat.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def git(root: Path, *words: str) -> str:
    """Standard output of a git command in a folder. UserError with git's own words when it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        raise UserError("git is not on PATH: install git (on Debian: apt install git)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"git {' '.join(words[:3])} gave no answer in 120 seconds: try it by hand in {root}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"git {' '.join(words[:3])} failed: {said}")
    return done.stdout


def source_revision() -> str | None:
    """The git revision of this package's sources, with `+` when tracked files have changed since; None for an installed package, which a
    repository around it says nothing about, and where git does not answer."""
    if not (ROOT / ".git").exists():
        return None
    try:
        changed = git(ROOT, "status", "--porcelain", "--untracked-files=no").strip()
        return git(ROOT, "rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except UserError:
        return None
