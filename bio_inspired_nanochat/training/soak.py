"""A soak test: a run that is killed and stopped at random times and resumed, beside one that is left alone. Both must end alike.

Every part is a process of its own, `python -m scripts.base_train`, with experts whose life cycle runs. The undisturbed run comes first
and sets the pace: its number of steps is chosen so that it takes a third of the time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.structural import read_lineage
from bio_inspired_nanochat.training.guards import Interrupted, StopSignals
from bio_inspired_nanochat.training.hardware import GIB

SHARE = 0.33  # of the time, for the undisturbed run
FEWEST = 60  # steps of a run
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTLED = 0.25  # share of a run after which its memory should not grow any more
LONG = 60  # half seconds that a process must live for its memory to count: before, it is still starting
RUN: dict[str, Any] = {
    "synapses": 1,
    "depth": 2,
    "n_embd": 64,
    "max_seq_len": 64,
    "vocab_size": 512,
    "device_batch_size": 4,
    "total_batch_size": 256,
    "num_experts": 5,
    "expert_slots": 7,
    "splitmerge_every": 10,
    "eval_every": 40,
    "eval_tokens": 2048,
    "sample_every": 0,
    "log_every": 1,
    "save_every": 15,
    "device": "cpu",
    **{
        f"syn_cfg.{name}": value
        for name, value in {"expert_youth": 5, "merge_similarity": -1.0, "bank_rate": 0.2, "bank_decay": 0.3}.items()
    },
    "syn_cfg.death_health_max": 0.4,
    "syn_cfg.split_health_min": 0.6,
    "syn_cfg.merge_health_max": 0.6,
}


@dataclass(frozen=True)
class SoakConfig:
    """How long to soak, how often to disturb, and how much memory may be gained."""

    minutes: float = knob(20.0, "time for both runs", lo=0.5, hi=10_000.0, unit="minutes")
    calm: float = knob(20.0, "mean time from one disturbance to the next", lo=2.0, hi=3600.0, unit="seconds")
    max_growth: float = knob(1.0, "most memory that a process may gain after the first quarter of its steps", lo=0.0, hi=1024.0, unit="GiB")
    seed: int = knob(0, "seed of the disturbances", lo=0, hi=1 << 31)
    folder: str = knob("", "where to work; empty is a temporary folder, removed afterwards")

    def __post_init__(self) -> None:
        validate(self)


@dataclass
class Part:
    """One process: its exit code (negative: the signal), its record if it printed one, resident GiB by seconds since it began."""

    code: int = 0
    record: dict[str, Any] | None = None
    memory: list[float] = field(default_factory=list)
    errors: str = ""

    def growth(self) -> float:
        """GiB from what it held after the first quarter of its life to the most that it held later; 0 for one that lived too briefly."""
        settled = self.memory[int(SETTLED * len(self.memory)) :]
        return max(settled) - settled[0] if len(self.memory) >= LONG else 0.0


def soak(config: SoakConfig) -> dict[str, Any]:
    """Run the test; the script's last line. `same` says whether both runs ended with the same loss, bit for bit.

    Raises UserError for a process that fails otherwise than by the signal that it got, and when it is interrupted itself.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        folder = Path(config.folder).expanduser() if config.folder else Path(made)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"folder={folder} cannot be made ({error.strerror}): choose another --folder") from None
        with StopSignals() as signals:
            signals.at_once = True  # so that no process of the run outlives this one
            try:
                return _soak(config, folder)
            except Interrupted:
                raise UserError(f"{signals.received} ended the soak test before its end") from None


def _soak(config: SoakConfig, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    rehearsal = _run(folder / "rehearsal", FEWEST)
    start = time.monotonic()
    steps = max(FEWEST, int(SHARE * 60 * config.minutes * rehearsal["tok_per_s"] / RUN["total_batch_size"]))
    say(f"undisturbed: {steps} steps")
    calm = _part(folder / "calm", steps, None)
    _require(calm, None)
    took = time.monotonic() - start
    say(f"disturbed: about every {config.calm:g} s, undisturbed it took {took:.0f} s")
    until = max(began + 60 * config.minutes, time.monotonic() + took)  # on a machine that grew busy the minutes may be over already
    parts, sent = _disturbed(config, folder / "disturbed", steps, until)
    last, whole = parts[-1].record, calm.record
    assert last is not None and whole is not None
    losses = [_losses(record) for record in (whole, last)]
    differing = next((step for step, pair in enumerate(zip(*losses, strict=False), 1) if pair[0] != pair[1]), None)
    ends = [record["final_loss"].hex() for record in (whole, last)]
    growth = max(part.growth() for part in [calm, *parts])
    lives = [read_lineage(record["log_dir"]) for record in (whole, last)]
    return {
        "same": ends[0] == ends[1] and losses[0] == losses[1] and lives[0] == lives[1] and len(losses[0]) == steps,
        "final_loss": last["final_loss"],
        "final_loss_hex": ends,
        "first_differing_step": differing,
        "steps": steps,
        "disturbances": {name: sent.count(name) for name in sorted(set(sent))},
        "processes": len(parts),
        "lineage_events": len(lives[0]) - RUN["depth"],
        "memory_growth_gib": round(growth, 4),
        "memory_bounded": growth <= config.max_growth,
        "seconds": round(time.monotonic() - began, 1),
    }


def _disturbed(config: SoakConfig, folder: Path, steps: int, until: float) -> tuple[list[Part], list[str]]:
    """Processes of one run to its end, all but the last ended by a signal as long as there is time; and the names of the signals."""
    rng, parts, sent = random.Random(config.seed), [], []
    while True:
        wait = rng.expovariate(1 / config.calm) if time.monotonic() < until else None
        number = rng.choice(SIGNALS)
        part = _part(folder, steps, None if wait is None else (2.0 + wait, number))
        parts.append(part)
        if part.record is not None and part.record["steps"] == steps and part.code == 0:
            _require(part, None)
            return parts, sent
        _require(part, number)
        sent.append(number.name)
        say(
            f"{number.name} after {2.0 + (wait or 0):.1f} s: {'killed' if part.record is None else 'stopped at step ' + str(part.record['steps'])}"
        )


def _require(part: Part, sent: signal.Signals | None) -> None:
    """UserError unless a process ended well, or by the SIGKILL that it got. SIGTERM and SIGINT may come while Python still starts."""
    fine = part.code == 0 and part.record is not None
    if not fine and (sent is None or part.code not in (-sent, 128 + sent) and "KeyboardInterrupt" not in part.errors):
        raise UserError(f"a process ended with {part.code} after {sent.name if sent else 'nothing'}: {part.errors[-600:]}")


def _run(folder: Path, steps: int) -> dict[str, Any]:
    part = _part(folder, steps, None)
    _require(part, None)
    assert part.record is not None
    return part.record


def _part(folder: Path, steps: int, disturbance: tuple[float, signal.Signals] | None) -> Part:
    """One process of the run in `folder`, to its end or to the disturbance (seconds, signal)."""
    flags = {**RUN, "num_iterations": steps, "checkpoint_dir": folder / "checkpoints", "log_dir": folder / "runs", "run_name": "soak"}
    command = [sys.executable, "-m", "scripts.base_train", "--resume=auto", *(f"--{name}={value}" for name, value in flags.items())]
    part, environment = Part(), {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "errors.txt", "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        seconds, sign = disturbance or (None, None)
        timer = None if seconds is None else threading.Timer(seconds, process.send_signal, [sign])
        if timer is not None:
            timer.start()
        watch = threading.Thread(target=_watch, args=(process, part.memory), daemon=True)
        watch.start()
        try:
            out, _ = process.communicate()
        finally:
            process.kill()
            if timer is not None:
                timer.cancel()
        watch.join()
        errors.seek(0)
        part.code, part.errors = process.returncode, errors.read()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    part.record = json.loads(lines[-1]) if part.code == 0 and lines else None
    return part


def _watch(process: subprocess.Popen, memory: list[float]) -> None:
    """Note the resident memory of a process every half second; nothing where the system does not tell."""
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        try:
            memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / GIB)
        except (OSError, IndexError):
            pass
        time.sleep(0.5)


def _losses(record: dict[str, Any]) -> Sequence[str]:
    """The loss of every step in a run's log, as hex."""
    lines = (Path(record["log_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["loss"].hex() for event in map(json.loads, lines) if event["kind"] == "step"]
