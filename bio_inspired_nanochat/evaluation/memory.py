"""What a model remembers: accuracy on the answers of a memory task, by distance and by kind of question; log-odds from an engram.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import SynapseState
from bio_inspired_nanochat.tasks.memory import Episodes, Facts, MemoryTask, Sessions, as_generator

Start = Callable[[SynapseState, int], SynapseState]


@dataclass(frozen=True)
class MemoryScore:
    """How well the questions of a task were answered.

    accuracy: share of right answers; loss: cross-entropy of the answers in nats; answers: how many there were; by_distance: accuracy
    of the answers that were told at least so many tokens back and less than twice as many (powers of two); by_group: by kind.
    """

    accuracy: float
    loss: float
    answers: int
    by_distance: dict[int, float]
    by_group: dict[str, float]


def measure(model: GPT, task: MemoryTask, rows: int = 512, seed: int = 0, batch: int = 128) -> MemoryScore:
    """Score a model on `rows` rows of `task.unseen()`, the same ones for every model on a device; `batch` at a time. Changes nothing.

    The model is judged by its most likely token among all V. Raises UserError for no rows or an empty batch.
    """
    if rows < 1 or batch < 1:
        raise UserError(f"measure(rows={rows}, batch={batch}): both must be at least 1")
    check_vocabulary(model, task)
    generator = as_generator(stable_hash(seed, task.name, "measure"), model.embed.weight.device)
    found = []
    eager = torch.compiler.set_stance("force_eager") if model.compiled else contextlib.nullcontext()  # shorter than compiling anew
    with evaluating(model), eager:
        for first in range(0, rows, batch):
            episodes = task.unseen().sample(generator, min(batch, rows - first))
            found.append(judge(model.logits(episodes.idx), episodes))
    right, losses, distance, group = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    octave = 2 ** torch.log2(distance.double()).floor().long()
    by_distance = {int(low): _share(right[octave == low]) for low in octave.unique()}
    by_group = {name: _share(right[group == i]) for i, name in enumerate(task.groups) if (group == i).any()}
    return MemoryScore(_share(right), losses.double().mean().item(), len(right), by_distance, by_group)


def judge(logits: Tensor, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of the answers in logits [B, T, V]: whether it is right, its cross-entropy, its distance and its group, all [answers]."""
    asked = episodes.targets >= 0
    chosen, targets = logits[asked], episodes.targets[asked]
    losses = torch.nn.functional.cross_entropy(chosen.float(), targets, reduction="none")
    return chosen.argmax(-1) == targets, losses, episodes.distance[asked], episodes.group[asked]


def check_vocabulary(model: GPT, task: MemoryTask) -> None:
    """UserError for a task whose words the model does not have."""
    if task.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the task {task.name} has {task.vocab_size} words, more than the model's vocab_size={model.config.vocab_size}: "
            f"use a model of at least {task.vocab_size}"
        )


def _share(right: Tensor) -> float:
    return right.double().mean().item()


@dataclass(frozen=True)
class EngramReport:
    """Log-odds in nats [N] of the right attribute in a second session of N sequences.

    own: given what the first session left; empty: given nothing; other: given what another sequence's first session left.
    """

    own: Tensor
    empty: Tensor
    other: Tensor

    @property
    def over_empty(self) -> float:
        """How much the own engram adds to an empty one, on average."""
        return (self.own - self.empty).mean().item()

    @property
    def over_other(self) -> float:
        """How much the own engram adds to another session's, on average."""
        return (self.own - self.other).mean().item()

    def record(self) -> dict[str, float]:
        """The means and differences for a JSON record."""
        means = {name: getattr(self, name).mean().item() for name in ("own", "empty", "other")}
        share = (self.own > torch.maximum(self.empty, self.other)).double().mean().item()
        return means | {"over_empty": self.over_empty, "over_other": self.over_other, "share_higher": share}


def engram_log_odds(
    model: GPT, task: Facts, names: int = 20, seed: int = 0, start: Start | None = None, folder: Path | None = None
) -> EngramReport:
    """Tell facts about names that training never showed in a first session of each of `names` sequences, ask about one in a second.

    start: from the state after first sessions [B] and the tokens of the second ones, the states in which those begin; by default
    `through_files`: an empty KV cache and the engrams, each saved to a file of its own (in `folder`, else a temporary one) and loaded.
    Raises UserError for fewer than two names.
    """
    if names < 2:
        raise UserError(f"names={names}: at least 2, because each is compared with another's engram")
    check_vocabulary(model, task)
    device = model.embed.weight.device
    sessions = task.unseen().sessions(as_generator(stable_hash(seed, "engrams"), device), names)
    with tempfile.TemporaryDirectory() as temporary, evaluating(model):
        begin = start or (lambda state, tokens: through_files(model, state, tokens, folder or Path(temporary)))
        state = model.init_state(names, sessions.told.shape[1] + sessions.asked.shape[1])
        model.step(sessions.told, state)
        others = [(row + 1) % names for row in range(names)]
        tokens = sessions.asked.shape[1]
        own = second_session(model, begin(state.clone(), tokens), sessions)
        other = second_session(model, begin(state.select(others), tokens), sessions)
        empty = second_session(model, model.init_state(names, tokens), sessions)
    return EngramReport(own, empty, other)


def second_session(model: GPT, state: SynapseState, sessions: Sessions) -> Tensor:
    """Log-odds [B] of the right answers when the questions are read from `state`, which advances."""
    return log_odds(model.step(sessions.asked, state)[:, -1], sessions.answers).cpu()


def log_odds(logits: Tensor, answers: Tensor) -> Tensor:
    """log(p / (1 - p)) [B] float64 of the answers [B] under logits [B, V], without cancellation near p = 1."""
    logits = logits.double()
    right = logits.gather(1, answers[:, None])
    rest = logits.scatter(1, answers[:, None], -torch.inf)
    return right[:, 0] - rest.logsumexp(1)


def through_files(model: GPT, state: SynapseState, tokens: int, folder: Path) -> SynapseState:
    """States of new sessions of at most `tokens` tokens that remember only the engrams of `state`, one file for each of its rows."""
    begun = []
    for row in range(state.batch_size):
        path = folder / f"session-{row}.safetensors"
        state.select([row]).save_engram(path)
        begun.append(model.init_state(1, tokens))
        begun[-1].implant(SynapseState.load_engram(path, model.embed.weight.device))
    return SynapseState.cat(begun)
