"""`bench_decode`: time to the first token and speed of the following ones, vanilla and synaptic, at growing context."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.benchmarks.records import (
    check_record_path,
    dtype_of,
    failures,
    free_unused,
    keep_record,
    nearest_to,
    place,
    quartiles,
    reason,
    say_skipped,
    short,
    shown,
)
from bio_inspired_nanochat.benchmarks.timing import Competitor, Course, Deadline, Mark, Spread, interleave, paired_ratio, warm_up
from bio_inspired_nanochat.common import pick_device, progress, say, table
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
from bio_inspired_nanochat.decoding import GraphDecoder, graph_obstacle
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import SynapseState
from bio_inspired_nanochat.training.clock import wait_for_device

HEADLINE_CONTEXT = 4096
_MODELS = ("vanilla", "synaptic")
COLUMNS = ("context", "batch", "model", "first token ms", "x vanilla", "step ms", "quartiles", "x vanilla", "tok/s", "record ms", "runs")


@dataclass(frozen=True)
class BenchDecodeConfig:
    """Two models of one size, and the contexts and batches that they read and continue."""

    depth: int | None = knob(None, "number of layers, the width follows; auto is 12 on CUDA, 2 elsewhere", lo=1, hi=256)
    n_embd: int | None = knob(None, "width; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is 64, from depth 16 on 128", lo=2, hi=1024)
    vocab_size: int | None = knob(None, "token ids; auto is 8192 on CUDA, 512 elsewhere", lo=2, hi=1 << 20)
    num_experts: int = knob(0, "experts beside every MLP, in both models; 0 has none", lo=0, hi=4096, off=0)
    moe_top_k: int = knob(2, "experts that a token visits", lo=1, hi=64)
    context: tuple[int, ...] | None = knob(
        None, "tokens of the prompt; auto is 512,1024,2048,4096,8192 on CUDA, 32,64 elsewhere", lo=1, hi=1 << 20, unit="tokens"
    )
    batch: tuple[int, ...] | None = knob(None, "sequences side by side; auto is 1,8 on CUDA, 1 elsewhere", lo=1, hi=1 << 16)
    new_tokens: int | None = knob(
        None, "tokens that a run decodes, rounded up to whole ticks; auto is 4 ticks on CUDA, 1 elsewhere", lo=1, hi=1 << 16, unit="tokens"
    )
    backend: str = knob("auto", "execution of the attention operators", choices=knobs_of(GPTConfig)["backend"].choices)
    syn_preset: str = knob("default", "named set of synaptic constants that --syn_cfg.* flags then change", choices=tuple(PRESETS))
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")
    graph: str = knob("auto", "decode by a captured CUDA graph; auto: where it can serve both models", choices=("auto", "0", "1"))
    seconds: float = knob(
        120.0, "time limit; context 4096 comes first, and its first size is measured in any case", lo=0.0, hi=1e6, unit="seconds"
    )
    device: str = device_knob()
    dtype: str = dtype_knob("activations and caches")
    seed: int = knob(0, "seed of weights and prompts", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("context", "batch"):
            if getattr(self, name) == ():
                raise UserError(f"{name} is empty: give at least one value")
        if not self.syn_cfg.active:
            raise UserError(
                "the synaptic model has no terminals, no barrier and no fast weights: there is nothing to compare; use --syn_preset=default"
            )


class Decoding:
    """A run reads a prompt into an empty state, then decodes; the mark stands between. Every token is read by the host, as a reader does.

    graph: decode by a captured graph, which the first run makes and the others find; their states take the place of its own.
    """

    def __init__(self, model: GPT, prompt: Tensor, new_tokens: int, graph: bool) -> None:
        self.model, self.prompt, self.new_tokens, self.graph = model, prompt, new_tokens, graph
        self.state: SynapseState | None = None
        self.decoder: GraphDecoder | None = None

    def prepare(self) -> None:
        """An empty state."""
        if self.decoder is not None:
            self.decoder.state.copy_(self._empty())
            return
        self.state = None  # the old one is freed before the new one is made
        self.state = self._empty()
        if self.graph:
            self.decoder = GraphDecoder(self.model, self.state)

    def recording(self) -> float | None:
        """Seconds until a decoder has its graphs, once the kernels are there: what an answer pays before its first quick token. None
        without graphs.
        """
        if self.decoder is None:
            return None
        wait_for_device(self.prompt.device)
        began = time.perf_counter()
        GraphDecoder(self.model, self.decoder.state).record()
        wait_for_device(self.prompt.device)
        return time.perf_counter() - began

    def _empty(self) -> SynapseState:
        return self.model.init_state(self.prompt.shape[0], self.prompt.shape[1] + self.new_tokens)

    def run(self, mark: Mark) -> None:
        """Prompt, mark, new tokens."""
        assert self.state is not None
        token = _most_likely(self.model.step(self.prompt, self.state)[:, -1])
        mark()
        for _ in range(self.new_tokens):
            token = self._next(token, self.state)

    def _next(self, ids: Tensor, state: SynapseState) -> Tensor:
        return _most_likely(self.model.step(ids[:, None], state)[:, -1] if self.decoder is None else self.decoder.step(ids))


def _most_likely(logits: Tensor) -> Tensor:
    """Token ids [B] of logits [B, V], read by the host."""
    token = logits.argmax(-1)
    token.tolist()
    return token


@dataclass
class Measured:
    """Both models at one context and batch, or why not."""

    context: int
    batch: int
    new_tokens: int
    courses: list[Course] | None = None
    recordings: Sequence[float | None] = (None, None)
    skipped: str = ""

    def ratio(self, phase: int) -> Spread | None:
        """Synaptic over vanilla: phase 0 is the first token, 1 the following ones."""
        if self.courses is None:
            return None
        vanilla, synaptic = (course.phase(phase) for course in self.courses)
        return paired_ratio(synaptic, vanilla)

    def records(self) -> list[dict[str, Any]]:
        """One row per model, milliseconds and tokens per second over all sequences."""
        size = {"context": self.context, "batch": self.batch}
        if self.courses is None:
            return [size | {"model": name, "skipped": self.skipped} for name in _MODELS]
        rows = []
        for name, course, recording in zip(_MODELS, self.courses, self.recordings, strict=True):
            first, step = course.spread(0).times(1e3), course.spread(1).times(1e3 / self.new_tokens)
            row = size | {"model": name, "first_token_ms": short(first.median), "step_ms": short(step.median)}
            row |= {"first_token_ms_quartiles": quartiles(first), "step_ms_quartiles": quartiles(step)}
            row |= {"tok_per_s": short(1e3 * self.batch / step.median), "record_ms": None if recording is None else short(1e3 * recording)}
            rows.append(row | {"runs": step.count})
        first_ratio, step_ratio = self.ratio(0), self.ratio(1)
        assert first_ratio is not None and step_ratio is not None
        rows[1] |= {"first_token_ratio": short(first_ratio.median), "first_token_ratio_quartiles": quartiles(first_ratio)}
        rows[1] |= {"step_ratio": short(step_ratio.median), "step_ratio_quartiles": quartiles(step_ratio)}
        return rows

    def cells(self) -> list[tuple]:
        """The rows for the table, of sizes that ran."""
        assert self.courses is not None
        found = []
        for row, course in zip(self.records(), self.courses, strict=True):
            quarters = shown(course.spread(1).times(1e3 / self.new_tokens))
            first = (row["context"], row["batch"], row["model"], row["first_token_ms"], row.get("first_token_ratio"))
            found.append((*first, row["step_ms"], quarters, row.get("step_ratio"), row["tok_per_s"], row["record_ms"], row["runs"]))
        return found


def bench_decode(config: BenchDecodeConfig) -> dict[str, Any]:
    """Measure every context and batch, print the table; returns the script's last line. Raises UserError for what cannot be."""
    check_record_path(config.json)
    device = pick_device(config.device)
    dtype = dtype_of(config.dtype, device)
    where = place(device, dtype)
    gpu = device.type == "cuda"
    contexts = config.context or ((512, 1024, 2048, 4096, 8192) if gpu else (32, 64))
    batches = config.batch or ((1, 8) if gpu else (1,))
    tick = config.syn_cfg.tick
    new_tokens = -(-(config.new_tokens or (4 if gpu else 1) * tick) // tick) * tick
    sizes = [Measured(context, batch, new_tokens) for context in sorted(set(contexts)) for batch in sorted(set(batches))]
    headline = nearest_to(HEADLINE_CONTEXT, contexts)
    models = _models(config, device, dtype, max(contexts) + new_tokens)
    graph = _graph(config.graph, models)
    deadline = Deadline(config.seconds)
    with progress(len(sizes), "measure", "sizes") as bar:
        for number, size in enumerate(sorted(sizes, key=lambda size: size.context != headline)):
            seconds = deadline.left() / (len(sizes) - number)
            if number and not seconds:
                size.skipped = "no time left: raise --seconds"
            else:
                _measure(size, models, seconds, config.seed, graph)
            say(_line(size))
            bar.advance()
            free_unused(device)
    table(COLUMNS, [row for size in sizes if size.courses is not None for row in size.cells()])
    say_skipped((f"context {size.context}, batch {size.batch}", size.skipped) for size in sizes if size.courses is None)
    model = models[1].config
    record = where | _headline(sizes) | {"depth": model.n_layer, "n_embd": model.n_embd, "head_dim": model.head_dim, "tick": tick}
    record |= {
        "syn_preset": config.syn_preset,
        "num_experts": config.num_experts,
        "backend": config.backend,
        "graph": graph,
        "new_tokens": new_tokens,
    }
    record |= {"rows": [row for size in sizes for row in size.records()]}
    keep_record(config.json, record)
    return record


def _models(config: BenchDecodeConfig, device: torch.device, dtype: torch.dtype, length: int) -> list[GPT]:
    """The vanilla and the synaptic model, in evaluation mode."""
    gpu = device.type == "cuda"
    sizes: dict[str, Any] = dict(sizes_from_depth(config.depth or (12 if gpu else 2), config.head_dim, config.n_embd))
    shape = GPTConfig(
        **sizes,
        sequence_len=length,
        vocab_size=config.vocab_size or (8192 if gpu else 512),
        backend=config.backend,
        num_experts=config.num_experts,
        moe_top_k=config.moe_top_k,
    )
    shapes = (shape, dataclasses.replace(shape, synapses=True, syn_cfg=config.syn_cfg))
    return [GPT(one, seed=config.seed).to(device).set_compute_dtype(dtype).eval() for one in shapes]


def _graph(wanted: str, models: Sequence[GPT]) -> bool:
    """Whether both models decode by captured graphs. Raises UserError when that is asked for and cannot be."""
    if wanted == "0":
        return False
    obstacle = next(filter(None, (graph_obstacle(model, model.init_state(1, 1)) for model in models)), None)
    if models[0].embed.weight.device.type != "cuda":
        obstacle = "graphs are captured on CUDA only"
    if obstacle and wanted == "1":
        raise UserError(f"--graph=1 is not possible: {obstacle}; use --graph=auto")
    say("decoding by " + (f"ordinary steps: {obstacle}" if obstacle else "captured graphs"))
    return obstacle is None


def _measure(size: Measured, models: Sequence[GPT], seconds: float, seed: int, graph: bool) -> None:
    """Fill in the courses of one context and batch, or the reason why there are none."""
    device = models[0].embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(models[0].config.vocab_size, (size.batch, size.context), generator=generator).to(device)
    works = [Decoding(model, prompt, size.new_tokens, graph) for model in models]
    competitors = {name: Competitor(work.run, work.prepare) for name, work in zip(_MODELS, works, strict=True)}
    try:
        for competitor in competitors.values():
            warm_up(competitor, device, runs=2)
        size.recordings = [work.recording() for work in works]
        courses = interleave(competitors, device, seconds)
    except failures() as error:
        size.skipped = reason(error)
        return
    size.courses = list(courses.values())


def _line(size: Measured) -> str:
    """What a context and batch came to, in one line."""
    what = f"context {size.context}, batch {size.batch}"
    step = size.ratio(1)
    if size.courses is None or step is None:
        return f"{what}: {size.skipped}"
    vanilla, synaptic = (course.spread(1).median * 1e3 / size.new_tokens for course in size.courses)
    return f"{what}: a step takes {vanilla:.3g} ms vanilla, {synaptic:.3g} ms synaptic ({step.median:.2f}x)"


def _headline(sizes: Sequence[Measured]) -> dict[str, Any]:
    """step_ratio at context 4096, or at the largest that ran, with the smallest batch."""
    ran = [size for size in sizes if size.courses is not None]
    if not ran:
        return {"step_ratio": None, "step_ratio_quartiles": None, "step_ratio_of": None}
    context = nearest_to(HEADLINE_CONTEXT, [size.context for size in ran])
    chosen = min((size for size in ran if size.context == context), key=lambda size: size.batch)
    ratio = chosen.ratio(1)
    assert ratio is not None
    of = {"context": context, "batch": chosen.batch}
    return {"step_ratio": short(ratio.median), "step_ratio_quartiles": quartiles(ratio), "step_ratio_of": of}
