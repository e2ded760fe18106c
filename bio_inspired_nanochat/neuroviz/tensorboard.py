"""TensorBoard as a training callback: `tensorboard --logdir runs` shows every run beside the others.

What it writes is listed in `training.metrics`. Scalars and histograms come with every look and cost milliseconds; pictures are drawn
at evaluations, as long as all of them together take less than `PICTURE_SHARE` of the run's time, and once more at the end.

What belongs to one step is one record, which tensorboard's own thread writes: training hands it over and does not wait. A process that
is killed loses at most the records of its last `FLUSH` seconds, and none that `metrics.jsonl` lacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bio_inspired_nanochat.common import is_cut, say, write_atomic
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz import figures
from bio_inspired_nanochat.neuroviz.reading import read_text
from bio_inspired_nanochat.structural import NeuroPhylo, read_lineage
from bio_inspired_nanochat.synaptic.telemetry import BINS, RANGES
from bio_inspired_nanochat.training.callbacks import Callback, EvalRecord, Run, StepRecord
from bio_inspired_nanochat.training.metrics import METRICS, SCALARS
from bio_inspired_nanochat.training.vitals import Look

PICTURE_SHARE = 0.005
PICTURE_TOKENS = 40
FIRST_GUESS = 2.0  # seconds that the first pictures are thought to take
FLUSH = 1  # seconds
QUEUE = 1000  # records that may wait for the thread; with more, training does
PROJECTED = ("layer", "id", "age", "load", "health", "account", "contribution")


def _while_writable(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that ends the log with a notice where the disk is full: training goes on without it."""

    @functools.wraps(hook)
    def guarded(self: TensorBoard, *args: Any) -> None:
        try:
            hook(self, *args)
        except OSError as error:
            say(f"notice: the TensorBoard log cannot be written ({error.strerror or error}): it ends here")
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer is not None:
                    writer.close()

    return guarded


def _silence_writer_thread() -> None:
    """Tensorboard's own thread would print a traceback of what the next call of its writer raises once more, here to be said in a line."""
    before = threading.excepthook
    if getattr(before, "leaves_out_writers", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            before(args)

    hook.leaves_out_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class TensorBoard(Callback):
    """Writes the tags of `training.metrics` into the run's log folder.

    A resumed run purges what an earlier process wrote after the step that it resumes from. Without the tensorboard package, or
    without a log folder, it does nothing; the first is said. share: of the run's time that pictures may take. spent: seconds that this
    callback has taken so far, pictures included.
    """

    def __init__(self, share: float = PICTURE_SHARE) -> None:
        self.share, self.spent = share, 0.0
        self._writer: Any = None
        self._run: Run | None = None
        self._look: Look | None = None
        self._pictures_took, self._rounds, self._drawn = 0.0, 0, -1

    @_while_writable
    def on_start(self, run: Run) -> None:
        """Open the log and write the flags of the run; without the package tensorboard say so and stay silent."""
        if run.log_dir is None:
            return
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("notice: no TensorBoard log, because the package tensorboard is not installed")
            return
        _silence_writer_thread()
        self._summary = Summary
        self._open = lambda purge: SummaryWriter(str(run.log_dir), purge_step=purge, flush_secs=FLUSH, max_queue=QUEUE)
        self._writer, self._run = self._open(run.start_step + 1 if run.start_step else None), run
        self._began = time.perf_counter()
        self._flags(to_dict(run.config))
        self._writer.add_custom_scalars(layout(len(run.model.blocks)))

    @_while_writable
    def on_rollback(self, step: int) -> None:
        """Go on in a file that voids what was written of later steps."""
        if self._writer is not None:
            self._writer.close()
            self._writer = self._open(step + 1)

    @_while_writable
    def on_step(self, record: StepRecord) -> None:
        """Curves of the training state, `train/...`."""
        if self._writer is None:
            return
        values = {name: value for name, value in dataclasses.asdict(record).items() if name not in ("step", "seconds_left")}
        self._write(self._scalars({f"train/{name}": value for name, value in values.items()}), record.step)

    @_while_writable
    def on_eval(self, record: EvalRecord) -> None:
        """Curves of the validation, and pictures while they take no more than `share` of the time."""
        if self._writer is None:
            return
        self._write(self._scalars({"val/bpb": record.val_bpb, "val/loss": record.val_loss}), record.step)
        ahead = self._pictures_took / max(1, self._rounds) if self._pictures_took else FIRST_GUESS
        if self._pictures_took + ahead <= self.share * (time.perf_counter() - self._began):
            self._pictures(record.step)

    @_while_writable
    def on_consolidate(self, step: int, change: float) -> None:
        """A curve of how much sleep changed the weights."""
        if self._writer is not None:
            self._write(self._scalars({"sleep/change": change}), step)

    @_while_writable
    def on_look(self, look: Look) -> None:
        """Curves per model and layer, histograms and decisions of a look into the layers."""
        if self._writer is None or self._run is None:
            return
        self._look = look
        began = time.perf_counter()
        values: dict[str, float | None] = dict(look.values)
        values |= {f"{tag}/layer{layer}": value for tag, held in look.layers.items() for layer, value in enumerate(held)}
        values |= _learned(look)
        for layer, gains in enumerate(look.gains):
            values |= {f"gains/layer{layer}/{name}": sum(heads) / len(heads) for name, heads in gains.items()}
        self._write(self._scalars(values) + self._pools(look) + self._kinetics(look), look.step)
        self._decisions(look)
        self.spent += time.perf_counter() - began

    @_while_writable
    def on_sample(self, step: int, texts: list[str]) -> None:
        """The samples as text."""
        if self._writer is not None:
            self._writer.add_text("samples", "\n\n".join(f"    {text!r}" for text in texts), step)

    @_while_writable
    def on_end(self, result: dict[str, Any]) -> None:
        """The last pictures, and that the session is over."""
        if self._writer is None:
            return
        if self._drawn != result["steps"]:
            self._pictures(result["steps"])
        from torch.utils.tensorboard.summary import hparams

        self._writer.file_writer.add_summary(hparams({}, {})[2])  # says that the session has ended
        self._writer.flush()  # says whether all of it could be written

    @_while_writable
    def close(self) -> None:
        """Write what is left and close the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- one kind of entry each ---------------------------------------------------------------------------------------------------

    def _write(self, values: list[Any], step: int) -> None:
        """One record of many values: each one alone would wait for the thread that writes."""
        self._writer.file_writer.add_summary(self._summary(value=values), step)

    def _scalars(self, values: Mapping[str, float | None]) -> list[Any]:
        return [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]

    def _flags(self, config: dict[str, Any]) -> None:
        """The flags as hyperparameters of this very run; add_hparams would make a second run of it."""
        from torch.utils.tensorboard.summary import hparams

        start = hparams(_flat(config), {"val/bpb": 0.0, "train/loss": 0.0})[:2]
        for part in start:
            self._writer.file_writer.add_summary(part)

    def _pools(self, look: Look) -> list[Any]:
        from torch.utils.tensorboard.summary import histogram_raw

        found: list[Any] = []
        for name in dict.fromkeys(name for pools in look.pools for name in pools):
            low, high = RANGES.get(name, (0.0, 1.0))
            limits = np.linspace(low, high, BINS + 1)
            middles, ends = (limits[1:] + limits[:-1]) / 2, limits[1:].tolist()
            layers = [layer for layer, pools in enumerate(look.pools) if name in pools]
            counts = np.stack([look.pools[layer][name].numpy() for layer in layers]).sum(1, dtype=np.float64)
            totals = np.stack([counts.sum(1), counts @ middles, counts @ middles**2], axis=1).tolist()
            for layer, held, (num, total, squares) in zip(layers, counts.tolist(), totals, strict=True):
                found += histogram_raw(f"pools/{name}/layer{layer}", low, high, num, total, squares, ends, held).value
        return found

    def _kinetics(self, look: Look) -> list[Any]:
        from torch.utils.tensorboard.summary import histogram

        found: list[Any] = []
        for name in dict.fromkeys(name for layer in look.constants for name in layer):
            values = np.array([value for layer in look.constants for value in layer.get(name, [])])
            found += histogram(f"kinetics/{name}", values, "auto" if len(values) > 64 else 16).value
        return found

    def _decisions(self, look: Look) -> None:
        """How well health alone tells what the life cycle decides, as curves of precision over recall."""
        kinds = {"split": (lambda one: one.split, lambda one: one.health), "end": (lambda one: one.ended, lambda one: 1 - one.health)}
        for name, (label, score) in kinds.items():
            labels = np.array([label(one) for one in look.ballots], dtype=bool)
            if labels.any():
                scores = np.array([score(one) for one in look.ballots]).clip(0, 1)
                self._writer.add_pr_curve(f"decisions/{name}", labels, scores, look.step)

    def _pictures(self, step: int) -> None:
        began = time.perf_counter()
        assert self._run is not None
        for tag, picture in self._drawings().items():
            self._writer.add_figure(tag, picture, step)
        if self._look is not None and self._look.identities is not None:
            self._projector(self._look)
        if self._run.log_dir is not None and self._look is not None and self._look.experts:
            self._lineage(self._run.log_dir, step)
        self._writer.flush()
        took = time.perf_counter() - began
        self._pictures_took, self._rounds, self._drawn = self._pictures_took + took, self._rounds + 1, step
        self.spent += took

    def _drawings(self) -> dict[str, Any]:
        assert self._run is not None
        found = {}
        alone = not any(is_cut(param) for param in self._run.model.parameters())  # else a forward would wait for the other ranks
        if self._run.tokenizer is not None and self._run.config.synapses and alone:
            reading = read_text(self._run.model, self._run.tokenizer, attention=True, most=PICTURE_TOKENS)
            found = {
                f"pictures/{name}": figures.state_map(reading, name) for name in ("calcium", "vesicles") if name in reading.quantities()
            }
            found["pictures/attention"] = figures.attention_maps(reading)
        if self._look is not None and self._look.identities is not None:
            found["pictures/experts"] = figures.expert_map(self._look.experts, figures.arrange(self._look.identities))
        return found

    def _projector(self, look: Look) -> None:
        """The newest router embedding beside the events; `add_embedding` would add another one to the list at every step."""
        from tensorboard.plugins import projector

        assert self._run is not None and self._run.log_dir is not None and look.identities is not None
        folder = self._run.log_dir
        lines: list[str] = ["\t".join(f"{value:.6g}" for value in row) for row in look.identities.tolist()]
        write_atomic(folder / "projector" / "experts.tsv", "\n".join(lines) + "\n")
        lines = ["\t".join(("name", *PROJECTED))]
        for row in look.experts:
            lines.append("\t".join((f"L{int(row['layer'])} #{int(row['id'])}", *(f"{row[name]:.6g}" for name in PROJECTED))))
        write_atomic(folder / "projector" / "metadata.tsv", "\n".join(lines) + "\n")
        config = projector.ProjectorConfig()
        entry = config.embeddings.add()
        entry.tensor_name, entry.tensor_path, entry.metadata_path = "experts", "projector/experts.tsv", "projector/metadata.tsv"
        projector.visualize_embeddings(str(folder), config)

    def _lineage(self, folder: Path, step: int) -> None:
        try:
            events = read_lineage(folder)
        except UserError:
            return  # a run without a log of its own
        layers = sorted({event["layer"] for event in events})
        lines = [line for layer in layers for line in NeuroPhylo(events, layer).render()]
        self._writer.add_text("lineage", "\n".join(f"    {line}" for line in lines), step)


def _learned(look: Look) -> dict[str, float]:
    """Time constants per head, and memories of fast weights."""
    found: dict[str, float] = {}
    for layer, values in enumerate(look.constants):
        for name, heads in values.items():
            if name.startswith("tau_"):
                found |= {f"time_constants/{name}/layer{layer}/head{head}": value for head, value in enumerate(heads)}
    for layer, memory in enumerate(look.memory):
        found |= {f"time_constants/fast_{key}/layer{layer}": value for key, value in memory.items()}
    return found


def layout(layers: int) -> dict[str, dict[str, list[Any]]]:
    """The page of custom scalars: a chapter per group, a chart per tag with the curves of all layers in it."""
    page: dict[str, dict[str, list[Any]]] = {}
    for metric in SCALARS:
        if "<" not in metric.tag:
            page.setdefault(metric.group, {})[metric.tag] = ["Multiline", [f"^{tag}$" for tag in metric.tags(layers)]]
    return page


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


__all__ = ["METRICS", "TensorBoard", "layout"]
