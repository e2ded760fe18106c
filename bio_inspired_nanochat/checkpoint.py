"""Checkpoints: directories of safetensors and JSON that are complete or absent. No pickle; this module knows no model class.

    root/step_000123/
        model.safetensors            tensors by parameter name
        meta.json                    step, model_config, train_config, loop
        optim_rank0.safetensors      tensors of the optimizer state of rank 0 ...
        optim_rank0.json             ... and everything else of it
        tokenizer.json, ...          further files, as bytes
        manifest.json                size and sha256 of every other file; written last

A checkpoint is written into `.stage-step_000123`, every file flushed to disk, the manifest last, and then renamed. A process that dies
at any moment leaves the previous checkpoint loadable. One run writes to a root at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bio_inspired_nanochat.common.console import say
from bio_inspired_nanochat.common.files import sha256_file
from bio_inspired_nanochat.errors import UserError, damaged_file

FORMAT = 1
MANIFEST, MODEL, META = "manifest.json", "model.safetensors", "meta.json"
CHOOSE = "choose another checkpoint"

_STEP = re.compile(r"step_(\d{6,})")
# Names beside the steps. `.replaced-` holds the old checkpoint of a step while the new one takes its name, and counts as a checkpoint
# as long as that name is free; the other two are leftovers whenever a new checkpoint begins.
_STAGE, _REPLACED, _TRASH = ".stage-", ".replaced-", ".trash-"
_TENSOR = "$tensor"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its directory, step, tensors on the CPU by parameter name, and metadata."""

    path: Path
    step: int
    model: dict[str, Tensor]
    meta: dict[str, Any]

    def file(self, name: str) -> Path:
        """The path of a further file such as `tokenizer.json`. UserError when the checkpoint holds none of that name."""
        if name not in _read_manifest(self.path)["files"]:
            raise UserError(f"checkpoint {self.path} holds no {name}")
        return self.path / name


# --- writing ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path | str,
    step: int,
    model: dict[str, Tensor],
    meta: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
    keep: int | None = None,
) -> Path:
    """Write root/step_NNNNNN completely or not at all, and return its path. For one process; several ranks use `begin`.

    A checkpoint of the same step is replaced. keep: delete all but the newest `keep` checkpoints of the root (None keeps all).
    UserError when the disk is full, the root is not writable, or `meta` or `optimizer` hold what JSON cannot return unchanged.
    """
    with begin(root, step) as stage:
        if optimizer is not None:
            stage.write_optimizer(0, optimizer)
        return stage.commit(model, meta, files, keep)


def begin(root: Path | str, step: int, *, rank: int = 0, world: int = 1) -> Stage:
    """Start writing the checkpoint of `step`; use it as a context manager, which removes an unfinished stage on an error.

    With several ranks, which share the file system: rank 0 begins, barrier, the others begin, every rank calls `write_optimizer`,
    barrier, rank 0 calls `commit`, barrier.
    """
    assert step >= 0 and 0 <= rank < world, f"step {step}, rank {rank} of {world}"
    stage = Stage(Path(root), step, rank, world)
    if rank == 0:
        with _write_errors(stage.root, step):
            stage.root.mkdir(parents=True, exist_ok=True)
            _clean(stage.root)
            stage.path.mkdir()
    return stage


class Stage:
    """A checkpoint that is being written. It becomes visible to `find_checkpoint` in `commit`."""

    def __init__(self, root: Path, step: int, rank: int, world: int) -> None:
        self.root, self.step, self.rank, self.world = root, step, rank, world
        self.target = root / f"step_{step:06d}"
        self.path = root / f"{_STAGE}{self.target.name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.rank == 0:
            self.abort()

    def abort(self) -> None:
        """Remove the stage; the checkpoints stay as they are."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_optimizer(self, rank: int, state: dict[str, Any]) -> None:
        """Write the optimizer state of one rank: nested dictionaries (keys: strings) and lists of tensors and JSON values."""
        tensors: dict[str, Tensor] = {}
        tree = _plain(state, f"optimizer state of rank {rank}", tensors)
        with _write_errors(self.root, self.step):
            _write_tensors(self.path / f"optim_rank{rank}.safetensors", tensors)
            _write(self.path / f"optim_rank{rank}.json", _dump(tree))

    def commit(
        self, model: dict[str, Tensor], meta: dict[str, Any], files: dict[str, bytes] | None = None, keep: int | None = None
    ) -> Path:
        """Write the rest and name the checkpoint; rank 0, after all wrote their optimizer state. UserError for a bad `keep`, a full disk."""
        assert self.rank == 0, "rank 0 commits"
        assert meta.get("step", self.step) == self.step, f"meta says step {meta['step']}, the checkpoint is of step {self.step}"
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep} checkpoints is out of bounds [1, inf]")
        record = _dump(_plain({"step": self.step, **meta}, "meta", None))
        with _write_errors(self.root, self.step):
            _write_tensors(self.path / MODEL, model)
            _write(self.path / META, record)
            for name, data in (files or {}).items():
                free = _is_plain_name(name) and name != MANIFEST and not (self.path / name).exists()
                assert free, f"{name!r} is no name for a further file"
                _write(self.path / name, data)
            self._write_manifest()
            self._rename()
        if keep is not None:
            _rotate(self.root, keep, self.target)
        return self.target

    def _write_manifest(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir())
        ranks = [name for name in names if name.startswith("optim_rank") and name.endswith(".json")]
        assert len(ranks) in (0, self.world), f"{len(ranks)} of {self.world} ranks wrote their optimizer state"
        files = {name: {"bytes": (self.path / name).stat().st_size, "sha256": sha256_file(self.path / name)} for name in names}
        manifest = {"format": FORMAT, "step": self.step, "created": time.time(), "world": self.world, "files": files}
        _write(self.path / MANIFEST, _dump(manifest))
        _sync_directory(self.path)

    def _rename(self) -> None:
        """Give the stage its name. A directory cannot replace a full one in one call, so an old checkpoint steps aside first."""
        if self.target.exists():
            os.rename(self.target, self.root / f"{_REPLACED}{self.target.name}")
        os.rename(self.path, self.target)
        _sync_directory(self.root)
        shutil.rmtree(self.root / f"{_REPLACED}{self.target.name}", ignore_errors=True)


def _clean(root: Path) -> None:
    """Remove what a process that died left behind, and give a checkpoint that was being replaced its name back."""
    for entry in list(root.iterdir()):
        if entry.name.startswith(_REPLACED) and not (root / entry.name.removeprefix(_REPLACED)).exists():
            os.rename(entry, root / entry.name.removeprefix(_REPLACED))
        elif entry.name.startswith((_STAGE, _REPLACED, _TRASH)):
            shutil.rmtree(entry)


def _rotate(root: Path, keep: int, newest: Path) -> None:
    """Delete all but `keep` checkpoints, highest steps first; `newest` stays in any case. Trouble is a notice: the new one is safe."""
    others = [path for _, path in _steps(root) if path != newest and not path.name.startswith(_REPLACED)]
    for path in others[keep - 1 :]:
        trash = root / f"{_TRASH}{path.name}"
        try:
            os.rename(path, trash)  # never a checkpoint with some of its files deleted
            shutil.rmtree(trash)
        except OSError as error:
            say(f"notice: old checkpoint {path} could not be deleted ({error.strerror or error})")


@contextlib.contextmanager
def _write_errors(root: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "free space, or choose a writable --checkpoint_dir"
        raise UserError(f"checkpoint of step {step} cannot be written to {root} ({error.strerror or error}): {fix}") from error


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors of any device, stride and sharing. Names of one and the same tensor are stored once, the others as aliases."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        assert not (tensor.is_meta or tensor.is_conj() or tensor.is_neg()), f"{name} has no values of its own to save"
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and names.setdefault(key, name) != name:
            aliases[name] = names[key]
            continue
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:  # the format refuses several views of one storage
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    try:
        save_file(stored, path, metadata={"aliases": json.dumps(aliases)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.chmod(path, path.parent.stat().st_mode & 0o666)  # the library makes files that only their owner can read
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading ---------------------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path | str, step: int | None = None) -> Path:
    """The directory of a complete checkpoint whose files all have their recorded size and sha256.

    path: a step directory, a root of steps, or a directory of roots (the most recently written root is searched first). step: this step and
    no other. Without it the highest complete step is taken, and each damaged or half-written one above it is a notice.
    UserError when there is none, or when what was asked for by name is damaged: it names the file and the reason.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"checkpoint path {path} does not exist: give the folder of a step, of a run or of runs")
    if not path.is_dir():
        raise UserError(f"checkpoint path {path} is a file: give the directory that holds it")
    if _is_step(path):
        _require_complete(path)
        found = _read_manifest(path)["step"]
        if step not in (None, found):
            raise UserError(f"checkpoint {path} is of step {found}, not {step}: give its parent directory to choose a step")
        return path
    try:
        candidates = _steps(path) or _steps_of_roots(path)
    except OSError as error:
        raise UserError(f"checkpoint path {path} cannot be read ({error.strerror}): choose a readable one") from None
    if not candidates:
        raise UserError(f"no checkpoint under {path}: expected directories named step_NNNNNN with a {MANIFEST}")
    if step is not None:
        chosen = [candidate for number, candidate in candidates if number == step]
        if not chosen:
            raise UserError(f"no checkpoint of step {step} under {path}: choose one of {_listed(number for number, _ in candidates)}")
        _require_complete(chosen[0])
        return chosen[0]
    damaged: list[str] = []
    for _, candidate in candidates:
        problem = _problem(candidate)
        if problem is None:
            for line in damaged:
                say(f"notice: checkpoint {line}; taking {candidate}")
            return candidate
        damaged.append(f"{candidate} is damaged: {problem}")
    raise UserError(f"no complete checkpoint under {path}: {damaged[0]}")


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Load what `find_checkpoint(path)` finds. Tensors are on the CPU. Raises UserError for a missing or damaged one."""
    path = find_checkpoint(path)
    with damaged_file(path / META, CHOOSE):
        meta = {**json.loads((path / META).read_bytes())}
    return Checkpoint(path, _read_manifest(path)["step"], _read_tensors(path / MODEL), meta)


def load_optimizer(path: Path | str, rank: int = 0) -> dict[str, Any]:
    """What one rank gave to `write_optimizer`, tensors on the CPU. Raises UserError for a damaged file and a rank that saved none."""
    path = find_checkpoint(path)
    manifest = _read_manifest(path)
    name = f"optim_rank{rank}"
    if f"{name}.json" not in manifest["files"]:
        saved = sum(entry.startswith("optim_rank") and entry.endswith(".json") for entry in manifest["files"])
        raise UserError(f"checkpoint {path} holds no optimizer state of rank {rank}: it was saved by {saved} ranks; resume with as many")
    tensors = _read_tensors(path / f"{name}.safetensors")
    with damaged_file(path / f"{name}.json", CHOOSE):
        return {**_restored(json.loads((path / f"{name}.json").read_bytes()), tensors)}


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of a root, highest first, complete or not. A checkpoint that is being replaced stands in for its successor."""
    found: dict[int, Path] = {}
    for entry in root.iterdir():
        match = _STEP.fullmatch(entry.name.removeprefix(_REPLACED))
        if match and entry.is_dir() and (not entry.name.startswith(_REPLACED) or not (root / match[0]).exists()):
            found[int(match[1])] = entry
    return sorted(found.items(), reverse=True)


def _steps_of_roots(path: Path) -> list[tuple[int, Path]]:
    roots = [_steps(entry) for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    roots = sorted((steps for steps in roots if steps), key=lambda steps: max(_created(entry) for _, entry in steps), reverse=True)
    return [pair for steps in roots for pair in steps]


def _is_step(path: Path) -> bool:
    return (path / MANIFEST).exists() or _STEP.fullmatch(path.name.removeprefix(_REPLACED)) is not None


def _require_complete(path: Path) -> None:
    problem = _problem(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}; choose another step")


def _problem(path: Path) -> str | None:
    """Why a step directory is not a complete checkpoint: the file and the reason. None when it is one."""
    try:
        manifest = _read_manifest(path)
        match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
        if match and int(match[1]) != manifest["step"]:
            return f"{MANIFEST} is that of step {manifest['step']}"
        for name, record in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes instead of {record['bytes']}"
            if _digest(path / name) != record["sha256"]:
                return f"{name} does not have the recorded sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except _BadManifest as error:
        return f"{MANIFEST} {error}"
    return None


class _BadManifest(Exception):
    """The manifest does not describe a checkpoint; the message says why."""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (ValueError, RecursionError):  # also what is no UTF-8
        raise _BadManifest("is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _BadManifest(f"is not of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("step"), int) or not {MODEL, META} <= set(files):
        raise _BadManifest("does not describe a checkpoint")
    for name, record in files.items():
        if not _is_plain_name(name) or not isinstance(record, dict) or not {"bytes", "sha256"} <= set(record):
            raise _BadManifest(f"has a bad entry {name!r}")
    return manifest


def _created(path: Path) -> float:
    try:
        return float(_read_manifest(path).get("created", 0.0))
    except (OSError, _BadManifest):
        return 0.0


_digests: dict[tuple[str, int, int, int], str] = {}


def _digest(path: Path) -> str:
    """sha256 of a file, computed once per process and state of the file: finding and loading both ask for it."""
    stat = path.stat()
    key = (str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256_file(path)
    return _digests[key]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            aliases = (file.metadata() or {}).get("aliases", "{}")
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): {CHOOSE}") from None
    with damaged_file(path, CHOOSE):
        return tensors | {name: tensors[source] for name, source in json.loads(aliases).items()}


# --- trees of tensors and JSON values --------------------------------------------------------------------------------------------


def _plain(value: Any, where: str, tensors: dict[str, Tensor] | None, path: str = "") -> Any:
    """A copy of `value` in JSON types, with tensors moved into `tensors` (None: there must be none). Tuples become lists.

    UserError for what JSON would not give back unchanged: NaN, infinities, keys that are no strings, other types.
    """
    if isinstance(value, Tensor) and tensors is not None:
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key != _TENSOR for key in value):
            raise UserError(f"{where} has keys in {path or 'its top level'} that are no usable strings: a checkpoint needs strings")
        return {key: _plain(item, where, tensors, f"{path}/{key}" if path else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, tensors, f"{path}/{index}" if path else str(index)) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} has {path} = {value}: a checkpoint keeps finite numbers only, store null")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{where} has {path} of type {type(value).__name__}: a checkpoint keeps numbers, strings, lists and dictionaries")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _restored(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    return value


def _dump(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode()


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and name == Path(name).name and not name.startswith(".") and "\0" not in name


def _listed(steps: Iterable[int]) -> str:
    numbers = sorted(set(steps))
    shown = numbers if len(numbers) <= 8 else [*numbers[:3], "...", *numbers[-3:]]
    return ", ".join(map(str, shown))
