"""Supervised fine-tuning: conversations in, a model that answers out. The loop, its guards and its checkpoints are those of pre-training.

The model learns what the assistant says and where it ends, nothing else. Rows hold several conversations; the model keeps them apart
(`GPTConfig.doc_mask`), so that neither attention nor any state of a synapse passes from one to the next. What is saved has the
configuration of the model that was started from, field by field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_optimizer
from bio_inspired_nanochat.common import Rank, base_dir, pick_device, say
from bio_inspired_nanochat.config import GPTConfig, from_dict, to_dict
from bio_inspired_nanochat.data.conversations import Conversation, read_conversations
from bio_inspired_nanochat.data.rows import RowLoader, Transcript
from bio_inspired_nanochat.engine import Message, render, source_path, transcript
from bio_inspired_nanochat.engine.conversation import TUNED
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import Optimizer, build_optimizer
from bio_inspired_nanochat.synaptic import describe_execution
from bio_inspired_nanochat.tasks.dialogues import embedded_conversations
from bio_inspired_nanochat.tasks.smalltalk import PROMPTS
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training.callbacks import Callback
from bio_inspired_nanochat.training.config import fill_defaults
from bio_inspired_nanochat.training.folders import Folders, find_resume, named, take_folders
from bio_inspired_nanochat.training.job import Job
from bio_inspired_nanochat.training.loopstate import Progress
from bio_inspired_nanochat.training.plan import Plan, given_dtype, graph_setting, inherit, whole_forwards
from bio_inspired_nanochat.training.ranks import broadcast, on_rank0
from bio_inspired_nanochat.training.run import build_model, register_states, reload, restore, run_job, save
from bio_inspired_nanochat.training.tuneconfig import TuneConfig, tuned_config

FEWEST_STEPS = 32  # of a pass, where the batch is free
HELD_OUT = 20  # one conversation in so many of a user's own validates
ROWS = 8  # of a forward, where neither flags nor the pre-training say it


def tune(config: TuneConfig, callbacks: Sequence[Callback] = (), given: set[str] | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, as one process or as one of torchrun's. Returns the record that chat_sft prints last.

    callbacks, given: as for `run.train`. Raises UserError for everything that a user can fix.
    """
    given = _differing(config) if given is None else given
    device = pick_device(config.device)
    result, job = run_job(config.run_name, device, lambda rank: prepare(config, device, rank, given), callbacks)
    if job is None:
        return result
    left = {"left_out": job.loader.left_out, "cut": job.loader.cut}  # type: ignore[attr-defined]
    return result | {"source": str(job.origin), "epochs": job.loader.epoch} | left


def prepare(config: TuneConfig, device: torch.device, rank: Rank, given: set[str]) -> Job:
    """Everything that a run needs, from the configuration. Collective."""
    name, resume = broadcast(on_rank0(lambda: _name_and_resume(config)))
    found = resume or broadcast(on_rank0(lambda: find_checkpoint(source_path(config.source) or _base_root())))
    origin = on_rank0(lambda: load_checkpoint(found), then_all=True)
    assert origin is not None
    if resume is not None:
        config = on_rank0(lambda: _resumed_config(config, given, origin), then_all=True) or config
    tokenizer = Tokenizer.load(origin.file("tokenizer.json"))
    train, val = _transcripts(config, tokenizer)
    plan, config = _plan(config, origin, device, rank.world, train, val, tokenizer)
    folders: Folders = broadcast(on_rank0(lambda: take_folders(plan.config, name, resume)))
    plan = dataclasses.replace(plan, config=named(plan.config, folders))
    loader = _loader(plan, train, tokenizer, rank)
    if resume is None:
        _announce(plan, loader, len(train), len(val), origin)
    say(describe_execution(plan.model, device, plan.dtype))
    model, optimizer = _model(plan, origin, device)
    if resume is None:
        _warm_start(config, optimizer, origin)
    start = Path(origin.meta["sft_source"]) if resume is not None else origin.path
    about = _about(origin, config, plan, start)
    job = Job(
        plan=plan,
        device=device,
        rank=rank,
        model=model,
        optimizer=optimizer,
        loader=loader,
        val_loader=lambda: _loader(plan, val, tokenizer, rank, loop=False),
        tokenizer=tokenizer,
        progress=Progress(),
        save=lambda job: save(job, folders.checkpoints, about),
        reload=reload,
        log_dir=folders.logs,
        masked=True,
        prompts=[render([Message("user", text)], tokenizer, "chat") for text in PROMPTS[:3]],
        origin=start,
    )
    register_states(job)
    if resume is not None:
        restore(job, origin)
    return job


def _differing(config: TuneConfig) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default}


def _name_and_resume(config: TuneConfig) -> tuple[str, Path | None]:
    """The wanted name of the run, and the checkpoint that it continues. The name is needed to find that by its step alone."""
    name, by_path = config.run_name, config.resume not in ("", "auto") and not config.resume.isdigit()
    if name is None and not by_path:
        source = find_checkpoint(source_path(config.source) or _base_root())
        name = source.parent.name.removesuffix("-sft") + "-sft"
    return name or "sft", find_resume(config.resuming(name or "sft"), name or "sft")


def _base_root() -> Path:
    root = base_dir() / "checkpoints"
    if not root.exists():
        raise UserError(f"no checkpoint under {root} yet: train a model with python -m scripts.base_train, or give --source=PATH")
    return root


def _resumed_config(config: TuneConfig, given: set[str], saved: Checkpoint) -> TuneConfig:
    stored = saved.meta.get("sft_config")
    if saved.meta.get("kind") != TUNED or not isinstance(stored, dict):
        raise UserError(f"checkpoint {saved.path} is not of a fine-tuning: give it as --source={saved.path}, without --resume")
    merged = inherit(config, given, stored)
    if "epochs" in given and "num_iterations" not in given:
        merged["num_iterations"] = None
    return from_dict(TuneConfig, merged)


def _about(origin: Checkpoint, config: TuneConfig, plan: Plan, start: Path) -> dict[str, Any]:
    """Metadata of the checkpoints: everything that the model's own says, except where the run stands.

    The optimizer is recorded as it was in pre-training, because `lr_scale` is relative to that whenever the model is tuned again.
    """
    kept = {name: value for name, value in origin.meta.items() if name not in ("step", "loop")}
    settings = to_dict(plan.config) | {"optim": origin.meta["train_config"]["optim"]}
    return kept | {"kind": TUNED, "train_config": settings, "sft_config": to_dict(config), "sft_source": str(start)}


# --- conversations -----------------------------------------------------------------------------------------------------------------


def conversations(config: TuneConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Those to learn from and those to validate on. Raises UserError for files that hold something else."""
    train, val = embedded_conversations() if config.embedded else ([], [])
    own = _read_all(config.data)
    if config.val_data is not None:
        return train + own, _read_all(config.val_data)
    held = [place for place in range(len(own)) if place % HELD_OUT == HELD_OUT - 1] or [len(own) - 1] * (len(own) > 1)
    kept = set(range(len(own))) - set(held)
    return train + [own[place] for place in sorted(kept)], val + [own[place] for place in held]


def _read_all(paths: str | None) -> list[Conversation]:
    return [conversation for path in (paths or "").split(",") if path.strip() for conversation in read_conversations(path.strip())]


def _transcripts(config: TuneConfig, tokenizer: Tokenizer) -> tuple[list[Transcript], list[Transcript]]:
    both = on_rank0(lambda: conversations(config), then_all=True)
    assert both is not None
    train, val = ([transcript(conversation, tokenizer) for conversation in part] for part in both)
    return train, val


def _loader(plan: Plan, part: Sequence[Transcript], tokenizer: Tokenizer, rank: Rank, loop: bool = True) -> RowLoader:
    where = {"rank": rank.index, "world": rank.world, "loop": loop, "seed": plan.config.seed}
    return RowLoader(part, tokenizer.bos_id, plan.rows, plan.length, align=alignment(plan.model), **where)


def alignment(model: GPTConfig) -> int:
    """Where conversations may begin in a row: ticks are counted from the row's start, and alone a conversation begins with a tick."""
    return model.syn_cfg.tick if model.synapses else 1


# --- plan, model, optimizer --------------------------------------------------------------------------------------------------------


def _plan(
    config: TuneConfig,
    origin: Checkpoint,
    device: torch.device,
    world: int,
    train: Sequence[Transcript],
    val: Sequence[Transcript],
    tokenizer: Tokenizer,
) -> tuple[Plan, TuneConfig]:
    """The plan, and the config with its open numbers filled in."""
    own = from_dict(GPTConfig, origin.meta["model_config"])
    length = config.max_seq_len or own.sequence_len
    if length > own.sequence_len:
        raise UserError(f"max_seq_len={length} is longer than the context {own.sequence_len} of {origin.path}: use at most that")
    settings = fill_defaults(tuned_config(config, origin.meta, origin.path), device)
    settings = dataclasses.replace(settings, graph=graph_setting(settings.graph, device, world))
    packed = RowLoader(train, tokenizer.bos_id, 1, length, align=alignment(own)).rows
    rows = config.device_batch_size or max(1, min(settings.device_batch_size or ROWS, packed // (FEWEST_STEPS * world)))
    total = config.total_batch_size or rows * length * world
    accumulation, tokens = whole_forwards(total, rows, length, world, told=config.total_batch_size is not None)
    steps = config.num_iterations or max(1, round(config.epochs * packed * length / tokens))
    sizes: dict[str, Any] = {"device_batch_size": rows, "total_batch_size": tokens, "num_iterations": steps}
    usable = [item for item in val if any(item.learned[1 : length + 1])]
    held = RowLoader(usable, tokenizer.bos_id, rows, length, align=alignment(own), loop=False).rows + rows * world if usable else 0
    evaluated = min(held * length, held * length if config.eval_tokens is None else config.eval_tokens)
    model = dataclasses.replace(own, doc_mask=True)
    settings = dataclasses.replace(settings, **sizes, eval_tokens=evaluated)
    with_sizes = dataclasses.replace(config, **sizes, max_seq_len=length)
    dtype = given_dtype(settings, device)
    with torch.device("meta"):
        shape = GPT(model)
    return Plan(settings, model, dtype, world, steps, accumulation, tokens, shape.num_params(), shape.flops_per_token(), length), with_sizes


def _model(plan: Plan, origin: Checkpoint, device: torch.device) -> tuple[GPT, Optimizer]:
    model = build_model(plan, device)
    model.load_state_dict(origin.model)
    optimizer = build_optimizer(
        model.named_parameters(), model.param_roles(), plan.config.optim, n_embd=plan.model.n_embd, batch_tokens=plan.tokens_per_step
    )
    return model, optimizer


def _warm_start(config: TuneConfig, optimizer: Optimizer, origin: Checkpoint) -> None:
    """Take over the moments of the checkpoint's optimizer, where it has some."""
    if not config.warm_start:
        return
    try:
        fresh = optimizer.load_state_dict(load_optimizer(origin.path), strict=False)
    except UserError:
        say("notice: the checkpoint has no optimizer state: the optimizer starts afresh")
        return
    if fresh:
        say(f"notice: {len(fresh)} parameters have no moments in the checkpoint and start afresh, {fresh[0]} among them")


def _announce(plan: Plan, loader: RowLoader, train: int, val: int, origin: Checkpoint) -> None:
    say(f"starting from {origin.path}")
    for line in plan.describe():
        say(line)
    say(f"conversations: {train:,} in {loader.rows:,} rows to learn from, {val:,} to validate on")
    if loader.left_out or loader.cut:
        say(
            f"notice: {loader.cut} conversations lose their end in {plan.length} tokens, {loader.left_out} have no answer in them and are left out"
        )
