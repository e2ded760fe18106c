"""Where a run keeps its checkpoints and logs, and which checkpoint it continues."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from bio_inspired_nanochat.checkpoint import find_checkpoint
from bio_inspired_nanochat.common import base_dir, say
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training.config import TrainConfig


@dataclass(frozen=True)
class Folders:
    """name: of the run; checkpoints, logs: the run's own folders; resume: the checkpoint that it continues, None for a new run."""

    name: str
    checkpoints: Path
    logs: Path
    resume: Path | None


def checkpoint_root(config: TrainConfig | None = None) -> Path:
    """The folder that holds one folder of checkpoints per run."""
    if config is not None and config.checkpoint_dir is not None:
        return Path(config.checkpoint_dir).expanduser()
    return base_dir() / "checkpoints"


def find_resume(config: TrainConfig, name: str) -> Path | None:
    """The checkpoint that `--resume` names, for a run called `name`; None starts afresh.

    `auto` takes the newest checkpoint of the run, or of d4-2, d4-3, ... for a run called d4, and none when there is none. A number is
    a step of that run. Anything else is a path. Raises UserError for a step or path that does not exist.
    """
    if not config.resume:
        return None
    root = checkpoint_root(config)
    if config.resume == "auto":
        found = _newest(_family(root, name))
        if found is None:
            say(f"notice: resume=auto found no checkpoint of a run {name} under {root}: starting afresh")
        return found
    if config.resume.isdigit():
        step, family = int(config.resume), _family(root, name)
        if not family:
            raise UserError(f"resume={step}: a run {name} has no checkpoint under {root}; give --resume=PATH, or the --run_name")
        holders = [folder for folder in family if (folder / f"step_{step:06d}").is_dir()] or family
        return find_checkpoint(max(holders, key=lambda folder: folder.stat().st_mtime), step)
    return find_checkpoint(Path(config.resume).expanduser())


def take_folders(config: TrainConfig, name: str, resume: Path | None) -> Folders:
    """Make the run's folders. A new run never writes into an old one's: a name that is taken gets -2, -3, ...

    A resumed run goes on in the folder of its checkpoint. Raises UserError for a folder that cannot be made.
    """
    logs = Path(config.log_dir).expanduser()
    try:
        if resume is not None:
            name = resume.parent.name
            (logs / name).mkdir(parents=True, exist_ok=True)
            return Folders(name, resume.parent, logs / name, resume)
        root = checkpoint_root(config)
        for number in itertools.count(1):
            taken = name if number == 1 else f"{name}-{number}"
            if (root / taken).exists() or not _make(logs / taken):
                continue
            if config.save_every >= 0:
                (root / taken).mkdir(parents=True, exist_ok=True)
            if number > 1:
                say(f"notice: a run {name} exists already: this one is called {taken}")
            return Folders(taken, root / taken, logs / taken, None)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be made ({error.strerror}): choose another --log_dir or --checkpoint_dir") from None
    raise AssertionError("the count does not end")


def named(config: TrainConfig, folders: Folders) -> TrainConfig:
    """The config with the name that the run got."""
    return dataclasses.replace(config, run_name=folders.name)


def _make(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def _family(root: Path, name: str) -> list[Path]:
    """The folders of runs called name, name-2, name-3, ... that hold checkpoints; and `root` itself if it does so directly."""
    if not root.is_dir():
        return []
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    members = [folder for folder in root.iterdir() if folder.is_dir() and pattern.fullmatch(folder.name)]
    return [folder for folder in [*members, root] if any(folder.glob("step_*"))]


def _newest(folders: list[Path]) -> Path | None:
    """The newest complete checkpoint of the given folders, by the time it was written."""
    found = []
    for folder in folders:
        try:
            found.append(find_checkpoint(folder))
        except UserError as error:
            say(f"notice: {error}")
    return max(found, key=lambda path: (path / "manifest.json").stat().st_mtime, default=None)
