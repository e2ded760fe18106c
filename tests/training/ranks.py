"""Runs whose batches are numbered, so that one process and several see the same ones. Started by torchrun from test_distributed."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd.profiler import profile

from bio_inspired_nanochat.common import Rank, local, sum_over_ranks, this_rank, whole
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.errors import UserError, exit_on_user_error
from bio_inspired_nanochat.optim import build_optimizer
from bio_inspired_nanochat.training import Callback, TrainConfig, train
from bio_inspired_nanochat.training.job import Job
from bio_inspired_nanochat.training.loop import Trainer
from bio_inspired_nanochat.training.loopstate import Progress
from bio_inspired_nanochat.training.pace import Rehearsal
from bio_inspired_nanochat.training.parallel import shard
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
SHARED = {"num_iterations": 6, "total_batch_size": 2 * 4 * SMALL["max_seq_len"], "log_every": 1}  # two forwards of real text per step
WAYS = ("ddp", "fsdp")
KINDS = {
    "vanilla": {},
    "synaptic": {"synapses": True},
    "fast": {"synapses": True, "syn_cfg": dataclasses.replace(SynapticConfig(), hebb="delta")},
    "experts": EXPERTS,
    "masked": {"masked": True},
    "life": {**LIVING, "num_iterations": 6, "log_every": 1},
}


class Numbered:
    """Row n of the data holds the same tokens whoever draws it; batch m of rank r of W is rows (m W + r) rows, and the following."""

    wait_seconds = 0.0
    epoch = 0

    def __init__(self, rank: Rank, rows: int, length: int, vocabulary: int, masked: bool = False) -> None:
        self.rows, self.length, self.vocabulary, self.world, self.next = rows, length, vocabulary, rank.world, rank.index
        self.masked = masked

    def next_batch(self):
        first = self.next * self.rows
        self.next += self.world
        tokens = torch.stack([self._row(number) for number in range(first, first + self.rows)])
        targets = tokens[:, 1:].contiguous()
        if self.masked:  # rows with 1 to all targets
            for place, number in enumerate(range(first, first + self.rows)):
                targets[place, 1 + number * 7 % self.length :] = -1
        return tokens[:, :-1], targets

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


def job(rank: Rank, rows: int, total: int = GLOBAL_ROWS, masked: bool = False, **changes) -> Job:
    """A job without data or files: `rows` rows per forward, `total` per step."""
    batch = {"device_batch_size": rows, "total_batch_size": total * SMALL["max_seq_len"]}
    config = TrainConfig(**{**SMALL, "log_every": 1, **changes, **batch})
    device = torch.device("cpu")
    plan = make_plan(config, device, rank.world)
    model = shard(build_model(plan, device), plan, device)
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
        loader=Numbered(*shape, masked),
        val_loader=lambda: Numbered(*shape),
        tokenizer=SimpleNamespace(token_bytes=lambda: [1] * plan.model.vocab_size),
        progress=Progress(),
        save=lambda _: Path("nowhere"),
        masked=masked,
    )


def run(rank: Rank, rows: int, total: int = GLOBAL_ROWS, **changes) -> dict:
    """Losses of every step, the record and a fingerprint of the final weights."""
    made, record = job(rank, rows, total, **changes), Record()
    result = Trainer(made, [record]).run()
    norm = math.sqrt(sum(float(whole(p.detach()).double().square().sum()) for p in made.model.parameters()))
    return {
        "losses": record.losses,
        "val_bpb": result["val_bpb"],
        "norm": norm,
        "accumulation": made.plan.accumulation,
        "events": result["lineage_events"],
    }


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


class Kill(Callback):
    """Ends one rank without a word after its last checkpoint."""

    def after_update(self, step, model, optimizer) -> None:
        if step == 4 and this_rank().index == 1:
            os.kill(os.getpid(), 9)


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


def stay_equal(rank: Rank) -> dict:
    """Every kind of model by every way, 2 rows per forward."""
    return {way: {kind: run(rank, 2, parallel=way, **changes) for kind, changes in KINDS.items()} for way in WAYS}


def messages(rank: Rank, rows: int, way: str, **changes) -> int:
    """Collectives of one optimizer step on this rank, whose micro-batches have `rows` rows."""
    rehearsal = Rehearsal(job(rank, rows, parallel=way, **changes).plan, torch.device("cpu"))
    rehearsal.step()  # DDP orders its buckets after the first backward
    with profile() as profiler:
        rehearsal.step()
    # not its table of averages, which takes a second for the twenty thousand events of a step
    return sum(event.name().startswith("gloo:") for event in profiler.kineto_results.events())


def divide(rank: Rank) -> list[float]:
    """The share of a model's values that this rank holds under each way, and of its matrices' momenta."""
    shares = []
    for way in WAYS:
        made = job(rank, 4, parallel=way, num_iterations=1, eval_tokens=0)
        Trainer(made).run()
        named = dict(made.model.named_parameters())
        cut = [name for name, role in made.model.param_roles().items() if role == "matrix"]
        kept = [local(named[name]).numel() + sum(local(m).numel() for m in made.optimizer.moments(name).values()) for name in cut]
        shares.append(sum(kept) / sum(2 * named[name].numel() for name in cut))
    return shares


def resume_and_stop(rank: Rank, out: Path) -> dict:
    """Whole runs with files: two ways of sharing, a stop between them, signals, mistakes."""
    seen = {}
    for way in WAYS:
        seen[f"poisoned-{way}"] = said_by(lambda way=way: Trainer(job(rank, 4, parallel=way), [Poison(1, 3)]).run())
        late = {"parallel": way, "num_iterations": 3, "eval_tokens": 0}
        seen[f"poisoned-late-{way}"] = said_by(lambda late=late: Trainer(job(rank, 4, **late), [Poison(1, 3)]).run())
    seen["interrupted"] = Trainer(job(rank, 4, num_iterations=50, eval_tokens=0), [Interrupt()]).run()["steps"]
    changes = {"synapses": True, "num_iterations": 4, "log_every": 1, "syn_cfg": dataclasses.replace(SynapticConfig(), hebb="delta")}
    changes |= {"consolidate_every": 2, "sample_every": 3}
    for way in WAYS:
        seen[f"whole-{way}"] = train(small(out / way, **changes, parallel=way), [whole := Record()]) | {"losses": whole.losses}
    train(small(out / "parts", **changes, parallel="fsdp", stop_after=2), [parts := Record()])
    seen["resumed"] = train(small(out / "parts", **changes, parallel="ddp", resume="auto"), [parts]) | {"losses": parts.losses}
    seen["life"] = train(small(out / "life", **LIVING))
    train(small(out / "lives", **LIVING, stop_after=6))
    seen["resumed_life"] = train(small(out / "lives", **LIVING, parallel="fsdp", resume="auto"))
    seen["bad_path"] = said_by(lambda: train(small(out, resume=str(out / "nowhere"))))
    train(small(out / "alone", **SHARED, resume="auto"), [grown := Record()])
    train(small(out / "pair", **SHARED, stop_after=3), [apart := Record()])
    seen["shared"] = {"grown": grown.losses, "apart": apart.losses}
    seen["messages"] = {way: [messages(rank, rows, way, **EXPERTS) for rows in (4, 2)] for way in WAYS}
    seen["buckets"] = [messages(rank, 4, "ddp", bucket_mb=size) for size in (25.0, 0.02)]
    seen["reshard"] = [messages(rank, 4, "fsdp", reshard=on) for on in (False, True)]
    seen["rounded"] = {way: run(rank, 4, parallel=way, reduce_dtype="bfloat16", num_iterations=3)["losses"] for way in WAYS}
    seen["shares"] = divide(rank)
    seen["sum"] = sum_over_ranks(torch.full((2,), 0.1 + rank.index)).tolist()
    return seen


def uneven(rank: Rank) -> dict:
    """Three ranks, among which rows, experts and matrices do not divide."""
    return {"experts": run(rank, 2, total=6, parallel="fsdp", num_iterations=4, eval_tokens=192, **EXPERTS)}


def main(what: str, out: Path) -> None:
    """What every rank saw, as JSON in `out`."""
    if what == "killed":
        with exit_on_user_error():
            train(small(out, num_iterations=50, save_every=3), [Kill()])
    with process_group(torch.device("cpu")) as rank:
        seen = uneven(rank) if what == "uneven" else {"equal": stay_equal(rank), **resume_and_stop(rank, out)}
        (out / f"rank{rank.index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
