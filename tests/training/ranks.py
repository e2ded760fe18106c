"""Runs whose batches are numbered, so that one process and several see the same ones. Started by torchrun from test_distributed."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from bio_inspired_nanochat.common import Rank, this_rank
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import build_optimizer
from bio_inspired_nanochat.training import Callback, TrainConfig, train
from bio_inspired_nanochat.training.job import Job
from bio_inspired_nanochat.training.loop import Trainer
from bio_inspired_nanochat.training.loopstate import Progress
from bio_inspired_nanochat.training.plan import make_plan
from bio_inspired_nanochat.training.ranks import process_group
from bio_inspired_nanochat.training.run import build_model
from tests.training.tiny import SMALL, small

GLOBAL_ROWS = 8
# Experts whose life is short, so that a few steps see every kind of event.
LIFE = {
    "expert_youth": 2,
    "death_health_max": 0.45,
    "split_health_min": 0.5,
    "merge_health_max": 0.6,
    "merge_similarity": -1.0,
    "bank_rate": 0.2,
    "bank_decay": 0.3,
}
EXPERTS = {"synapses": True, "num_experts": 5, "expert_slots": 7, "expert_ratio": 1}
LIVING = {**EXPERTS, "splitmerge_every": 2, "syn_cfg": dataclasses.replace(SynapticConfig(), **LIFE), "num_iterations": 10}
ALONE = Rank(0, 0, 1)


class Numbered:
    """Row n of the data holds the same tokens whoever draws it; batch m of rank r of W is rows (m W + r) rows, and the following."""

    wait_seconds = 0.0
    epoch = 0

    def __init__(self, rank: Rank, rows: int, length: int, vocabulary: int) -> None:
        self.rows, self.length, self.vocabulary, self.world, self.next = rows, length, vocabulary, rank.world, rank.index

    def next_batch(self):
        first = self.next * self.rows
        self.next += self.world
        tokens = torch.stack([self._row(number) for number in range(first, first + self.rows)])
        return tokens[:, :-1], tokens[:, 1:].contiguous()

    def _row(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(self.vocabulary // 8, (self.length + 1,), generator=generator)

    def state_dict(self):
        return {"next": self.next}


class Record(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, record) -> None:
        self.losses.append(record.loss)


def job(rank: Rank, rows: int, **changes) -> Job:
    """A job without data or files: `rows` rows per forward, GLOBAL_ROWS per step."""
    config = TrainConfig(
        **{**SMALL, "log_every": 1, **changes, "device_batch_size": rows, "total_batch_size": GLOBAL_ROWS * SMALL["max_seq_len"]}
    )
    device = torch.device("cpu")
    plan = make_plan(config, device, rank.world)
    model = build_model(plan, device)
    optimizer = build_optimizer(
        model.named_parameters(), model.param_roles(), config.optim, n_embd=plan.model.n_embd, batch_tokens=plan.tokens_per_step
    )
    shape = (rank, rows, plan.model.sequence_len, plan.model.vocab_size)
    return Job(
        plan=plan,
        device=device,
        rank=rank,
        model=model,
        optimizer=optimizer,
        loader=Numbered(*shape),
        val_loader=lambda: Numbered(*shape),
        tokenizer=SimpleNamespace(token_bytes=lambda: [1] * plan.model.vocab_size),
        progress=Progress(),
        save=lambda _: Path("nowhere"),
    )


def run(rank: Rank, rows: int, **changes) -> dict:
    """Losses of every step, the record and a fingerprint of the final weights."""
    made, record = job(rank, rows, **changes), Record()
    result = Trainer(made, [record]).run()
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in made.model.parameters()))
    return {"losses": record.losses, "val_bpb": result["val_bpb"], "norm": norm, "accumulation": made.plan.accumulation}


class Poison(Callback):
    """Makes one rank's weights NaN after a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def after_update(self, step, model, optimizer) -> None:
        if step == self.step and this_rank().index == self.rank:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))


class Interrupt(Callback):
    """Sends one rank a signal after a step."""

    def after_update(self, step, model, optimizer) -> None:
        if step == 3 and this_rank().index == 1:
            os.kill(os.getpid(), 15)


def said_by(action) -> str:
    """What a user error says; on a rank that ends silently, nothing."""
    try:
        action()
    except UserError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2
        return ""
    raise AssertionError("no error")


def main(out: Path) -> None:
    """What rank 0 and rank 1 saw, as JSON in `out`."""
    with process_group(torch.device("cpu")) as rank:
        seen = {
            "vanilla": run(rank, 4),
            "accumulated": run(rank, 2),
            "synaptic": run(rank, 2, synapses=True),
            "experts": run(rank, 2, **EXPERTS),
        }
        seen["poisoned"] = said_by(lambda: Trainer(job(rank, 4), [Poison(1, 3)]).run())
        seen["interrupted"] = Trainer(job(rank, 4, num_iterations=50), [Interrupt()]).run()["steps"]
        changes = {"synapses": True, "num_iterations": 4, "log_every": 1}
        seen["whole"] = train(small(out / "whole", **changes), [whole := Record()])
        seen["whole_losses"] = whole.losses
        train(small(out / "parts", **changes, stop_after=2), [parts := Record()])
        seen["resumed"] = train(small(out / "parts", **changes, resume="auto"), [parts])
        seen["resumed_losses"] = parts.losses
        seen["life"] = train(small(out / "life", **LIVING))
        train(small(out / "lives", **LIVING, stop_after=6))
        seen["resumed_life"] = train(small(out / "lives", **LIVING, resume="auto"))
        seen["bad_path"] = said_by(lambda: train(small(out, resume=str(out / "nowhere"))))
        (out / f"rank{rank.index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
