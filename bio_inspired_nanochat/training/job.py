"""What the training loop works with: the loader, the objective, and the job that holds everything of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bio_inspired_nanochat.common import Rank
from bio_inspired_nanochat.engine import generate_batch
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import Optimizer
from bio_inspired_nanochat.synaptic import Probe, Routing, SynapticCausalSelfAttention
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training.experts import Ballots
from bio_inspired_nanochat.training.loopstate import Progress, Registry
from bio_inspired_nanochat.training.plan import Plan

SAMPLE_PROMPTS = ("The", "Once upon a time", "A: Hello, how are you?\nB:")
SAMPLE_TOKENS = 32


class Loader(Protocol):
    """What the loop needs of a data loader; `PackedLoader` has it. Also used, where it has them: `documents` of the last batch, `counts`."""

    @property
    def wait_seconds(self) -> float:
        """Seconds that `next_batch` has waited for data so far."""
        ...

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        ...

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next inputs and targets, [B, T] each; targets of -1 do not count. StopIteration when there are no more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, in JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a position. Raises UserError for one of other data."""
        ...


class Objective(nn.Module):
    """The model as a function from a batch to what training minimises, the form that `parallel.Engine` calls."""

    def __init__(self, model: GPT, seed: int = 0) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        for layer in model.modules():
            if isinstance(layer, SynapticCausalSelfAttention):
                layer.checked = False

    def forward(
        self, idx: Tensor, targets: Tensor, step: int | Tensor = 0, first_row: int | Tensor = 0, probes: list[Probe] | None = None
    ) -> tuple[Tensor, Tensor, list[Routing] | None]:
        """idx and targets [B,T] to the mean loss plus auxiliary losses, the mean loss alone, in nats, and what experts did.

        step and first_row (index of the first row in the whole step's batch) say which stochastic release is drawn, so the
        draws do not depend on how a batch is cut into micro-batches and ranks. Both may be 0-dim int64 tensors.
        """
        rows = first_row + torch.arange(idx.shape[0], device=idx.device)
        where = {"noise_seed": self.seed, "noise_step": step, "sequence_ids": rows}
        out = self.model.run(idx, targets, **where, routing=probes is not None, probes=probes)
        assert out.loss is not None, "there are targets"
        return out.loss if out.aux is None else out.loss + out.aux, out.loss.detach(), out.routing


@dataclass
class Job:
    """Everything that one run works with.

    save: writes a checkpoint of the progress and returns its path on rank 0, reload: returns to one but for its place in the data; both are
    collective. states: whatever else a checkpoint must hold; ballots: decisions about experts. masked: the batches hold different numbers
    of targets, so that a step weighs its forwards by them. prompts: what samples of text continue, by default SAMPLE_PROMPTS. origin: the
    checkpoint that a fine-tuning began with.
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
    ballots: Ballots = field(default_factory=Ballots)
    log_dir: Path | None = None
    resumed_from: Path | None = None
    masked: bool = False
    prompts: list[list[int]] | None = None
    origin: Path | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The forwards of one optimizer step on this rank: inputs, targets, and the factor of each one's mean loss.

        The sum of the products, averaged over ranks, is the mean over all targets of the step. Collective when `masked`.
        """
        micro = self.plan.accumulation
        if not self.masked:
            for _ in range(micro):
                yield *self.loader.next_batch(), 1 / micro
            return
        pairs = [self.loader.next_batch() for _ in range(micro)]
        counts = [int((targets >= 0).sum()) for _, targets in pairs]
        total = torch.tensor(float(sum(counts)), device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        for (idx, targets), count in zip(pairs, counts, strict=True):
            yield idx, targets, count * self.rank.world / total.item()

    def sample(self, model: GPT, stopped: Callable[[], bool] = lambda: False) -> list[str] | None:
        """What `model` makes of the prompts, prompt included; None when `stopped` said so between two tokens."""
        tokenizer, room = self.tokenizer, self.plan.model.sequence_len - 2
        prompts = self.prompts or [tokenizer.encode(text, bos=True) for text in SAMPLE_PROMPTS]
        tokens = [list(prompt[:room]) for prompt in prompts]
        stops = [tokenizer.bos_id, tokenizer.special("<|assistant_end|>")]
        with evaluating(model):
            made = generate_batch(model, [list(row) for row in tokens], SAMPLE_TOKENS, seed=self.plan.config.seed, top_k=50, stop_ids=stops)
            for item in made:
                if stopped():
                    return None
                for row, token in enumerate(item):
                    tokens[row] += [] if token is None else [token]
        return [tokenizer.decode(row[1:]) for row in tokens]
