"""What a speedrun finds out about its two trained models: validation by blocks, learned gains, samples.

R rows, T tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.data import DataSource
from bio_inspired_nanochat.engine import generate_batch, load
from bio_inspired_nanochat.evaluation import Bpb, bits_per_byte
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training.lesson import Lesson
from bio_inspired_nanochat.training.plan import Plan
from bio_inspired_nanochat.training.rounds import Curve

KINDS = ("vanilla", "synaptic")
BLOCKS = 12  # parts of the validation text, for the error of a difference
SAMPLE_TOKENS = 64
DEMO_PROMPTS = ("A: Hello, how are you?\nB:", "KING:\n")


@dataclass
class Outcome:
    """One trained model: its plan, the record of its run, its curve; and from `compare` its validation by blocks and its
    samples as (prompt, continuation)."""

    plan: Plan
    record: dict[str, Any]
    curve: Curve
    blocks: list[Bpb] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What the script's last line says about the model."""
        names = ("tok_per_s", "params", "seconds", "checkpoint", "steps", "tokens", "final_loss", "peak_memory_gib", "log_dir")
        total = pooled(self.blocks) if self.blocks else None
        val = {"val_bpb": total and total.bpb, "val_loss": total and total.nats_per_token}
        return val | {name: self.record[name] for name in names}


@dataclass
class Synapses:
    """What the synaptic model learned, per layer and over its heads: gains, and time constants in tokens; and its validation by
    blocks when all gains are set to zero."""

    gains: list[dict[str, list[float]]] = field(default_factory=list)
    times: list[dict[str, list[float]]] = field(default_factory=list)
    zeroed: list[Bpb] = field(default_factory=list)


@dataclass
class Findings:
    """Everything that the report shows. name: of the run's folders; data: the text in words; machine: the device in words; command:
    what reproduces it; folder: where the report goes; val_tokens: of the evaluations during training; lesson: the fine-tuning for chat,
    where there was one; seconds: of everything.
    """

    name: str
    data: str
    machine: str
    command: str
    seed: int
    folder: Path
    val_tokens: int
    vanilla: Outcome
    synaptic: Outcome
    synapses: Synapses
    lesson: Lesson | None = None
    seconds: float = 0.0

    @property
    def outcomes(self) -> tuple[tuple[str, Outcome], tuple[str, Outcome]]:
        """Both models with their names."""
        return (KINDS[0], self.vanilla), (KINDS[1], self.synaptic)


def compare(outcomes: Sequence[Outcome], source: DataSource, tokenizer: Tokenizer, tokens: int, seed: int, own_text: bool) -> Synapses:
    """Evaluate both models from their checkpoints on the same `tokens` of validation text and let them write; fills `outcomes`.

    own_text: the corpus is not the demo one, so that prompts come from its validation documents.
    """
    device = torch.device(outcomes[0].record["device"])
    prompts = sample_prompts(source) if own_text else list(DEMO_PROMPTS)
    rows = validation_rows(source, tokenizer, outcomes[0].plan.model.sequence_len, tokens)
    found = Synapses()
    for outcome in outcomes:
        model = load(outcome.record["checkpoint"], device).model.set_compute_dtype(outcome.plan.dtype)
        outcome.blocks = evaluate_blocks(model, *rows, outcome.plan.rows, tokenizer)
        outcome.samples = write_samples(model, tokenizer, prompts, seed)
        if outcome.plan.model.synapses:
            found.gains, found.times = model.gains(), learned_times(model)
            found.zeroed = evaluate_blocks(model.zero_gains(), *rows, outcome.plan.rows, tokenizer)
    return found


# --- validation --------------------------------------------------------------------------------------------------------------------


class _Rows:
    """Batches of given rows; what `bits_per_byte` needs of a loader."""

    def __init__(self, idx: Tensor, targets: Tensor, batch: int) -> None:
        self._batches = iter(list(zip(idx.split(batch), targets.split(batch), strict=True)))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        return next(self._batches)


def validation_rows(source: DataSource, tokenizer: Tokenizer, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [R,T] of about the first `tokens` validation tokens, or of all there are. T is `length`."""
    wanted = max(1, tokens // length)
    loader = source.loader("val", tokenizer, min(8, wanted), length, loop=False)
    try:
        batches = list(itertools.islice(loader, -(-wanted // min(8, wanted))))
    finally:
        loader.close()
    idx, targets = (torch.cat(side)[:wanted] for side in zip(*batches, strict=True))
    real = (targets >= 0).any(dim=1)
    return idx[real], targets[real]


def evaluate_blocks(model: GPT, idx: Tensor, targets: Tensor, batch: int, tokenizer: Tokenizer) -> list[Bpb]:
    """Bits per byte of up to BLOCKS consecutive parts of rows [R,T]; the same parts for every model."""
    count = min(BLOCKS, len(idx))
    parts = zip(idx.tensor_split(count), targets.tensor_split(count), strict=True)
    lengths = tokenizer.token_bytes()
    return [bits_per_byte(model, _Rows(*part, batch), len(part[0]), lengths) for part in parts]


def pooled(blocks: Sequence[Bpb]) -> Bpb:
    """All blocks as one measurement."""
    tokens, size = sum(block.tokens for block in blocks), sum(block.bytes for block in blocks)
    bpb = sum(block.bpb * block.bytes for block in blocks) / size
    return Bpb(bpb, sum(block.nats_per_token * block.tokens for block in blocks) / tokens, tokens, size)


def difference(before: Sequence[Bpb], after: Sequence[Bpb], quantity: str = "bpb") -> tuple[float, float]:
    """How much `after` is above `before`, and the standard error of that over the paired blocks (NaN for a single block).

    quantity: "bpb" or "nats_per_token". The error says how much the choice of text matters; not how much the seed of training does.
    """
    weights = [block.bytes if quantity == "bpb" else block.tokens for block in before]
    gaps = [getattr(b, quantity) - getattr(a, quantity) for a, b in zip(before, after, strict=True)]
    mean = sum(gap * weight for gap, weight in zip(gaps, weights, strict=True)) / sum(weights)
    if len(gaps) < 2:
        return mean, math.nan
    squares = sum((weight * (gap - mean)) ** 2 for gap, weight in zip(gaps, weights, strict=True))
    return mean, math.sqrt(squares * len(gaps) / (len(gaps) - 1)) / sum(weights)


# --- words and synapses --------------------------------------------------------------------------------------------------------------


def sample_prompts(source: DataSource) -> list[str]:
    """Beginnings to continue: the first words of two validation documents."""
    texts = [" ".join(text.split()[:6])[:80] for text in itertools.islice(source.texts("val"), 2)]
    return [text for text in texts if text] or ["The"]


def write_samples(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """(prompt, continuation) of each prompt; a prompt longer than half the context loses its end."""
    room = max(1, (model.config.sequence_len - 1) // 2)
    ids = [tokenizer.encode(prompt, bos=True)[:room] for prompt in prompts]
    made: list[list[int]] = [[] for _ in ids]
    for item in generate_batch(model, ids, SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed, stop_ids=[tokenizer.bos_id]):
        for row, token in enumerate(item):
            made[row] += [] if token is None else [token]
    return [(tokenizer.decode(start[1:]), tokenizer.decode(rest)) for start, rest in zip(ids, made, strict=True)]


def learned_times(model: GPT) -> list[dict[str, list[float]]]:
    """Learned time constants per layer in tokens, one list over heads each: calcium decay tau_c, vesicle refill tau_rrp."""
    found: list[dict[str, list[float]]] = []
    for block in model.blocks:
        synapse = getattr(block.attn, "synapse", None)
        if synapse is not None and synapse.cfg.presyn:
            params = synapse.params()
            found.append({name: getattr(params, name).detach().float().tolist() for name in ("tau_c", "tau_rrp")})
    return found
