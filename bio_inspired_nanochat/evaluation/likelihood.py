"""Likelihoods of parts of token rows of different lengths.

Rows are padded on the right, which changes nothing to their left. B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.evaluation.setting import eager
from bio_inspired_nanochat.gpt import GPT


class Part(NamedTuple):
    """The tokens [start, stop) of a row, given all tokens before them. start is at least 1: the first token is given."""

    ids: Sequence[int]
    start: int
    stop: int


class PartScore(NamedTuple):
    """losses [stop - start] float64 in nats, on the CPU; greedy [stop - start] bool: whether each token was the most likely one."""

    losses: Tensor
    greedy: Tensor


def score(model: GPT, parts: Sequence[Part], batch_size: int = 8) -> list[PartScore]:
    """Losses of parts in their order; `batch_size` rows at a time, of similar lengths. Changes nothing.

    Raises UserError for a row longer than the model's context and a part outside of its row.
    """
    limit = model.config.sequence_len
    for part in parts:
        if not 1 <= part.start < part.stop <= len(part.ids):
            raise UserError(f"part [{part.start}, {part.stop}) is out of bounds [1, {len(part.ids)}] of its row")
        if len(part.ids) > limit + 1:
            raise UserError(f"a row of {len(part.ids)} tokens does not fit into the context of {limit}: shorten it")
    order = sorted(range(len(parts)), key=lambda place: len(parts[place].ids))
    found: dict[int, PartScore] = {}
    with evaluating(model), eager(model):
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            found.update(zip(places, _score_batch(model, [parts[place] for place in places]), strict=True))
    return [found[place] for place in range(len(parts))]


def _score_batch(model: GPT, parts: Sequence[Part]) -> list[PartScore]:
    longest = max(part.stop for part in parts) - 1
    idx = torch.zeros(len(parts), longest, dtype=torch.long)
    for row, part in enumerate(parts):
        idx[row, : part.stop - 1] = torch.tensor(list(part.ids[: part.stop - 1]))
    logits = model.logits(idx.to(model.embed.weight.device))
    scores = []
    for row, part in enumerate(parts):
        mine = logits[row, part.start - 1 : part.stop - 1]
        targets = torch.tensor(list(part.ids[part.start : part.stop]), device=mine.device)
        losses = F.cross_entropy(mine.float(), targets, reduction="none")
        scores.append(PartScore(losses.cpu().double(), (mine.argmax(-1) == targets).cpu()))
    return scores


def fitted(ids: Sequence[int], start: int, context: int) -> Part:
    """The part from `start` on of a row that begins with BOS, cut behind the BOS where it is longer than the context.

    A part that does not fit by itself keeps its end.
    """
    excess = len(ids) - (context + 1)
    if excess <= 0:
        return Part(ids, start, len(ids))
    kept = [ids[0], *ids[1 + excess :]]
    return Part(kept, max(1, start - excess), len(kept))
