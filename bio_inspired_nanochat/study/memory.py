"""The memory study: train small models on the memory tasks, several seeds and variants, and say which ones remember.

A finished run is one line of a JSONL file, written at once, under a key made of everything that its result depends on. A study
that is started again skips what the file has; several processes with other seeds, tasks or variants may share the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.common import base_dir, pick_device, progress, say, stable_hash, table
from bio_inspired_nanochat.common.console import Progress
from bio_inspired_nanochat.common.files import read_json_lines
from bio_inspired_nanochat.config import SynapticConfig, knob, to_dict, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.memory import MemoryScore, engram_log_odds, measure
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.study.cohort import Cohort
from bio_inspired_nanochat.study.models import VARIANTS, WindowedConfig, build_variant, memory_only, memory_values, variant_roles
from bio_inspired_nanochat.tasks.memory import TASKS, Binding, Facts, MemoryTask, Recall, Switching, as_generator
from bio_inspired_nanochat.training import guards

POOL = 16  # batches that are generated together, so that generating costs a device next to nothing
READ_EVERY = 50  # steps after which the loss is read


@dataclass(frozen=True)
class MemoryStudyConfig:
    """Which models to train on which tasks, and how."""

    tasks: tuple[str, ...] = knob(tuple(TASKS), "memory tasks", choices=tuple(TASKS))
    variants: tuple[str, ...] = knob(tuple(VARIANTS), "kinds of models", choices=tuple(VARIANTS))
    seeds: tuple[int, ...] = knob((0, 1, 2, 3, 4), "seeds of weights and training rows", lo=0, hi=1 << 40)
    steps: int = knob(2000, "optimizer steps of a run", lo=1, hi=1 << 24, unit="steps", aliases=("num_iterations", "max_steps"))
    rows: int = knob(64, "rows of a step", lo=1, hi=1 << 20, aliases=("device_batch_size", "batch_size"))
    distance: int | None = knob(None, "distance of all tasks; auto is each task's own", lo=1, hi=1 << 16, unit="tokens")
    n_layer: int = knob(3, "transformer blocks", lo=1, hi=64, aliases=("depth",))
    n_embd: int = knob(128, "width of the residual stream", lo=8, hi=8192, aliases=("width",))
    head_dim: int = knob(32, "size of an attention head", lo=2, hi=1024)
    window: int = knob(8, "attention window of every layer; full keeps it in its first layer only", lo=1, hi=1 << 16, unit="tokens")
    eval_rows: int = knob(512, "rows of a measurement", lo=1, hi=1 << 20)
    eval_every: int = knob(0, "steps between measurements; 0 measures at the end only", lo=0, hi=1 << 24, off=0, unit="steps")
    eval_distances: tuple[int, ...] = knob((), "further distances to measure the trained models at", lo=1, hi=1 << 16, unit="tokens")
    stop_accuracy: float = knob(0.0, "accuracy at which a run ends early, when a measurement finds it; 0 never", lo=0.0, hi=1.0, off=0.0)
    engram_names: int = knob(20, "unseen names for the two-session form of the fact probe; 0 leaves it out", lo=0, hi=10000, off=0)
    out: str | None = knob(None, "file of records, continued when it exists; auto is study/memory.jsonl in the base folder")
    device: str = knob("auto", "where to run; auto takes CUDA, then MPS, then the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = knob("float32", "activations", choices=("float32", "bfloat16"))
    compile: bool = knob(False, "torch.compile of the training step", off=False)
    syn_cfg: SynapticConfig = knob(memory_only, "constants of the memory; a variant sets the rule and the gates")
    optim: OptimConfig = knob(OptimConfig, "optimizer")
    recall: Recall = knob(Recall, "associative recall")
    binding: Binding = knob(Binding, "variable binding")
    facts: Facts = knob(Facts, "fact probe")
    switching: Switching = knob(Switching, "switching between mappings")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("tasks", "variants", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: name at least one")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name}={','.join(map(str, getattr(self, name)))} names something twice: name each once")
        if self.n_embd % self.head_dim:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of head_dim={self.head_dim}")
        if self.engram_names == 1:
            raise UserError("engram_names=1: at least 2, because each is compared with another's engram; 0 leaves it out")
        needed, names = self.engram_names * self.facts.facts, self.facts.unseen().num_names
        if "facts" in self.tasks and needed > names:
            raise UserError(
                f"engram_names={self.engram_names} sessions of facts.facts={self.facts.facts} need {needed} names, there are {names} unseen ones: "
                f"use engram_names at most {names // self.facts.facts} or more facts.syllables"
            )
        reach = self.n_layer * (self.window - 1)
        for task in self.tasks:
            for distance in (self.task(task).distance, *self.eval_distances):
                if reach >= distance:
                    raise UserError(
                        f"{task}: attention reaches n_layer * (window - 1) = {reach} tokens, not less than the distance of {distance}: "
                        f"use window at most {(distance - 1) // self.n_layer + 1} or a larger distance"
                    )

    def task(self, name: str) -> MemoryTask:
        """The task of that name with its distance."""
        task: MemoryTask = getattr(self, name)
        return task if self.distance is None else task.at(self.distance)

    def model(self, task: MemoryTask) -> WindowedConfig:
        """Sizes of the models for a task."""
        heads = self.n_embd // self.head_dim
        sizes = {"n_layer": self.n_layer, "n_head": heads, "n_kv_head": heads, "n_embd": self.n_embd}
        text = {"sequence_len": task.length, "vocab_size": task.vocab_size}
        return WindowedConfig(**sizes, **text, attention_window=self.window, syn_cfg=self.syn_cfg)


@dataclass(frozen=True)
class StudyRun:
    """One training: a task, a variant and a seed."""

    config: MemoryStudyConfig
    task_name: str
    variant: str
    seed: int

    @property
    def task(self) -> MemoryTask:
        """The task."""
        return self.config.task(self.task_name)

    def key(self) -> str:
        """A digest of everything that the result depends on, but for the device."""
        config = self.config
        model = to_dict(config.model(self.task))
        if not memory_values(self.variant, config.model(self.task)):
            del model["syn_cfg"]
        names = ("steps", "rows", "eval_rows", "eval_every", "eval_distances", "stop_accuracy", "engram_names", "dtype", "compile")
        parts = {name: to_dict(config)[name] for name in names} | {"optim": to_dict(config.optim), "model": model}
        parts |= {"task": [self.task_name, to_dict(self.task)], "variant": [self.variant, repr(VARIANTS[self.variant])], "seed": self.seed}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def memory_study(config: MemoryStudyConfig) -> dict[str, Any]:
    """Do the runs that the file of records lacks, print the table; returns the script's last line."""
    device, began = pick_device(config.device), time.perf_counter()
    path = records_path(config)
    runs = [StudyRun(config, task, variant, seed) for task in config.tasks for seed in config.seeds for variant in config.variants]
    known = read_records(path)
    left = [run for run in runs if run.key() not in known]
    say(f"{len(runs)} runs of {config.steps} steps on {device}, {len(runs) - len(left)} of them in {path}")
    with progress(len(left) * config.steps, "study", "steps") as bar:
        for cohort in cohorts(left, device):
            with guards.out_of_memory_as_user_error(config.rows, lambda: config.rows // 2, str(device)):
                for record in train_runs(cohort, device, bar):
                    append_record(path, record)
                    known[record["key"]] = record
                    say(f"{record['task']} {record['variant']} seed {record['seed']}: {_said(record)}")
    results = summarise([known[run.key()] for run in runs])
    rows = [[task, variant, *_cells(cell)] for task, cells in results.items() for variant, cell in cells.items()]
    table(("task", "variant", "accuracy", "sd", "seeds", "failed", "chance", "engram over empty", "over other"), rows)
    return {
        "results": results,
        "runs": len(runs),
        "new_runs": len(left),
        "records": str(path),
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 3),
    }


def cohorts(runs: Sequence[StudyRun], device: torch.device) -> list[list[StudyRun]]:
    """Runs that are trained side by side: on CUDA all seeds of a task and a variant, elsewhere each alone."""
    if device.type != "cuda" or (runs and runs[0].config.optim.grad_clip):
        return [[run] for run in runs]
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault((run.task_name, run.variant), []).append(run)
    return list(groups.values())


def train_runs(runs: Sequence[StudyRun], device: torch.device, bar: Progress) -> Iterator[dict[str, Any]]:
    """Train models of one task and variant side by side; yields the record of each as soon as it is measured for the last time.

    A run whose loss stops being finite ends there and says so in `failed`.
    """
    config, task, variant, began = runs[0].config, runs[0].task, runs[0].variant, time.perf_counter()
    sizes, dtype = config.model(task), getattr(torch, config.dtype)
    models = [build_variant(variant, sizes, run.seed).to(device).set_compute_dtype(dtype) for run in runs]
    for model in models:
        model.train()
        if config.compile:
            model.compile_regions()
    cohort = Cohort(models, variant_roles(models[0]), config.optim, config.rows * task.length, config.steps)
    rows = [_rows(run, device) for run in runs]
    going, curves = dict(enumerate(runs)), [[] for _ in runs]

    def finished(k: int, step: int, failed: str | None = None) -> dict[str, Any]:
        bar.advance(config.steps - step)  # a run that ends early leaves no steps open
        run, model = going.pop(k), models[k]
        record: dict[str, Any] = {"key": run.key(), "task": run.task_name, "variant": variant, "seed": run.seed, "steps": step}
        record |= {"chance": task.chance, "distance": task.distance, "params": model.num_params(), "failed": failed}
        record |= {"memory_values": memory_values(variant, sizes), "curve": curves[k]}
        record |= _failed() if failed else _measured(run, model, task)
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        spent = (time.perf_counter() - began) / len(runs)  # they share the time
        return record | {"seconds": round(spent, 3), "device": place, "config": to_dict(config)}

    for step in range(1, config.steps + 1):
        losses = cohort.step([next(each) for each in rows])
        bar.advance(len(going))
        last = step == config.steps
        due = config.eval_every > 0 and step % config.eval_every == 0 and not last
        if due or last or step % READ_EVERY == 0:
            values = losses.tolist()
            bar.advance(0, note=f"{runs[0].task_name} {variant} seed {runs[0].seed}, loss {values[0]:.3f}")
            for k in [k for k in going if not math.isfinite(values[k])]:
                yield finished(k, step, f"the loss is not finite at step {step}")
        for k, run in list(going.items()) if due else []:
            score = measure(models[k], run.task, config.eval_rows, batch=config.rows)
            curves[k].append([step, round(score.loss, 5), round(score.accuracy, 5)])
            if config.stop_accuracy and score.accuracy >= config.stop_accuracy:
                yield finished(k, step)
        if not going:
            return
    for k in list(going):
        yield finished(k, config.steps)


def _rows(run: StudyRun, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches of a run without end."""
    generator = as_generator(stable_hash(run.seed, run.task_name, "train"), device)
    while True:
        sides = run.task.batch(generator, POOL * run.config.rows)
        yield from zip(*(side.split(run.config.rows) for side in sides), strict=True)


def _measured(run: StudyRun, model: GPT, task: MemoryTask) -> dict[str, Any]:
    config = run.config
    score = measure(model, task, config.eval_rows, batch=config.rows)
    found: dict[str, Any] = {name: value for name, value in dataclasses.asdict(score).items() if name != "by_distance"}
    found["by_distance"] = _buckets(score)
    found["at_distance"] = {
        str(distance): measure(model, task.at(distance), config.eval_rows, batch=config.rows).accuracy for distance in config.eval_distances
    }
    found["engram"] = None
    if isinstance(task, Facts) and config.engram_names and VARIANTS[run.variant].fast is not None:
        found["engram"] = engram_log_odds(model, task, config.engram_names).record()
    return found


def _buckets(score: MemoryScore) -> dict[str, float]:
    """Accuracy by distance with the keys that JSON has."""
    return {str(low): share for low, share in score.by_distance.items()}


def _failed() -> dict[str, Any]:
    empty: dict[str, Any] = {"by_group": {}, "by_distance": {}, "at_distance": {}}
    return empty | {"accuracy": None, "loss": None, "answers": 0, "engram": None}


# --- records ------------------------------------------------------------------------------------------------------------------------


def records_path(config: MemoryStudyConfig) -> Path:
    """The file of records; its folder is made. Raises UserError when it cannot be written."""
    path = base_dir() / "study" / "memory.jsonl" if config.out is None else Path(config.out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(f"out={str(path)!r} cannot be written ({error.strerror}): give a file in a writable folder") from None
    return path


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Records by key. A line that a crash has cut off is skipped: its run is done again."""
    return {record["key"]: record for record in read_json_lines(path) if "key" in record}


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one write, which other processes that append cannot tear apart, and wait until it is on the disk."""
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        cut_off = end > 0 and file.read(1) != b"\n"  # what a crash left of a line must not swallow this one
        file.write((b"\n" if cut_off else b"") + json.dumps(record).encode() + b"\n")
        os.fsync(file.fileno())


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and variant: accuracy, its standard deviation over the seeds (null for one), and the means of its parts.

    Failed runs count in `failed` only.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["variant"]), []).append(record)
    for (task, variant), members in groups.items():
        good = [record for record in members if record["failed"] is None]
        accuracies = [record["accuracy"] for record in good]
        cell: dict[str, Any] = {"accuracy": statistics.fmean(accuracies) if accuracies else None}
        cell |= {"sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None, "seeds": len(good)}
        cell |= {"failed": len(members) - len(good), "chance": members[0]["chance"], "accuracies": accuracies}
        cell |= {name: _means([record[name] for record in good]) for name in ("by_group", "by_distance", "at_distance")}
        cell["engram"] = _means([record["engram"] for record in good if record["engram"]]) or None
        cell |= {"params": members[0]["params"], "memory_values": members[0]["memory_values"]}
        cell["seconds"] = round(statistics.fmean(record["seconds"] for record in members), 3)
        found.setdefault(task, {})[variant] = cell
    return found


def _means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: statistics.fmean(part[name] for part in parts if name in part) for name in names}


def _cells(cell: dict[str, Any]) -> list[Any]:
    engram = cell["engram"] or {}
    parts = [cell[name] for name in ("accuracy", "sd", "seeds", "failed", "chance")]
    return [*parts, engram.get("over_empty"), engram.get("over_other")]


def _said(record: dict[str, Any]) -> str:
    if record["failed"]:
        return record["failed"]
    groups = ", ".join(f"{name} {share:.3f}" for name, share in record["by_group"].items()) if len(record["by_group"]) > 1 else ""
    engram = f", engram {record['engram']['over_empty']:+.2f} nats" if record["engram"] else ""
    return f"accuracy {record['accuracy']:.3f}{f' ({groups})' if groups else ''}{engram}, {record['seconds']:.1f} s"
