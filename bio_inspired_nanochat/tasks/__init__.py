"""Problems to train and measure models on."""

from bio_inspired_nanochat.tasks.phrases import VOCAB, batch, objective, train

__all__ = ["VOCAB", "batch", "objective", "train"]
