"""A model reads a sentence: what every terminal holds tick by tick, and where every head looks.

Everything comes from one pass of the model itself. Attention weights are the model's own attention output when the value of key j is
the j-th unit vector, so that bias, barrier and window are in them.

Dimensions: H query heads, N ticks, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import Extras

SENTENCE = (  # long enough for several ticks
    "The king said to his friend that the bird sang near the river, and the king said that the bird sang well. "
    "The friend said to the king that the river near the bird was cold, and that the bird sang for the king."
)


@dataclass(frozen=True)
class Reading:
    """tokens: text of each; tick: tokens per tick; course: per layer and quantity [H, N, T] at the start of each tick, float32 on the
    CPU (see `GPT.course`; empty without terminals); attention: per layer [H, T, T], rows are queries; [] when it was not asked for.
    """

    tokens: list[str]
    tick: int
    course: list[dict[str, Tensor]]
    attention: list[Tensor]

    def quantities(self) -> list[str]:
        """What the terminals of this model have."""
        return list(self.course[0]) if self.course else []


def read(model: GPT, ids: Sequence[int], tokens: Sequence[str], attention: bool = False) -> Reading:
    """Let `model` read token `ids`, whose texts are `tokens`. Raises UserError for more tokens than its context."""
    if not 1 <= len(ids) <= model.config.sequence_len:
        raise UserError(f"the text has {len(ids)} tokens: give between 1 and {model.config.sequence_len}, this model's context")
    idx = torch.tensor([list(ids)], device=model.embed.weight.device)
    weights: list[Tensor] = []
    with evaluating(model), _watched(model, weights) if attention else contextlib.nullcontext():
        records = model.course(idx)
    course = [{name: value[0].float().cpu() for name, value in record.items() if name != "fast"} for record in records]
    return Reading(list(tokens), model.config.syn_cfg.tick, [record for record in course if record], weights)


def read_text(model: GPT, tokenizer: Any, text: str = SENTENCE, attention: bool = False, most: int | None = None) -> Reading:
    """`read` for a text, after a BOS; only its first `most` tokens, and never more than the context."""
    ids = tokenizer.encode(text, bos=True)[: min(most or model.config.sequence_len, model.config.sequence_len)]
    return read(model, ids, [shown(tokenizer, one) for one in ids], attention)


def shown(tokenizer: Any, token: int) -> str:
    """A token as a short visible label: a blank is ␣, a line end ⏎, a special stays as it is named."""
    text = tokenizer.decode([token])
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


@contextlib.contextmanager
def _watched(model: GPT, weights: list[Tensor]) -> Iterator[None]:
    """Within it every layer also appends its attention weights to `weights`."""
    layers = [block.attn for block in model.blocks]

    def watch(layer: Any) -> None:
        plain = layer.attend

        def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Any) -> Tensor:
            units = torch.eye(k.shape[2], device=k.device, dtype=torch.float32).expand(*k.shape[:2], -1, -1)
            kept = layer.backend, layer.parts
            layer.backend = layer.parts = "reference"  # the only one that takes values of any width
            try:
                weights.append(plain(x, q, k, units, Extras(extras.doc, extras.noise))[0].float().cpu())
            finally:
                layer.backend, layer.parts = kept
            return plain(x, q, k, v, extras)

        layer.attend = attend

    for layer in layers:
        watch(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend  # pyrefly: ignore[missing-attribute]
