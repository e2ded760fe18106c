"""A CORE bundle: a folder, a zip file of it, or the address of such a file.

    core.yaml            icl_tasks: a list of label, icl_task_type, dataset_uri, num_fewshot: [n], continuation_delimiter (" " if absent)
    eval_meta_data.csv   columns "Eval Task" and "Random baseline", the latter in percent
    eval_data/           the JSONL files that dataset_uri names

This is the layout of the bundle that DCLM (Li et al. 2024) made and nanochat serves. What is downloaded is kept under
`<base>/eval_bundles/`, whole or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import lzma
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock

from bio_inspired_nanochat.common import base_dir, progress, say, sha256_file
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.pairs import read_jsonl

KEYS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
MAX_BYTES = 1 << 30  # of a download; unpacked four times that
MAX_FILES = 10_000
_PIECE = 1 << 18


@dataclass(frozen=True)
class CoreTask:
    """One task. baseline: what guessing scores, in [0, 1); items: checked records with the keys of `KEYS[kind]`."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: tuple[dict[str, Any], ...]


def find_bundle(folder: str | None, file: str | None, url: str | None, timeout: float = 60.0, max_bytes: int = MAX_BYTES) -> Path | None:
    """The folder of the bundle that is given in one of three ways; None without any. Downloads and unpacks at most once.

    Raises UserError for several ways at once and for everything that is wrong with a file or an address.
    """
    given = {"eval_bundle_dir": folder, "eval_bundle_zip": file, "eval_bundle_url": url}
    names = [f"--{name}" for name, value in given.items() if value]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are both given: give one of them")
    if folder:
        return _root(Path(folder).expanduser(), f"eval_bundle_dir={folder}")
    if not file and not url:
        return None
    store = base_dir() / "eval_bundles"
    store.mkdir(exist_ok=True)
    path = Path(file or "").expanduser()
    if file:
        if not path.is_file():
            raise UserError(f"eval_bundle_zip={file} does not exist: give the zip file of a bundle")
        key, what = sha256_file(path)[:16], f"eval_bundle_zip={file}"
    else:
        key, what = "url-" + hashlib.sha256(str(url).encode()).hexdigest()[:16], f"eval_bundle_url={url}"
    with FileLock(store / ".lock"):
        if not (store / key).exists():
            with tempfile.TemporaryDirectory(dir=store) as temporary:
                if url:
                    path = Path(temporary) / "bundle.zip"
                    _download(url, path, timeout, max_bytes)
                unpacked = Path(temporary) / "bundle"
                unpack(path, unpacked, what, 4 * max_bytes)
                _root(unpacked, what)  # what is no bundle is not kept
                unpacked.rename(store / key)
        return _root(store / key, what)


def _root(folder: Path, what: str) -> Path:
    """The folder with core.yaml: this one, or the only one in it that has it."""
    if not folder.is_dir():
        raise UserError(f"{what} is not a folder: give the one with core.yaml")
    found = [place for place in (folder, *sorted(folder.iterdir())) if (place / "core.yaml").is_file()]
    if not found:
        raise UserError(f"{what} has no core.yaml: it is not a CORE bundle")
    return found[0]


def _download(url: str, path: Path, timeout: float, max_bytes: int) -> None:
    """Fetch from the beginning to a file of at most `max_bytes`, or raise UserError."""
    what = f"eval_bundle_url={url}"
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{what} is no http or https address")
    say(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer, open(path, "wb") as file:
            announced = answer.headers.get("Content-Length", "")
            total = int(announced) if announced.isdigit() else None
            if total is not None and total > max_bytes:
                raise UserError(f"{what} has {total} bytes, more than {max_bytes}: fetch it yourself and give --eval_bundle_zip")
            size = 0
            with progress(total, "download", "bytes") as bar:
                while piece := answer.read(_PIECE):
                    size += len(piece)
                    if size > max_bytes:
                        raise UserError(f"{what} has more than {max_bytes} bytes: fetch it yourself and give --eval_bundle_zip")
                    file.write(piece)
                    bar.advance(len(piece))
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{what} answers HTTP {error.code} {error.reason}: check the address") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} cannot be fetched ({type(error).__name__}: {error}): check the address and try again") from None
    if total is not None and size < total:
        raise UserError(f"{what} ended after {size} of {total} bytes: try again")


def unpack(archive: Path, out: Path, what: str, max_bytes: int = 4 * MAX_BYTES) -> None:
    """Unpack a zip file into the new folder `out`. Raises UserError for names that lead elsewhere, links, damage and too much of it."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            if len(members) > MAX_FILES:
                raise UserError(f"{what} has {len(members)} files, more than {MAX_FILES}: it is not a CORE bundle")
            out.mkdir(parents=True)
            left = max_bytes
            for member in members:
                target = out / _safe(member, what)
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, open(target, "wb") as file:
                    left -= _copy(source, file, left, what, max_bytes)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:  # damage of what bzip2 has packed comes as an OSError without a number
            raise UserError(f"{what} is not a whole zip file ({error}): fetch or make it again") from None
        raise UserError(f"{what} cannot be unpacked ({error.strerror or error}): make room under {base_dir()}") from None


def _safe(member: zipfile.ZipInfo, what: str) -> PurePosixPath:
    """The member's path inside of the bundle. Raises UserError for one that would leave it."""
    name = PurePosixPath(member.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename or not name.parts:
        raise UserError(f"{what} has a file named {member.filename!r}, which leads out of the bundle: do not trust it")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"{what} has the link {member.filename!r}: a bundle has plain files")
    return name


def _copy(source: IO[bytes], file: IO[bytes], left: int, what: str, max_bytes: int) -> int:
    """Copy and return the number of bytes; what a header says of the size is not believed."""
    size = 0
    while piece := source.read(_PIECE):
        size += len(piece)
        if size > left:
            raise UserError(f"{what} unpacks to more than {max_bytes} bytes: it is not a CORE bundle")
        file.write(piece)
    return size


# --- its files -----------------------------------------------------------------------------------------------------------------------


def read_bundle(root: Path) -> list[CoreTask]:
    """The tasks in the order of core.yaml. Raises UserError that names the file and what is wrong in it."""
    import yaml  # imported late: only this reads YAML

    path = root / "core.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:160]}): restore it") from None
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lacks the list icl_tasks: it is not a CORE bundle")
    baselines = _baselines(root / "eval_meta_data.csv")
    return [_task(root, f"{path} icl_tasks[{place}]", entry, baselines) for place, entry in enumerate(entries)]


def _baselines(path: Path) -> dict[str, tuple[str, str]]:
    """By task the place and the text of its baseline: the table may have lines for other tasks than those of core.yaml."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV ({error}): restore it") from None
    found = {}
    for number, row in enumerate(rows, 2):
        label, text = row.get("Eval Task"), row.get("Random baseline")
        if label is None or text is None:
            raise UserError(f'{path} line {number} lacks "Eval Task" or "Random baseline": the first line names the columns')
        found[label] = (f"{path} line {number}", text)
    return found


def _percentage(place: str, text: str) -> float:
    """The share that a percentage in [0, 100) stands for."""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{place} has Random baseline {text!r}: a percentage is needed") from None
    if not 0 <= value < 100:
        raise UserError(f"{place} has Random baseline {text}: a percentage in [0, 100) is needed")
    return value / 100


def _task(root: Path, where: str, entry: Any, baselines: dict[str, tuple[str, str]]) -> CoreTask:
    wanted = {"label": str, "icl_task_type": str, "dataset_uri": str, "num_fewshot": list}
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no mapping: label, icl_task_type, dataset_uri and num_fewshot are needed")
    for key, kind in wanted.items():
        if not isinstance(entry.get(key), kind):
            raise UserError(f"{where} has {key}={entry.get(key)!r}: a {kind.__name__} is needed")
    label, task_kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
    delimiter = entry.get("continuation_delimiter", " ")
    if task_kind not in KEYS:
        raise UserError(f"{where} ({label}) has icl_task_type={task_kind!r}: one of {', '.join(KEYS)}")
    if len(shots) < 1 or not isinstance(shots[0], int) or isinstance(shots[0], bool) or shots[0] < 0 or not isinstance(delimiter, str):
        raise UserError(
            f"{where} ({label}) has num_fewshot={shots!r} and continuation_delimiter={delimiter!r}: [number] and a text are needed"
        )
    if label not in baselines:
        raise UserError(f"{root / 'eval_meta_data.csv'} has no line for the task {label}: its random baseline is needed")
    uri = PurePosixPath(entry["dataset_uri"])
    if uri.is_absolute() or ".." in uri.parts or "\0" in str(uri):
        raise UserError(f"{where} ({label}) has dataset_uri={str(uri)!r}, which leads out of the bundle")
    items = tuple(_checked(place, item, task_kind) for place, item in read_jsonl(root / "eval_data" / uri))
    if len(items) <= shots[0]:
        raise UserError(f"{root / 'eval_data' / uri} has {len(items)} items: {label} needs more than its {shots[0]} examples")
    return CoreTask(label, task_kind, shots[0], delimiter, _percentage(*baselines[label]), items)


def _checked(place: str, item: dict[str, Any], kind: str) -> dict[str, Any]:
    for key, form in KEYS[kind].items():
        value = item.get(key)
        if not isinstance(value, form) or isinstance(value, bool):
            raise UserError(f"{place} has {key}={str(value)[:40]!r}: a {kind} item needs a {form.__name__} there")
    options = item.get("choices") if kind == "multiple_choice" else item.get("context_options") if kind == "schema" else None
    if options is not None:
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise UserError(f"{place} has fewer than two options, or one that is no text")
        if not 0 <= item["gold"] < len(options):
            raise UserError(f"{place} has gold={item['gold']}, out of bounds [0, {len(options) - 1}]")
    return item
