"""`bench_cpu`: decoding and reading of prompts on a CPU, the Rust extension against the PyTorch path of the same model.

The vanilla model decodes with PyTorch's own attention, eager and compiled: the faster one is what a synaptic step is measured by.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.benchmarks.records import check_record_path, dtype_of, failures, keep_record, quartiles, reason, short
from bio_inspired_nanochat.benchmarks.timing import Competitor, Course, Deadline, Mark, Spread, interleave, paired_ratio, warm_up
from bio_inspired_nanochat.common import say, table
from bio_inspired_nanochat.config import PRESETS, GPTConfig, SynapticConfig, knob, sizes_from_depth, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.kernels import PresynParams, presyn, rust
from bio_inspired_nanochat.synaptic import CausalSelfAttention, SynapseState

HEADLINE_CONTEXT = 2048
CPU = torch.device("cpu")
_READ_BYTES = 1 << 28  # more than any cache
COLUMNS = ("threads", "context", "model", "prompt tok/s", "step ms", "tok/s", "attention ms", "GB/s", "of read bandwidth")


@dataclass(frozen=True)
class BenchCpuConfig:
    """Two models of one size, the contexts that they read and continue, and how many threads work."""

    depth: int = knob(12, "number of layers, the width follows", lo=1, hi=256)
    n_embd: int | None = knob(None, "width; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is 64, from depth 16 on 128", lo=2, hi=1024)
    vocab_size: int = knob(8192, "token ids", lo=2, hi=1 << 20)
    num_experts: int = knob(0, "experts beside every MLP, in all models; 0 has none", lo=0, hi=4096)
    moe_top_k: int = knob(2, "experts that a token visits", lo=1, hi=64)
    context: tuple[int, ...] = knob((256, 1024, 2048, 4096), "tokens of the prompt", lo=1, hi=1 << 20, unit="tokens")
    threads: tuple[int, ...] = knob((1, 2), "threads of both executions", lo=1, hi=1024)
    compiled: bool = knob(True, "also measure the compiled decoding attention of the vanilla model")
    syn_preset: str = knob("default", "named set of synaptic constants that --syn_cfg.* flags then change", choices=tuple(PRESETS))
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")
    seconds: float = knob(240.0, "time limit; context 2048 comes first, and it is measured in any case", lo=0.0, hi=1e6, unit="seconds")
    dtype: str = knob("float32", "activations and caches", choices=("float32", "bfloat16"))
    seed: int = knob(0, "seed of weights and prompts", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("context", "threads"):
            if getattr(self, name) == ():
                raise UserError(f"{name} is empty: give at least one value")
        if not self.syn_cfg.active:
            raise UserError("the synaptic model has neither terminals nor barrier: there is nothing to compare; use --syn_preset=default")


class Decoder:
    """One model that continues one prompt by `tick` tokens; the time that its attention, and its MLPs with experts, take is kept apart."""

    def __init__(self, model: GPT, prompt: Tensor, tick: int, attend: Callable | None = None) -> None:
        self.model, self.prompt, self.tick = model, prompt, tick
        self.state: SynapseState = model.init_state(1, prompt.shape[1] + tick)
        self.attention: list[float] = []
        self.experts: list[float] = []
        self._attend = attend
        self._clock = {"attention": 0.0, "experts": 0.0}

    def read(self, _: Mark = lambda: None) -> None:
        """Read the prompt into an empty state."""
        self.state = self.model.init_state(1, self.prompt.shape[1] + self.tick)
        self.model.step(self.prompt, self.state)

    def prepare(self) -> None:
        """Go back to the end of the prompt: places behind it are written anew, and what terminals did there is little."""
        self.state.pos.fill_(self.prompt.shape[1])
        self._clock = dict.fromkeys(self._clock, 0.0)

    def run(self, _: Mark) -> None:
        """One tick of tokens, so that the end of a tick is paid for once."""
        ids = self.prompt[:, :1]
        with _clocked(self):
            for _token in range(self.tick):
                self.model.step(ids, self.state)
        self.attention.append(self._clock["attention"] / self.tick)
        self.experts.append(self._clock["experts"] / self.tick)


class _clocked:
    """While it is open, attention and experts of every layer of the decoder's model add their seconds to the decoder's clock."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers: list[CausalSelfAttention] = [block.attn for block in decoder.model.blocks]  # pyrefly: ignore[bad-assignment]

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.attend_step = self._timed(self.decoder._attend or layer.attend_step, layer)  # type: ignore[method-assign]
        for mixture in self.decoder.model.experts():
            mixture.step = self._counted(mixture.step)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.attend_step
        for mixture in self.decoder.model.experts():
            del mixture.step

    def _counted(self, step: Callable) -> Callable:
        def counted(*args: Any) -> Tensor:
            began = time.perf_counter()
            y = step(*args)
            self.decoder._clock["experts"] += time.perf_counter() - began
            return y

        return counted

    def _timed(self, attend: Callable, layer: CausalSelfAttention) -> Callable:
        def timed(x: Tensor, q: Tensor, state: Any, chunk: Any) -> Tensor:
            began = time.perf_counter()
            y = attend(x, q, state, chunk) if self.decoder._attend is None else attend(q, state.k, state.v, chunk.stop, layer)
            self.decoder._clock["attention"] += time.perf_counter() - began
            return y

        return timed


def _compiled_attention() -> Callable:
    """Decoding attention of one token over the first `stop` places of a cache, compiled for any number of them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    fast = torch.compile(attend, dynamic=True)
    return lambda q, k, v, stop, layer: fast(q, k[:, :, :stop], v[:, :, :stop], layer.scale)


def _reading() -> Competitor:
    """A plain sum over a buffer larger than any cache: how fast this machine reads memory with the current threads."""
    buffer = torch.ones(_READ_BYTES // 4)
    return Competitor(lambda _: buffer.sum())


@dataclass
class Measured:
    """All competitors at one context and number of threads."""

    threads: int
    context: int
    bytes_read: int
    reading: list[float | None] = field(default_factory=list)
    step: dict[str, Course] = field(default_factory=dict)
    attention: dict[str, list[float]] = field(default_factory=dict)
    experts: dict[str, list[float]] = field(default_factory=dict)
    prompt: dict[str, float] = field(default_factory=dict)
    tick: int = 1
    skipped: str = ""

    def ratio(self, above: str, below: str) -> Spread | None:
        """Of whole steps."""
        return paired_ratio(self.step[above].total(), self.step[below].total()) if self.step else None

    def attention_ratio(self, above: str, below: str) -> Spread | None:
        """Of the attention of all layers."""
        return paired_ratio(self.attention[above], self.attention[below]) if self.attention else None

    def experts_ratio(self, above: str, below: str) -> Spread | None:
        """Of the MLPs of all layers, experts included, where there are any."""
        return paired_ratio(self.experts[above], self.experts[below]) if self.experts and any(self.experts[below]) else None

    def fraction(self, name: str) -> Spread | None:
        """Speed at which the attention of a competitor reads keys and values, over that of a plain read in the same round."""
        wanted = [None if seconds is None else seconds * self.bytes_read / _READ_BYTES for seconds in self.reading]
        return paired_ratio(wanted, self.attention[name])

    def fastest_vanilla(self) -> str:
        """The vanilla competitor with the quickest step."""
        names = [name for name in self.step if name.startswith("vanilla")]
        return min(names, key=lambda name: self.step[name].spread().median)

    def records(self) -> list[dict[str, Any]]:
        """One row per competitor."""
        size = {"threads": self.threads, "context": self.context}
        if not self.step:
            return [size | {"skipped": self.skipped}]
        rows = []
        for name, course in self.step.items():
            seconds, attention = course.spread().median / self.tick, statistics.median(self.attention[name])
            row = size | {"model": name, "prompt_tok_per_s": short(self.context / self.prompt[name]) if name in self.prompt else None}
            row |= {"step_ms": short(seconds * 1e3), "tok_per_s": short(1 / seconds), "attention_ms": short(attention * 1e3)}
            if any(self.experts[name]):
                row["experts_ms"] = short(statistics.median(self.experts[name]) * 1e3)
            fraction = self.fraction(name)
            row |= {
                "gb_per_s": short(self.bytes_read / attention / 1e9),
                "bandwidth_fraction": None if fraction is None else short(fraction.median),
            }
            rows.append(row)
        return rows


def bench_cpu(config: BenchCpuConfig) -> dict[str, Any]:
    """Measure every context and number of threads, print the table; returns the script's last line. UserError for what cannot be."""
    check_record_path(config.json)
    if not rust.available():
        say(f"nothing to compare: {rust.why_not()}")
        record = {"decode_speedup": None, "step_speedup": None, "skipped": rust.why_not()}
        keep_record(config.json, record)
        return record
    dtype = dtype_of(config.dtype, CPU)
    models = _models(config, dtype)
    attend = _compiled_attention() if config.compiled else None
    before = torch.get_num_threads()
    contexts, threads = sorted(set(config.context)), sorted(set(config.threads))
    head = (max(threads), HEADLINE_CONTEXT if HEADLINE_CONTEXT in contexts else max(contexts))
    order = sorted(((n, c) for n in threads for c in contexts), key=lambda size: size != head)
    deadline, sizes = Deadline(config.seconds), []
    try:
        for number, (count, context) in enumerate(order):
            sizes.append(_measure(config, models, attend, count, context, deadline.left() / (len(order) - number), number == 0))
            say(_line(sizes[-1]))
        terminals = _terminals(models["synaptic rust"], head[1], head[0], min(5.0, config.seconds))
    finally:
        torch.set_num_threads(before)
    rows = [row for size in sorted(sizes, key=lambda size: (size.threads, size.context)) for row in size.records()]
    keys = ("threads", "context", "model", "prompt_tok_per_s", "step_ms", "tok_per_s", "attention_ms", "gb_per_s", "bandwidth_fraction")
    table(COLUMNS, [tuple(row[key] for key in keys) for row in rows if "skipped" not in row])
    record = (
        {"device": "cpu", "dtype": config.dtype, "torch": torch.__version__}
        | _headline(sizes[0])
        | terminals
        | {"depth": config.depth, "n_embd": models["vanilla eager"].config.n_embd}
    )
    record |= {
        "head_dim": models["vanilla eager"].config.head_dim,
        "num_experts": config.num_experts,
        "tick": config.syn_cfg.tick,
        "syn_preset": config.syn_preset,
        "rows": rows,
    }
    keep_record(config.json, record)
    return record


def _models(config: BenchCpuConfig, dtype: torch.dtype) -> dict[str, GPT]:
    sizes: dict[str, Any] = dict(sizes_from_depth(config.depth, config.head_dim, config.n_embd))
    sizes |= {"num_experts": config.num_experts, "moe_top_k": config.moe_top_k}
    shape = GPTConfig(**sizes, sequence_len=max(config.context) + config.syn_cfg.tick, vocab_size=config.vocab_size, backend="sdpa")
    shapes = {"vanilla eager": shape}
    for name, backend in (("synaptic rust", "rust"), ("synaptic torch", "sdpa")):
        shapes[name] = dataclasses.replace(shape, synapses=True, syn_cfg=config.syn_cfg, backend=backend)
    return {name: GPT(one, seed=config.seed).set_compute_dtype(dtype).eval() for name, one in shapes.items()}


def _measure(
    config: BenchCpuConfig, models: dict[str, GPT], attend: Callable | None, threads: int, context: int, seconds: float, first: bool
) -> Measured:
    """Every competitor at one size, in turns."""
    torch.set_num_threads(threads)
    shape = models["vanilla eager"].config
    wide = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * models["vanilla eager"].init_state(1, 1).layers[0].k.element_size()
    tick = config.syn_cfg.tick
    size = Measured(threads, context, wide * (context + tick // 2), tick=tick)
    if not first and not seconds:
        size.skipped = "no time left: raise --seconds"
        return size
    generator = torch.Generator().manual_seed(config.seed)
    prompt = torch.randint(shape.vocab_size, (1, context), generator=generator)
    decoders = {name: Decoder(model, prompt, tick) for name, model in models.items()}
    for name, decoder in decoders.items():
        began = time.perf_counter()
        decoder.read()
        size.prompt[name] = time.perf_counter() - began
    if attend is not None:
        decoders["vanilla compiled"] = Decoder(models["vanilla eager"], prompt, tick, attend)
        decoders["vanilla compiled"].read()
    competitors = {name: Competitor(decoder.run, decoder.prepare) for name, decoder in decoders.items()}
    for name in list(competitors):
        try:
            warm_up(competitors[name], CPU, runs=2)
        except failures() as error:
            if name != "vanilla compiled":
                raise
            say(f"skipped: {name}: {reason(error)}")
            del competitors[name]
    competitors["read"] = _reading()
    warm_up(competitors["read"], CPU, runs=2)
    size.step = interleave(competitors, CPU, seconds / 2)
    size.reading = size.step.pop("read").total()
    size.attention = {name: decoders[name].attention[-len(course.rounds) :] for name, course in size.step.items()}
    size.experts = {name: decoders[name].experts[-len(course.rounds) :] for name, course in size.step.items()}
    return size


def _terminals(model: GPT, context: int, threads: int, seconds: float) -> dict[str, Any]:
    """How much faster the terminals of one layer pass over the ticks of a prompt than in the reference."""
    if not model.config.syn_cfg.presyn:
        return {"presyn_speedup": None}
    torch.set_num_threads(threads)
    with torch.no_grad():
        params: PresynParams = model.blocks[0].attn.synapse.params()  # pyrefly: ignore[missing-attribute]
    ticks = -(-context // params.tick)
    drive = torch.rand(1, model.config.n_head, ticks, context, generator=torch.Generator().manual_seed(0))
    born = torch.arange(context) < (torch.arange(ticks)[:, None] + 1) * params.tick
    drive *= born

    def work(backend: str) -> Competitor:
        return Competitor(torch.no_grad()(lambda _: presyn(drive, params, causal=True, backend=backend)))

    competitors = {backend: work(backend) for backend in ("reference", "rust")}
    for competitor in competitors.values():
        warm_up(competitor, CPU, runs=2)
    courses = interleave(competitors, CPU, seconds)
    ratio = paired_ratio(courses["reference"].total(), courses["rust"].total())
    assert ratio is not None
    return {"presyn_speedup": short(ratio.median), "presyn_speedup_quartiles": quartiles(ratio)}


def _headline(size: Measured) -> dict[str, Any]:
    vanilla = size.fastest_vanilla()
    ratios = {
        "decode_speedup": size.attention_ratio("synaptic torch", "synaptic rust"),
        "step_speedup": size.ratio("synaptic torch", "synaptic rust"),
        "step_over_vanilla": size.ratio("synaptic rust", vanilla),
    }
    if any(size.experts["synaptic rust"]):
        ratios["experts_speedup"] = size.experts_ratio("synaptic torch", "synaptic rust")
    record: dict[str, Any] = {}
    for name, ratio in ratios.items():
        record |= {name: None if ratio is None else short(ratio.median), f"{name}_quartiles": quartiles(ratio)}
    fraction = size.fraction("synaptic rust")
    record |= {"bandwidth_fraction": fraction and short(fraction.median), "bandwidth_fraction_quartiles": quartiles(fraction)}
    read = Spread.of(_READ_BYTES / seconds / 1e9 for seconds in size.reading if seconds)
    record |= {"read_gb_per_s": short(read.median), "read_gb_per_s_quartiles": quartiles(read), "vanilla": vanilla}
    return record | {"of": {"context": size.context, "threads": size.threads}}


def _line(size: Measured) -> str:
    what = f"{size.threads} threads, context {size.context}"
    if not size.step:
        return f"{what}: {size.skipped}"
    attention, step = size.attention_ratio("synaptic torch", "synaptic rust"), size.ratio("synaptic torch", "synaptic rust")
    vanilla = size.ratio("synaptic rust", size.fastest_vanilla())
    assert attention and step and vanilla
    return (
        f"{what}: attention in Rust is {attention.median:.2f} times as fast as in PyTorch, "
        f"the whole step {step.median:.2f} times; it takes {vanilla.median:.2f} times a step of {size.fastest_vanilla()}"
    )
