"""The tiny language problem that liveness and golden-curve tests train on."""

from bio_inspired_nanochat.tasks.phrases import VOCAB, batch, train

__all__ = ["VOCAB", "batch", "train"]
