"""Reply: answers to one prompt, token by token, with tools, stop texts, vitals and Monte-Carlo uncertainty.

Several answers share one prefill. Every step is small (one token per answer, or one piece of the prompt), so that whoever
drives several replies can take turns between them and drop any of them after each step. V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.engine.calculator import calculate
from bio_inspired_nanochat.engine.generation import Finish, Sampling, Stepper, context_length, next_tokens
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import Engram, SynapseState, vitals
from bio_inspired_nanochat.tokenizer import Tokenizer

PREFILL = 256  # tokens of the prompt per step
MOST_SAMPLES = 16


@dataclass(frozen=True)
class ReplyOptions:
    """How to answer.

    n: answers to the same prompt; stop: texts that end an answer, not part of it; samples: random releases behind each token (0:
    expectations), which give the uncertainty; vitals_every: tokens between two looks at the synapses (0: never); tools: whether the
    model may call the calculator.
    """

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop: tuple[str, ...] = ()
    samples: int = 0
    vitals_every: int = 0
    tools: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("max_tokens", 1, 1 << 20), ("n", 1, 64), ("samples", 0, MOST_SAMPLES), ("vitals_every", 0, 1 << 20)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)} is out of bounds [{low}, {high}]")
        if self.samples == 1:
            raise UserError("samples=1 says nothing about uncertainty: 0 computes expectations, 2 or more compare random releases")
        if any(not text for text in self.stop):
            raise UserError("a stop text is empty: leave it out or give at least one character")


class Piece(NamedTuple):
    """One token of one answer. token: -1 for text that was held back until the end; text: the characters that it completes;
    tool: "" for the answer, "python" or "output" for a call of the calculator; uncertainty: standard deviation of the token's
    probability over the random releases, or None.
    """

    answer: int
    token: int
    text: str
    tool: str = ""
    uncertainty: float | None = None


class StopText:
    """Text of a stream up to the first stop text. What may be the beginning of one is held back until that is known."""

    def __init__(self, stops: Collection[str]) -> None:
        self._stops, self._held, self.stopped = tuple(stops), "", False

    def push(self, text: str) -> str:
        """What can be shown now."""
        if not self._stops:
            return text
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        keep = max((n for stop in self._stops for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What is left at the end of the stream."""
        held, self._held = self._held, ""
        return held


class _Answer:
    """One answer in the making."""

    def __init__(self, index: int, seed: int, tokenizer: Tokenizer, stops: Collection[str]) -> None:
        self.index = index
        self.generator = generator_for(seed, "sample")
        self.decoder = tokenizer.stream_decoder()
        self.visible = StopText(stops)
        self.forced: deque[int] = deque()  # tokens of a tool's answer that are still to be read
        self.call: list[int] | None = None  # tokens of a call of the calculator that is being written
        self.tool = ""


class Reply:
    """An iterator over lists of pieces: one per running answer, none after a step that only read a part of the prompt.

    `finish[i]` says why answer i ended, as `generate_batch` does; "cancelled" after `cancel`, which acts before the next token.
    `vitals`: a look at the synapses of the first running answer, taken in the last step, or None; `made`: tokens per answer. With one answer `state` is its state
    at the end and `unread` the tokens that it has not read.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        options: ReplyOptions,
        stop_ids: Collection[int],
        *,
        state: SynapseState | None = None,
        engram: Engram | None = None,
    ) -> None:
        """Answer the token ids `ids`, which `state` (of one sequence, by default a fresh one with `engram`) reads first.

        Raises UserError when the prompt leaves no room in the context, and for random releases that the model does not have.
        """
        before = 0 if state is None else int(state.pos[0])
        self._context = context_length(model) if state is None else state.max_len
        if not ids or before + len(ids) >= self._context:
            raise UserError(f"the prompt has {before + len(ids)} tokens, the context holds {self._context}: shorten it or start anew")
        if options.samples and not model.stochastic:
            raise UserError(f"samples={options.samples}: this model releases no vesicle at random (syn_cfg.stochastic_train_frac is 0)")
        if options.samples and state is not None:
            raise UserError(f"samples={options.samples}: random releases need a fresh state, because they are part of it")
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._stop_ids = frozenset(stop_ids)
        self._prompt, self._read = list(ids), 0
        self._given, self._engram = state, engram
        self._stepper: Stepper | None = None
        self._logits: Tensor | None = None  # [answers * lanes, V]
        self._lanes = max(1, options.samples)
        seed = options.sampling.seed
        self._answers = [_Answer(i, seed + i, tokenizer, options.stop) for i in range(options.n)]
        self._names = {token: name for name, token in tokenizer.specials.items()}
        self._cancelled = False
        self.prompt_tokens = before + len(ids)
        self.finish: list[Finish] = ["" for _ in self._answers]
        self.made = [0 for _ in self._answers]
        self.unread: list[int] = []
        self.vitals: list[dict[str, Any]] | None = None

    @property
    def state(self) -> SynapseState | None:
        """The state of the answers that still run; of the last one at the end. None before the prompt has been begun."""
        return self._given if self._stepper is None else self._stepper.state

    @property
    def begun(self) -> bool:
        """Whether the whole prompt has been read: before that `state` is one of half a question."""
        return self._read == len(self._prompt)

    def cancel(self) -> None:
        """End all answers before the next token. May be called from another thread."""
        self._cancelled = True

    def __iter__(self) -> Iterator[list[Piece]]:
        return self

    def __next__(self) -> list[Piece]:
        self.vitals = None
        if self._cancelled and self._answers:
            return self._end(list(self._answers), "cancelled")
        if not self._answers:
            raise StopIteration
        if not self.begun:
            self._prefill()
            return []
        if self.unread:
            self._feed()
        return self._draw()

    # --- reading -----------------------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        model, options = self._model, self._options
        if self._stepper is None:
            state = self._given
            if state is None:
                length = min(self._context, len(self._prompt) + options.max_tokens)
                noise: dict[str, Any] = (
                    {"noise_seed": options.sampling.seed, "sequence_ids": torch.arange(self._lanes)} if options.samples else {}
                )
                state = model.init_state(self._lanes, length, engram=self._engram, **noise)
            self._stepper = Stepper(model, state)
        state = self._stepper.state
        piece = torch.tensor(self._prompt[self._read : self._read + PREFILL], device=next(model.parameters()).device)
        self._logits = model.step(piece.expand(state.batch_size, -1), state)[:, -1]
        self._read += len(piece)
        self._look(state)
        if self.begun and options.n > 1:
            rows = list(range(self._lanes)) * options.n
            self._stepper.select(rows)
            self._logits = self._logits[rows]

    def _feed(self) -> None:
        assert self._stepper is not None
        state = self._stepper.state
        budget = min(self._options.max_tokens - self.made[self._answers[0].index], state.max_len - int(state.pos[0]))
        self._logits = self._stepper.step([token for token in self.unread for _ in range(self._lanes)], budget)
        self.unread = []
        self._look(self._stepper.state)

    def _look(self, state: SynapseState) -> None:
        every = self._options.vitals_every
        past = int(state.pos[0])
        self.vitals = vitals(state) if every and (past % every == 0 or past == len(self._prompt)) else None

    # --- writing ------------------------------------------------------------------------------------------------------------

    def _draw(self) -> list[Piece]:
        assert self._logits is not None and self._stepper is not None
        logits, probabilities = self._logits, None
        if self._options.samples:
            lanes = torch.log_softmax(logits.double(), dim=-1).unflatten(0, (-1, self._lanes))
            probabilities, logits = lanes.exp(), torch.logsumexp(lanes, dim=1) - math.log(self._lanes)
        uniforms = [torch.rand((), dtype=torch.float64, generator=answer.generator).item() for answer in self._answers]
        drawn = next_tokens(logits, self._options.sampling, uniforms)
        pieces, ended, kept = [], [], []
        for place, answer in enumerate(self._answers):
            forced = bool(answer.forced)
            token = answer.forced.popleft() if forced else drawn[place]
            if token in self._stop_ids and not forced:
                ended.append((answer, "stop"))
                continue
            spread = None if probabilities is None or forced else float(probabilities[place, :, token].std())
            pieces.append(self._piece(answer, token, spread))
            self.made[answer.index] += 1
            if answer.visible.stopped:
                ended.append((answer, "stop"))
            elif self.made[answer.index] >= self._options.max_tokens:
                ended.append((answer, "length"))
            elif self.prompt_tokens + self.made[answer.index] >= self._context:
                ended.append((answer, "context"))
            kept.append((answer, token))
        gone = {answer.index for answer, _ in ended}
        self.unread = [token for answer, token in kept if answer.index not in gone]
        if len(gone) == len(self._answers):  # the state of the last one stays, for who goes on with it
            self.unread = [token for answer, token in kept][-1:]
        for reason in ("stop", "length", "context"):
            pieces += self._end([answer for answer, why in ended if why == reason], reason)
        return pieces

    def _piece(self, answer: _Answer, token: int, spread: float | None) -> Piece:
        name = self._names.get(token)
        if name is not None:
            before = answer.tool
            rest = answer.decoder.flush()  # half a character before the token is no part of what comes behind it
            self._tool(answer, name)
            return Piece(answer.index, token, rest if before else answer.visible.push(rest), before if rest else answer.tool)
        if answer.tool:
            if answer.call is not None:
                answer.call.append(token)
            return Piece(answer.index, token, answer.decoder.push(token), answer.tool, spread)
        return Piece(answer.index, token, answer.visible.push(answer.decoder.push(token)), "", spread)

    def _tool(self, answer: _Answer, name: str) -> None:
        """A special token inside of an answer: the calculator's, or one that means nothing here."""
        special = self._tokenizer.special
        if name == "<|python_start|>" and self._options.tools:
            answer.call, answer.tool = [], "python"
        elif name == "<|python_end|>" and answer.call is not None:
            result = calculate(self._tokenizer.decode(answer.call))
            answer.call, answer.tool = None, ""
            if result is not None:
                answer.forced.extend([special("<|output_start|>"), *self._tokenizer.encode(result), special("<|output_end|>")])
        elif name == "<|output_start|>" and answer.forced:
            answer.tool = "output"
        elif name == "<|output_end|>":
            answer.tool = ""

    def _end(self, answers: list[_Answer], reason: Finish) -> list[Piece]:
        """Mark answers as finished, drop them from the state, and hand out the text that was held back."""
        rest = []
        for answer in answers:
            self.finish[answer.index] = reason
            tail = answer.decoder.flush() if not answer.tool else ""
            text = "" if answer.visible.stopped else answer.visible.push(tail) + answer.visible.flush()
            if text:
                rest.append(Piece(answer.index, -1, text))
        kept = [place for place, answer in enumerate(self._answers) if answer not in answers]
        if kept and len(kept) < len(self._answers) and self._stepper is not None and self.begun:
            self._stepper.select([place * self._lanes + lane for place in kept for lane in range(self._lanes)])
        self._answers = [self._answers[place] for place in kept]
        return rest
