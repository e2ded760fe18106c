"""Let a model continue text, in the terminal.

    python -m scripts.chat_cli --prompt="Once upon a time"
    python -m scripts.chat_cli

Without --prompt it asks for prompts until /quit or the end of the input. Ctrl-C stops an answer, not the program. Without
--checkpoint the newest one is taken. The last line of stdout is a JSON record.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bio_inspired_nanochat.common import pick_device, print_json_line, say
from bio_inspired_nanochat.common.console import write
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.engine import Generation, Loaded, generate_batch, load, stream_text
from bio_inspired_nanochat.errors import UserError, exit_on_user_error, nearest

COMMANDS = {"/help": "show this list", "/quit": "end (so does Ctrl-D)"}
NOTICES = {"context": "[the context is full]", "length": "", "stop": ""}


@dataclass(frozen=True)
class ChatConfig:
    """Which model answers, and how it draws its words."""

    checkpoint: str | None = knob(None, "checkpoint: a step, a run or a folder of runs; auto is the newest of all runs", path="exists")
    prompt: str | None = knob(None, "text to continue once; - asks for prompts", none="-")
    max_tokens: int = knob(200, "longest answer", lo=1, hi=1 << 20, unit="tokens")
    temperature: float = knob(0.8, "spread of the answers; 0 always takes the most likely token", lo=0.0, hi=100.0, off=0.0)
    top_k: int = knob(50, "draw from this many most likely tokens; 0 from all", lo=0, hi=1 << 20, off=0)
    top_p: float = knob(
        1.0, "draw from the most likely tokens that hold this share of the probability; 1 from all", lo=1e-6, hi=1.0, off=1.0
    )
    seed: int = knob(0, "seed of the first answer; each further answer takes the next one", lo=0, hi=(1 << 62) - 1)
    device: str = knob("auto", "where to run; auto takes CUDA, then MPS, then the CPU", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self) -> None:
        validate(self)


@dataclass
class Answer:
    """One answer: its text, token count, and why it ended ("stop", "length", "context" or "interrupted")."""

    text: str = ""
    tokens: int = 0
    finish: str = ""


def answer(config: ChatConfig, loaded: Loaded, prompt: str, turn: int = 0) -> Answer:
    """Print the continuation of `prompt` as it is made. Ctrl-C ends it. Raises UserError for a prompt that does not fit."""
    tokenizer = loaded.tokenizer
    made = Answer()
    generation = generate_batch(
        loaded.model,
        [tokenizer.encode(prompt, bos=True)],
        config.max_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.seed + turn,
        stop_ids=[tokenizer.bos_id],
    )
    try:
        for piece in stream_text(_counted(generation, made), tokenizer):
            made.text += piece
            write("".join(letter for letter in piece if letter.isprintable() or letter in "\n\t"))  # no escape sequences
        made.finish = generation.finish[0]
    except KeyboardInterrupt:
        made.finish = "interrupted"
    write("\n")
    if notice := NOTICES.get(made.finish, "[stopped]"):
        say(notice)
    return made


def _counted(generation: Generation, made: Answer) -> Iterator[int]:
    for (token,) in generation:
        if token is not None:
            made.tokens += 1
            yield token


def converse(config: ChatConfig, loaded: Loaded) -> Answer:
    """Ask for prompts until /quit or the end of the input; each is continued on its own. Returns the last answer, with all tokens counted."""
    say("each line is continued on its own; /help lists the commands")
    last, tokens, turn = Answer(finish="stop"), 0, 0
    while (line := _ask()) is not None:
        command = line.strip()
        if command == "/quit":
            break
        if command.startswith("/"):
            known = command == "/help"
            say("\n".join(f"{name}  {doc}" for name, doc in COMMANDS.items()) if known else _unknown(command))
        elif command:
            try:
                last = answer(config, loaded, line, turn)
            except UserError as error:
                say(f"error: {error}")
                continue
            tokens, turn = tokens + last.tokens, turn + 1
    last.tokens = tokens
    return last


def _unknown(command: str) -> str:
    return f"unknown command {command}{nearest(command, COMMANDS)}: /help lists the commands"


def _ask() -> str | None:
    """The next line, or None at the end of the input. Ctrl-C while typing drops the line."""
    while True:
        try:
            if sys.stdin.isatty():
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D ends)")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the model, answer, print the record."""
    with exit_on_user_error():
        config = parse(ChatConfig, argv, prog="scripts.chat_cli", description="Let a model continue text, in the terminal.")
        loaded = load(config.checkpoint, pick_device(config.device))
        began = time.perf_counter()
        made = converse(config, loaded) if config.prompt is None else answer(config, loaded, config.prompt)
        record = {"checkpoint": str(loaded.path), "step": loaded.step, "tokens": made.tokens, "finish": made.finish, "text": made.text}
        print_json_line(record | {"seconds": round(time.perf_counter() - began, 3)})


if __name__ == "__main__":
    main()
