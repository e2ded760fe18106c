"""What one run works with, and the model as a function to minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bio_inspired_nanochat.common import Rank
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import Optimizer
from bio_inspired_nanochat.synaptic import Probe, Routing, SynapticCausalSelfAttention
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training.loopstate import Progress, Registry
from bio_inspired_nanochat.training.plan import Plan


class Loader(Protocol):
    """What the loop needs of a data loader; `PackedLoader` has it."""

    wait_seconds: float  # and, where it has them: `documents` of the last batch, `counts` (see PackedLoader)

    @property
    def epoch(self) -> int: ...

    def next_batch(self) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...


class Objective(nn.Module):
    """The model as a function from a batch to what training minimises, the form that DistributedDataParallel wraps."""

    def __init__(self, model: GPT, seed: int = 0) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        for layer in model.modules():
            if isinstance(layer, SynapticCausalSelfAttention):
                layer.checked = False

    def forward(
        self, idx: Tensor, targets: Tensor, step: int = 0, first_row: int = 0, probes: list[Probe] | None = None
    ) -> tuple[Tensor, Tensor, list[Routing] | None]:
        """idx and targets [B,T] to the mean loss plus auxiliary losses, the mean loss alone, in nats, and what experts did.

        step and first_row (index of the first row in the whole step's batch) say which stochastic release is drawn, so the
        draws do not depend on how a batch is cut into micro-batches and ranks.
        """
        rows = torch.arange(first_row, first_row + idx.shape[0], device=idx.device)
        where = {"noise_seed": self.seed, "noise_step": step, "sequence_ids": rows}
        out = self.model.run(idx, targets, **where, routing=probes is not None, probes=probes)
        return out.loss if out.aux is None else out.loss + out.aux, out.loss.detach(), out.routing


@dataclass
class Job:
    """Everything that one run works with. `save` writes a checkpoint of the progress and returns its path, `reload` returns to one but for
    its place in the data; both are collective. states: whatever else a checkpoint must hold.
    """

    plan: Plan
    device: torch.device
    rank: Rank
    model: GPT
    optimizer: Optimizer
    loader: Loader
    val_loader: Callable[[], Loader]
    tokenizer: Tokenizer
    progress: Progress
    save: Callable[[Job], Path | None]
    reload: Callable[[Job, Path], None] | None = None
    states: Registry = field(default_factory=Registry)
    log_dir: Path | None = None
    resumed_from: Path | None = None
