"""One pre-training run from its configuration to its record: data, plan, model, resume, loop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.checkpoint import CHOOSE, Checkpoint, load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.common import Rank, pick_device, say, whole_tree
from bio_inspired_nanochat.config import GPTConfig, from_dict, to_dict
from bio_inspired_nanochat.data import DataSource, ensure_tokenizer, resolve_data
from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.data.streams import StreamLoader, check_shared, count_streams, join_states
from bio_inspired_nanochat.engine.conversation import TUNED
from bio_inspired_nanochat.errors import UserError, damaged_file
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.injection import START
from bio_inspired_nanochat.optim import build_optimizer
from bio_inspired_nanochat.registry import inert_fields
from bio_inspired_nanochat.synaptic import describe_execution
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training import faults, guards
from bio_inspired_nanochat.training.callbacks import Callback, Console, JsonLog
from bio_inspired_nanochat.training.config import TrainConfig, fill_defaults
from bio_inspired_nanochat.training.folders import Folders, find_resume, named, take_folders
from bio_inspired_nanochat.training.hardware import crowded, fitting_rows, keep_freed_memory, peak_memory_gib, total_memory
from bio_inspired_nanochat.training.job import Job
from bio_inspired_nanochat.training.loop import Trainer
from bio_inspired_nanochat.training.loopstate import Generators, Progress
from bio_inspired_nanochat.training.parallel import load_weights, shard
from bio_inspired_nanochat.training.plan import Plan, check_memory, given_fields, inherit, make_plan
from bio_inspired_nanochat.training.ranks import broadcast, gather, on_rank0, process_group


def train(config: TrainConfig, callbacks: Sequence[Callback] = (), given: set[str] | None = None) -> dict[str, Any]:
    """Train as `config` says, as one process or as one of torchrun's. Returns the record that base_train prints last.

    callbacks: called after the built-in ones (console lines, JSON log). given: dotted names of the flags that were typed; a
    resumed run takes all others from its checkpoint (None: those that differ from their defaults).
    Raises UserError for everything that a user can fix: values, paths, memory, divergence.
    """
    given = given_fields(config) if given is None else given
    device = pick_device(config.device)
    return run_job(config.run_name, device, lambda rank: prepare(config, device, rank, given), callbacks)[0]


def run_job(
    run_name: str | None, device: torch.device, prepare: Callable[[Rank], Job], callbacks: Sequence[Callback]
) -> tuple[dict[str, Any], Job | None]:
    """Prepare a job and train it, as one process or as one of torchrun's: its record, and the job unless a signal came before its first step."""
    keep_freed_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of a run before this one in the process
    with process_group(device) as rank, guards.StopSignals() as signals:
        signals.at_once = rank.world == 1  # several ranks come to the loop, where they can agree to stop
        try:
            job = prepare(rank)
            signals.at_once = False
            trainer = Trainer(job, [Console(), JsonLog(), *callbacks], signals)
        except guards.Interrupted:
            say(f"notice: {signals.received} before the first step: nothing to save")
            return unstarted(run_name, device, signals.received), None
        return trainer.run(), job


def prepare(config: TrainConfig, device: torch.device, rank: Rank, given: set[str]) -> Job:
    """Everything that a run needs, from the configuration. Collective."""
    name = config.run_name or fill_defaults(config, device).default_run_name()
    resume = broadcast(on_rank0(lambda: find_resume(config, name)))
    saved = on_rank0(lambda: None if resume is None else load_checkpoint(resume), then_all=True)
    if saved is not None:
        config = on_rank0(lambda: _resumed_config(config, given, saved), then_all=True) or config
    source, tokenizer = _data(config, resume)
    plan: Plan = broadcast(on_rank0(lambda: make_plan(config, device, rank.world, tokenizer.vocab_size, tokenizer.bos_id)))
    if saved is not None:
        on_rank0(lambda: _check_same_model(plan.model, saved), then_all=True)
    folders: Folders = broadcast(on_rank0(lambda: take_folders(plan.config, name, resume)))
    plan = dataclasses.replace(plan, config=named(plan.config, folders))
    if saved is None:
        for line in (*plan.describe(), *crowded(device)):
            say(line)
    _say_inert(plan, given)
    on_rank0(lambda: check_memory(plan, device))
    say(describe_execution(plan.model, device, plan.dtype))
    model = shard(build_model(plan, device), plan, device)
    optimizer = build_optimizer(
        model.named_parameters(), model.param_roles(), plan.config.optim, n_embd=plan.model.n_embd, batch_tokens=plan.tokens_per_step
    )
    loader = _streams(source, tokenizer, plan, rank, saved)

    def val_loader() -> PackedLoader:
        return source.loader("val", tokenizer, plan.rows, plan.model.sequence_len, rank.index, rank.world, loop=False)

    torch.manual_seed(plan.config.seed + rank.index)
    job = Job(
        plan=plan,
        device=device,
        rank=rank,
        model=model,
        optimizer=optimizer,
        loader=loader,
        val_loader=val_loader,
        tokenizer=tokenizer,
        progress=Progress(),
        save=lambda job: save(job, folders.checkpoints),
        reload=reload,
        log_dir=folders.logs,
    )
    register_states(job)
    if saved is not None:
        restore(job, saved)
    return job


def _streams(source: DataSource, tokenizer: Tokenizer, plan: Plan, rank: Rank, saved: Checkpoint | None) -> StreamLoader:
    """This process's share of the training data. A resumed run keeps the streams that it began with."""

    def make(index: int, streams: int) -> PackedLoader:
        ahead = 2 if streams == rank.world else 1
        return source.loader("train", tokenizer, plan.rows, plan.model.sequence_len, index, streams, prefetch=ahead)

    begun = None
    if saved is not None and saved.meta.get("kind") != START:
        with damaged_file(f"the training state of checkpoint {saved.path}", CHOOSE):
            begun = join_states([part["loader"] for part in saved.meta["loop"]["ranks"]]).get("of")
    if not isinstance(begun, int) or begun < 1:
        begun = count_streams(plan.accumulation * rank.world, rank.world, sum(map(len, source.train_paths)))
    on_rank0(lambda: check_shared(begun, rank.world), then_all=True)
    return StreamLoader(make, begun, rank.index, rank.world)


def _say_inert(plan: Plan, given: set[str]) -> None:
    """A notice for every given flag of the synapses that changes nothing."""
    for line in inert_fields(plan.model.syn_cfg, given, plan.model.num_experts > 0) if plan.model.synapses else []:
        say(f"notice: {line}")


def _data(config: TrainConfig, resume: Path | None) -> tuple[DataSource, Tokenizer]:
    """Corpus and tokenizer; rank 0 prepares them first. A resumed run uses the tokenizer in its checkpoint."""

    def load() -> tuple[DataSource, Tokenizer]:
        source = resolve_data(config.data_dir, config.dataset)
        stored = None if resume is None else resume / "tokenizer.json"
        if stored is not None and stored.exists():
            return source, Tokenizer.load(stored)
        if resume is not None and config.tokenizer is None:
            raise UserError(f"checkpoint {resume} holds no tokenizer.json: give the one that its token ids are of by --tokenizer=FILE")
        size = fill_defaults(config, pick_device(config.device)).vocab_size
        assert size is not None
        return source, ensure_tokenizer(source, size, config.tokenizer)

    loaded = on_rank0(load, then_all=True)
    assert loaded is not None
    return loaded


def build_model(plan: Plan, device: torch.device) -> GPT:
    """The plan's model with fresh weights, drawn on the CPU so that they are the same on every device."""
    model = GPT(plan.model, seed=plan.config.seed).to(device)
    return model.set_compute_dtype(plan.dtype)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def save(job: Job, folder: Path, about: Mapping[str, Any] | None = None) -> Path | None:
    """Write a checkpoint of a job into the run's folder. Collective; rank 0 writes and returns the path.

    about: metadata that replaces or joins what is written of a pre-training.

    Optimizer states are equal on all ranks, so one is stored; what FSDP has divided is gathered first, so the files do not depend on
    `--parallel`. The position in the data and the random generators are each rank's own.
    """
    ranks = gather(job.states.of_rank())
    meta = {
        "step": job.progress.step,
        "kind": "base",
        "model_config": to_dict(job.plan.model),
        "train_config": to_dict(job.plan.config),
        "loop": {**job.states.of_run(), "ranks": ranks, "tokens_per_step": job.plan.tokens_per_step},
    } | dict(about or {})

    state = whole_tree({name: value.detach() for name, value in job.model.state_dict().items()})
    optimizer = whole_tree(job.optimizer.state_dict())

    def write() -> Path:
        files = {"tokenizer.json": job.tokenizer.to_json().encode()}
        keep = job.plan.config.keep_checkpoints or None
        return save_checkpoint(folder, job.progress.step, state, meta, optimizer, files, keep)

    return broadcast(on_rank0(write))


def register_states(job: Job) -> None:
    """Name what a checkpoint holds beside weights and optimizer."""
    job.states.add("progress", job.progress)
    job.states.add("loader", job.loader, per_rank=True)
    job.states.add("rng", Generators(job.device), per_rank=True)
    if job.plan.model.num_experts:
        job.states.add("ballots", job.ballots)


def restore(job: Job, saved: Checkpoint) -> None:
    """Continue from a checkpoint: weights, optimizer, position in the data, random generators, counters.

    One of the kind `injection.START` has weights only, and the run begins at step 0 with them. Raises UserError for a checkpoint without
    the state of a training.
    """
    if saved.meta.get("kind") == START:
        load_weights(job.model, saved.model)
        job.resumed_from = saved.path
        say(f"starting from the weights in {saved.path}")
        return
    with damaged_file(f"the training state of checkpoint {saved.path}", CHOOSE):
        loop = saved.meta.get("loop", {})
        if "progress" not in loop or "ranks" not in loop:
            raise UserError(f"checkpoint {saved.path} holds no training state: it can be evaluated and fine-tuned, not resumed")
        load_weights(job.model, saved.model)
        job.optimizer.load_state_dict(load_optimizer(saved.path))
        job.states.load(loop, _of_this_rank(job, loop["ranks"]))
        before = int(loop["tokens_per_step"])
    job.resumed_from = saved.path
    if before != job.plan.tokens_per_step:
        say(f"notice: steps had {before:,} tokens before, now {job.plan.tokens_per_step:,}")
    say(f"resumed from step {job.progress.step}: {saved.path}")


def reload(job: Job, path: Path) -> None:
    """Return to a checkpoint of this run after a fault, but not in the data, which goes on where it is: the batch is not met again.

    The counters of faults and the time go on, too. Collective.
    """
    saved = on_rank0(lambda: load_checkpoint(path), then_all=True)
    assert saved is not None
    now = job.progress.state_dict()
    load_weights(job.model, saved.model)
    job.optimizer.load_state_dict(load_optimizer(saved.path))
    job.progress.load_state_dict(saved.meta["loop"]["progress"])
    job.progress.load_state_dict(
        {**job.progress.state_dict(), **{name: now[name] for name in ("seconds", "faults", "skipped", "rollbacks")}}
    )


def unstarted(run_name: str | None, device: torch.device, stopped: str) -> dict[str, Any]:
    """The record of a run that a signal ended before its first step; see `Trainer.result`."""
    empty = ("final_loss", "val_bpb", "val_loss", "first_loss", "tok_per_s", "params", "checkpoint", "resumed_from", "log_dir")
    counts = dict.fromkeys(("steps", "tokens", "skipped_steps", "rollbacks", "lineage_events", "looks_left_out"), 0)
    rest = {"stopped": stopped, "seconds": 0.0, "peak_memory_gib": round(peak_memory_gib(device), 3), "device": str(device), "data": {}}
    return dict.fromkeys(empty) | counts | rest | {"run_name": run_name}


def _of_this_rank(job: Job, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What this process continues from the states of those that wrote a checkpoint, be they as many or not."""
    if len(ranks) != job.rank.world:
        say(f"notice: the checkpoint was written by {len(ranks)} processes, this run has {job.rank.world}: they share the same data anew")
    own = ranks[job.rank.index] if job.rank.index < len(ranks) else job.states.of_rank()
    return {**own, "loader": join_states([part["loader"] for part in ranks])}


def _resumed_config(config: TrainConfig, given: set[str], saved: Checkpoint) -> TrainConfig:
    stored = saved.meta.get("train_config")
    if saved.meta.get("kind") == TUNED:
        raise UserError(f"checkpoint {saved.path} is of a fine-tuning: go on with python -m scripts.chat_sft --resume={saved.path}")
    if not isinstance(stored, dict):
        raise UserError(f"checkpoint {saved.path} holds no train_config: it was not written by base_train")
    return from_dict(TrainConfig, inherit(config, given, stored))


def _check_same_model(model: GPTConfig, saved: Checkpoint) -> None:
    """UserError when the flags ask for another model than the checkpoint's. The execution backend may change."""
    now, then = _flat(to_dict(model)), _flat(to_dict(from_dict(GPTConfig, saved.meta.get("model_config") or {})))
    for name in (*FLAG_OF, *now):
        if name != "backend" and now[name] != then[name]:
            raise UserError(
                f"{FLAG_OF.get(name, name)}={now[name]} differs from {then[name]} in {saved.path}: "
                "a resumed run keeps its model; leave the flag out or start afresh"
            )


# Model fields that other fields follow from, with the flag that sets them.
FLAG_OF = {"n_layer": "depth", "n_embd": "n_embd", "sequence_len": "max_seq_len"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# --- runs that train nothing -----------------------------------------------------------------------------------------------------


def print_config(config: TrainConfig, given: set[str] | None = None) -> dict[str, Any]:
    """The configuration with every default filled in, and what follows from it, without touching data or files.

    given: see `train`.
    """
    plan = make_plan(config, pick_device(config.device), 1)
    for line in plan.describe():
        say(line)
    _say_inert(plan, given_fields(config) if given is None else given)
    say(json.dumps(to_dict(plan.config), indent=1))
    return {"config": to_dict(plan.config), "model": to_dict(plan.model), "params": plan.params, "flops_per_token": plan.flops_per_token}


def dry_run(config: TrainConfig, given: set[str] | None = None) -> dict[str, Any]:
    """Parameters, operations and memory of a run, and one real optimizer step on random tokens. Writes nothing, reads no data.

    given: see `train`.
    """
    device = pick_device(config.device)
    plan = make_plan(config, device, 1)
    for line in plan.describe():
        say(line)
    _say_inert(plan, given_fields(config) if given is None else given)
    check_memory(plan, device)
    say(f"memory: about {plan.memory_gib():.2f} GiB for {plan.rows} rows in {str(plan.dtype).removeprefix('torch.')}")
    memory = total_memory(device)
    half = max(1, plan.rows // 2)

    def fits() -> int:
        return half if memory is None else fitting_rows(plan.model, plan.dtype, plan.params, memory, most=half)

    with guards.out_of_memory_as_user_error(plan.rows, fits, str(device)):
        loss = _one_step(plan, device)
    if not math.isfinite(loss):
        raise faults.diverged(faults.Fault(1, "the loss is not finite", {}), None)
    say(f"one step on random tokens: loss {loss:.4f}, {peak_memory_gib(device):.2f} GiB at the peak")
    return {
        "dry_run": True,
        "params": plan.params,
        "flops_per_token": plan.flops_per_token,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
        "total_batch_size": plan.tokens_per_step,
        "memory_gib": round(plan.memory_gib(), 3),
        "peak_memory_gib": round(peak_memory_gib(device), 3),
        "first_loss": loss,
        "device": str(device),
    }


def _one_step(plan: Plan, device: torch.device) -> float:
    model = build_model(plan, device)
    optimizer = build_optimizer(
        model.named_parameters(), model.param_roles(), plan.config.optim, n_embd=plan.model.n_embd, batch_tokens=plan.tokens_per_step
    )
    generator = torch.Generator().manual_seed(plan.config.seed)
    tokens = torch.randint(plan.model.vocab_size, (plan.rows, plan.model.sequence_len + 1), generator=generator).to(device)
    optimizer.schedule(0, plan.steps)
    loss = model.run(tokens[:, :-1], tokens[:, 1:].contiguous()).loss
    assert loss is not None, "there are targets"
    loss.backward()
    optimizer.clip_grad_norm()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())
