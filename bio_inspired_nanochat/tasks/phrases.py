"""Repeated phrases: a language so small that a model learns it in a few hundred steps on one core.

Liveness and golden curves train on it. A row repeats one random phrase with a few errors, so that looking back, and tiring of
a key, both pay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, build_optimizer

VOCAB = 50
ERRORS = 0.1  # share of tokens that are replaced


def batch(step: int, rows: int = 8, length: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length] of a step, the same ones whenever asked."""
    generator = torch.Generator().manual_seed(1000 + step)
    period = int(torch.randint(5, 20, (1,), generator=generator))
    phrase = torch.randint(1, VOCAB, (rows, period), generator=generator)
    tokens = phrase.repeat(1, length // period + 2)[:, : length + 1]
    noise = torch.rand(tokens.shape, generator=generator) < ERRORS
    tokens = torch.where(noise, torch.randint(1, VOCAB, tokens.shape, generator=generator), tokens)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def objective(model: GPT, step: int) -> Tensor:
    """What training minimises on the batch of a step, in nats per token, with everything that acts in training only."""
    device = model.embed.weight.device
    idx, targets = (tokens.to(device) for tokens in batch(step))
    return model(idx, targets, noise_seed=step)


def train(model: GPT, steps: int, on_step: Callable[[int, float], None] | None = None) -> list[float]:
    """Train with the project's optimizer, fast weights at a rate for few steps; the loss of every step. `on_step(step, loss)` is called after each."""
    optimizer = build_optimizer(
        model.named_parameters(), model.param_roles(), OptimConfig(fast_lr=0.02), n_embd=model.config.n_embd, batch_tokens=512
    )
    losses = []
    for step in range(steps):
        optimizer.schedule(step, steps)
        loss = objective(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses
