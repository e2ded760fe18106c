"""The queue of a matrix: runs are done by processes of their own, and what is known about a run lies in its folder.

    runs/ID/record.json     the run is done: written whole, at its end
    runs/ID/attempts.jsonl  one line per attempt that failed
    runs/ID/lock            held by whoever works on it; the system frees it when that process ends, however it ends
    runs/ID/log.txt         what the last attempt printed

So several queues, on several GPUs, may share a folder, and one that was killed leaves nothing to clean up. The seeds of a condition follow
each other in one process, as far as that leaves no worker idle: they are the same training, compiled once. A run that fails ends its
process and is tried once more, then it counts as failed and the others go on. SIGTERM and Ctrl-C end the runs in progress, which are done again later; so does
a text that is no longer the plan's, without which every run would fail.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bio_inspired_nanochat.common import say, write_atomic
from bio_inspired_nanochat.common.console import duration
from bio_inspired_nanochat.common.files import read_json_lines
from bio_inspired_nanochat.config import knob
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.study.job import NO_TEXT, STOPPED
from bio_inspired_nanochat.study.plan import FolderConfig, read_plan
from bio_inspired_nanochat.training import guards

ATTEMPTS = 2
POLL = 0.05
LAST_LINES = 12
FIT = 1.1  # a run is started when this times its expected duration is left


@dataclass(frozen=True)
class RunConfig(FolderConfig):
    """Do the runs of a plan that are not done yet, until all are or the time is up."""

    budget_minutes: float = knob(0.0, "start no run that would not end within this time; 0 is no limit", lo=0.0, off=0.0, unit="minutes")
    workers: int = knob(
        1,
        "runs at the same time, spread over the GPUs; those that share a GPU, or the CPU, say nothing about speed and memory",
        lo=1,
        hi=64,
    )
    run_minutes: float = knob(
        0.0, "end a run that takes longer, as failed; 0 is ten times its expected duration, at least 30", lo=0.0, off=0.0, unit="minutes"
    )
    grace: float = knob(60.0, "time that a run has to end after a signal", lo=0.0, hi=3600.0, unit="seconds")


@dataclass(frozen=True)
class ResumeConfig(RunConfig):
    """Go on with a queue that was stopped, killed or out of time; with retry_failed also with the runs that failed."""

    retry_failed: bool = knob(False, "try failed runs anew", off=False)


def work_command(folders: Sequence[Path]) -> list[str]:
    """The command that does the runs of some folders."""
    return [sys.executable, "-m", "bio_inspired_nanochat.study.job", *map(str, folders)]


class Queue:
    """The runs of the plan in a folder. command: from the folders of runs to the process that does them."""

    def __init__(self, config: RunConfig, command: Callable[[Sequence[Path]], list[str]] = work_command) -> None:
        self.config, self.command, self.folder = config, command, config.folder()
        self.plan = read_plan(self.folder)
        self.runs: list[dict[str, Any]] = self.plan["runs"]
        self.began, self.stop = time.monotonic(), threading.Event()
        self.lock = threading.Lock()
        self.left_out: list[str] = []
        self.new: list[str] = []
        self.waiting = 0  # runs to do when the work began
        self.textless = ""  # why the text cannot be read

    def place(self, run: Mapping[str, Any]) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / str(run["id"])

    def status(self, run: Mapping[str, Any]) -> str:
        """done, failed or waiting."""
        if read_record(self.place(run)) is not None:
            return "done"
        return "failed" if len(read_attempts(self.place(run))) >= ATTEMPTS else "waiting"

    def work(self) -> dict[str, Any]:
        """Do what is left; returns the script's last line. After a signal it comes back when the runs in progress have ended.

        Raises UserError when the text of the plan is gone.
        """
        if isinstance(self.config, ResumeConfig) and self.config.retry_failed:
            for run in self.runs:
                if self.status(run) == "failed":
                    (self.place(run) / "attempts.jsonl").unlink()
        self.waiting = sum(self.status(run) == "waiting" for run in self.runs)
        say(f"{self.waiting} of {len(self.runs)} runs are to do in {self.folder}{' (smoke)' if self.plan['smoke'] else ''}")
        with guards.StopSignals(grace=24 * 3600.0) as signals:
            threads = [threading.Thread(target=self._worker, args=(number,)) for number in range(self.config.workers)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(POLL)
                if signals.received and not self.stop.is_set():
                    say(f"notice: {signals.received}: the runs in progress end here and will be done again by `eval_matrix resume`")
                    self.stop.set()
        summary = self.summary(signals.received)
        if self.textless:
            done = f"{summary['done']} of {summary['runs']} runs are done, no other counts as failed"
            raise UserError(f"{self.textless}; {done}: restore the text, then go on with eval_matrix resume --out={self.folder}")
        return summary

    def summary(self, stopped: str = "") -> dict[str, Any]:
        """How far the queue is."""
        states = [self.status(run) for run in self.runs]
        failed = {run["id"]: read_attempts(self.place(run))[-1] for run, state in zip(self.runs, states, strict=True) if state == "failed"}
        for name, attempt in failed.items():
            say(f"failed: {name}: {attempt['why']}: {' | '.join(attempt['last_lines'][-2:])}")
        return {
            "runs": len(states),
            "done": states.count("done"),
            "new": len(self.new),
            "failed": sorted(failed),
            "waiting": states.count("waiting"),
            "left_out": len(self.left_out),
            "stopped": stopped or None,
            "smoke": self.plan["smoke"],
            "minutes": round((time.monotonic() - self.began) / 60, 3),
            "out": str(self.folder),
        }

    def batches(self) -> list[list[dict[str, Any]]]:
        """Runs that one process does: the seeds of a condition, fewer at a time where there are more workers than conditions."""
        size = max(1, self.waiting // self.config.workers)
        alike = [list(runs) for _, runs in itertools.groupby(self.runs, key=lambda run: (run["depth"], run["conditions"]))]
        return [runs[start : start + size] for runs in alike for start in range(0, len(runs), size)]

    def _worker(self, number: int) -> None:
        for batch in self.batches():
            for _ in range(ATTEMPTS * len(batch)):
                with contextlib.ExitStack() as held:
                    runs = self._within_budget([run for run in batch if self._take(run, held)])
                    if not runs:
                        break
                    self._attempt(runs, number)

    def _take(self, run: Mapping[str, Any], held: contextlib.ExitStack) -> bool:
        """Lock a run that is to be done; whether that is for us to do."""
        if self.stop.is_set() or run["id"] in self.left_out or self.status(run) != "waiting":
            return False
        self.place(run).mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(FileLock(self.place(run) / "lock", timeout=0))
        except Timeout:  # somebody else works on it
            return False
        return self.status(run) == "waiting"

    def expected(self, run: Mapping[str, Any]) -> float:
        """Seconds that a run should take: as its condition took at other seeds, else at this depth the plan's estimate times how far
        that was off so far."""
        same, ratios = [], []
        for other in self.runs:
            record = read_record(self.place(other)) if other["depth"] == run["depth"] else None
            if record is not None:
                took = record["ended"] - record["began"]
                ratios.append(took / max(other["seconds"], 1e-9))
                if set(other["conditions"]) & set(run["conditions"]):
                    same.append(took)
        return max(same) if same else run["seconds"] * (max(ratios) if ratios else 1.0)

    def _within_budget(self, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first runs, as many as end in time; one that would not even alone is left out."""
        budget, ends, fitting = 60 * self.config.budget_minutes, time.monotonic() - self.began, []
        for run in runs:
            end = ends + FIT * self.expected(run)
            if not budget or end <= budget:
                fitting.append(run)
                ends = end
            elif fitting:
                break  # by the time that these are done it may fit
            else:
                with self.lock:
                    self.left_out.append(run["id"])
        return fitting

    def _attempt(self, runs: list[dict[str, Any]], worker: int) -> None:
        """Do the runs in one process, until all have a record or one fails."""
        shared = self.config.workers > max(1, len(_visible_gpus()))
        folders = [self.place(run) for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            job = {"run": run, "shared": shared, **{name: self.plan[name] for name in JOB}}
            write_atomic(folder / "job.json", json.dumps(job) + "\n")
            (folder / "log.txt").write_bytes(b"")
        with open(folders[0] / "log.txt", "wb") as log:
            process = subprocess.Popen(
                self.command(folders),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(worker),
                start_new_session=True,  # Ctrl-C comes to this process alone, which ends its runs in order
            )
            failed, why, seconds = self._watch(process, runs)
        if failed is None or self.stop.is_set() or process.returncode == STOPPED or failed["id"] in self.left_out:
            return
        folder = self.place(failed)
        last = tail(folder / "log.txt")
        if process.returncode == NO_TEXT:
            with self.lock:
                self.textless = self.textless or last[-1].removeprefix("error: ")
            self.stop.set()
            return
        attempt = {"why": why or f"exit code {process.returncode} without a record", "last_lines": last, "seconds": round(seconds, 1)}
        with open(folder / "attempts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")
        say(f"notice: {failed['id']}: {attempt['why']}; its last lines are in {folder / 'attempts.jsonl'}")

    def _watch(self, process: subprocess.Popen[bytes], runs: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str, float]:
        """Until the process ends: the run that it ended in (None: all are done), why it was ended, and seconds since that run began."""
        why, began, number = "", time.monotonic(), 0
        limit = self._limit(runs[0])
        while True:
            ended = process.poll() is not None
            while number < len(runs) and (record := read_record(self.place(runs[number]))) is not None:
                self._done(runs[number], record, time.monotonic() - began)
                number, began = number + 1, time.monotonic()
                if number < len(runs):
                    limit = self._limit(runs[number])
                    if not ended and not self._within_budget([runs[number]]):
                        self._end(process)
                        ended = True
            if ended:
                return (runs[number] if number < len(runs) else None), why, time.monotonic() - began
            if time.monotonic() > began + limit or self.stop.is_set():
                why = "stopped" if self.stop.is_set() else "took too long"
                self._end(process)
            time.sleep(POLL)

    def _limit(self, run: Mapping[str, Any]) -> float:
        return 60 * self.config.run_minutes or max(1800.0, 10 * self.expected(run))

    def _done(self, run: Mapping[str, Any], record: Mapping[str, Any], seconds: float) -> None:
        with self.lock:
            self.new.append(str(run["id"]))
        loss = record["metrics"].get("val_loss")
        found = "" if loss is None else f", validation loss {loss:.4f}"
        say(f"{run['id']}: done in {seconds:.0f} s{found}; {self._left()}")

    def _left(self) -> str:
        """How much is left, at the pace so far of all queues that share the folder."""
        left = sum(self.status(run) == "waiting" for run in self.runs)
        pace = (time.monotonic() - self.began) / max(1, self.waiting - left)
        return f"{left} left" + (f", {duration(pace * left)} at this pace" if left else "")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """First ask, then kill, the process and what it has started."""
        for number, seconds in ((signal.SIGTERM, self.config.grace), (signal.SIGKILL, 30.0)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                pass
            try:
                process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                continue


JOB = ("data", "digest", "smoke", "evaluations", "evaluation_tokens")


def _environment(worker: int) -> dict[str, str]:
    """The environment of a run: this package first on the path, and one GPU for each worker where there are several."""
    found = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, found.get("PYTHONPATH"))))
    visible = _visible_gpus()
    if len(visible) > 1:
        found["CUDA_VISIBLE_DEVICES"] = visible[worker % len(visible)]
    return found


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named is not None else [str(i) for i in range(torch.cuda.device_count())]


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run, or None while it has none that can be read. It was renamed into place whole."""
    try:
        found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The failed attempts of a run; a line that is none, as where a crash has cut it off, is left out."""
    found = read_json_lines(folder / "attempts.jsonl")
    return [one for one in found if isinstance(one.get("why"), str) and _texts(one.get("last_lines"))]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]


def run_queue(config: RunConfig, command: Callable[[Sequence[Path]], list[str]] = work_command) -> dict[str, Any]:
    """Do the runs of the plan in a folder; returns the script's last line.

    Raises UserError without a plan, with a changed one, and when its text is gone.
    """
    return Queue(config, command).work()
