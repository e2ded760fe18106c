"""A tiny language problem and a few hundred steps on it: what liveness and golden-curve tests train on."""

import torch

from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, build_optimizer

VOCAB = 50


def batch(step: int, rows: int = 8, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that repeat a random phrase with a few errors, so that looking back, and tiring of a key, both pay."""
    generator = torch.Generator().manual_seed(1000 + step)
    period = int(torch.randint(5, 20, (1,), generator=generator))
    phrase = torch.randint(1, VOCAB, (rows, period), generator=generator)
    tokens = phrase.repeat(1, length // period + 2)[:, : length + 1]
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    tokens = torch.where(noise, torch.randint(1, VOCAB, tokens.shape, generator=generator), tokens)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(model: GPT, steps: int) -> list[float]:
    """Train on `batch` with the project's optimizer; the loss of every step."""
    optimizer = build_optimizer(model.named_parameters(), model.param_roles(), OptimConfig(), n_embd=model.config.n_embd, batch_tokens=512)
    losses = []
    for step in range(steps):
        optimizer.schedule(step, steps)
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
