"""What every evaluation of the suite is given and what it gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.data import DataSource
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tasks.memory import MemoryTask
from bio_inspired_nanochat.tokenizer import Tokenizer

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


class NotApplicable(Exception):
    """An evaluation cannot say anything about this model in this setting; the message says what is missing."""


@dataclass(frozen=True)
class Metric:
    """One number: better in {"lower", "higher"}; `reference` marks one to compare others with, which is neither good nor bad."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    meaning: str
    reference: bool = False


@dataclass(frozen=True)
class Found:
    """values: by the metric's name without its evaluation's, None where it does not apply; details: whatever else is worth a record;
    notices: why values are None.
    """

    values: Mapping[str, float | None]
    details: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much to measure, and the files of evaluations that need some."""

    split: str = knob("val", "text to measure on", choices=("val", "train"))
    tokens: int = knob(1 << 15, "tokens of text for likelihoods, calibration and experts", lo=1, hi=1 << 40, unit="tokens")
    rows: int = knob(16, "rows of every length for copies and needles", lo=1, hi=1 << 20)
    lengths: tuple[int, ...] = knob(LENGTHS, "lengths of those rows", lo=128, hi=1 << 20, unit="tokens")
    samples: int = knob(32, "continuations to draw", lo=1, hi=1 << 20)
    sample_tokens: int = knob(128, "tokens of a continuation", lo=4, hi=1 << 20, unit="tokens")
    temperature: float = knob(1.0, "spread of the continuations; 1 draws from what the model predicts", lo=0.0, hi=100.0, off=0.0)
    draws: int = knob(8, "Monte-Carlo passes with random release, for a model that has it", lo=2, hi=1 << 16)
    batch_size: int = knob(8, "rows of one forward", lo=1, hi=1 << 20, aliases=("device_batch_size",))
    max_per_task: int = knob(0, "questions of a task and pairs of a file at most; 0 takes all", lo=0, hi=1 << 40, off=0)
    eval_bundle_dir: str | None = knob(None, "folder of a CORE bundle (core.yaml, eval_meta_data.csv, eval_data)", path="dir", none="none")
    eval_bundle_zip: str | None = knob(None, "zip file of a CORE bundle", path="file", none="none")
    eval_bundle_url: str | None = knob(None, "address of a zip file of a CORE bundle, fetched once", none="none")
    pairs_dir: str | None = knob(None, "folder of JSONL files with sentence_good and sentence_bad", path="dir", none="none")
    lm_eval_tasks: tuple[str, ...] = knob((), "tasks of lm-eval (the extra lm-eval)")
    lm_eval_dir: str | None = knob(None, "folder of further task files for lm-eval", path="dir", none="none")
    seed: int = knob(0, "seed of questions, rows and draws", lo=0, hi=(1 << 62) - 1)

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationSetting(Amounts):
    """What to measure on. The same setting gives every model the same tokens, questions and draws, and the same numbers each time.

    tokenizer, source: of the model's training, or None where there is none, as for models of integer tasks. memory: memory tasks
    that the model was trained on. device: where to run, to which the model is moved; None leaves it where it is.
    """

    tokenizer: Tokenizer | None = None
    source: DataSource | None = None
    memory: tuple[MemoryTask, ...] = ()
    memory_rows: int = knob(512, "rows of a memory task", lo=1, hi=1 << 20)
    device: torch.device | None = None

    def text(self, what: str) -> tuple[Tokenizer, DataSource]:
        """Tokenizer and text. Raises NotApplicable when one is missing."""
        if self.source is None:
            raise NotApplicable(f"{what} needs a tokenizer and text: give EvaluationSetting(tokenizer=..., source=...)")
        return self.words(what), self.source

    def words(self, what: str) -> Tokenizer:
        """The tokenizer. Raises NotApplicable when it is missing."""
        if self.tokenizer is None:
            raise NotApplicable(f"{what} needs a tokenizer: give EvaluationSetting(tokenizer=...)")
        return self.tokenizer


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `run` measures a model in evaluation mode without gradients; `needs` says in words what must be there."""

    name: str
    metrics: tuple[Metric, ...]
    needs: str
    run: Callable[[GPT, EvaluationSetting], Found]


@contextlib.contextmanager
def eager(model: GPT) -> Iterator[None]:
    """Run a compiled model as it was written: an evaluation of a few shapes is shorter than compiling each."""
    with torch.compiler.set_stance("force_eager") if model.compiled else contextlib.nullcontext():
        yield


def text_batches(model: GPT, setting: EvaluationSetting, what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs and targets [B, T] of the first ceil(tokens / T) rows of the split, T the model's context, and the rows' numbers [B].

    The same rows for every batch size; fewer where the text ends, the last of which may have targets of -1 behind its end. Raises
    NotApplicable without text.
    """
    tokenizer, source = setting.text(what)
    check_tokenizer(model, tokenizer)
    length, device = model.config.sequence_len, model.embed.weight.device
    rows = -(-setting.tokens // length)
    loader = source.loader(setting.split, tokenizer, min(rows, setting.batch_size), length, loop=False)
    try:
        done = 0
        while done < rows:
            try:
                idx, targets = loader.next_batch()
            except StopIteration:
                break
            told = min(int((targets >= 0).any(1).sum()), rows - done)  # what the text does not fill is padding up to a full batch
            if not told:
                break
            idx, targets = idx[:told].to(device), targets[:told].to(device)
            yield idx, targets, torch.arange(done, done + len(idx))
            done += len(idx)
        if not done:
            raise NotApplicable(f"{what} needs a row of {length} tokens of {setting.split} text, which holds less: add text")
    finally:
        loader.close()


def check_tokenizer(model: GPT, tokenizer: Tokenizer) -> None:
    """UserError for a tokenizer whose ids the model does not have."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size={model.config.vocab_size}: "
            "give the one that the model was trained with"
        )
