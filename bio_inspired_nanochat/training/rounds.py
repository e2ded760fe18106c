"""Two models trained in turns within a time limit, so that both end with equally many steps, whatever the machine does meanwhile.

A round trains both models up to the same step, each from its checkpoint of the round before. Between rounds the number of steps is
planned anew where the pace has changed. Both follow the same learning rates, which depend on the step and the plan alone. When time
runs out inside of a round, both models fall back to the end of the round before.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.training.callbacks import Callback, EvalRecord, StepRecord
from bio_inspired_nanochat.training.plan import Plan
from bio_inspired_nanochat.training.run import train

ROUNDS = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0)  # shares of the steps; the last rounds are short, because what they fall back to counts
FEW_ROUNDS = (0.2, 0.6, 1.0)
FEW_SECONDS = 120.0  # below this many seconds of training, starting six rounds would cost too much of them
KEEP_SHARE = 0.9  # of the time that is left, for the steps that are planned anew
SLACK = 1.25  # how many more steps than planned must fit before the plan grows
DECAY = OptimConfig().decay_frac  # share of the steps in which the learning rate falls


class OutOfTime(Exception):
    """A run reached its deadline between two steps."""


class Deadline(Callback):
    """Ends a run after the step during which the deadline passes, in `time.perf_counter()` seconds."""

    def __init__(self, at: float) -> None:
        self._at = at

    def after_update(self, step: int, model: Any, optimizer: Any) -> None:
        """Raises OutOfTime when the deadline has passed."""
        if time.perf_counter() > self._at:
            raise OutOfTime


class Curve(Callback):
    """Keeps the loss curve of a run: training loss in nats by step, validation bits per byte by step."""

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.val: list[tuple[int, float]] = []

    def on_step(self, record: StepRecord) -> None:
        """Keep the training loss."""
        self.train.append((record.step, record.loss))

    def on_eval(self, record: EvalRecord) -> None:
        """Keep the validation bits per byte."""
        self.val.append((record.step, record.val_bpb))

    def cut(self, step: int) -> None:
        """Forget what came after `step`."""
        self.train = [point for point in self.train if point[0] <= step]
        self.val = [point for point in self.val if point[0] <= step]


@dataclass
class Entrant:
    """One of the models: its plan, the name of its run, its curve, and the record of each of its rounds.

    pace: seconds of a step, as measured so far; start: seconds that a round costs apart from its steps.
    """

    kind: str
    plan: Plan
    name: str
    pace: float
    start: float = 1.0
    curve: Curve = field(default_factory=Curve)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps behind it."""
        return self.rounds[-1]["steps"] if self.rounds else 0

    def record(self) -> dict[str, Any]:
        """The record of the whole run: of its last round, with rates, times and memory over all of them. Needs a round."""
        spans = list(zip([0, *(done["steps"] for done in self.rounds)], self.rounds, strict=False))
        timed = [(done["steps"] - before, done["tok_per_s"]) for before, done in spans if done["tok_per_s"]]
        steps, seconds = sum(n for n, _ in timed), sum(n / rate for n, rate in timed)
        return self.rounds[-1] | {
            "tok_per_s": round(steps / seconds, 1) if seconds else None,
            "seconds": round(sum(done["seconds"] for done in self.rounds), 3),
            "peak_memory_gib": max(done["peak_memory_gib"] for done in self.rounds),
            "first_loss": self.rounds[0]["first_loss"],
        }

    def advance(self, stop: int, total: int, eval_tokens: int, callbacks: Sequence[Callback]) -> str | None:
        """Train up to step `stop` of `total` and evaluate. Returns why it stopped earlier, or None. Raises OutOfTime."""
        began, before = time.perf_counter(), self.step
        config = dataclasses.replace(
            self.plan.config,
            num_iterations=total,
            stop_after=stop if stop < total else 0,
            eval_every=stop,
            eval_tokens=eval_tokens,
            log_every=max(1, min(50, total // 40)),
            run_name=self.name,
            resume=str(self.rounds[-1]["checkpoint"]) if self.rounds else "",
        )
        try:
            done = train(config, [self.curve, *callbacks])
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if done["steps"] or not self.rounds:  # else a signal came before the first step of this round
            self.rounds.append(done)
        seconds, steps = time.perf_counter() - began, done["steps"] - before
        if done["tok_per_s"] and steps:
            self.pace = self.plan.tokens_per_step / done["tok_per_s"]
            self.start = max(0.0, seconds - steps * self.pace)
        return done["stopped"] if done["stopped"] != "stop_after" else None

    def fall_back(self, rounds: int) -> None:
        """Return to the end of an earlier round, whose checkpoint is still there."""
        self.rounds = self.rounds[:rounds]
        self.curve.cut(self.step)


def train_in_turns(
    entrants: Sequence[Entrant], steps: int, most: int, seconds: float, eval_tokens: int, callbacks: Callable[[], list[Callback]]
) -> str | None:
    """Train all entrants for `steps` steps, or for as many as fit into `seconds`, never more than `most`.

    callbacks: makes further callbacks for each part of a run. Returns the name of the signal that ended it early, or None.
    Raises UserError when the time is up before the first round ends.
    """
    deadline = time.perf_counter() + seconds
    shares = ROUNDS if seconds >= FEW_SECONDS else FEW_ROUNDS
    for number, share in enumerate(shares):
        step = entrants[0].step
        if number:
            steps = replan(entrants, steps, most, len(shares) - number, deadline - time.perf_counter())
        if step >= steps:
            break
        before = shares[number - 1] if number else 0.0
        stop = min(steps, max(step + 1, step + round((steps - step) * (share - before) / (1 - before))))
        say(f"[3/5] round {number + 1} of {len(shares)}: steps {step + 1} to {stop} of {steps}")
        try:
            for i, entrant in enumerate(entrants):
                left, rest = deadline - time.perf_counter(), [other.pace for other in entrants[i:]]
                at = time.perf_counter() + left * rest[0] / sum(rest)
                say(f"{entrant.kind}:")
                if signal := entrant.advance(stop, steps, eval_tokens, [Deadline(at), *callbacks()]):
                    return signal
                entrant.pace = (entrant.pace + rest[0]) / 2  # one round says more about the machine's mood than about the next ones
        except OutOfTime:
            if not number:
                raise UserError(f"the time was up before step {stop}: give more --minutes or a smaller --depth") from None
            say(f"notice: the machine became slower and the time is up: both models stay as they were after step {step}")
            for entrant in entrants:
                entrant.fall_back(number)
            break
    return None


def replan(entrants: Sequence[Entrant], steps: int, most: int, rounds: int, seconds: float) -> int:
    """The number of steps to aim at with `rounds` rounds and `seconds` left: `steps` as long as they fit and no more than that would.

    At least the step that is behind the entrants, at most `most`. Once the learning rate falls, no more than `steps`: it would rise again,
    and a machine that was fast for one round would leave too little time to bring it down.
    """
    left = seconds - rounds * sum(entrant.start for entrant in entrants)
    done, pace = entrants[0].step, sum(entrant.pace for entrant in entrants)
    fitting = done + max(0, int(left / pace))
    falls = done > steps - round(DECAY * steps)
    if steps <= fitting and (falls or fitting <= SLACK * steps):
        return min(steps, most)
    planned = min(most, done + max(0, int(KEEP_SHARE * left / pace)))
    if planned != steps:
        say(f"notice: the pace has changed: {planned:,} steps instead of {steps:,} for both models")
    return planned
