"""Plans of tiny models, and runs of them that only pretend: a process that writes the record that it is told to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.study.matrix import SETS, Matrix, build_matrix
from bio_inspired_nanochat.study.plan import PlanConfig, make_matrix_plan
from tests.training.tiny import corpus

TINY: dict[str, Any] = {
    "sets": ("anchors",),
    "conditions": ("vanilla", "default", "all_on"),
    "depths": (2,),
    "seeds": (0, 1, 2),
    "tokens": 512,
    "smoke": True,
    "n_embd": 32,
    "head_dim": 16,
    "max_seq_len": 32,
    "vocab_size": 280,
    "device_batch_size": 4,
    "total_batch_size": 256,
    "eval_tokens": 256,
    "device": "cpu",
    "tok_per_s": 1e9,
    "data_dir": str(corpus()),
}


@cache
def full() -> Matrix:
    """The matrix of all sets."""
    return build_matrix(list(SETS))


# What a pretended run in `folder` does: `behave(run)` in the source below may crash, sleep or return metrics.
SOURCE = """
import json, os, sys, time
job = json.load(open(folder + "/job.json"))
run = job["run"]
open(folder + "/started", "a").write("x")
print("began", run["id"], flush=True)
{behave}
metrics = behave(run)
n = len(metrics) and 4
loss = metrics["val_loss"]
curve = {{"tokens": [run["tokens"] * i / 4 for i in (1, 2, 3, 4)], "loss": [loss + 3 - i for i in range(4)]}}
curve["flops"] = [t * run["flops_per_token"] for t in curve["tokens"]]
curve["seconds"] = [] if job["shared"] else [t / metrics["tok_per_s"] for t in curve["tokens"]]
if job["shared"]:
    metrics["tok_per_s"] = None
names = ("id", "key", "conditions", "depth", "seed", "flops_per_token", "tokens")
record = {{name: run[name] for name in names}} | {{"metrics": metrics, "curve": curve, "config": run["train"]}}
record |= {{name: job[name] for name in ("digest", "smoke", "data", "shared")}}
record |= {{"versions": {{}}, "git": None, "device": "pretended", "began": 0.0, "ended": {seconds}}}
open(folder + "/.record", "w").write(json.dumps(record))
os.replace(folder + "/.record", folder + "/record.json")
"""
# Losses with a little noise that seeds share: the default gains 0.05 nats, all_on loses 0.02.
HONEST = """
def behave(run):
    gain = {"default": -0.05, "all_on": 0.02}.get(run["conditions"][0], 0.0)
    shared = 0.01 * ((run["seed"] * 7) % 5)
    own = 0.0002 * ((run["seed"] + 2) * sum(map(ord, run["conditions"][0])) % 13)
    return {"val_loss": 3.0 + gain + shared + own, "val_bpb": 1.0, "tok_per_s": 100.0 if gain else 200.0, "perplexity": 20.0 * 2.718 ** gain}
"""


def pretend(behave: str = HONEST, seconds: float = 1.0) -> Callable[[Sequence[Path]], list[str]]:
    """A command for `Queue` whose runs behave as the source says and claim to have taken `seconds`."""
    source = SOURCE.format(behave=behave, seconds=seconds)
    each = "import os, sys\nfor folder in sys.argv[2:]:\n    sys.stdout.flush()\n"
    each += "    log = os.open(folder + '/log.txt', os.O_WRONLY)\n    os.dup2(log, 1), os.dup2(log, 2)\n    exec(sys.argv[1], {'folder': folder})"
    return lambda folders: [sys.executable, "-S", "-c", each, source, *map(str, folders)]


def plan(folder: Path, **changes: Any) -> PlanConfig:
    """Make a tiny plan in a folder."""
    config = PlanConfig(**TINY | changes, out=str(folder))
    make_matrix_plan(config)
    return config


def started(folder: Path) -> dict[str, int]:
    """How often each run was begun."""
    return {path.parent.name: len(path.read_text()) for path in sorted(folder.glob("runs/*/started"))}
