"""Two processes that meet trouble: faults on one of them, stops between steps and in every phase. Started from test_pair."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from bio_inspired_nanochat.common import this_rank
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.training import Callback, train
from bio_inspired_nanochat.training.loop import Trainer
from bio_inspired_nanochat.training.ranks import process_group
from tests.training import ranks
from tests.training.tiny import small

CHANGES = {"log_every": 1, "num_iterations": 5, "device_batch_size": 2}
KINDS = {
    "vanilla": {},
    "synaptic": {"synapses": True, "syn_cfg": SynapticConfig(hebb="delta", rank_eligibility=4)},
    "experts": {**ranks.LIVING, "num_iterations": 7},
}


class Spoil(Callback):
    """Makes what one rank's attention reads NaN in one training forward, so that the terminals meet it first."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step, self.count = rank, step, 0

    def on_job(self, model) -> None:
        model.blocks[0].attn.register_forward_pre_hook(self._hook)

    def _hook(self, module, inputs):
        if not torch.is_grad_enabled():
            return None
        self.count += 1
        if self.count != self.step or this_rank().index != self.rank:
            return None
        return (inputs[0] * float("nan"), *inputs[1:])


class Losses(Callback):
    """The exact loss of every step, and the faults."""

    def __init__(self) -> None:
        self.hex: list[str] = []
        self.faults: list[tuple] = []

    def on_step(self, record) -> None:
        self.hex.append(record.loss.hex())

    def on_fault(self, record) -> None:
        self.faults.append((record.at, record.what, sorted(record.batches)))


class Named(ranks.Numbered):
    """Numbered batches that name their documents."""

    @property
    def documents(self) -> list[str]:
        first = (self.next - self.world) * self.rows
        return [f"rows:{number}" for number in range(first, first + self.rows)]


def spoiled(rank, **changes) -> dict:
    """A run in which rank 1 meets NaN in step 3: its steps, faults and weights, or what it says."""
    job = ranks.job(rank, 4, **{"synapses": True, **changes})
    old = job.loader
    job.loader = Named(rank, old.rows, old.length, old.vocabulary)
    spoil, losses = Spoil(1, 3), Losses()
    spoil.on_job(job.model)
    told = {}

    def go() -> None:
        result = Trainer(job, [losses]).run()
        told.update(steps=result["steps"], skipped=result["skipped_steps"])

    said = "" if changes else ranks.said_by(go)
    if changes:
        go()
    weight = float(job.model.head.weight.double().sum())
    return {"said": said, "faults": losses.faults, "weight": weight.hex(), "step": job.progress.step, **told}


def stopped(rank, phase: str) -> dict:
    """A run in which one rank gets SIGTERM in the middle of a phase of step 3 or 4."""
    changes = {"sample": {"sample_every": 3}, "eval": {"eval_every": 3, "eval_tokens": 4096}, "life": ranks.LIVING, "train": {}}[phase]
    job, fired = ranks.job(rank, 4, **{"num_iterations": 10, **changes}), []

    def signalled(call, index):
        def run(*arguments, **options):
            if rank.index == index and job.progress.step >= 3 and not fired:
                fired.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
            return call(*arguments, **options)

        return run

    trainer = Trainer(job, [Losses()])
    if phase == "train":
        job.model.run = signalled(job.model.run, 1)
    elif phase == "life":
        trainer.keeper._loss = signalled(trainer.keeper._loss, 1)
    elif phase == "eval":
        val = job.val_loader()
        val.next_batch = signalled(val.next_batch, 1)
        job.val_loader = lambda: val
    else:  # rank 0 alone samples
        job.tokenizer.encode = signalled(lambda text, bos: [0, 1], 0)
        job.tokenizer.decode, job.tokenizer.bos_id = str, 0
        job.tokenizer.special = len
    result = trainer.run()
    return {"steps": result["steps"], "stopped": result["stopped"], "owed": job.progress.owed, "fired": bool(fired)}


def resumed(out: Path, kind: str) -> dict:
    """Losses and end of a whole run, and of one in three parts."""
    changes = {**CHANGES, **KINDS[kind]}
    record = train(small(out / f"{kind}-whole", **changes), [whole := Losses()])
    parts = Losses()
    for stop, resume in ((2, ""), (4, "auto"), (0, "auto")):
        last = train(small(out / f"{kind}-parts", **changes, stop_after=stop, resume=resume), [parts])
    return {"whole": whole.hex, "parts": parts.hex, "ends": [record["final_loss"].hex(), last["final_loss"].hex()], "record": last}


def main(out: Path) -> None:
    """What this rank saw, as JSON in `out`."""
    with process_group(torch.device("cpu")) as rank:
        seen = {
            "stop": spoiled(rank),
            "skip": spoiled(rank, on_nonfinite="skip"),
            "skip experts": spoiled(rank, on_nonfinite="skip", **ranks.EXPERTS),
            **{phase: stopped(rank, phase) for phase in ("train", "life", "eval", "sample")},
            **{kind: resumed(out, kind) for kind in KINDS},
        }
        (out / f"rank{rank.index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
