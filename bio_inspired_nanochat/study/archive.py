"""A matrix as one small file, to commit or to go on with elsewhere: the plan, what each run has found, and the speeds, without the models.

    {"version", "plan", "common", "records", "attempts", "speed"} as gzipped JSON

Nothing in it depends on the machine: where the text lies is said again when it is unpacked, and the fingerprint says whether it is the same.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say, write_atomic
from bio_inspired_nanochat.config import knob
from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.errors import UserError, damaged_file
from bio_inspired_nanochat.study.plan import PLACES, FolderConfig, check_plan, located, read_plan
from bio_inspired_nanochat.study.queue import read_attempts, read_record
from bio_inspired_nanochat.study.speed import FILE

VERSION = 1
ABSOLUTE = re.compile(r"(?<![\w./])/(?:[^/\s\"']+/)+")  # the folders of an absolute path


@dataclass(frozen=True)
class PackConfig(FolderConfig):
    """Write the plan of a matrix and what its runs have found as one small file."""

    file: str | None = knob(None, "file to write, gzipped JSON; auto is matrix.json.gz in the folder")


@dataclass(frozen=True)
class UnpackConfig(FolderConfig):
    """Make the folder of a matrix from such a file, to report on it or to go on with its runs."""

    file: str = knob("matrix.json.gz", "file that pack wrote", path="file")
    data_dir: str | None = knob(
        None,
        "folder of the same parquet shards, for further runs; none is the embedded demo corpus, or only to report",
        path="exists",
        none="none",
    )
    tokenizer: str | None = knob(None, "tokenizer file for further runs; auto trains one for the data once", path="file")


def pack(config: PackConfig) -> dict[str, Any]:
    """Write the file; returns the script's last line. Raises UserError without a plan, or where the file cannot be written."""
    folder = config.folder()
    plan = read_plan(folder)
    file = folder / "matrix.json.gz" if config.file is None else Path(config.file).expanduser()
    trainings = [{**run["train"], **dict.fromkeys(PLACES)} for run in plan["runs"]]
    common = {name: value for name, value in trainings[0].items() if all(one[name] == value for one in trainings)}
    runs = [
        {**run, "train": {name: value for name, value in train.items() if name not in common}}
        for run, train in zip(plan["runs"], trainings, strict=True)
    ]
    records, attempts = {}, {}
    for run in plan["runs"]:
        place = folder / "runs" / run["id"]
        if (record := read_record(place)) is not None:
            records[run["id"]] = {name: value for name, value in record.items() if name != "config"}
        elif found := read_attempts(place):
            attempts[run["id"]] = [{**one, "last_lines": [ABSOLUTE.sub(".../", line) for line in one["last_lines"]]} for one in found]
    speed = folder / FILE
    with damaged_file(speed, "move it away and measure again"):
        speeds = json.loads(speed.read_text(encoding="utf-8")) if speed.exists() else None
    held = {"version": VERSION, "plan": {**plan, "runs": runs}, "common": common, "records": records, "attempts": attempts, "speed": speeds}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, gzip.compress(json.dumps(held, separators=(",", ":")).encode(), mtime=0))
    except OSError as error:
        raise UserError(f"file={str(file)!r} cannot be written ({error.strerror}): give a file in a writable folder") from None
    say(f"{len(records)} of {len(runs)} runs packed, {file.stat().st_size / 1024:.0f} KiB")
    return {"runs": len(runs), "done": len(records), "file": str(file), "bytes": file.stat().st_size}


def unpack(config: UnpackConfig) -> dict[str, Any]:
    """Write plan.json and the records; returns the script's last line. Runs that the folder has already stay as they are.

    Raises UserError for a file that is none of these, for another text than the plan's, and for a folder with another plan.
    """
    folder, file = config.folder(), Path(config.file).expanduser()
    fix = "give a file that `eval_matrix pack` wrote"
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"file={str(file)!r} cannot be read ({error}): {fix}") from None
    with damaged_file(file, fix):
        held = json.loads(content)
        if held["version"] != VERSION:
            raise UserError(
                f"{file} is of version {held['version']!r}, this is version {VERSION}: use the version of the package that wrote it"
            )
        plan, speeds = restored(held, config), held["speed"]
        check_plan(plan, file)
        trainings = {run["id"]: run["train"] for run in plan["runs"]}
        records = {name: json.dumps({**one, "config": trainings[name]}) + "\n" for name, one in held["records"].items()}
        attempts = {name: "".join(json.dumps(one) + "\n" for one in found) for name, found in held["attempts"].items()}
    if config.data_dir is not None and (found := resolve_data(config.data_dir).fingerprint) != plan["data"]["fingerprint"]:
        planned = plan["data"]["fingerprint"]
        raise UserError(f"data_dir={config.data_dir!r} is another text ({found[:16]}) than the plan's ({planned[:16]}): give its shards")
    if (folder / "plan.json").exists() and read_plan(folder)["digest"] != plan["digest"]:
        raise UserError(f"out={str(folder)!r} has another plan: give another --out, or move that folder away")
    new = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
        for run in plan["runs"]:
            place = folder / "runs" / run["id"]
            if run["id"] in records and read_record(place) is None:
                place.mkdir(parents=True, exist_ok=True)
                write_atomic(place / "record.json", records[run["id"]])
                new += 1
            elif run["id"] in attempts and not read_attempts(place):
                place.mkdir(parents=True, exist_ok=True)
                write_atomic(place / "attempts.jsonl", attempts[run["id"]])
        if speeds is not None and not (folder / FILE).exists():
            write_atomic(folder / FILE, json.dumps(speeds, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out={str(folder)!r} cannot be written ({error.strerror}): give a writable folder") from None
    say(f"{len(records)} of {len(plan['runs'])} runs are done, {new} of them new here")
    return {"runs": len(plan["runs"]), "done": len(records), "new": new, "out": str(folder)}


def restored(held: Mapping[str, Any], config: UnpackConfig) -> dict[str, Any]:
    """The plan of a file, with every training whole and on this machine's text."""
    places = located({name: getattr(config, name) for name in PLACES})
    runs = [{**run, "train": {**held["common"], **run["train"], **places}} for run in held["plan"]["runs"]]
    return {**held["plan"], "runs": runs}
