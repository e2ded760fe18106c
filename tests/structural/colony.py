"""Small models with experts, and a world in which they live: a language of successors, the project's optimizer, the keeper of experts."""

import dataclasses

import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, Optimizer, build_optimizer
from bio_inspired_nanochat.training.experts import ExpertKeeper

VOCAB = 50
ERRORS = 0.1  # share of tokens that are drawn at random


def batch(step: int, rows: int = 8, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [rows, length]: every token has one successor, a permutation that an MLP learns in a few dozen steps."""
    generator = torch.Generator().manual_seed(1000 + step)
    successor = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    noise = torch.rand(tokens.shape, generator=generator) < ERRORS
    for t in range(length):
        tokens[:, t + 1] = torch.where(noise[:, t + 1], tokens[:, t + 1], successor[tokens[:, t]])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


SIZES = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32}


def colony(experts=4, slots=6, synapses=True, k=2, seed=0, n_layer=1, **fields) -> GPT:
    """A model whose attention is plain and whose experts are quick to live: youth of 20 steps."""
    cfg = dataclasses.replace(SynapticConfig.preset("off"), **{"expert_youth": 20, **fields})
    shape = {**SIZES, "n_layer": n_layer, "num_experts": experts, "expert_slots": slots, "moe_top_k": k, "expert_ratio": 1}
    return GPT(GPTConfig(**shape, synapses=synapses, syn_cfg=cfg if synapses else SynapticConfig()), seed=seed)


class World:
    """Trains a colony; `live` returns losses."""

    def __init__(self, model: GPT, every: int = 0, log=None, seed: int = 0) -> None:
        self.model, self.step = model, 0
        self.optimizer: Optimizer = build_optimizer(
            model.named_parameters(), model.param_roles(), OptimConfig(), n_embd=model.config.n_embd, batch_tokens=512
        )
        self.keeper = ExpertKeeper(model, self.optimizer, every, seed, log)

    def live(self, steps: int, each=None) -> list[float]:
        losses = []
        for _ in range(steps):
            idx, targets = batch(self.step)
            self.optimizer.schedule(min(self.step, 399), 400)
            out = self.model.run(idx, targets, routing=True, probes=self.keeper.probes())
            self.keeper.add(out.routing)
            out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.keeper.after_step(self.step, idx, targets)
            losses.append(out.loss.item())
            if each is not None:
                each()
        return losses
