"""Dendrites: a mechanism of a synapse in one file, which is its equation, its parameters and its record.

A dendrite is a neuron of its own: each of its branches sums its input and spikes when the sum passes a threshold, and the soma sums the
branches (Poirazi, Brannon & Mel 2003, the two-layer neuron). Here the branches of a layer read its input, and what they say moves the
forgetting gate of every head beside the gate's own linear drive, so that a head can close its past on a conjunction of features:

    d_h = sum over b of g_hb * sigmoid(4 (u_b . x - 1))         f_h = sigmoid(w_h . x + b_h + d_h)

    NANOCHAT_MECHANISMS=examples/dendrites.py python -m scripts.base_train --synapses=1 --syn_cfg.extra=dendrites
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.registry import add_gate_drive

BRANCHES = 8
SLOPE, THRESHOLD = 4.0, 1.0  # in standard deviations of a branch's input: about one token in six makes it spike


class Dendrites(nn.Module):
    """The branches of one layer, [BRANCHES, n_embd], and their gains on the gate of each head, [n_head, BRANCHES]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.branches = nn.Parameter(torch.empty(BRANCHES, config.n_embd))
        self.gain = nn.Parameter(torch.empty(config.n_head, BRANCHES))

    def init_weights(self, generator: torch.Generator) -> None:
        """Random branches whose input has unit variance; gains of zero, so that a newborn model is the one without dendrites."""
        drawn = torch.empty(self.branches.shape).normal_(0, 1 / math.sqrt(self.branches.shape[1]), generator=generator)
        self.branches.copy_(drawn)
        self.gain.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The drive of the gates, x [B, T, n_embd] to [B, T, n_head] in x's dtype."""
        spikes = torch.sigmoid(SLOPE * (F.linear(x, self.branches.to(x.dtype)) - THRESHOLD))
        return F.linear(spikes, self.gain.to(x.dtype))


add_gate_drive(
    "dendrites",
    "branches that spike on conjunctions of features drive the forgetting gate",
    source="two-layer neuron (Poirazi, Brannon & Mel 2003)",
    build=Dendrites,
)
