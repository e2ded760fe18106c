"""From a TrainConfig to a plan: every `auto` replaced by a number, batches that divide, parameters and operations counted."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.common import compute_dtype, say
from bio_inspired_nanochat.config import GPTConfig, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import active_size
from bio_inspired_nanochat.training.config import TrainConfig, fill_defaults, model_config
from bio_inspired_nanochat.training.hardware import GIB, bytes_per_row, fitting_rows, free_memory, static_bytes

# Tokens of a step that suit a run: nanochat's over its 1.32e9 tokens, and what was measured over 8e6 (RESULTS.md, the study: 8192, for either
# model), with a power law between. Its own exponent, 0.383, would give the short run 65,536, with which it learns much less.
_REFERENCE_BATCH = 1 << 19
_REFERENCE_TOKENS = 12 * 110e6
_BATCH_EXPONENT = 0.8


@dataclass(frozen=True)
class Plan:
    """A run with nothing left open. `config` holds concrete numbers; accumulation: forwards per rank and optimizer step.

    tokens_per_step: over all ranks; params: learned values; flops_per_token: forward and backward; row_tokens: of a row where it is
    shorter than the context of the model (0: it is not).
    """

    config: TrainConfig
    model: GPTConfig
    dtype: torch.dtype
    world: int
    steps: int
    accumulation: int
    tokens_per_step: int
    params: int
    flops_per_token: int
    row_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens T of a row."""
        return self.row_tokens or self.model.sequence_len

    @property
    def rows(self) -> int:
        """Rows of one forward on one rank."""
        assert self.config.device_batch_size is not None
        return self.config.device_batch_size

    def eval_rows(self) -> int:
        """Rows per rank of one evaluation: the same tokens for every batch size; 0 for no evaluation."""
        tokens = self.config.eval_tokens or 0
        return -(-tokens // (self.length * self.world))

    def memory_gib(self) -> float:
        """Estimated need of one device."""
        return (static_bytes(self.params) + self.rows * bytes_per_row(self.model, self.dtype)) / GIB

    def describe(self) -> list[str]:
        """The plan in a few lines for a person."""
        model, kind = self.model, "synaptic" if self.model.synapses else "vanilla"
        heads = f"{model.n_head} heads of {model.head_dim}" + (
            f" on {model.n_kv_head} key heads" if model.n_kv_head != model.n_head else ""
        )
        total = self.steps * self.tokens_per_step
        experts = (
            f", {model.num_experts} experts in {model.slots} slots beside the shared one, top {model.moe_top_k}"
            if model.num_experts
            else ""
        )
        size = f"{model.n_layer} layers x {model.n_embd}, {heads}, context {model.sequence_len}, vocabulary {model.vocab_size}{experts}"
        batch = f"{self.rows} rows x {self.length} tokens x {self.world} processes x {self.accumulation} accumulated"
        return [
            f"model: {kind}, {size}, {self.params:,} parameters, {self.flops_per_token:.3g} FLOPs per token",
            f"batch: {self.tokens_per_step:,} tokens = {batch}; {self.steps:,} steps, {total:,} tokens ({total / self.params:.2g} per parameter)",
        ]


def make_plan(config: TrainConfig, device: torch.device, world: int, vocab_size: int | None = None, bos_token_id: int = 0) -> Plan:
    """Fill in every `auto`. Deterministic, so that all ranks arrive at one plan (on CUDA rank 0's plan should be broadcast:
    free memory may differ). vocab_size and bos_token_id are the tokenizer's; without one the wanted size counts.
    """
    config = fill_defaults(config, device)
    config = dataclasses.replace(config, graph=graph_setting(config.graph, device, world))
    assert config.vocab_size is not None and config.tokens_per_param is not None
    shape = model_config(config, vocab_size or config.vocab_size, bos_token_id)
    dtype = given_dtype(config, device)
    with torch.device("meta"):
        model = GPT(shape)
    params = model.num_params()
    target = int(config.tokens_per_param * _dense_params(model))
    rows = config.device_batch_size or _rows(device, shape, dtype, params)
    total = config.total_batch_size or _batch_tokens(config, device, target, rows * shape.sequence_len * world)
    if config.device_batch_size is None:
        rows = max(1, min(rows, total // (shape.sequence_len * world)))
    accumulation, tokens = whole_forwards(total, rows, shape.sequence_len, world, told=config.total_batch_size is not None)
    steps = config.num_iterations or max(1, round(target / tokens))
    config = dataclasses.replace(
        config, vocab_size=shape.vocab_size, device_batch_size=rows, total_batch_size=tokens, num_iterations=steps, n_embd=shape.n_embd
    )
    return Plan(config, shape, dtype, world, steps, accumulation, tokens, params, model.flops_per_token())


def graph_setting(wanted: str, device: torch.device, world: int) -> str:
    """`--graph` with auto replaced by 0 or 1. UserError for steps that should be replayed and cannot be."""
    possible = device.type == "cuda" and world == 1
    if wanted == "1" and not possible:
        where = f"{world} processes" if world > 1 else f"device={device.type}"
        raise UserError(f"graph=1 is for one process on CUDA, and this is {where}: leave --graph out")
    return str(int(possible)) if wanted == "auto" else wanted


def check_memory(plan: Plan, device: torch.device) -> None:
    """UserError for a model whose weights and optimizer state are larger than this machine's memory, before anything is allocated.

    For CPUs, where the system would end the process without a word; a GPU says so itself.
    """
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if static_bytes(plan.params) > memory:
        raise UserError(
            f"depth={plan.model.n_layer} and n_embd={plan.model.n_embd} need about {plan.memory_gib():.0f} GiB of {memory / GIB:.0f} GiB memory: "
            "use a smaller --depth or --n_embd"
        )


def _dense_params(model: GPT) -> int:
    """Matrices and head: what vanilla and synaptic models of one depth share, so that both get equally many tokens."""
    roles = model.param_roles()
    named = model.named_parameters()
    return sum(active_size(model.config, name, parameter) for name, parameter in named if roles[name] in ("matrix", "head"))


def given_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations that the config asks for."""
    return compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)


def _rows(device: torch.device, shape: GPTConfig, dtype: torch.dtype, params: int) -> int:
    free = free_memory(device)
    return 8 if free is None else fitting_rows(shape, dtype, params, free)


def _batch_tokens(config: TrainConfig, device: torch.device, target: int, forward: int) -> int:
    """Tokens per step that suit the length of the run, as a power of two; at least `forward` where the length is given in steps."""
    if device.type != "cuda":
        return forward
    return suited_batch(target) if config.num_iterations is None else max(forward, suited_batch(config.num_iterations * forward))


def suited_batch(tokens: int) -> int:
    """Tokens of an optimizer step that suit a run over so many, as a power of two."""
    return max(1, 1 << round(math.log2(_REFERENCE_BATCH * (tokens / _REFERENCE_TOKENS) ** _BATCH_EXPONENT)))


def whole_forwards(total: int, rows: int, length: int, world: int, told: bool) -> tuple[int, int]:
    """(forwards per rank, tokens per step) nearest to `total` tokens; says so when that is another number."""
    forward = rows * length * world
    accumulation = max(1, round(total / forward))
    tokens = accumulation * forward
    if told and tokens != total:
        say(
            f"notice: total_batch_size={total} is not a multiple of {forward} ({rows} rows x {length} tokens x {world} processes): using {tokens}"
        )
    return accumulation, tokens


# Settings of the process rather than of the training: a resumed run takes them from its own command line.
OPERATIONAL = frozenset(
    {
        *("eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "log_every"),
        *(
            "max_minutes",
            "stop_after",
            "device",
            "compile",
            "graph",
            "parallel",
            "bucket_mb",
            "reduce_dtype",
            "reshard",
            "print_config",
            "dry_run",
        ),
        *("checkpoint_dir", "log_dir", "run_name", "resume"),
    }
)


def given_fields(config: TrainConfig) -> set[str]:
    """The dotted names of fields that differ from their defaults: what a library user has set."""
    return set(_differences(to_dict(config), to_dict(TrainConfig())))


def inherit(config: Any, given: set[str], saved: dict[str, Any]) -> dict[str, Any]:
    """The values of a resumed run: those of the checkpoint, except for settings of the process and flags that were given.

    config: a TrainConfig or TuneConfig; saved: that of the checkpoint; given: dotted names of flags on the command line. Returns values for `from_dict`.
    """
    values = to_dict(config)
    kept = {name: value for name, value in saved.items() if name in values and name not in OPERATIONAL}
    if "syn_preset" in given:
        kept.pop("syn_cfg", None)
    merged = _merge(values, kept, given, "")
    if "tokens_per_param" in given and "num_iterations" not in given:
        merged["num_iterations"] = None
    return merged


def _merge(values: dict[str, Any], saved: dict[str, Any], given: set[str], prefix: str) -> dict[str, Any]:
    merged = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(saved.get(name), dict):
            merged[name] = _merge(value, saved[name], given, f"{prefix}{name}.")
        elif name in saved and prefix + name not in given:
            merged[name] = saved[name]
        else:
            merged[name] = value
    return merged


def _differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> Sequence[str]:
    names: list[str] = []
    for name, value in left.items():
        if isinstance(value, dict):
            names += _differences(value, right[name], f"{prefix}{name}.")
        elif value != right[name]:
            names.append(prefix + name)
    return names
