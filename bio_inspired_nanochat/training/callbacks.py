"""Callbacks: what happens around the training loop, without the loop knowing it.

The loop calls them in order on rank 0; `after_update` alone runs on every rank, because it may change the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from bio_inspired_nanochat.common import progress, say, write_atomic
from bio_inspired_nanochat.common.console import Progress, duration, on_terminal
from bio_inspired_nanochat.common.files import finite
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.training.config import TrainConfig
from bio_inspired_nanochat.training.vitals import Look


@dataclass(frozen=True)
class Run:
    """What is fixed for the whole run.

    start_step: steps done before (0 unless resumed); log_dir: the run's own folder, None for no logs; tokenizer: that of the data;
    owed: events of the start step ("eval", "sample") that are about to be done, or done again.
    """

    config: TrainConfig
    model: GPT
    start_step: int
    total_steps: int
    log_dir: Path | None
    tokenizer: Any = None
    owed: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """The training state after `step` optimizer steps; rates and shares are over the steps since the last record.

    loss: mean nats per token; lr: multiplier of every group's learning rate; mfu: share of the device's peak, None when unknown;
    wait: share of the time spent waiting for data; seconds_left: None while unknown.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tok_per_s: float
    mfu: float | None
    mem_gib: float
    wait: float
    epoch: int
    tokens: int
    seconds_left: float | None


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation after `step` steps: bits per byte and nats per token on the validation shard."""

    step: int
    val_bpb: float
    val_loss: float
    tokens: int


@dataclass(frozen=True)
class FaultRecord:
    """A step that went wrong and was left behind (see `faults.Fault`). step: where training stands now; at: the step that went wrong;
    count: such steps so far.
    """

    step: int
    at: int
    what: str
    action: str
    count: int
    batches: dict[int, list[str]]


class Callback:
    """Does nothing; subclasses override what they need."""

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def after_update(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """After every optimizer step, on every rank; `step` counts from 1."""

    def on_step(self, record: StepRecord) -> None:
        """Every `log_every` steps."""

    def on_eval(self, record: EvalRecord) -> None:
        """After every evaluation."""

    def on_look(self, look: Look) -> None:
        """After the steps that `looks.Looks` takes, the first and the last among them, in models with synapses or experts."""

    def on_consolidate(self, step: int, change: float) -> None:
        """After fast weights joined slow ones; `change`: norm of what was added, relative to that of the weights."""

    def on_sample(self, step: int, texts: list[str]) -> None:
        """After sampling: each text with its prompt."""

    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint is complete."""

    def on_rollback(self, step: int) -> None:
        """After the model went back to `step`: what was recorded of later steps is void."""

    def on_fault(self, record: FaultRecord) -> None:
        """After a step that went wrong was skipped or rolled back."""

    def on_end(self, result: dict[str, Any]) -> None:
        """After the run ended in order; `result` is the script's last line."""

    def close(self) -> None:
        """Always called, also after an error: release files."""


class Console(Callback):
    """Lines on stdout, one per event, in a form that stays the same for grep; on a terminal with a progress bar below them."""

    _bar: Progress | None = None

    def on_start(self, run: Run) -> None:
        """Begin the bar, on a terminal; a run that is complete already is said to be."""
        self._width = len(str(run.total_steps)) if run.total_steps > 99_999 else 5
        self._total = run.total_steps
        self._display = contextlib.ExitStack()
        if on_terminal():
            self._bar = self._display.enter_context(progress(run.total_steps, "train", "steps", start=run.start_step))
        if run.start_step >= run.total_steps:
            say(f"notice: step {run.start_step} of {run.total_steps} is done, nothing is left to train: give a larger --num_iterations")

    def after_update(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(1)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._display.close()
            self._bar = None

    def on_step(self, record: StepRecord) -> None:
        """Print the training state."""
        say(step_line(record, self._total, self._width))

    def on_eval(self, record: EvalRecord) -> None:
        """Print the validation."""
        say(
            f"eval {record.step:0{self._width}d} | val_bpb {record.val_bpb:.4f} | val_loss {record.val_loss:.4f} | {record.tokens:,} tokens"
        )

    def on_consolidate(self, step: int, change: float) -> None:
        """Print how much sleep changed the weights."""
        say(f"sleep {step:0{self._width}d} | fast weights changed the slow ones by {change:.2g} of their norm")

    def on_sample(self, step: int, texts: list[str]) -> None:
        """Print the samples."""
        for text in texts:
            say(f"sample {step:0{self._width}d} | {text!r}")

    def on_rollback(self, step: int) -> None:
        """Move the bar back."""
        if self._bar is not None:
            self._bar.advance(step - self._bar.done)

    def on_fault(self, record: FaultRecord) -> None:
        """Print what went wrong and what was done."""
        documents = sum(map(len, record.batches.values()))
        say(
            f"notice: step {record.at}: {record.what} ({documents} documents, named in metrics.jsonl): {record.action}, "
            f"going on from step {record.step} (fault {record.count} of this run)"
        )

    def on_save(self, step: int, path: Path) -> None:
        """Print where the checkpoint is."""
        say(f"saved {step:0{self._width}d} | {path}")

    def on_end(self, result: dict[str, Any]) -> None:
        """Print why a run ends before its last step; after a signal, how it goes on."""
        stopped, step = result["stopped"], result["steps"]
        if stopped in (None, "stop_after"):
            return
        further = ": --resume=auto goes on from there" if stopped != "max_minutes" and result["checkpoint"] else ""
        say(f"end {step:0{self._width}d} | {stopped} ends the run at step {step} of {self._total}{further}")


def step_line(record: StepRecord, total: int, width: int = 5) -> str:
    """`step 00010/00200 | loss 4.1234 | lr 1.00 | 12,345 tok/s | MFU 12.3% | mem 1.2 GiB | wait 0.1% | 3m12s left`."""
    parts = [
        f"step {record.step:0{width}d}/{total:0{width}d}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2f}",
        f"{record.tok_per_s:,.0f} tok/s",
        "MFU n/a" if record.mfu is None else f"MFU {100 * record.mfu:.1f}%",
        f"mem {record.mem_gib:.1f} GiB",
        f"wait {100 * record.wait:.1f}%",
        "? left" if record.seconds_left is None else f"{duration(record.seconds_left)} left",
    ]
    return " | ".join(parts)


class JsonLog(Callback):
    """`metrics.jsonl` in the run's log folder, one object per event, beside `config.json`.

    A resumed run drops the lines after the step that it resumes from, so that no step appears twice.
    """

    _file: TextIO | None = None

    def on_start(self, run: Run) -> None:
        """Open the file; a resumed run keeps the lines up to its first step."""
        if run.log_dir is None:
            return
        self._path = run.log_dir / "metrics.jsonl"
        try:
            write_atomic(run.log_dir / "config.json", json.dumps(to_dict(run.config), indent=1) + "\n")
        except OSError as error:
            self._ends(error)
        else:
            self._reopen(run.start_step, run.owed if run.start_step else ("step", "eval", "sample", "save", "fault"))

    def _reopen(self, step: int, again: Sequence[str] = ()) -> None:
        """Keep the lines up to `step`, but for the kinds in `again` at that step."""
        self.close()
        try:
            write_atomic(self._path, "".join(_lines_up_to(self._path, step, again)))
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            self._ends(error)

    def _ends(self, error: OSError) -> None:
        """A full disk must not cost the run what a checkpoint may still keep."""
        say(f"notice: {self._path} cannot be written ({error.strerror}): this log ends here")
        self.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"kind": kind, **finite(record)}, default=str) + "\n")
            self._file.flush()
        except OSError as error:
            self._ends(error)

    def on_step(self, record: StepRecord) -> None:
        """Add a line of kind `step`."""
        self._write("step", dataclasses.asdict(record))

    def on_eval(self, record: EvalRecord) -> None:
        """Add a line of kind `eval`."""
        self._write("eval", dataclasses.asdict(record))

    def on_look(self, look: Look) -> None:
        """Add a line of kind `vitals`."""
        self._write("vitals", look.to_json())

    def on_consolidate(self, step: int, change: float) -> None:
        """Add a line of kind `consolidate`."""
        self._write("consolidate", {"step": step, "change": change})

    def on_sample(self, step: int, texts: list[str]) -> None:
        """Add a line of kind `sample`."""
        self._write("sample", {"step": step, "texts": texts})

    def on_save(self, step: int, path: Path) -> None:
        """Add a line of kind `save`."""
        self._write("save", {"step": step, "path": str(path)})

    def on_rollback(self, step: int) -> None:
        """Drop the lines of later steps."""
        if self._file is not None:
            self._reopen(step)

    def on_fault(self, record: FaultRecord) -> None:
        """Add a line of kind `fault`."""
        self._write("fault", dataclasses.asdict(record))

    def on_end(self, result: dict[str, Any]) -> None:
        """Add a line of kind `end`."""
        self._write("end", {"step": result["steps"], **result})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _lines_up_to(path: Path, step: int, again: Sequence[str]) -> list[str]:
    """The complete lines of events up to `step`, without the kinds in `again` at that step.

    An `end` line is dropped, because the run goes on; so is a half-written last line.
    """
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            at, kind = event.get("step", 0), event.get("kind")
            if line.endswith("\n") and at <= step and kind != "end" and not (at == step and kind in again):
                kept.append(line)
    return kept
