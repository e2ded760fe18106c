"""A tokenizer and tiny models that speak it."""

from functools import cache
from pathlib import Path

import torch

from bio_inspired_nanochat.engine import Loaded
from bio_inspired_nanochat.tokenizer import Tokenizer
from tests.contract import make_model


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the king said to his old friend that a small bird sang near the river " * 20], 300)


def speaker(kind: str = "default", style: str = "chat", sequence_len: int = 256, **changes) -> Loaded:
    """A loaded model with random weights. style `chat` is what a tuned checkpoint says of itself."""
    vocab = tokenizer().vocab_size
    model = make_model(kind, vocab_size=vocab, bos_token_id=tokenizer().bos_id, sequence_len=sequence_len, **changes)
    return Loaded(model, tokenizer(), Path("nowhere"), 1, {"kind": "sft"} if style == "chat" else {})


class Script:
    """In place of a model: it says the given tokens, one after the other, and keeps what it was asked to read."""

    def __init__(self, loaded: Loaded, says: list[int]) -> None:
        self.model, self.says, self.read = loaded.model, says, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, idx: torch.Tensor, state, lengths=None) -> torch.Tensor:
        self.read += idx[0].tolist()
        logits = self.model.step(idx, state)
        said = len(self.read) - self.prompt if hasattr(self, "prompt") else 0
        logits[:, -1] = -50.0
        logits[:, -1, self.says[min(said, len(self.says) - 1)]] = 50.0
        return logits
