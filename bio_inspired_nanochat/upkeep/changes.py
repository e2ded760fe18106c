"""Which files of a git repository changed, and which tests are theirs."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from pathlib import Path

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.git import git

PACKAGE = "bio_inspired_nanochat"
BASES = ("main", "origin/main", "master", "origin/master")
# Tests of what is no module.
_OTHERS = {
    "README.md": ("tests/test_readme.py",),
    "RESULTS.md": ("tests/test_prompts.py", "tests/test_readme.py"),
    "constraints.txt": ("tests/test_architecture.py", "tests/test_environment.py"),
    "pyproject.toml": ("tests/test_architecture.py", "tests/test_environment.py"),
    "LICENSE": ("tests/test_architecture.py",),
    ".pre-commit-config.yaml": ("tests/upkeep/test_gate.py",),
    "speedrun.sh": ("tests/test_environment.py",),
    "scripts/env.sh": ("tests/test_environment.py",),
    "tests/run.sh": ("tests/test_environment.py",),
}
_FOLDERS = {
    "rust_src/": ("tests/test_rust.py",),
    "notebooks/": ("tests/test_notebooks.py",),
    "prompts/": ("tests/test_prompts.py",),
    "docs/": ("tests/test_readme.py",),
    "examples/": ("tests/test_examples.py", "tests/test_readme.py"),
}


def repository(folder: Path, otherwise: str = "") -> Path:
    """The root of the git working tree that a folder is in. UserError outside of one, which says what could be done `otherwise`."""
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").strip())
    except UserError as error:
        if "not on PATH" in str(error):
            raise
        raise UserError(f"{folder} is not inside a git working tree ({error}): run this in a clone{otherwise}") from None


def project(folder: Path) -> Path:
    """The nearest folder upward that has the package and a pyproject.toml. UserError when there is none."""
    for place in (folder, *folder.parents):
        if (place / "pyproject.toml").is_file() and (place / PACKAGE).is_dir():
            return place
    raise UserError(f"{folder} is not inside a copy of this repository (no folder with pyproject.toml and {PACKAGE}/): cd to one")


def staged(root: Path) -> list[str]:
    """Paths that the next commit would change, deleted ones included."""
    return _paths(git(root, "diff", "--cached", "--name-only", "--no-renames", "-z"))


def unstaged(root: Path) -> list[str]:
    """Paths of tracked files whose working copy differs from what is staged."""
    return _paths(git(root, "diff", "--name-only", "--no-renames", "-z"))


def base_revision(root: Path, name: str | None) -> tuple[str, str]:
    """(what the branch is compared with, how to say it): the merge base with `name`, by default with the first of BASES.

    Without a common ancestor (unrelated or shallow histories) the other commit itself. UserError for a revision that is not there.
    """
    for candidate in [name] if name else BASES:
        if commit := _commit(root, candidate):
            break
    else:
        raise UserError(f"base={name or ' or '.join(BASES)} is no revision of this repository: name one with --base=REV, or use --mode=all")
    if _commit(root, "HEAD") is None:
        raise UserError("this repository has no commit yet: use --mode=staged or --mode=all")
    try:
        return git(root, "merge-base", commit, "HEAD").strip(), f"the merge base with {candidate}"
    except UserError:
        return commit, f"{candidate} itself, which shares no ancestor with HEAD"


def since(root: Path, revision: str) -> list[str]:
    """Paths that differ between a revision and the working tree, untracked files that git does not ignore included."""
    changed = _paths(git(root, "diff", "--name-only", "--no-renames", "-z", revision))
    return sorted({*changed, *_paths(git(root, "ls-files", "--others", "--exclude-standard", "-z"))})


def _commit(root: Path, name: str) -> str | None:
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
    except UserError:
        return None


def _paths(listed: str) -> list[str]:
    return [path for path in listed.split("\0") if path]


def tests_of(root: Path, changed: Iterable[str], narrow: bool) -> list[str]:
    """Test files for changed files, by folder and by import, sorted.

    A module's tests are those of its room, or, if `narrow` and there is one, the file named like it; always also those that import
    it or a helper that changed. Helpers of tests pull in what imports them, however indirectly.
    """
    imports = {path: _imports(root, path) for path in _python(root, "tests")}
    found: set[str] = set()
    helpers: list[str] = []
    for path in changed:
        found.update(name for name in _OTHERS.get(path, ()) if (root / name).exists())
        for folder, tests in _FOLDERS.items():
            if path.startswith(folder):
                found.update(name for name in tests if (root / name).exists())
        if path.endswith("conftest.py") and path.startswith("tests/"):
            found.update(name for name in imports if _is_test(name) and name.startswith(path.removesuffix("conftest.py")))
        elif path.endswith(".py"):
            helpers.append(_module(path))
            if path in imports and _is_test(path):
                found.add(path)
            elif path.startswith(f"{PACKAGE}/"):
                found.update(_own_tests(path, imports, narrow))
    while helpers:
        module = helpers.pop()
        for path, names in imports.items():
            if module in names and path not in found:
                if _is_test(path):
                    found.add(path)
                elif _module(path) != module:
                    imports = {name: used for name, used in imports.items() if name != path}
                    helpers.append(_module(path))
    return sorted(found)


def _own_tests(path: str, imports: dict[str, set[str]], narrow: bool) -> set[str]:
    """Tests of the room of a module of the package, or only the file that is named like it."""
    parts = Path(path).with_suffix("").parts[1:]
    mirrored = Path("tests", *parts[:-1], f"test_{parts[-1]}.py").as_posix()
    if narrow and mirrored in imports:
        return {mirrored}
    room = {f"tests/test_{parts[0]}.py"} & set(imports)
    return room | {name for name in imports if _is_test(name) and name.startswith(f"tests/{parts[0]}/")}


def _is_test(path: str) -> bool:
    return os.path.basename(path).startswith("test_")


def _python(root: Path, folder: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / folder).rglob("*.py"))


def _module(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def _imports(root: Path, path: str) -> set[str]:
    """Dotted names that a file imports, each with what is taken from it. A file that cannot be read imports nothing."""
    try:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names
