"""The last part of a speedrun: a short fine-tuning on the embedded conversations, and a look at how the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.engine import Loaded, Message, Sampling, context_length, load, render
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.chat import Answered, answer_prompts
from bio_inspired_nanochat.tasks.smalltalk import PROMPTS
from bio_inspired_nanochat.training.callbacks import Callback
from bio_inspired_nanochat.training.tune import tune
from bio_inspired_nanochat.training.tuneconfig import TuneConfig

STEPS = 150  # of optimizer steps that the time is kept for, as far as SHARES of the speedrun's minutes allow
SHARES = (0.05, 0.2)
EPOCHS = 3.0  # passes over the conversations, where the time suffices
ROOM = 8  # tokens that a prompt must leave for its answer, to be asked
ANSWER_TOKENS = 100  # an answer that is longer counts as one without an end
SHOWN = 6  # answers in the report


@dataclass
class Lesson:
    """What came of it. record: of the fine-tuning; answers: to the built-in prompts that fit into the context."""

    record: dict[str, Any]
    answers: list[Answered]

    @property
    def ended(self) -> int:
        """Answers that end with the end token."""
        return sum(answer.ended for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """What the script's last line says about it."""
        names = ("checkpoint", "steps", "tokens", "final_loss", "val_loss", "seconds")
        return {name: self.record[name] for name in names} | {"ended": self.ended, "prompts": len(self.answers)}

    def closing(self) -> dict[str, Any]:
        """What joins the speedrun's record; `stopped` where a signal ended the lesson."""
        signal = self.record["stopped"] if self.record["stopped"] not in (None, "max_minutes") else None
        return {"chat": self.summary()} | ({"stopped": signal} if signal else {})


def seconds_for(minutes: float, pace: float) -> float:
    """Seconds of training that a speedrun of so many minutes keeps for the lesson of a model that takes `pace` seconds per step."""
    low, high = (share * 60 * minutes for share in SHARES)
    return min(high, max(low, STEPS * pace))


def teach(
    checkpoint: str, seconds: float, steps: int | None, callbacks: Sequence[Callback], *, name: str, device: str, seed: int, log_dir: str
) -> Lesson | None:
    """Fine-tune a checkpoint for `steps` steps, or by default for about `seconds`, and ask it.

    None, with a notice, where conversations do not fit into the model.
    """
    config = TuneConfig(
        source=checkpoint,
        epochs=EPOCHS,
        num_iterations=steps,
        max_minutes=0.0 if steps else seconds / 60,
        eval_every=0,
        seed=seed,
        device=device,
        compile="0",  # costs more time than so short a training saves
        run_name=name,
        log_dir=log_dir,
    )
    try:
        record = tune(config, callbacks)
    except UserError as error:
        say(f"notice: no fine-tuning for chat: {error}")
        return None
    loaded = load(record["checkpoint"], torch.device(record["device"]))
    sampling = Sampling(temperature=0.8, top_k=50, seed=seed)
    return Lesson(record, answer_prompts(loaded, fitting(loaded), sampling, ANSWER_TOKENS))


def fitting(loaded: Loaded) -> list[str]:
    """The built-in prompts that leave room for an answer."""
    room = context_length(loaded.model) - ROOM
    return [text for text in PROMPTS if len(render([Message("user", text)], loaded.tokenizer, "chat")) <= room]
