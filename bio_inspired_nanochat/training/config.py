"""TrainConfig: every flag of pre-training, and the defaults that follow from the device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from bio_inspired_nanochat.config import (
    PRESETS,
    GPTConfig,
    SynapticConfig,
    device_knob,
    dtype_knob,
    knob,
    knobs_of,
    sizes_from_depth,
    validate,
)
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import OptimConfig

CONTEXT_LIMIT = 1 << 20
# Options of torch.compile by --compile, None for none. The last is PyTorch's mode of that name but for CUDA graphs, which are --graph's.
COMPILE: dict[str, dict[str, bool] | None] = {"0": None, "1": {}, "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True}}


@dataclass(frozen=True)
class TrainConfig:
    """One pre-training run. `None` (written `auto`) is filled in by `resolve`, from the device and the depth."""

    synapses: bool = knob(False, "replace every attention layer by a synaptic one", off=False)
    depth: int | None = knob(None, "the one dial: number of layers, the width follows; auto is 4 on a CPU, 12 on a GPU", lo=1, hi=256)
    n_embd: int | None = knob(None, "width, rounded up to whole heads; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is 64, from depth 16 on 128", lo=2, hi=1024)
    n_kv_head: int | None = knob(None, "key and value heads; fewer than the query heads share keys; auto is all of them", lo=1, hi=1024)
    max_seq_len: int | None = knob(
        None, "context length; auto is 256 on a CPU, 1024 or 2048 on a GPU", lo=2, hi=CONTEXT_LIMIT, unit="tokens"
    )
    vocab_size: int | None = knob(None, "token ids of the tokenizer, specials included; auto follows device and data", lo=266, hi=1 << 20)
    window_pattern: str = knob("L", "attention window per layer, repeated: L is the full context, S a quarter; the last layer is L")
    value_embeds: bool = knob(True, "gated value embeddings on alternate layers", off=False)
    doc_mask: bool = knob(False, "a BOS token starts a document: attention and synapses do not look across it", off=False)
    backend: str = knob(
        "auto", "execution of the attention operators; auto picks by device", choices=knobs_of(GPTConfig)["backend"].choices
    )
    init: str = knob(
        "standard",
        "initial q, k, v and mlp input matrices: uniform draws, or a cellular automaton with the same mean and spread",
        choices=knobs_of(GPTConfig)["init"].choices,
        off="standard",
    )
    dropout: float = knob(
        0.0, "share of what attention and MLP add to the residual stream that is zeroed in training", lo=0.0, hi=0.9, off=0.0
    )
    mlp_ratio: int = knob(4, "hidden units of an MLP, as a multiple of n_embd", lo=1, hi=64)
    num_experts: int | None = knob(
        None, "experts of every MLP at birth, beside the shared one; auto is 8 with --splitmerge_every, else none", lo=0, hi=4096, off=0
    )
    moe_top_k: int = knob(2, "experts that a token visits beside the shared one", lo=1, hi=64)
    expert_slots: int | None = knob(
        None, "places for experts, living and dead; auto is half as many again as num_experts with --splitmerge_every", lo=0, hi=8192
    )
    expert_ratio: int = knob(2, "hidden units of an expert, as a multiple of n_embd (the shared one has mlp_ratio)", lo=1, hi=64)
    splitmerge_every: int = knob(
        0, "steps between life cycles of experts: death, merge, split, birth; 0 has none", lo=0, off=0, unit="steps"
    )
    syn_preset: str = knob(
        "default", f"synaptic constants that --syn_cfg.* flags then change: one of {', '.join(PRESETS)}, or a .json file of the tuner"
    )
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")

    num_iterations: int | None = knob(
        None, "optimizer steps of the whole run; auto follows --tokens_per_param", lo=1, hi=1 << 40, aliases=("max_steps",), unit="steps"
    )
    tokens_per_param: float | None = knob(
        None,
        "training tokens per matrix and head parameter, where --num_iterations is auto; auto is 0.5 on a CPU, 12 on a GPU",
        lo=0.001,
        hi=1e5,
    )
    device_batch_size: int | None = knob(
        None, "rows of one forward on one device; auto is 8 on a CPU and what fits on a GPU", lo=1, hi=1 << 20, aliases=("batch_size",)
    )
    total_batch_size: int | None = knob(
        None,
        "tokens of one optimizer step over all devices, rounded to whole forwards; auto grows with the length of the run",
        lo=1,
        hi=1 << 40,
        unit="tokens",
    )
    optim: OptimConfig = knob(OptimConfig, "optimizer")
    consolidate_every: int = knob(
        0,
        "steps between consolidations: the fast weights of the last batch's sequences join the slow weights; 0 never does it",
        lo=0,
        off=0,
        unit="steps",
    )
    consolidate_strength: float = knob(0.01, "share of the fast weights that a consolidation adds", lo=-1.0, hi=1.0)
    seed: int = knob(0, "seed of weights, sampling and everything else that is random", lo=0, hi=(1 << 63) - 1)
    max_minutes: float = knob(
        0.0,
        "end after this time; the learning rate decays by whichever runs out first, steps or minutes; 0 is no limit",
        lo=0.0,
        off=0.0,
        unit="minutes",
    )

    on_nonfinite: str = knob(
        "stop",
        "after a loss or gradient that is not finite, or a loss spike: stop, skip that update, or rollback to the last checkpoint and go on "
        "with the data after it; skip and rollback wait for the device in every step",
        choices=("stop", "skip", "rollback"),
    )
    max_faults: int = knob(10, "such steps that skip and rollback put up with in a whole run, then it stops", lo=0)
    loss_spike: float = knob(
        5.0, "a loss this far above the mean of the steps before (at most 20) is a spike; 0 sees none", lo=0.0, off=0.0, unit="nats"
    )

    eval_every: int = knob(250, "steps between evaluations; 0 evaluates only at the end", lo=0, off=0, unit="steps")
    eval_tokens: int | None = knob(
        None, "validation tokens of one evaluation; 0 never evaluates; auto is 65536 on a CPU, 2097152 on a GPU", lo=0, off=0, unit="tokens"
    )
    sample_every: int = knob(1000, "steps between samples of text, with a last one at the end; 0 never samples", lo=0, off=0, unit="steps")
    save_every: int = knob(500, "steps between checkpoints; 0 saves only the last, -1 not even that", lo=-1, off=-1, unit="steps")
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept; 0 keeps all", lo=0, off=0)
    vitals_every: int | None = knob(
        None,
        "steps between looks at the synapses and experts for the logs, with a first and a last one; 0 never looks; auto is 100, less "
        "often where looks take more than half a percent of the time",
        lo=0,
        off=0,
        unit="steps",
    )
    log_every: int = knob(10, "steps between log lines; 0 logs none", lo=0, off=0, unit="steps")

    device: str = device_knob()
    dtype: str = dtype_knob()
    parallel: str = knob(
        "ddp",
        "how several processes share the model: ddp keeps it whole on each and averages gradients, fsdp divides parameters, gradients and "
        "moments by rows",
        choices=("ddp", "fsdp"),
    )
    bucket_mb: float = knob(
        25.0,
        "gradients that travel together under ddp; larger is better for slow links, smaller overlaps more",
        lo=0.01,
        hi=4096.0,
        unit="MB",
    )
    reduce_dtype: str = knob(
        "float32",
        "dtype in which gradients travel between processes; bfloat16 halves the bytes and rounds",
        choices=("float32", "bfloat16"),
    )
    reshard: bool = knob(
        False, "under fsdp, free a block's gathered parameters after its forward: less memory, and they travel once more", off=False
    )
    compile: str = knob(
        "auto",
        "torch.compile; auto is 1 on CUDA, 0 elsewhere; max-autotune also times more kernels to choose from, which takes minutes",
        choices=("auto", *COMPILE),
    )
    graph: str = knob(
        "auto", "record forward and backward as a CUDA graph and replay it; auto is 1 for one process on CUDA, 0 elsewhere",
        choices=("auto", "0", "1"),
    )  # fmt: skip
    data_dir: str | None = knob(
        None, "folder of parquet shards (see scripts.prepare_data); none is the embedded demo corpus", path="exists", none="none"
    )
    dataset: str | None = knob(None, "name of a Hugging Face dataset to use instead", none="none")
    tokenizer: str | None = knob(None, "tokenizer file; auto trains one for the data once and keeps it", path="file")
    checkpoint_dir: str | None = knob(
        None, "folder that gets one folder of checkpoints per run; auto is checkpoints/ under $NANOCHAT_BASE_DIR"
    )
    log_dir: str = knob("runs", "folder that gets one folder of logs per run")
    run_name: str | None = knob(None, "name of the run's folders; auto is like d4 or d4-synaptic; a taken name gets a number")
    resume: str = knob("", "continue a run: auto (its newest checkpoint, if any), a step number or a path; empty starts afresh")
    stop_after: int = knob(0, "save and stop after this step as if interrupted; 0 does not", lo=0, off=0, unit="steps")
    print_config: bool = knob(False, "print the configuration with all defaults filled in and stop", off=False)
    dry_run: bool = knob(False, "report parameters, FLOPs and memory, try one step on random tokens, write nothing and stop", off=False)

    def __post_init__(self) -> None:
        validate(self)
        if not self.synapses and self.syn_cfg != SynapticConfig():
            raise UserError("--syn_cfg.* and --syn_preset do nothing without synapses: add --synapses=1")
        if self.splitmerge_every and self.num_experts == 0:
            raise UserError("--splitmerge_every has nobody to act on with --num_experts=0: leave --num_experts out (8) or give at least 3")
        if self.consolidate_every and not (self.synapses and self.syn_cfg.hebb != "off"):
            raise UserError(
                f"consolidate_every={self.consolidate_every} needs fast weights: add --synapses=1 --syn_cfg.hebb=delta, or set it to 0"
            )
        if self.reshard and self.parallel != "fsdp":
            raise UserError("--reshard=1 has nothing to free under --parallel=ddp: add --parallel=fsdp")
        if self.on_nonfinite == "rollback" and self.save_every <= 0:
            raise UserError(
                f"--on_nonfinite=rollback needs checkpoints to return to, save_every={self.save_every} makes none: give --save_every=N"
            )
        if self.data_dir is not None and self.dataset is not None:
            raise UserError("--data_dir and --dataset are two sources of text: give one of them")
        if self.run_name is not None and (not self.run_name.strip(".") or "/" in self.run_name or "\\" in self.run_name):
            raise UserError(f"run_name={self.run_name!r} is not a folder name: use letters, digits, - and _")

    SECTIONS: ClassVar = {
        "synapses": "model",
        "syn_preset": "synapses",
        "num_iterations": "training",
        "data_dir": "data",
        "checkpoint_dir": "folders",
        "num_experts": "experts",
        "eval_every": "evaluation",
        "on_nonfinite": "faults",
        "device": "device",
        "print_config": "inspection",
    }  # of --help, by their first flags

    def default_run_name(self) -> str:
        """`d4`, or `d4-synaptic` (with the preset's name when it is not the default one)."""
        name = f"d{self.depth}"
        if self.synapses:
            name += "-synaptic" + (f"-{Path(self.syn_preset).stem}" if self.syn_preset != "default" else "")
        return name


def fill_defaults(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill in what follows from the device alone: sizes of the model, vocabulary, dtype, compile, evaluation budget."""
    gpu = device.type == "cuda"
    depth = config.depth or {"cuda": 12, "mps": 6}.get(device.type, 4)
    own_data = config.data_dir is not None or config.dataset is not None
    values: dict[str, Any] = {
        "depth": depth,
        "max_seq_len": (2048 if depth >= 12 else 1024) if gpu else 256,
        "vocab_size": (32768 if own_data else 8192) if gpu else 4096,
        "tokens_per_param": 12.0 if gpu else 0.5,
        "eval_tokens": 1 << 21 if gpu else 1 << 16,
        "num_experts": 8 if config.splitmerge_every else 0,
    }
    changes = {name: value for name, value in values.items() if getattr(config, name) is None}
    experts = config.num_experts if config.num_experts is not None else values["num_experts"]
    if config.expert_slots is None:
        changes["expert_slots"] = experts + experts // 2 if config.splitmerge_every else 0
    changes["compile"] = config.compile if config.compile != "auto" else str(int(gpu))
    return dataclasses.replace(config, **changes)


def model_config(config: TrainConfig, vocab_size: int, bos_token_id: int) -> GPTConfig:
    """The model's shape. `config` has gone through `fill_defaults`; the vocabulary comes from the tokenizer."""
    assert config.depth is not None and config.max_seq_len is not None
    sizes = sizes_from_depth(config.depth, config.head_dim, config.n_embd)
    if config.n_kv_head is not None:
        sizes["n_kv_head"] = config.n_kv_head
    return GPTConfig(
        **sizes,
        sequence_len=config.max_seq_len,
        vocab_size=vocab_size,
        bos_token_id=bos_token_id,
        window_pattern=config.window_pattern,
        value_embeds=config.value_embeds,
        doc_mask=config.doc_mask,
        backend=config.backend,
        init=config.init,
        mlp_ratio=config.mlp_ratio,
        dropout=config.dropout,
        num_experts=config.num_experts or 0,
        moe_top_k=config.moe_top_k,
        expert_slots=config.expert_slots or 0,
        expert_ratio=config.expert_ratio,
        synapses=config.synapses,
        syn_cfg=config.syn_cfg,
    )
