"""TensorBoard as a training callback: `tensorboard --logdir runs` shows every run beside the others."""

from __future__ import annotations

import dataclasses
from typing import Any

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.training.callbacks import Callback, EvalRecord, Run, StepRecord


class TensorBoard(Callback):
    """Scalars of every step and evaluation, the synaptic gains per layer, and samples, in the run's log folder.

    A resumed run purges what an earlier process wrote after the step that it resumes from. Without the tensorboard package, or
    without a log folder, it does nothing; the first is said.
    """

    def __init__(self) -> None:
        self._writer: Any = None
        self._model: Any = None

    def on_start(self, run: Run) -> None:
        if run.log_dir is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("notice: no TensorBoard log, because the package tensorboard is not installed")
            return
        self._open = lambda purge: SummaryWriter(str(run.log_dir), purge_step=purge)
        self._writer, self._model = self._open(run.start_step + 1 if run.start_step else None), run.model

    def on_rollback(self, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = self._open(step + 1)

    def on_step(self, record: StepRecord) -> None:
        values = {name: value for name, value in dataclasses.asdict(record).items() if name not in ("step", "seconds_left")}
        self._scalars("train", values, record.step)

    def on_eval(self, record: EvalRecord) -> None:
        self._scalars("val", {"bpb": record.val_bpb, "loss": record.val_loss}, record.step)
        for layer, gains in enumerate(self._model.gains() if self._writer is not None else []):
            means = {name: sum(values) / len(values) for name, values in gains.items()}
            self._scalars(f"gains/layer{layer}", means, record.step)

    def on_sample(self, step: int, texts: list[str]) -> None:
        if self._writer is not None:
            self._writer.add_text("samples", "\n\n".join(f"    {text!r}" for text in texts), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, group: str, values: dict[str, float | None], step: int) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()
