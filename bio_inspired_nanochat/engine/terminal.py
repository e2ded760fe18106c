"""A conversation in the terminal: lines in, answers streamed out, commands that begin with a slash."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bio_inspired_nanochat.common import pick_device, say
from bio_inspired_nanochat.common.console import on_terminal, write
from bio_inspired_nanochat.config import device_knob, knob, validate
from bio_inspired_nanochat.engine.generation import Loaded, Sampling, load, source_path
from bio_inspired_nanochat.engine.reply import MOST_SAMPLES, Piece, ReplyOptions
from bio_inspired_nanochat.engine.session import ChatSession, Turn
from bio_inspired_nanochat.errors import UserError, nearest

NOTICES = {"context": "[the context is full]", "length": "", "stop": "", "cancelled": "[stopped]"}
BLOCK = '"""'


@dataclass(frozen=True)
class ChatConfig:
    """Which model answers, and how it draws its words."""

    source: str = knob("base", "base: the newest that base_train wrote; sft: the newest fine-tuned one; or the path of a checkpoint")
    checkpoint: str | None = knob(None, "checkpoint: a step, a run or a folder of runs; auto is what --source says", path="exists")
    prompt: str | None = knob(None, "text to answer once; - asks for prompts", none="-")
    system: str = knob("", "instructions in front of the conversation")
    style: str = knob(
        "auto",
        "chat: turns between special tokens; text: the model continues what is there; auto follows the checkpoint",
        choices=("auto", "chat", "text"),
    )
    memory: bool = knob(True, "a new conversation starts with the fast weights of the one before", off=False)
    max_tokens: int = knob(200, "longest answer", lo=1, hi=1 << 20, unit="tokens")
    temperature: float = knob(0.8, "spread of the answers; 0 always takes the most likely token", lo=0.0, hi=100.0, off=0.0)
    top_k: int = knob(50, "draw from this many most likely tokens; 0 from all", lo=0, hi=1 << 20, off=0)
    top_p: float = knob(
        1.0, "draw from the most likely tokens that hold this share of the probability; 1 from all", lo=1e-6, hi=1.0, off=1.0
    )
    samples: int = knob(
        0, "random releases behind each token; on a terminal a tint shows how far they disagree", lo=0, hi=MOST_SAMPLES, off=0
    )
    seed: int = knob(0, "seed of the first answer; each further answer takes the next one", lo=0, hi=(1 << 62) - 1)
    device: str = device_knob()

    def __post_init__(self) -> None:
        validate(self)


@dataclass
class Answer:
    """The last answer: its text, why it ended ("stop", "length", "context" or "interrupted"), and the tokens of all answers."""

    text: str = ""
    tokens: int = 0
    finish: str = ""


class Chat:
    """The conversation and its commands."""

    def __init__(self, config: ChatConfig, loaded: Loaded) -> None:
        style: Any = None if config.style == "auto" else config.style
        self.session = ChatSession(loaded, style, config.system, config.memory)
        self.config, self.temperature, self.turns = config, config.temperature, 0
        self.last = Answer(finish="stop")
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("show this list", self._help),
            "/reset": ("new conversation; with memory on it starts with what this one left behind", self._reset),
            "/memory": ("show the memory; /memory on, off or reset changes it", self._memory),
            "/save": ("/save FILE writes the memory, /save FILE.json the conversation", self._save),
            "/load": ("/load FILE starts a new conversation from a saved file", self._load),
            "/temp": ("show the temperature; /temp NUMBER sets it", self._temperature),
            "/consolidate": ("/consolidate [STRENGTH] writes the fast weights into the loaded model, not into its file", self._consolidate),
            "/rollback": ("takes the last consolidation back", self._rollback),
        }

    # --- answers -----------------------------------------------------------------------------------------------------------

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it is made. Ctrl-C ends it. Raises UserError for a text that does not fit."""
        config = self.config
        sampling = Sampling(self.temperature, config.top_k, config.top_p, config.seed + self.turns)
        turn = self.session.ask(text, ReplyOptions(config.max_tokens, sampling, samples=config.samples))
        self.turns += 1
        if turn.dropped:
            say(f"[the oldest {turn.dropped} messages did not fit into the context]")
        show = _painter()
        with _ctrl_c(turn):
            for piece in turn:
                show(piece)
        write("\n")
        if notice := NOTICES[turn.finish]:
            say(notice)
        finish = "interrupted" if turn.finish == "cancelled" else turn.finish
        self.last = Answer(turn.text, self.last.tokens + turn.tokens, finish)

    def run(self) -> None:
        """Ask for messages until /quit or the end of the input."""
        how = "answers" if self.session.style == "chat" else "continues what you write (it was not tuned to answer)"
        say(f"the model {how}; /help lists the commands")
        while (text := _ask()) is not None:
            word, _, argument = text.strip().partition(" ")
            if word == "/quit":
                break
            try:
                if word.startswith("/"):
                    known = self.commands.get(word)
                    if known is None:
                        say(f"unknown command {word}{nearest(word, [*self.commands, '/quit'])}: /help lists the commands")
                    else:
                        known[1](argument.strip())
                elif word:
                    self.answer(text)
            except UserError as error:
                say(f"error: {error}")

    # --- commands ------------------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        lines = [f"{name}  {doc}" for name, (doc, _) in self.commands.items()]
        say("\n".join([*lines, "/quit  end (so does Ctrl-D); Ctrl-C stops an answer"]))
        say(f"a line that ends with \\ goes on in the next one; {BLOCK} alone on a line begins and ends a longer text")

    def _reset(self, _: str) -> None:
        self.session.reset()
        say("new conversation")

    def _memory(self, argument: str) -> None:
        session = self.session
        if argument == "reset":
            session.forget()
        elif argument in ("on", "off"):
            session.memory = argument == "on"
        elif argument:
            raise UserError(f"/memory {argument} is unknown: on, off, reset or nothing")
        engram = session.engram()
        parts = [value for layer in engram.layers for name, value in layer.items() if name.endswith(".weights")] if engram else []
        size = sum(float(value.float().square().sum()) for value in parts) ** 0.5
        held = f"fast-weight norm {size:.3g}" if parts else "empty" if session.remembers else "this model has no fast weights"
        say(f"memory {'on' if session.memory else 'off'}, {held}")

    def _save(self, argument: str) -> None:
        self.session.save(_required(argument, "/save FILE"))
        say(f"saved {argument}")

    def _load(self, argument: str) -> None:
        self.session.load(_required(argument, "/load FILE"))
        say(f"new conversation from {argument}")

    def _temperature(self, argument: str) -> None:
        if argument:
            self.temperature = Sampling(temperature=_number(argument)).temperature
        say(f"temperature {self.temperature:g}")

    def _consolidate(self, argument: str) -> None:
        change = self.session.consolidate(_number(argument) if argument else 1.0)
        say(f"the weights changed by {change:.3g} of their size; /rollback takes it back")

    def _rollback(self, _: str) -> None:
        self.session.rollback()
        say("the weights are what they were")


def chat(config: ChatConfig) -> dict[str, Any]:
    """Load the model, answer once or converse; the record of it. Raises UserError for what cannot be loaded or answered."""
    loaded = load(config.checkpoint or source_path(config.source), pick_device(config.device))
    began = time.perf_counter()
    made = Chat(config, loaded)
    if config.prompt is None:
        made.run()
    else:
        made.answer(config.prompt)
    record = {"checkpoint": str(loaded.path), "step": loaded.step, "tokens": made.last.tokens, "finish": made.last.finish}
    return record | {"text": made.last.text, "seconds": round(time.perf_counter() - began, 3)}


def _required(argument: str, usage: str) -> str:
    if not argument:
        raise UserError(f"a file name is missing: {usage}")
    return argument


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number") from None


def _clean(text: str) -> str:
    """Without control characters: what a model says must not command the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _painter() -> Callable[[Piece], None]:
    """Shows pieces: tool calls dim and tokens tinted by their uncertainty on a terminal, the plain answer elsewhere."""
    if not on_terminal():
        return lambda piece: None if piece.tool else write(_clean(piece.text))
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def paint(piece: Piece) -> None:
        shade = int(min(1.0, 2 * (piece.uncertainty or 0.0) ** 0.5) * 110)
        style = "dim" if piece.tool else f"on rgb({shade},{shade // 2},0)" if shade else ""
        console.print(Text(_clean(piece.text), style=style), end="", soft_wrap=True)

    return paint


@contextmanager
def _ctrl_c(turn: Turn) -> Iterator[None]:
    """The first Ctrl-C ends the answer between two tokens; a second one, while that takes long, is an ordinary interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        turn.cancel()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ask() -> str | None:
    """The next message, or None at the end of the input. Ctrl-C while typing drops it."""
    while True:
        try:
            line = _line("> ")
            if line is None:
                return None
            if line.strip() == BLOCK:
                lines = []
                while (line := _line(". ")) is not None and line.strip() != BLOCK:
                    lines.append(line)
                return "\n".join(lines)
            lines = [line]
            while lines[-1].endswith("\\") and (line := _line(". ")) is not None:
                lines[-1] = lines[-1][:-1]
                lines.append(line)
            return "\n".join(lines)
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D ends)")


def _line(sign: str) -> str | None:
    if sys.stdin.isatty():
        try:
            return input(sign)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
