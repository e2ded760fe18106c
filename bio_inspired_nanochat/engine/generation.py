"""Text from a model: batched sampling on `model.step` with its state, and streaming of complete UTF-8.

Every row draws from its own seeded generator and its own filtered distribution, so what a row says depends neither on its
neighbours nor on the device. B batch, T tokens, V vocabulary.

When the context is full, generation stops and says so (`finish == "context"`); nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from bio_inspired_nanochat.checkpoint import find_checkpoint, load_checkpoint
from bio_inspired_nanochat.common import base_dir, compute_dtype, generator_for, say
from bio_inspired_nanochat.decoding import GraphDecoder, NotRecorded, graph_obstacle
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import SynapseState
from bio_inspired_nanochat.tokenizer import Tokenizer

Finish = Literal["", "stop", "length", "context", "cancelled"]
TUNED_FOLDER = "sft_checkpoints"  # under the base folder, beside `checkpoints`, where base_train writes
WORTH_CAPTURING = 32  # new tokens: a capture takes as long as some ordinary steps
_REFUSED: WeakSet[GPT] = WeakSet()  # models whose step could not be recorded: said once, not tried again


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, with what its checkpoint says about it."""

    model: GPT
    tokenizer: Tokenizer
    path: Path
    step: int
    meta: dict[str, Any]


def source_path(source: str) -> str | None:
    """What `load` takes for a source: `base` (the newest that base_train wrote), `sft` (the newest fine-tuned one), or a path.

    Raises UserError when there is no such thing.
    """
    if source == "base":
        return None
    if source == "sft":
        folder = base_dir() / TUNED_FOLDER
        if not folder.exists():
            raise UserError(
                f"--source=sft: there is no fine-tuned model under {folder} yet: run python -m scripts.chat_sft, or give a path"
            )
        return str(folder)
    if not Path(source).expanduser().exists():
        raise UserError(f"--source={source} does not exist: give base, sft or the path of a checkpoint")
    return source


def load(path: str | Path | None, device: torch.device) -> Loaded:
    """Model and tokenizer of a checkpoint: `path` (a step, a run or a folder of runs), or the newest that base_train wrote.

    Raises UserError when there is none, for a damaged one, for weights that are not finite, and for a tokenizer whose ids the
    model does not have.
    """
    root = base_dir() / "checkpoints"
    if not path and not root.exists():
        raise UserError(f"no checkpoint under {root} yet: train a model with python -m scripts.base_train, or give --checkpoint=PATH")
    found = find_checkpoint(path or root)
    checkpoint = load_checkpoint(found)
    tokenizer = Tokenizer.load(checkpoint.file("tokenizer.json"))
    for name, value in checkpoint.model.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{found} has values in {name} that are not finite, its training diverged: choose an earlier step")
    model = GPT.from_checkpoint(found, device).set_compute_dtype(compute_dtype(device))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {found} has {tokenizer.vocab_size} ids, its model vocab_size={model.config.vocab_size}: "
            "it is another model's; choose another checkpoint"
        )
    return Loaded(model, tokenizer, found, checkpoint.step, checkpoint.meta)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the most likely one; top_k 0 and top_p 1 filter nothing."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature={self.temperature} is out of bounds [0, 100]: 0 always takes the most likely token")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is out of bounds [0, inf]: 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is out of bounds (0, 1]: 1 keeps every token")


def next_tokens(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """Draw one token per row. logits: [B,V]; uniforms: B numbers in [0, 1), one per row (not read at temperature 0).

    Inverse transform sampling over the tokens sorted by probability, in float64 on the CPU: the same uniform number picks
    the same token on every device. Ties are ordered by token id. Raises UserError for logits that are not finite.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # NaN anywhere in a row is its maximum
        raise UserError("the model's logits are not finite: the checkpoint is damaged or its training diverged")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < values.shape[-1]:
        values, order = values[:, : sampling.top_k], order[:, : sampling.top_k]
    mass = torch.softmax(values / sampling.temperature, dim=-1).cumsum(dim=-1)
    # The smallest set of tokens that holds top_p of the mass: a token stays while the mass before it is below top_p.
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    kept = (before < sampling.top_p).sum(dim=-1, keepdim=True)
    total = mass.gather(-1, kept - 1)
    target = torch.tensor(list(uniforms), dtype=torch.float64)[:, None] * total
    picked = torch.minimum(torch.searchsorted(mass, target, right=True), kept - 1)
    return order.gather(-1, picked)[:, 0].tolist()


class Stepper:
    """One token per row through `model.step`, or on CUDA through a captured graph where one serves the model and pays.

    `state` is that of the rows that still run; `budget` is how many more tokens are expected at most.
    """

    def __init__(self, model: GPT, state: SynapseState, graph: bool = True) -> None:
        self.model, self.state = model, state
        self._graph = graph and next(model.parameters()).is_cuda and model not in _REFUSED
        self._decoder: GraphDecoder | None = None

    @torch.no_grad()
    def step(self, tokens: Sequence[int], budget: int) -> Tensor:
        """Logits [B, V] after one more token per row; the state advances in place."""
        idx = torch.tensor(tokens, device=next(self.model.parameters()).device)
        decoder = self._captured(budget) if self._graph else None
        if decoder is not None:
            try:
                return decoder.step(idx)
            except NotRecorded as error:
                say(f"notice: tokens are not decoded by a CUDA graph, which may be slower ({error})")
                self._graph = False
                _REFUSED.add(self.model)
        return self.model.step(idx[:, None], self.state)[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.state = self.state.select(list(rows))

    def _captured(self, budget: int) -> GraphDecoder | None:
        if self._decoder is not None and self._decoder.state is self.state:
            return self._decoder
        if budget < WORTH_CAPTURING or graph_obstacle(self.model, self.state) is not None:
            self._graph = False
            return None
        self._decoder = GraphDecoder(self.model, self.state) if self._decoder is None else self._decoder.follow(self.state)
        return self._decoder


class Generation:
    """An iterator over generated tokens, made by `generate_batch`.

    Each item has one entry per prompt: the next token id, or None once that row has finished. Stop tokens are not emitted.
    `finish[i]` says why row i ended: "stop" (a stop token), "length" (max_new_tokens), "context" (no room left);
    it is empty while the row still runs.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        graph: bool = True,
    ) -> None:
        self.finish: list[Finish] = ["" for _ in prompts]
        self._model = model
        self._sampling = sampling
        self._stop_ids = frozenset(stop_ids)
        self._prompts = _checked_prompts(model, prompts)
        self._context = context_length(model)
        self._budget = max_new_tokens
        self._made = 0
        self._generators = [generator_for(sampling.seed + i, "sample") for i in range(len(prompts))]
        self._rows = list(range(len(prompts)))  # prompts that are still running, in the order of the state's rows
        self._graph = graph
        self._stepper: Stepper | None = None
        self._logits: Tensor | None = None
        if max_new_tokens <= 0:
            self._end(list(self._rows), "length")

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        if not self._rows:
            raise StopIteration
        if self._stepper is None:
            self._prefill()
        assert self._logits is not None
        uniforms = [torch.rand((), dtype=torch.float64, generator=self._generators[row]).item() for row in self._rows]
        drawn = dict(zip(self._rows, next_tokens(self._logits, self._sampling, uniforms), strict=True))
        self._made += 1
        item: list[int | None] = [drawn.get(row) for row in range(len(self.finish))]
        stopped = [row for row in self._rows if drawn[row] in self._stop_ids]
        for row in stopped:
            item[row] = None
        self._end(stopped, "stop")
        if self._made >= self._budget:
            self._end(list(self._rows), "length")
        # The token just drawn fills one place; it is the last when it filled the context.
        self._end([row for row in self._rows if len(self._prompts[row]) + self._made >= self._context], "context")
        if self._rows:
            self._step([drawn[row] for row in self._rows])
        elif not any(token is not None for token in item):
            raise StopIteration
        return item

    def _prefill(self) -> None:
        lengths = [len(prompt) for prompt in self._prompts]
        longest = max(lengths)
        device = next(self._model.parameters()).device
        idx = torch.zeros(len(lengths), longest, dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            idx[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        with torch.no_grad():
            state = self._model.init_state(len(lengths), min(self._context, longest + self._budget))
            ragged = torch.tensor(lengths, device=device) if min(lengths) < longest else None
            logits = self._model.step(idx.to(device), state, lengths=ragged)
        self._stepper = Stepper(self._model, state, self._graph)
        last = torch.tensor(lengths, device=logits.device) - 1
        self._logits = logits[torch.arange(len(lengths), device=logits.device), last]

    def _step(self, tokens: list[int]) -> None:
        assert self._stepper is not None
        shortest = min(len(self._prompts[row]) for row in self._rows)
        self._logits = self._stepper.step(tokens, min(self._budget, self._context - shortest) - self._made)

    def _end(self, rows: list[int], reason: Finish) -> None:
        """Mark rows as finished and drop them from the state, so that they cost nothing from here on."""
        if not rows:
            return
        for row in rows:
            self.finish[row] = reason
        kept = [place for place, row in enumerate(self._rows) if row not in set(rows)]
        self._rows = [self._rows[place] for place in kept]
        if self._rows and self._stepper is not None:
            self._stepper.select(kept)


def context_length(model: GPT) -> int:
    """How many tokens, prompt included, `generate` lets a sequence grow to: the length the model was trained on."""
    return int(model.config.sequence_len)


def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    graph: bool = True,
) -> Generation:
    """Continue several prompts at once. Row i draws from seed + i; an empty prompt becomes the BOS token alone.

    graph: on CUDA, decode by a captured graph where one can serve (`decoding.GraphDecoder`). The model should be in eval mode.
    Raises UserError for settings out of bounds and prompts that leave no room in the context.
    """
    return Generation(model, prompts, max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop_ids, graph)


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    graph: bool = True,
) -> Iterator[int]:
    """Continue one prompt: an iterator over token ids. See `generate_batch`, whose row 0 it equals."""
    for (token,) in generate_batch(model, [prompt_ids], max_new_tokens, temperature, top_k, top_p, seed, stop_ids, graph):
        if token is not None:
            yield token


def _checked_prompts(model: GPT, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    config = model.config
    if not prompts:
        raise UserError("no prompt given: pass at least one list of token ids")
    checked = [list(prompt) or [config.bos_token_id] for prompt in prompts]
    for prompt in checked:
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise UserError(f"token id {outside[0]} is outside of the vocabulary [0, {config.vocab_size - 1}]")
        if len(prompt) >= config.sequence_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the context holds {config.sequence_len}: "
                f"shorten it by {len(prompt) - config.sequence_len + 1} or more"
            )
    return checked
