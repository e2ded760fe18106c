"""Evaluation of a chat model, offline: small questions with one right answer, and whether its answers come to an end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.common import pick_device, progress, say, table
from bio_inspired_nanochat.config import device_knob, knob, validate
from bio_inspired_nanochat.engine import Loaded, Message, Reply, ReplyOptions, Sampling, context_length, load, render, source_path, style_of
from bio_inspired_nanochat.engine.conversation import turn_end
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.tasks.questions import TASKS, Question, Task
from bio_inspired_nanochat.tasks.smalltalk import PROMPTS

ANSWER_TOKENS = 64  # of a free answer to a question; the right ones are shorter


@dataclass(frozen=True)
class ChatEvalConfig:
    """What to ask which model."""

    source: str = knob("sft", "sft: the newest fine-tuned model; base: the newest that base_train wrote; or the path of a checkpoint")
    tasks: str = knob("all", f"tasks to measure, separated by commas: {', '.join(TASKS)}; all of them, or none")
    questions: int = knob(
        100, "questions per task, fewer where a task has fewer; none of them is in the embedded conversations", lo=1, hi=100000
    )
    prompts: int = knob(len(PROMPTS), "built-in prompts of which to measure how many answers end", lo=0, hi=len(PROMPTS), off=0)
    max_tokens: int = knob(200, "longest answer to such a prompt", lo=1, hi=1 << 20, unit="tokens")
    temperature: float = knob(0.8, "spread of those answers; questions are answered by the most likely tokens", lo=0.0, hi=100.0, off=0.0)
    top_k: int = knob(50, "draw those answers from this many most likely tokens; 0 from all", lo=0, hi=1 << 20, off=0)
    show: int = knob(3, "answers to print", lo=0, hi=len(PROMPTS), off=0)
    device: str = device_knob()
    seed: int = knob(0, "seed of the questions and of the answers to the prompts", lo=0, hi=(1 << 62) - 1)

    def __post_init__(self) -> None:
        validate(self)
        self.chosen()

    def chosen(self) -> list[Task]:
        """The tasks by name. Raises UserError for an unknown one."""
        if self.tasks in ("all", "none"):
            return list(TASKS.values()) if self.tasks == "all" else []
        names = [name.strip() for name in self.tasks.split(",")]
        for name in names:
            if name not in TASKS:
                raise UserError(f"--tasks={self.tasks} has an unknown task {name!r}: one of {', '.join(TASKS)}{nearest(name, TASKS)}")
        return [TASKS[name] for name in names]


@dataclass(frozen=True)
class Answered:
    """The answer to a prompt. ended: the model ended it by itself, with the end token of its turn."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def evaluate_chat(config: ChatEvalConfig) -> dict[str, Any]:
    """Evaluate one checkpoint; returns the script's last line. Raises UserError for a missing checkpoint."""
    began = time.perf_counter()
    loaded = load(source_path(config.source), pick_device(config.device))
    say(
        f"checkpoint {loaded.path}: {'tuned on conversations' if style_of(loaded.meta) == 'chat' else 'a base model, which continues text'}"
    )
    record: dict[str, Any] = {"checkpoint": str(loaded.path), "step": loaded.step, "kind": loaded.meta.get("kind"), "tasks": {}}
    rows = []
    for task in config.chosen():
        found = record["tasks"][task.name] = measure(loaded, task, config.questions, config.seed)
        how = "choice by likelihood" if task.chance else "free answer"
        spread = f"{found['accuracy']:.3f} ± {found['error']:.3f}"
        rows.append([task.name, how, found["questions"], spread, f"{found['chance']:.3f}", f"{found['centred']:.3f}"])
    if rows:
        table(["task", "kind", "questions", "accuracy", "chance", "above chance"], rows)
        record["centred"] = sum(found["centred"] for found in record["tasks"].values()) / len(rows)
    if config.prompts:
        sampling = Sampling(config.temperature, config.top_k, seed=config.seed)
        answers = answer_prompts(loaded, PROMPTS[: config.prompts], sampling, config.max_tokens)
        for answer in answers[: config.show]:
            say(f"sample | {answer.prompt!r} -> {answer.text!r}")
        record |= {"ended": sum(answer.ended for answer in answers), "prompts": len(answers)}
        say(f"{record['ended']} of {len(answers)} answers end with the end token")
    return record | {"seed": config.seed, "seconds": round(time.perf_counter() - began, 3)}


def measure(loaded: Loaded, task: Task, count: int, seed: int) -> dict[str, Any]:
    """Accuracy on held-out questions, its standard error, chance, and the accuracy above chance as a share of what is left.

    Chance is what guessing scores: among the options, or, where the answer is free, by always saying the most frequent right answer.
    """
    questions = task.test(count, seed)
    right = 0
    with progress(len(questions), task.name, "questions") as bar:
        for place, question in enumerate(questions):
            right += _chooses_right(loaded, question) if question.options else _answers_right(loaded, question, seed + place)
            bar.advance(1)
    accuracy, chance = right / len(questions), task.chance
    if not chance:
        chance = Counter(question.answer for question in questions).most_common(1)[0][1] / len(questions)
    return {
        "accuracy": round(accuracy, 4),
        "error": round(math.sqrt(accuracy * (1 - accuracy) / len(questions)), 4),
        "chance": round(chance, 4),
        "centred": round((accuracy - chance) / (1 - chance), 4) if chance < 1 else 0.0,
        "questions": len(questions),
    }


def answer_prompts(loaded: Loaded, prompts: Sequence[str], sampling: Sampling, max_tokens: int) -> list[Answered]:
    """One answer to each prompt; the one to prompt i is drawn with seed + i."""
    end = loaded.tokenizer.special("<|assistant_end|>")
    answers = []
    for place, prompt in enumerate(prompts):
        draw = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed + place)
        text, tokens, finish = _answer(loaded, prompt, ReplyOptions(max_tokens, draw), {end})
        answers.append(Answered(prompt, text, tokens, finish == "stop"))
    return answers


def _answer(loaded: Loaded, asked: str, options: ReplyOptions, stops: set[int]) -> tuple[str, int, str]:
    """Visible text, number of tokens, why it ended."""
    with evaluating(loaded.model):
        reply = Reply(loaded.model, loaded.tokenizer, _prompt(loaded, asked), options, stops)
        text = "".join(piece.text for pieces in reply for piece in pieces if not piece.tool)
    return text, reply.made[0], reply.finish[0]


def _prompt(loaded: Loaded, asked: str) -> list[int]:
    """Ids up to where the answer begins; a base model answers in a line of its own."""
    style = style_of(loaded.meta)
    ids = render([Message("user", asked)], loaded.tokenizer, style)
    ids = ids if style == "chat" else ids + turn_end(loaded.tokenizer, style)
    room = context_length(loaded.model) - 1
    if len(ids) > room:
        raise UserError(
            f"a question has {len(ids)} tokens, the context of {loaded.path} holds {room + 1}: choose other --tasks or --prompts=0"
        )
    return ids


def _answers_right(loaded: Loaded, question: Question, seed: int) -> bool:
    style = style_of(loaded.meta)
    stops = {loaded.tokenizer.special("<|assistant_end|>")} if style == "chat" else {loaded.tokenizer.bos_id}
    options = ReplyOptions(ANSWER_TOKENS, Sampling(0.0, seed=seed), stop=() if style == "chat" else ("\n",))
    return question.right(_answer(loaded, question.asked, options, stops)[0])


def _chooses_right(loaded: Loaded, question: Question) -> bool:
    """Whether the first option is likelier than every other, its end included."""
    logs = option_likelihoods(loaded, question.asked, question.options)
    return all(logs[0] > other for other in logs[1:])


def option_likelihoods(loaded: Loaded, asked: str, options: Sequence[str]) -> list[float]:
    """Log probability in nats of each option as the whole answer: its tokens and the end of the turn."""
    prompt, end = _prompt(loaded, asked), turn_end(loaded.tokenizer, style_of(loaded.meta))
    rows = [prompt + loaded.tokenizer.encode(option) + end for option in options]
    longest = max(map(len, rows))
    idx = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for place, row in enumerate(rows):
        idx[place, : len(row)] = torch.tensor(row)
        targets[place, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
    device = next(loaded.model.parameters()).device
    with evaluating(loaded.model):
        losses = loaded.model.token_losses(idx.to(device), targets.to(device))
    return (-losses.double().sum(dim=1)).tolist()
