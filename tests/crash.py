"""Processes that die, run out of room or lack rights while they write a checkpoint. Started from test_crash, so that forks are cheap and safe."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.checkpoint import find_checkpoint
from bio_inspired_nanochat.errors import UserError
from tests.test_checkpoint import CALLS, holds, names, save

NOBODY = 65534


def forked(action: Callable[[], Any]) -> int | str:
    """Run `action` in a process of its own: what it says in a UserError, or its exit code (negative: the signal that ended it)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            action()
            code = 0
        except UserError as error:
            os.write(writing, str(error).encode()[:4000])
            code = 2
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if code == 2 else code


def die_at(moment: int, half: bool) -> None:
    """Let this process kill itself at the `moment`-th file operation: before it, or with half of what it writes written."""
    count = itertools.count()

    def wrapped(name: str, call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(count) != moment:
                return call(*arguments, **options)
            if half and name == "_write":
                path, data = arguments
                path.write_bytes(data[: len(data) // 2])
            elif half and name == "save_file":
                call(*arguments, **options)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            elif half and name == "rmtree":
                for path in [path for path in Path(arguments[0]).glob("*") if path.is_file()][:1]:
                    path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return run

    for module, name in CALLS:
        setattr(module, name, wrapped(name, getattr(module, name)))


def kills(folder: Path, half: bool, step: int) -> list[str]:
    """Kill a save at each of its moments in turn, next to a checkpoint of step 1 and leftovers. What was found instead of a good one."""
    wrong = []
    for moment in itertools.count():
        root = folder / f"{half}-{step}-{moment}"
        save(root, 1, seed=1)
        (root / ".stage-step_000007").mkdir()
        (root / ".stage-step_000007" / "meta.json").write_text("half")

        def act(root: Path = root, moment: int = moment) -> None:
            die_at(moment, half)
            save(root, step, seed=5, keep=1)

        code = forked(act)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"moment {moment}: the save ended with {code}")
        found = find_checkpoint(root)
        if not (holds(found, 5) or (code and holds(found, 1))):
            wrong.append(f"moment {moment}: {found} is neither the old checkpoint nor the new one")
        save(root, 3, seed=3, keep=1)
        if names(root) != ["step_000003"] or not holds(root, 3):
            wrong.append(f"moment {moment}: the next save left {names(root)}")
        shutil.rmtree(root)
        if code == 0:
            return [*wrong, *([] if moment > 15 else [f"only {moment} moments were met"])]
    raise AssertionError("the count does not end")


def full_disk(folder: Path) -> list[str]:
    """Save with room for so many bytes per file, as the system itself enforces it. What is wrong."""
    wrong, refused = [], 0
    for limit in (0, 1, 100, 150, 400, 1000, 1 << 20):
        root = folder / f"full-{limit}"
        save(root, 1, seed=1)

        def act(root: Path = root, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(root, 2, seed=5)

        said = forked(act)
        refused += isinstance(said, str)
        if isinstance(said, int) and said != 0:
            wrong.append(f"{limit} bytes: exit code {said}")
        if isinstance(said, str) and "checkpoint of step 2 cannot be written" not in said:
            wrong.append(f"{limit} bytes: {said}")
        if not holds(root, 5 if said == 0 else 1) or any(name.startswith(".stage") for name in names(root)):
            wrong.append(f"{limit} bytes: {names(root)}")
    return [*wrong, *([] if refused >= 5 else [f"only {refused} limits were met"])]


def read_only() -> list[str]:
    """Save into a folder without the right to write there, also when this process is root's. What is wrong."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "run"
        save(root, 1, seed=1)
        for path in (Path(made), root):
            path.chmod(0o555)

        def act() -> None:
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            save(root, 2, seed=5)

        said = forked(act)
        wrong = [] if isinstance(said, str) and "Permission denied" in said and "writable --checkpoint_dir" in said else [f"said {said!r}"]
        if not holds(root, 1):
            wrong.append("the checkpoint is gone")
        for path in (Path(made), root):
            path.chmod(0o755)
    return wrong


def main() -> None:
    """Print what was wrong as JSON, by scene."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # hundreds of saves: what a disk takes to flush is beside the point
    with tempfile.TemporaryDirectory(dir=memory) as made:
        folder, scenes = Path(made), {}
        for half, step in itertools.product((False, True), (1, 2)):
            scenes[f"kill {'in' if half else 'before'} a write of step {step}"] = kills(folder, half, step)
        print(json.dumps({**scenes, "full disk": full_disk(folder), "read only": read_only()}))


if __name__ == "__main__":
    main()
