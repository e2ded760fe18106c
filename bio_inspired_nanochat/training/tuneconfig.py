"""TuneConfig: every flag of supervised fine-tuning, and the TrainConfig that follows from it and from the model's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.config import device_knob, dtype_knob, from_dict, knob, knobs_of, validate
from bio_inspired_nanochat.engine import TUNED_FOLDER
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.training.config import CONTEXT_LIMIT, TrainConfig

_GRAPH = knobs_of(TrainConfig)["graph"]
# Taken over from this command line; everything else of a TrainConfig is the model's own, as it was pre-trained.
_SHARED = (
    *("seed", "max_minutes", "eval_every", "sample_every", "save_every", "keep_checkpoints", "log_every"),
    *("device", "dtype", "compile", "graph", "log_dir", "resume", "stop_after"),
)


@dataclass(frozen=True)
class TuneConfig:
    """One fine-tuning run. `None` (written `auto`) follows from the model and the conversations."""

    source: str = knob("base", "model to start from: base (the newest that base_train wrote), sft, or the path of a checkpoint")
    data: str | None = knob(
        None, "files of conversations, one JSON object per line, or folders of them, separated by commas; none has none", none="none"
    )
    embedded: bool = knob(True, "learn from the embedded conversations, too", off=False)
    val_data: str | None = knob(None, "conversations to validate on, as --data; none holds out one in twenty of --data", none="none")

    epochs: float = knob(3.0, "passes over the conversations, where --num_iterations is auto", lo=0.001, hi=1e5)
    num_iterations: int | None = knob(
        None, "optimizer steps; auto follows --epochs", lo=1, hi=1 << 40, aliases=("max_steps",), unit="steps"
    )
    max_seq_len: int | None = knob(
        None, "tokens of a row, at most the model's context, which is auto", lo=2, hi=CONTEXT_LIMIT, unit="tokens"
    )
    device_batch_size: int | None = knob(
        None,
        "rows of one forward on one device; auto is that of the pre-training, or less where a pass would have fewer than 32 steps",
        lo=1,
        hi=1 << 20,
        aliases=("batch_size",),
    )
    total_batch_size: int | None = knob(
        None,
        "tokens of one optimizer step, rounded to whole forwards; auto is one forward of every device",
        lo=1,
        hi=1 << 40,
        unit="tokens",
    )
    lr_scale: float = knob(0.3, "all learning rates, as a fraction of those of the pre-training", lo=0.0, hi=100.0, log=True)
    warm_start: bool = knob(True, "go on with the moments of the pre-training's optimizer", off=False)
    seed: int = knob(0, "seed of the order of the conversations, of samples and of everything else that is random", lo=0, hi=(1 << 63) - 1)
    max_minutes: float = knob(0.0, "end after this time; 0 is no limit", lo=0.0, off=0.0, unit="minutes")

    eval_every: int = knob(100, "steps between evaluations; 0 evaluates only at the end", lo=0, off=0, unit="steps")
    eval_tokens: int | None = knob(
        None, "tokens of validation rows of one evaluation; 0 never evaluates; auto is all there are", lo=0, off=0, unit="tokens"
    )
    sample_every: int = knob(0, "steps between sampled answers, with last ones at the end; 0 never samples", lo=0, off=0, unit="steps")
    save_every: int = knob(0, "steps between checkpoints; 0 saves only the last, -1 not even that", lo=-1, off=-1, unit="steps")
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept; 0 keeps all", lo=0, off=0)
    log_every: int = knob(10, "steps between log lines; 0 logs none", lo=0, off=0, unit="steps")

    device: str = device_knob()
    dtype: str = dtype_knob()
    compile: str = knob("auto", "torch.compile; auto is 1 on CUDA, 0 elsewhere", choices=("auto", "0", "1"))
    graph: str = knob("auto", _GRAPH.doc, choices=_GRAPH.choices)
    checkpoint_dir: str | None = knob(
        None, f"folder that gets one folder of checkpoints per run; auto is {TUNED_FOLDER}/ under $NANOCHAT_BASE_DIR"
    )
    log_dir: str = knob("runs", "folder that gets one folder of logs per run")
    run_name: str | None = knob(None, "name of the run's folders; auto is that of the model's run with -sft; a taken name gets a number")
    resume: str = knob("", "continue a run: auto (its newest checkpoint, if any), a step number or a path; empty starts afresh")
    stop_after: int = knob(0, "save and stop after this step as if interrupted; 0 does not", lo=0, off=0, unit="steps")

    def __post_init__(self) -> None:
        validate(self)
        if not self.embedded and self.data is None:
            raise UserError("--embedded=0 without --data leaves no conversation: give --data=FILE.jsonl")

    def root(self) -> str:
        """The folder that holds one folder of checkpoints per run."""
        return self.checkpoint_dir or str(base_dir() / TUNED_FOLDER)

    def resuming(self, name: str) -> TrainConfig:
        """What `find_resume` has to know."""
        return TrainConfig(resume=self.resume, checkpoint_dir=self.root(), run_name=name)


def tuned_config(config: TuneConfig, meta: dict[str, Any], where: object) -> TrainConfig:
    """The TrainConfig of a fine-tuning: that of the pre-training in the checkpoint's metadata, with what fine-tuning sets.

    Raises UserError when the checkpoint (`where`) has none.
    """
    stored = meta.get("train_config")
    if not isinstance(stored, dict):
        raise UserError(f"checkpoint {where} holds no train_config: it was not written by base_train or enable_synapses")
    own = from_dict(TrainConfig, stored)
    shared = {name: getattr(config, name) for name in _SHARED}
    return dataclasses.replace(
        own,
        **shared,
        checkpoint_dir=config.root(),
        optim=tuned_optim(own.optim, config.lr_scale),
        splitmerge_every=0,  # the population of experts is part of what was pre-trained
        consolidate_every=0,
        print_config=False,
        dry_run=False,
    )


def tuned_optim(optim: OptimConfig, scale: float) -> OptimConfig:
    """The pre-training's optimizer with all learning rates scaled, which then fall linearly to 0; its momentum is warm already."""
    rates = {field.name: scale * getattr(optim, field.name) for field in dataclasses.fields(optim) if field.name.endswith("_lr")}
    limits: dict[str, Any] = {name: min(rate, 1.0) for name, rate in rates.items()}
    return dataclasses.replace(
        optim, **limits, momentum_start=optim.momentum, momentum_warmup=0, warmup_steps=0, decay_frac=1.0, final_lr_frac=0.0
    )
