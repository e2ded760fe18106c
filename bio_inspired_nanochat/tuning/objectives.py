"""What a candidate is judged by: small models that are trained for it, measured on rows that training never saw.

Lower is better. All candidates of a seed see the same rows from the same initial weights, and what counts is the difference to the
configuration that the search began with, under the same seed, so that most of what a seed does cancels.

K models, B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, knob, validate
from bio_inspired_nanochat.data import ensure_tokenizer, resolve_data
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.calibration import calibration_error
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.study.models import WindowedConfig
from bio_inspired_nanochat.tasks.memory import MemoryTask, Recall, as_generator
from bio_inspired_nanochat.tasks.needle import Needle
from bio_inspired_nanochat.tuning.stack import Single, Stack, obstacle, stack_key
from bio_inspired_nanochat.tuning.steps import Batch, by_seed, task_rows, text_rows, train

OBJECTIVES = ("recall", "lm", "composite")
CURVE = 8  # validations of a language model from which its learning curve is extrapolated


def _recall() -> Recall:
    """As many pairs as the fast weights have modes: what is recalled then depends on how well they are written and kept."""
    return Recall(distance=32, spread=8, fillers=16, pairs=16, keys=32, values=16)


def _needle() -> Needle:
    return Needle(distance=48, spread=0, fillers=16)


def _optim() -> OptimConfig:
    """Fast weights have to be learned within a run of few steps."""
    return OptimConfig(fast_lr=0.02)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which models are trained on what."""

    objective: str = knob(
        "recall",
        "what candidates are judged by: recall (loss of the answers of memory tasks), lm (extrapolated loss of a short language model on "
        "text) or composite (both, calibration, and cost)",
        choices=OBJECTIVES,
    )
    tasks: tuple[str, ...] = knob(("recall",), "memory tasks", choices=("recall", "needle"))
    steps: int = knob(250, "optimizer steps of a training", lo=1, hi=1 << 24, unit="steps", aliases=("num_iterations",))
    rows: int = knob(32, "rows of a step", lo=1, hi=1 << 16, aliases=("device_batch_size",))
    eval_rows: int = knob(256, "rows of a measurement", lo=1, hi=1 << 20)
    n_layer: int = knob(2, "transformer blocks", lo=1, hi=64, aliases=("depth",))
    n_embd: int = knob(64, "width of the residual stream", lo=8, hi=8192, aliases=("width",))
    head_dim: int = knob(32, "size of an attention head", lo=2, hi=1024)
    window: int = knob(
        8,
        "attention window of every layer on memory tasks; 0 sees everything, and then attention alone recalls",
        lo=0,
        hi=1 << 16,
        off=0,
        unit="tokens",
    )
    context: int = knob(64, "tokens of a row of text", lo=2, hi=1 << 16, unit="tokens")
    vocab_size: int = knob(512, "token ids of the language model", lo=266, hi=1 << 20)
    horizon: float = knob(4.0, "the learning curve is extrapolated to so many times --steps", lo=1.0, hi=1e4)
    data_dir: str | None = knob(None, "folder of parquet shards; none is the demo corpus", path="exists", none="none")
    quality_weight: float = knob(0.7, "composite: weight of loss, recall and calibration", lo=0.0, hi=1.0, off=0.0)
    cost_weight: float = knob(0.3, "composite: weight of operations per token and bytes of state", lo=0.0, hi=1.0, off=0.0)
    stack: int = knob(64, "models that are trained as one at most", lo=1, hi=4096)
    dtype: str = knob("float32", "activations", choices=("float32", "bfloat16"))
    graph: bool = knob(True, "record a step as a CUDA graph and replay it; elsewhere than on CUDA nothing is recorded", off=False)
    optim: OptimConfig = knob(_optim, "optimizer")
    recall: Recall = knob(_recall, "associative recall")
    needle: Needle = knob(_needle, "needle in a haystack")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.head_dim:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of head_dim={self.head_dim}")
        if self.objective != "lm" and not self.tasks:
            raise UserError(f"tasks is empty, and objective={self.objective} needs one: --tasks=recall")
        if self.objective == "composite" and not self.quality_weight + self.cost_weight:
            raise UserError("quality_weight and cost_weight are both 0: raise one of them")

    def model(self, syn: SynapticConfig, task: MemoryTask | None) -> GPTConfig:
        """The model of a candidate for a task, or for text (None)."""
        heads = self.n_embd // self.head_dim
        sizes = {"n_layer": self.n_layer, "n_head": heads, "n_kv_head": heads, "n_embd": self.n_embd, "synapses": True, "syn_cfg": syn}
        if task is None:
            return GPTConfig(**sizes, sequence_len=self.context, vocab_size=self.vocab_size)
        text = {"sequence_len": task.length, "vocab_size": task.vocab_size}
        return WindowedConfig(**sizes, **text, attention_window=self.window) if self.window else GPTConfig(**sizes, **text)


@dataclass(frozen=True)
class Score:
    """What was measured of one candidate under one seed; losses in nats, NaN where the objective has no such part.

    answer_loss, accuracy: of the answers to memory tasks; ece: calibration error; lm_loss: at the last step; lm_final: extrapolated;
    operations: of training per token; state_bytes: what a sequence keeps beside keys and values; lost: nothing was
    measured, because the worker died or took too long.
    """

    answer_loss: float = math.nan
    accuracy: float = math.nan
    ece: float = math.nan
    lm_loss: float = math.nan
    lm_final: float = math.nan
    operations: float = math.nan
    state_bytes: float = math.nan
    diverged: bool = False
    lost: bool = False


LOST = Score(diverged=True, lost=True)  # a candidate whose worker died or took too long


def evaluate(
    config: ObjectiveConfig, candidates: Sequence[SynapticConfig], seeds: Sequence[int], device: torch.device
) -> list[list[Score]]:
    """Scores [candidate][seed]. Candidates of one shape, all seeds together, are trained as one."""
    pairs = [(candidate, seed) for candidate in candidates for seed in seeds]
    found: list[dict[str, Any]] = [{} for _ in pairs]
    tasks = [] if config.objective == "lm" else [getattr(config, name) for name in config.tasks]
    for task in [*tasks, *([None] if config.objective != "recall" else [])]:
        shapes: dict[Any, list[int]] = {}
        for index, (candidate, _) in enumerate(pairs):
            shapes.setdefault(stack_key(config.model(candidate, task)), []).append(index)
        for members in shapes.values():
            for first in range(0, len(members), config.stack):
                part = members[first : first + config.stack]
                for index, values in zip(part, _trained(config, [pairs[i] for i in part], task, device), strict=True):
                    for name, value in values.items():
                        found[index].setdefault(name, []).append(value)
    means: list[dict[str, Any]] = [{name: float(np.mean(values)) for name, values in one.items()} for one in found]
    scores = [Score(**one) for one in means]
    scores = [dataclasses.replace(score, diverged=_diverged(config, score)) for score in scores]
    return [scores[first : first + len(seeds)] for first in range(0, len(scores), len(seeds))]


def _diverged(config: ObjectiveConfig, score: Score) -> bool:
    needed = {"recall": ("answer_loss",), "lm": ("lm_final",), "composite": ("answer_loss", "lm_final", "ece")}[config.objective]
    return not all(math.isfinite(getattr(score, name)) for name in needed)


def fitness(config: ObjectiveConfig, score: Score, reference: Score) -> float:
    """The candidate's value less the reference's, both under one seed; infinite for one that diverged. Lower is better.

    recall, lm: a difference in nats. composite: quality_weight times the mean of the relative changes of the language model's loss and of
    the answers' loss and the change of the calibration error, and cost_weight times the mean of the relative changes of operations and state.
    """
    if score.diverged:
        return math.inf
    if config.objective == "recall":
        return score.answer_loss - reference.answer_loss
    if config.objective == "lm":
        return score.lm_final - reference.lm_final
    changes = [getattr(score, name) / max(getattr(reference, name), 1e-9) - 1 for name in ("lm_final", "answer_loss")]
    quality = (sum(changes) + score.ece - reference.ece) / 3
    costs = [getattr(score, name) / max(getattr(reference, name), 1.0) - 1 for name in ("operations", "state_bytes")]
    return config.quality_weight * quality + config.cost_weight * sum(costs) / 2


def _trained(
    config: ObjectiveConfig, pairs: Sequence[tuple[SynapticConfig, int]], task: MemoryTask | None, device: torch.device
) -> list[dict[str, float]]:
    """Train the models of some candidates and seeds, which have one shape, and measure them."""
    configs, seeds = [config.model(candidate, task) for candidate, _ in pairs], [seed for _, seed in pairs]
    if obstacle(configs[0]):
        models: list[Any] = [Single(one, seed, device) for one, seed in zip(configs, seeds, strict=True)]
        parts = [[seed] for seed in seeds]
    else:
        models, parts = [Stack(configs, seeds, device)], [seeds]
    judged: Callable[..., list[dict[str, float]]] = _train_on_task if isinstance(task, MemoryTask) else _train_on_text
    found = []
    for model, part in zip(models, parts, strict=True):
        model.compute_dtype = getattr(torch, config.dtype)
        found += judged(config, model, part, task, device)
    operations = GPT(configs[0]).flops_per_token()
    size = float(_state_bytes(configs[0]))
    return [{**one, "operations": operations, "state_bytes": size} for one in found]


def _state_bytes(config: GPTConfig) -> int:
    """Bytes that a running sequence keeps beside keys and values, at the length of its context."""
    state = GPT(config).init_state(1, config.sequence_len)
    return sum(
        value.numel() * value.element_size() for layer in state.layers for name, value in layer.tensors().items() if name not in "kv"
    )


def _train_on_task(
    config: ObjectiveConfig, model: Stack | Single, seeds: Sequence[int], task: MemoryTask, device: torch.device
) -> list[dict[str, float]]:
    def rows(seed: int) -> Iterator[Batch]:
        return task_rows(task, as_generator(stable_hash(seed, task.name, "train"), device), config.rows)

    for _ in train(model, by_seed(seeds, rows), config.steps, config.steps, config.optim, config.graph):
        pass
    held_out = {
        seed: task.unseen().sample(as_generator(stable_hash(seed, task.name, "measure"), device), config.eval_rows)
        for seed in dict.fromkeys(seeds)
    }
    idx, targets = (torch.stack([getattr(held_out[seed], name) for seed in seeds]) for name in ("idx", "targets"))
    losses, right, errors = [], [], []
    for logits, wanted in zip(_asked(model, idx, config.rows), targets, strict=True):
        asked = wanted >= 0
        chosen, answers = logits[asked], wanted[asked]
        losses.append(F.cross_entropy(chosen, answers).item())
        right.append((chosen.argmax(-1) == answers).double().mean().item())
        errors.append(calibration_error(chosen, answers))
    return [{"answer_loss": a, "accuracy": b, "ece": c} for a, b, c in zip(losses, right, errors, strict=True)]


@torch.no_grad()
def _asked(model: Stack | Single, idx: Tensor, rows: int) -> Tensor:
    """Logits [K, B, T, V], computed `rows` rows at a time; NaN when one model alone reports that it has diverged."""
    try:
        return torch.cat([model.logits(part) for part in idx.split(rows, dim=1)], dim=1)
    except FloatingPointError:
        return torch.full((*idx.shape, model.config.vocab_size), torch.nan, device=idx.device)


def _train_on_text(
    config: ObjectiveConfig, model: Stack | Single, seeds: Sequence[int], task: None, device: torch.device
) -> list[dict[str, float]]:
    shown, held_out = (part.to(device) for part in read_text(config))

    def rows(seed: int) -> Iterator[Batch]:
        return text_rows(shown, as_generator(stable_hash(seed, "text")), config.rows)

    due = curve_steps(config.steps)
    total, curve, errors = math.ceil(config.steps * config.horizon), [], []
    idx = held_out[:, :-1].expand(model.size, -1, -1)
    for step in train(model, by_seed(seeds, rows), config.steps, total, config.optim, config.graph):
        if step in due:
            logits = _asked(model, idx, config.rows)
            each = [F.cross_entropy(one.flatten(0, 1), held_out[:, 1:].flatten()).item() for one in logits]
            errors = [calibration_error(one.flatten(0, 1), held_out[:, 1:].flatten()) for one in logits]
            curve.append(each)
    finals = [extrapolate(due, [each[k] for each in curve], total) for k in range(len(seeds))]
    return [{"lm_loss": a, "lm_final": b, "ece": c} for a, b, c in zip(curve[-1], finals, errors, strict=True)]


def curve_steps(steps: int) -> list[int]:
    """The steps at which a learning curve is read: the second half of the run, evenly."""
    return sorted({max(1, round(steps * (1 + share / (CURVE - 1)) / 2)) for share in range(CURVE)})


def extrapolate(steps: Sequence[int], losses: Sequence[float], until: float) -> float:
    """The loss at step `until` by a power law a + b s^-c with b >= 0 and 0 <= a <= the last loss, least squares; NaN for a curve that is not finite.

    Source: power laws of learning curves (Hestness et al. 2017; Domhan et al. 2015 for stopping by them). With fewer than four points, or a
    curve that does not fall, it is the mean of the last two losses.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if not np.isfinite(y).all():
        return math.nan
    best = (math.inf, float(y[-2:].mean()))
    for c in np.geomspace(0.05, 2.0, 40) if len(x) >= 4 else ():
        s = x**-c
        b = float(((s - s.mean()) * (y - y.mean())).sum() / ((s - s.mean()) ** 2).sum())
        a = float(y.mean() - b * s.mean())
        if a < 0:
            a, b = 0.0, float((s * y).sum() / (s * s).sum())
        error = float(((a + b * s - y) ** 2).sum())
        if b > 0 and error < best[0]:
            best = (error, a + b * until**-c)
    return best[1]


def read_text(config: ObjectiveConfig) -> Batch:
    """Training rows [N, T + 1] and held-out rows [M, T + 1] of token ids, on the CPU; read once per process."""
    return _read_text(config.data_dir, config.vocab_size, config.context, min(config.steps, 1000) * config.rows, config.eval_rows)


@functools.lru_cache(maxsize=2)
def _read_text(data_dir: str | None, vocab_size: int, context: int, rows: int, eval_rows: int) -> Batch:
    source = resolve_data(data_dir)
    tokenizer = ensure_tokenizer(source, vocab_size)
    parts = []
    for split, count in (("train", rows), ("val", eval_rows)):
        loader = source.loader(split, tokenizer, min(count, 64), context, prefetch=0, threads=1)
        drawn = [loader.next_batch() for _ in range(-(-count // min(count, 64)))]
        loader.close()
        parts.append(torch.cat([torch.cat([idx, targets[:, -1:]], dim=1) for idx, targets in drawn])[:count])
    return parts[0], parts[1]
