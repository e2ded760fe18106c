"""The speedrun: a vanilla and a synaptic model of one size, on the same tokens and seed, side by side within a few minutes.

The time decides how long both train: their pace is measured first, then they train in turns, with equally many steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.common import base_dir, pick_device, say, table, this_rank
from bio_inspired_nanochat.common.console import duration
from bio_inspired_nanochat.config import PRESETS, SynapticConfig, device_knob, knob, validate
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.data import DataSource, ensure_tokenizer, resolve_data
from bio_inspired_nanochat.data.prepare import PrepareConfig, prepare
from bio_inspired_nanochat.data.source import tokenizer_path
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training.callbacks import Callback
from bio_inspired_nanochat.training.comparison import KINDS, Findings, Outcome, compare, difference
from bio_inspired_nanochat.training.config import TrainConfig
from bio_inspired_nanochat.training.folders import checkpoint_root
from bio_inspired_nanochat.training.lesson import seconds_for, teach
from bio_inspired_nanochat.training.pace import Budget, Pace, check_feasible, make_budget, measure
from bio_inspired_nanochat.training.plan import Plan, make_plan
from bio_inspired_nanochat.training.report import table_rows, with_error, write_report
from bio_inspired_nanochat.training.rounds import Entrant, train_in_turns

VARIABLES = {"depth": "SPEEDRUN_DEPTH", "minutes": "SPEEDRUN_MINUTES", "data": "SPEEDRUN_DATA"}
AFTER_SECONDS = 25.0  # samples, pictures, report and two checkpoints on a busy machine
ASKING = 1.4  # seconds of the lesson for each of its training: start, checkpoint and questions
MOST_EPOCHS = 4  # passes over the training text; more would only learn it by heart
COMPILE_MINUTES = 3.0  # below this, torch.compile costs a GPU more time than it saves
# On two CPU cores the lowest bits per byte in 10 minutes, of depth 3 and 4, vocabulary 2048 and 4096, and 4 and 8 rows.
_CPU = {"depth": 3, "vocab_size": 2048, "max_seq_len": 256, "device_batch_size": 4}
_GPU = {"depth": 8, "vocab_size": 8192, "max_seq_len": 1024, "total_batch_size": 1 << 15}


@dataclass(frozen=True)
class SpeedrunConfig:
    """How large, how long and on what. `None` (written `auto`) follows from the device."""

    depth: int | None = knob(None, "layers of both models (SPEEDRUN_DEPTH); auto is 3 on a CPU, 8 on a GPU", lo=1, hi=64)
    minutes: float = knob(9.5, "time for everything after installation (SPEEDRUN_MINUTES)", lo=0.5, hi=600.0, unit="minutes")
    data: str | None = knob(
        None,
        "folder of parquet shards, or a text file or folder (SPEEDRUN_DATA); none is the embedded demo corpus",
        path="exists",
        none="none",
    )
    seed: int = knob(0, "seed of weights and samples, the same for both models", lo=0, hi=(1 << 62) - 1)
    device: str = device_knob()
    syn_preset: str = knob("default", "synapses of the synaptic model", choices=tuple(PRESETS))
    n_embd: int | None = knob(None, "width of both models; auto is 64 per layer", lo=8, hi=16384, aliases=("width",))
    max_seq_len: int | None = knob(None, "context length; auto is 256 on a CPU, 1024 on a GPU", lo=8, hi=1 << 16, unit="tokens")
    vocab_size: int | None = knob(None, "token ids of the tokenizer; auto is 2048 on a CPU, 8192 on a GPU", lo=266, hi=1 << 20)
    batch_size: int | None = knob(
        None, "rows of one forward; auto is 4 on a CPU and what fits on a GPU", lo=1, hi=4096, aliases=("device_batch_size",)
    )
    max_steps: int | None = knob(
        None, "never more optimizer steps than this; auto follows from the time", lo=1, hi=1 << 40, aliases=("num_iterations",)
    )
    lesson_steps: int | None = knob(
        None, "optimizer steps of the fine-tuning for chat; auto follows from the time, 0 leaves it out", lo=0, hi=1 << 40, off=0
    )
    log_dir: str = knob("runs", "folder that gets the logs of both runs and the folder of the report")
    report: str = knob("report.md", "where a copy of the report goes, its pictures into report_files/ beside it")

    def __post_init__(self) -> None:
        validate(self)


def read_config(argv: Sequence[str] | None, environ: Mapping[str, str], prog: str) -> SpeedrunConfig:
    """The configuration from flags and SPEEDRUN_* variables; flags win. Raises UserError in terms of what the user wrote."""
    words = []
    for name, variable in VARIABLES.items():
        if value := environ.get(variable, "").strip():
            try:
                parse(SpeedrunConfig, [f"--{name}={value}"], prog=prog, description="")
            except UserError as error:
                raise UserError(str(error).replace(f"--{name}=", f"{variable}=")) from None
            words.append(f"--{name}={value}")
    description = (
        "Train a vanilla and a synaptic model of one size on the same text, compare them and teach the synaptic one to chat, within --minutes. "
        f"The variables {', '.join(VARIABLES.values())} set the defaults of the flags of that name."
    )
    typed = sys.argv[1:] if argv is None else argv
    return parse(SpeedrunConfig, [*words, *(word for word in typed if word != "--")], prog=prog, description=description)


def speedrun(config: SpeedrunConfig, callbacks: Callable[[], list[Callback]] = list, began: float | None = None) -> dict[str, Any]:
    """Run it all; returns the record that the script prints last.

    began: `time.perf_counter()` from which the minutes count (None: now); callbacks: makes further callbacks for each part of a run.
    Raises UserError for what a user can fix. An interrupt ends the training in progress with a checkpoint; the record then has
    `stopped`.
    """
    began = time.perf_counter() if began is None else began
    if this_rank().world > 1:
        raise UserError(f"the speedrun is one process, this launch has {this_rank().world}: start it without torchrun")
    device = pick_device(config.device)
    say("[1/5] text and tokenizer")
    folder = data_folder(config.data)
    source = resolve_data(folder)
    base = base_config(config, device, folder)
    assert base.vocab_size is not None
    tokenizer = ensure_tokenizer(source, base.vocab_size)
    base = dataclasses.replace(base, tokenizer=str(tokenizer_path(source, base.vocab_size)))
    plans = same_plans(base, config.syn_preset, device, tokenizer)
    say(f"[2/5] pace of both models on {device_name(device)}")
    plans, paces = measure_both(plans, device, config.minutes)
    left = 60 * config.minutes - (time.perf_counter() - began)
    train_tokens, val_tokens = (estimated_tokens(source, split, tokenizer) for split in ("train", "val"))
    read = max(1, int(MOST_EPOCHS * train_tokens / plans[0].tokens_per_step))
    most = config.max_steps or read
    batch = plans[0].rows * plans[0].model.sequence_len
    lesson_seconds = 0.0 if config.lesson_steps == 0 else seconds_for(config.minutes, paces[1].step)
    budget = make_budget(left, min(AFTER_SECONDS + ASKING * lesson_seconds, 0.35 * left), paces, batch, most, val_tokens)
    _announce(plans, paces, budget, None if config.max_steps else read)
    name = run_name(config, plans[0])
    entrants = [Entrant(kind, plan, f"{name}-{kind}", pace.step) for kind, plan, pace in zip(KINDS, plans, paces, strict=True)]
    signal = train_in_turns(entrants, budget.steps, most, budget.seconds, budget.eval_tokens, callbacks)
    outcomes = [Outcome(entrant.plan, entrant.record(), entrant.curve) for entrant in entrants if entrant.rounds]
    if signal:
        return _interrupted(outcomes, signal)
    say("[4/5] validation and samples")
    synapses = compare(outcomes, source, tokenizer, budget.eval_tokens, config.seed, own_text=config.data is not None)
    lesson = None
    if lesson_seconds:
        say("[5/5] a lesson in conversation for the synaptic model")
        places = {"name": f"{name}-chat", "device": device.type, "seed": config.seed, "log_dir": config.log_dir}
        lesson = teach(outcomes[1].record["checkpoint"], lesson_seconds, config.lesson_steps, callbacks(), **places)
    found = Findings(
        name=name,
        data=config.data or "the embedded demo corpus",
        machine=device_name(device) + (f" ({torch.get_num_threads()} used)" if device.type == "cpu" else ""),
        command=command(config, outcomes),
        seed=config.seed,
        folder=Path(config.log_dir).expanduser() / name,
        val_tokens=budget.eval_tokens,
        vanilla=outcomes[0],
        synaptic=outcomes[1],
        synapses=synapses,
        lesson=lesson,
        seconds=time.perf_counter() - began,
    )
    return _conclude(found, write_report(found, Path(config.report).expanduser()))


# --- before training ---------------------------------------------------------------------------------------------------------------


def data_folder(data: str | None) -> str | None:
    """The folder of shards that `data` means; text files are made into shards once, under the base folder. None is the demo corpus."""
    if data is None:
        return None
    path = Path(data).expanduser().resolve()
    if path.is_dir() and any(path.glob("*.parquet")):
        return str(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:12]
    out = base_dir() / "data" / f"{path.stem or 'text'}-{digest}"
    if not out.exists():
        prepare(PrepareConfig(input=str(path), out=str(out)))
    return str(out)


def base_config(config: SpeedrunConfig, device: torch.device, folder: str | None) -> TrainConfig:
    """The configuration that both models share, as far as it is known before the pace."""
    gpu = device.type == "cuda"
    sizes: dict[str, Any] = dict(_GPU if gpu else _CPU)
    sizes |= {name: getattr(config, name) for name in ("depth", "vocab_size", "max_seq_len") if getattr(config, name) is not None}
    if config.batch_size is not None:
        sizes |= {"device_batch_size": config.batch_size, "total_batch_size": None}
    return TrainConfig(
        **sizes,
        n_embd=config.n_embd,
        compile="1" if gpu and config.minutes >= COMPILE_MINUTES else "0",
        num_iterations=1,
        seed=config.seed,
        device=device.type,
        data_dir=folder,
        log_dir=config.log_dir,
        sample_every=0,
        save_every=0,
    )


def same_plans(base: TrainConfig, preset: str, device: torch.device, tokenizer: Tokenizer) -> list[Plan]:
    """Plans of the vanilla and the synaptic model with equal batches: as many rows as the hungrier of them can take."""
    synaptic = dataclasses.replace(base, synapses=True, syn_preset=preset, syn_cfg=SynapticConfig.preset(preset))
    plans = [make_plan(config, device, 1, tokenizer.vocab_size, tokenizer.bos_id) for config in (base, synaptic)]
    return _with_rows(plans, device, min(plan.rows for plan in plans))


def _with_rows(plans: Sequence[Plan], device: torch.device, rows: int) -> list[Plan]:
    configs = [dataclasses.replace(plan.config, device_batch_size=rows) for plan in plans]
    shape = plans[0].model
    return [make_plan(config, device, 1, shape.vocab_size, shape.bos_token_id) for config in configs]


def measure_both(plans: list[Plan], device: torch.device, minutes: float) -> tuple[list[Plan], list[Pace]]:
    """The pace of both models; with fewer rows for both where the memory of a GPU asks for it.

    Raises UserError when not even one row fits.
    """
    check_feasible(plans, device, 60 * minutes)
    seconds = min(10.0, max(0.5, 0.015 * 60 * minutes))
    while True:
        try:
            # the last, synaptic model has the most and the smallest products, which suffer most from threads that wait for a core
            paces = [measure(plan, device, seconds, choose_threads=plan is plans[-1]) for plan in reversed(plans)]
            return plans, paces[::-1]
        except torch.OutOfMemoryError:
            rows = plans[0].rows // 2
            if rows == 0:
                raise UserError(f"{device} has too little memory for depth={plans[0].model.n_layer}: use a smaller --depth") from None
            say(f"notice: {2 * rows} rows do not fit into the memory of {device}: trying {rows}")
        torch.cuda.empty_cache()
        plans = _with_rows(plans, device, rows)


def estimated_tokens(source: DataSource, split: str, tokenizer: Tokenizer) -> int:
    """About how many tokens a split has, from its first documents."""
    texts = list(itertools.islice(source.texts(split), 200))
    tokens = sum(map(len, tokenizer.encode_batch(texts, bos=True)))
    return int(tokens / max(1, len(texts)) * sum(map(len, source.parts(split))))


def _announce(plans: Sequence[Plan], paces: Sequence[Pace], budget: Budget, most: int | None) -> None:
    model, tokens = plans[0].model, plans[0].tokens_per_step
    rates = ", ".join(f"{kind} {tokens / pace.step:,.0f} tokens/s" for kind, pace in zip(KINDS, paces, strict=True))
    times = " + ".join(duration(budget.steps * pace.step) for pace in paces)
    shape = f"{model.n_layer} layers x {model.n_embd}, context {model.sequence_len}, vocabulary {model.vocab_size}"
    say(f"both models: {shape}, {plans[0].rows} rows, {str(plans[0].dtype).removeprefix('torch.')}, CPU threads: {torch.get_num_threads()}")
    say(f"measured: {rates}")
    say(f"plan: {budget.steps:,} steps of {tokens:,} tokens for each model, about {times}")
    if most is not None and budget.steps < 50:
        fix = f"the text is read {MOST_EPOCHS} times then, so give more of it" if budget.steps == most else "give more --minutes"
        say(f"notice: so few steps say little about either model: {fix}")


def run_name(config: SpeedrunConfig, plan: Plan) -> str:
    """`speedrun-d4`, with a number behind it when that name is taken; the two runs add their kind to it."""
    stem = f"speedrun-d{plan.model.n_layer}"
    logs, root = Path(config.log_dir).expanduser(), checkpoint_root()
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        taken = [logs / name, *(place / f"{name}-{kind}" for place in (logs, root) for kind in KINDS)]
        if not any(path.exists() for path in taken):
            return name
    raise AssertionError("the count does not end")


# --- the end -----------------------------------------------------------------------------------------------------------------------


def _interrupted(outcomes: Sequence[Outcome], signal: str) -> dict[str, Any]:
    say(f"stopped by {signal}. To go on with a model:")
    for outcome in outcomes:
        say(f"  {python()} -m scripts.base_train --resume={outcome.record['checkpoint']}")
    done = [outcome.summary() for outcome in outcomes]
    return dict(itertools.zip_longest(KINDS, done)) | {"stopped": signal}


def _conclude(found: Findings, report: Path) -> dict[str, Any]:
    """Table, samples and the commands to type next; returns the record."""
    say("")
    table(["", *KINDS, "difference"], table_rows(found))
    raised, error = difference(found.synaptic.blocks, found.synapses.zeroed, "nats_per_token")
    say(f"setting all gains of the trained synapses to zero changes the validation loss by {with_error(raised, error)} nats per token")
    for kind, outcome in found.outcomes:
        say(f"\n{kind} writes:")
        for prompt, text in outcome.samples:
            say("  " + (prompt + text).strip().replace("\n", "\n  "))
    if found.lesson is not None:
        say("\nafter its lesson it answers:")
        for answer in found.lesson.answers[:3]:
            say(f"  {answer.prompt} -> {answer.text}")
        say(f"{found.lesson.ended} of {len(found.lesson.answers)} answers end with the end token")
    say(f"\nreport: {report}, and {found.folder / 'report.md'}; {duration(found.seconds)} in all")
    say("\nnext, type one of these:")
    if found.lesson is not None:
        say(f"  {python()} -m scripts.chat_cli --source={found.lesson.record['checkpoint']}        (talk to it)")
        say(f"  {python()} -m scripts.chat_web --source={found.lesson.record['checkpoint']}        (in the browser)")
    say(f'  {python()} -m scripts.chat_cli --checkpoint={found.synaptic.record["checkpoint"]} --prompt="Once upon a time"')
    say(f"  {python()} -m tensorboard.main --logdir {found.folder.parent}")
    say("  SPEEDRUN_DATA=your_text.txt bash speedrun.sh        (train on your own text)")
    val = difference(found.synaptic.blocks, found.synapses.zeroed)[0]
    return {
        **{kind: outcome.summary() for kind, outcome in found.outcomes},
        "zero_gains": {"raises_val_loss": raised, "error": error, "raises_val_bpb": val},
        "seconds": round(found.seconds, 1),
        "report": str(report),
        "log_dir": str(found.folder.parent),
    } | ({} if found.lesson is None else found.lesson.closing())


def command(config: SpeedrunConfig, outcomes: Sequence[Outcome]) -> str:
    """A command that repeats the run with as many steps, on any machine that is fast enough."""
    changed = [
        f"--{f.name}={getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if f.name not in ("max_steps", "depth") and getattr(config, f.name) != f.default
    ]
    depth, steps = outcomes[0].plan.model.n_layer, outcomes[0].record["steps"]
    return " ".join([python(), "-m scripts.speedrun", f"--depth={depth}", *changed, f"--max_steps={steps}"])


def python() -> str:
    """The running interpreter as a person would type it here."""
    return sys.executable.removeprefix(os.getcwd() + os.sep) or "python"


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU with {os.cpu_count()} cores" if device.type == "cpu" else device.type.upper()
