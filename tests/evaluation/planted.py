"""Models whose answers are known, in place of trained ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bio_inspired_nanochat.data import DataSource
from bio_inspired_nanochat.data.source import open_corpus
from tests.engine.speakers import tokenizer
from tests.training.tiny import corpus

SURE = 30.0  # a logit that leaves nothing to the others
Rule = Callable[[list[int]], list[int | None]]


class Planted(nn.Module):
    """Says after each token what `rule` has for its place in the row; None is a uniform guess."""

    stochastic = compiled = False

    def __init__(self, rule: Rule, sequence_len: int = 256, vocab_size: int = tokenizer().vocab_size) -> None:
        super().__init__()
        self.rule, self.embed = rule, nn.Embedding(1, 1)
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=vocab_size, bos_token_id=tokenizer().bos_id)

    def logits(self, idx: Tensor) -> Tensor:
        found = torch.zeros(*idx.shape, self.config.vocab_size)
        for row, ids in enumerate(idx.tolist()):
            for place, token in enumerate(self.rule(ids)):
                if token is not None:
                    found[row, place, token] = SURE
        return found

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view_as(
            targets
        )

    def experts(self) -> list:
        return []


def guess(ids: list[int]) -> list[int | None]:
    """Knows nothing."""
    return [None] * len(ids)


def repeat(ids: list[int], order: int = 8) -> list[int | None]:
    """Says what followed the last `order` tokens where they stood before."""
    seen: dict[tuple[int, ...], int] = {}
    found: list[int | None] = []
    for place in range(len(ids)):
        key = tuple(ids[max(0, place - order + 1) : place + 1])
        found.append(seen.get(key) if len(key) == order else None)
        if place + 1 < len(ids):
            seen[key] = ids[place + 1]
    return found


def knows(*texts: str, order: int = 6) -> Rule:
    """Continues these texts, whatever stands before them."""
    after: dict[tuple[int, ...], int] = {}
    for text in texts:
        ids = tokenizer().encode(text)
        for stop in range(1, len(ids)):
            for length in range(1, min(order, stop) + 1):
                after.setdefault(tuple(ids[stop - length : stop]), ids[stop])

    def rule(ids: list[int]) -> list[int | None]:
        found: list[int | None] = []
        for place in range(len(ids)):
            keys = (tuple(ids[max(0, place + 1 - length) : place + 1]) for length in range(order, 0, -1))
            found.append(next((after[key] for key in keys if key in after), None))
        return found

    return rule


def text() -> DataSource:
    """The tiny corpus."""
    return open_corpus(corpus())
