"""Runs of a matrix, one after the other in a process: train, evaluate, write `record.json`.

    python -m bio_inspired_nanochat.study.job FOLDER [FOLDER ...]

FOLDER holds `job.json`, written by the queue. What a run prints goes into its `log.txt`; the first one's standard output is there
already. Runs of one training with several seeds share what was compiled. The first that is not done ends the process. Exit code 0: all
records are there; STOPPED: a signal ended a run, which can be started again; NO_TEXT: the text of the plan is not there, which is
no fault of a run.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bio_inspired_nanochat.common import pick_device, say, write_atomic
from bio_inspired_nanochat.common.files import finite, read_json_lines
from bio_inspired_nanochat.config import from_dict, to_dict
from bio_inspired_nanochat.data import DataSource, resolve_data
from bio_inspired_nanochat.errors import UserError, exit_on_user_error
from bio_inspired_nanochat.evaluation.suite import EvaluationSetting, evaluate
from bio_inspired_nanochat.git import source_revision
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.study.views import read_curve, step_variances
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.plan import given_fields
from bio_inspired_nanochat.training.run import prepare, run_job

STOPPED, NO_TEXT = 75, 76
OF_SPEED = ("tok_per_s", "peak_memory_gib", "seconds")
OF_TRAINING = ("val_loss", "val_bpb", "final_loss", *OF_SPEED)


def main(folders: Sequence[Path]) -> int:
    """Do the runs of the folders in order; the exit code of the process. Raises UserError for what the user can fix."""
    parent = os.getppid()
    for number, folder in enumerate(folders):
        if number:
            if os.getppid() != parent:  # the queue was killed, and its runs are anybody's
                return STOPPED
            _print_into(folder / "log.txt")
            gc.collect()
            torch.cuda.empty_cache()
        if code := run(folder):
            return code
    return 0


def _print_into(path: Path) -> None:
    """Send all that this process prints into a file, whoever prints it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


class TextChanged(UserError):
    """The text is not the one that was planned with."""


def run(folder: Path) -> int:
    """Do the run of a folder; its exit code. Raises UserError for what the user can fix."""
    try:
        return _run(folder)
    except TextChanged as error:
        say(f"error: {error}")
        return NO_TEXT


def _run(folder: Path) -> int:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    spec, began = job["run"], time.time()
    for name in ("train", "checkpoints"):  # what an attempt before has left
        shutil.rmtree(folder / name, ignore_errors=True)
    places = {"log_dir": str(folder), "checkpoint_dir": str(folder / "checkpoints"), "run_name": "train"}
    config = dataclasses.replace(from_dict(TrainConfig, spec["train"]), **places)
    device, source = pick_device(config.device), planned_text(config, job["data"]["fingerprint"])
    result, done = run_job(config.run_name, device, lambda rank: prepare(config, device, rank, given_fields(config)), ())
    if done is None or result["stopped"]:
        return STOPPED
    metrics = {name: result[name] for name in OF_TRAINING} | {"params": result["params"], "perplexity": _perplexity(result["val_loss"])}
    log = Path(result["log_dir"]) / "metrics.jsonl"
    metrics |= step_variances(log) | last_look(log)
    metrics |= evaluated(done.model, job["evaluations"], done.tokenizer, source, job["evaluation_tokens"], done.plan.rows)
    planned_text(config, job["data"]["fingerprint"])  # a shard that went missing on the way was left out, and no number is what it says
    curve = read_curve(log, spec["flops_per_token"])
    if job["shared"]:  # beside other runs a time is not the model's own
        metrics |= dict.fromkeys(OF_SPEED)
        curve = dataclasses.replace(curve, seconds=())
    record = {
        **{name: spec[name] for name in ("id", "key", "conditions", "depth", "seed", "flops_per_token")},
        "tokens": result["tokens"],
        "metrics": metrics,
        "curve": dataclasses.asdict(curve),
        "shared": job["shared"],
        "config": to_dict(config),
        "digest": job["digest"],
        "smoke": job["smoke"],
        "data": job["data"],
        "versions": versions(),
        "git": source_revision(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "began": round(began, 1),
        "ended": round(time.time(), 1),
    }
    write_atomic(folder / "record.json", json.dumps(finite(record)) + "\n")
    return 0


def planned_text(config: TrainConfig, fingerprint: str) -> DataSource:
    """The text of a run. Raises TextChanged where it is not there, not all of it, or another than the one with that fingerprint."""
    try:
        source = resolve_data(config.data_dir, config.dataset)
    except UserError as error:
        raise TextChanged(str(error)) from error
    if source.fingerprint != fingerprint:
        raise TextChanged(f"the text has changed since the plan ({source.fingerprint[:16]}, planned {fingerprint[:16]}): restore it")
    return source


def evaluated(
    model: GPT, names: Sequence[str], tokenizer: Tokenizer, source: DataSource, tokens: int, rows: int
) -> dict[str, float | None]:
    """The metrics of the evaluation suite for a trained model."""
    return (
        {} if not names else evaluate(model, names, EvaluationSetting(tokenizer=tokenizer, source=source, tokens=tokens, batch_size=rows))
    )


def last_look(log: Path) -> dict[str, float]:
    """What the last look at experts saw, by tag."""
    looks = [event for event in read_json_lines(log) if event.get("kind") == "vitals"]
    return {tag: value for tag, value in looks[-1]["values"].items() if tag.startswith("experts/") and value is not None} if looks else {}


def versions() -> dict[str, str]:
    """What the numbers depend on beside this package."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 50.0))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main([Path(word) for word in sys.argv[1:]]))
