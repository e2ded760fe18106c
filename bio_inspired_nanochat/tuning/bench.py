"""`bench_stack`: what a training step of a population of small models costs, trained as one, against the step of a single model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.records import dtype_of, place, quartiles, short
from bio_inspired_nanochat.benchmarks.timing import Competitor, Run, interleave, paired_ratio, warm_up
from bio_inspired_nanochat.common import pick_device, table
from bio_inspired_nanochat.config import PRESETS, GPTConfig, SynapticConfig, device_knob, dtype_knob, knob, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig, build_optimizer
from bio_inspired_nanochat.tuning.stack import Stack, obstacle
from bio_inspired_nanochat.tuning.steps import WARM_RUNS as RECORDED_AFTER
from bio_inspired_nanochat.tuning.steps import Gradients


@dataclass(frozen=True)
class BenchStackConfig:
    """Sizes of the models and of the population."""

    models: tuple[int, ...] = knob((2, 10), "sizes of the population", lo=1, hi=1024)
    syn_preset: str = knob("default", "synapses of the models", choices=tuple(PRESETS))
    hebb: str = knob("off", "fast weights", choices=("off", "hebb", "delta"), off="off")
    n_layer: int = knob(2, "transformer blocks", lo=1, hi=64, aliases=("depth",))
    n_embd: int = knob(64, "width of the residual stream", lo=8, hi=8192, aliases=("width",))
    head_dim: int = knob(32, "size of an attention head", lo=2, hi=1024)
    rows: int = knob(16, "rows of a step", lo=1, hi=1 << 16)
    context: int = knob(128, "tokens of a row", lo=2, hi=1 << 16, unit="tokens")
    vocab_size: int = knob(256, "number of token ids", lo=2, hi=1 << 20)
    graph: bool = knob(True, "populations: record a step as a CUDA graph and replay it, as the search does", off=False)
    seconds: float = knob(60.0, "time limit", lo=0.0, hi=1e6, unit="seconds")
    device: str = device_knob()
    dtype: str = dtype_knob()
    seed: int = knob(0, "seed of weights and tokens", lo=0, hi=(1 << 63) - 1)

    def __post_init__(self) -> None:
        validate(self)
        if not self.models:
            raise UserError("models is empty: name at least one size, --models=10")
        if self.n_embd % self.head_dim:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of head_dim={self.head_dim}")
        if reason := obstacle(self.model()):
            raise UserError(f"syn_preset={self.syn_preset} cannot be trained as a stack: {reason}; use default")

    def model(self) -> GPTConfig:
        """The model of which there are many."""
        heads = self.n_embd // self.head_dim
        sizes: dict[str, Any] = {"n_layer": self.n_layer, "n_head": heads, "n_kv_head": heads, "n_embd": self.n_embd}
        syn = SynapticConfig.preset(self.syn_preset)
        syn = syn if self.hebb == "off" else dataclasses.replace(syn, hebb=self.hebb)
        return GPTConfig(sequence_len=self.context, vocab_size=self.vocab_size, **sizes, synapses=True, syn_cfg=syn)


def bench_stack(config: BenchStackConfig) -> dict[str, Any]:
    """Time the steps in turns, print the table; returns the script's last line."""
    device = pick_device(config.device)
    dtype = dtype_of(config.dtype, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    shape = (config.rows, config.context + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator, device=device)
    runs = {"one model": _alone(config, tokens, dtype)}
    runs |= {f"{size} as one": _stacked(config, size, tokens, dtype) for size in config.models}
    competitors = {name: Competitor(run) for name, run in runs.items()}
    for competitor in competitors.values():
        warm_up(competitor, device)
    courses = interleave(competitors, device, config.seconds)
    base, rows, ratios = courses["one model"], [], {}
    for name, course in courses.items():
        spread, ratio = course.spread().times(1e3), paired_ratio(course.total(), base.total())
        assert ratio is not None, "every round runs all"
        rows.append((name, short(spread.median), str(quartiles(spread)), short(ratio.median), spread.count))
        if name != "one model":
            ratios[name.split()[0]] = short(ratio.median)
    table(("models", "step ms", "quartiles", "x one model", "runs"), rows)
    steps = {name: milliseconds for name, milliseconds, *_ in rows}
    return place(device, dtype) | {"stack_ratio": ratios, "step_ms": steps, "params": GPT(config.model()).num_params()}


def _alone(config: BenchStackConfig, tokens: torch.Tensor, dtype: torch.dtype) -> Run:
    model = GPT(config.model(), config.seed).to(tokens.device).set_compute_dtype(dtype).train()
    batch = config.rows * config.context
    optimizer = build_optimizer(model.named_parameters(), model.param_roles(), OptimConfig(), n_embd=config.n_embd, batch_tokens=batch)

    def run(_: Any) -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _stacked(config: BenchStackConfig, size: int, tokens: torch.Tensor, dtype: torch.dtype) -> Run:
    stack = Stack([config.model()] * size, range(config.seed, config.seed + size), tokens.device)
    stack.compute_dtype = dtype
    optimizer = stack.optimizer(OptimConfig(), config.rows * config.context)
    gradients = Gradients(stack, config.graph)
    idx, targets = (part.expand(size, -1, -1) for part in (tokens[:, :-1], tokens[:, 1:]))
    if gradients.wanted:
        for _ in range(RECORDED_AFTER + 1):
            gradients(idx, targets)

    def run(_: Any) -> None:
        gradients(idx, targets)
        optimizer.step()

    return run
