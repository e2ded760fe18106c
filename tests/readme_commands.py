"""What makes the commands of README.md and docs/ small enough for a test, and how torchrun's are run without a launcher."""

from __future__ import annotations

import os
import socket
import sys

from tests import forked

STEPS, MORE_STEPS = 3, 5
TRAINING = {
    "depth": 2,
    "n_embd": 32,
    "head_dim": 16,
    "max_seq_len": 64,
    "vocab_size": 280,
    "num_iterations": STEPS,
    "device_batch_size": 2,
    "total_batch_size": 256,
    "eval_every": 0,
    "eval_tokens": 128,
    "sample_every": 0,
    "device": "cpu",
}
# What makes each script small. A flag that the page itself gives is replaced, so that its name is still checked.
TINY: dict[str, dict[str, object]] = {
    "scripts.base_train": TRAINING,
    "scripts.base_eval": {"eval_tokens": 128, "samples": 1, "max_tokens": 4, "device": "cpu"},
    "scripts.eval_suite": {"tokens": 64, "rows": 1, "samples": 2, "sample_tokens": 8, "draws": 2, "device": "cpu"},
    "scripts.bench_kernels": {"head_dim": 16, "context": 32, "tick": 8, "seconds": 0, "device": "cpu"},
    "scripts.bench_train": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "seconds": 0,
    },
    "scripts.bench_scaling": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "steps": 1,
        "seconds": 0,
    },
    "scripts.bench_api": {"tokens": 2, "clients": 2, "seconds": 0, "device": "cpu"},
    "scripts.bench_vitals": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "seconds": 0,
    },
    "scripts.bench_memory": {"modes": 4, "context": 16, "rows": 1, "seconds": 0, "device": "cpu"},
    "scripts.bench_decode": {"depth": 1, "n_embd": 32, "head_dim": 16, "context": "8,16", "seconds": 0, "device": "cpu"},
    "scripts.bench_cpu": {
        "depth": 1,
        "n_embd": 32,
        "head_dim": 16,
        "vocab_size": 300,
        "context": "8,16",
        "threads": "1",
        "compiled": 0,
        "seconds": 0,
    },
    "scripts.chat_sft": {"num_iterations": STEPS, "device_batch_size": 1, "eval_tokens": 32, "device": "cpu"},
    "scripts.chat_eval": {"questions": 1, "prompts": 1, "max_tokens": 2, "tasks": "copying,larger", "device": "cpu"},
    "scripts.chat_cli": {"max_tokens": 4, "device": "cpu"},
    "scripts.chat_web": {"port": 0, "seconds": 0.5, "device": "cpu"},
    "scripts.enable_synapses": {},
    "scripts.param_census": {"steps": 2, "knobs": "barrier_strength", "device": "cpu"},
    "scripts.dashboard": {"port": 0, "seconds": 0.5},
    "scripts.lineage": {},
    "scripts.viz_export": {},
    "scripts.neurophylo": {},
    "scripts.neuroviz": {"device": "cpu"},
    "scripts.prepare_data": {},
    "scripts.tok_train": {"vocab_size": 280},
    "scripts.tok_eval": {"vocab_size": "270,280", "max_chars": 5000},
    "scripts.download_data": {"pause": 0, "attempts": 2},
    "scripts.doctor": {"depth": 1, "context": 64},
    "scripts.quality_gate": {"mode": "all", "skip": "types,imports,clippy,rustfmt,tests"},
}
TUNING: dict[str, object] = {
    "steps": 2,
    "rows": 2,
    "eval_rows": 4,
    "n_layer": 1,
    "n_embd": 16,
    "head_dim": 8,
    "tasks": "recall",
    "recall.distance": 8,
    "seeds": 1,
    "device": "cpu",
}
# Scripts with sub-commands, by both names.
TINY |= {
    "scripts.bench_stack": {
        "models": "2",
        "rows": 1,
        "context": 8,
        "n_layer": 1,
        "n_embd": 16,
        "head_dim": 8,
        "seconds": 0,
        "device": "cpu",
    },
    "scripts.tune_bio_params sanity": TUNING | {"gate_seeds": 2, "popsize": 2},
    "scripts.tune_bio_params sensitivity": TUNING | {"trajectories": 1, "points": 1},
    "scripts.tune_bio_params optimize": TUNING | {"generations": 2, "popsize": 3},
    "scripts.tune_bio_params report": {},
    "scripts.tune_bio_params best": {"confirm_seeds": 2, "device": "cpu"},
}
TINY |= {
    "scripts.eval_matrix plan": {
        **{name: TRAINING[name] for name in ("n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "sets": "anchors",
        "conditions": "vanilla,default",
        "depths": 2,
        "seeds": 0,
        "tokens": 256,
        "total_batch_size": 128,
        "eval_tokens": 128,
        "tok_per_s": 1000,
        "evaluations": "",
        "smoke": 1,
    },
    "scripts.eval_matrix run": {},
    "scripts.eval_matrix resume": {},
    "scripts.eval_matrix speed": {"seconds": 0},
    "scripts.eval_matrix report": {},
    "scripts.eval_matrix pack": {},
    "scripts.eval_matrix unpack": {},
}


def ranks(world: int, module: str, words: list[str]) -> None:
    """Be the launcher of `world` ranks on this machine, which are forks of this process, and end as they do.

    What torchrun itself does is shown by the tests of `tests/launcher.py`; here the commands of a page are the matter.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(world):
        if pid := os.fork():
            started.append(pid)
            continue
        os.environ.update({name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        code = forked._execute("-m", module, *words)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    raise SystemExit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in started))
