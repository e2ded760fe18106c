"""Conversations to learn from: their form, and JSON lines that hold them.

A line is an object with the key `messages`, or the list of messages itself; a message has `role` (system, user or assistant) and
`content`: a text, or a list of parts `{"type": ..., "text": ...}` of the types `text`, `python` (a call of the calculator) and
`python_output` (what it answered).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bio_inspired_nanochat.errors import UserError

TEXT, CALL, RESULT = "text", "python", "python_output"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class Part(NamedTuple):
    """A piece of a message. kind: TEXT, CALL or RESULT."""

    kind: str
    text: str


class Turn(NamedTuple):
    """A message. role: SYSTEM, USER or ASSISTANT."""

    role: str
    parts: tuple[Part, ...]


Conversation = tuple[Turn, ...]


def dialogue(*texts: str | Sequence[Part]) -> Conversation:
    """A conversation of the user's and the assistant's messages in turns, the user's first."""
    turns = []
    for place, said in enumerate(texts):
        parts = (Part(TEXT, said),) if isinstance(said, str) else tuple(said)
        turns.append(Turn((USER, ASSISTANT)[place % 2], parts))
    return tuple(turns)


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a file of JSON lines, or of all `*.jsonl` files of a folder in name order.

    Raises UserError, which names file and line, for anything that is no conversation, and for none at all.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"data={path} does not exist: give a .jsonl file of conversations, or a folder of them")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = [conversation for file in files for conversation in _read_file(file)]
    if not found:
        raise UserError(f"data={path} holds no conversation: expected a .jsonl file with one per line")
    return found


def _read_file(path: Path) -> Iterator[Conversation]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _conversation(line, f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None


def _conversation(line: str, where: str) -> Conversation:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): write one conversation per line") from None
    messages = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where} has no messages: write {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    turns = tuple(_turn(message, f"{where}, message {place}") for place, message in enumerate(messages, 1))
    spoken = turns[1:] if turns[0].role == SYSTEM else turns
    for place, turn in enumerate(spoken):
        if turn.role != (USER, ASSISTANT)[place % 2]:
            raise UserError(
                f"{where} has {turn.role} as speaker {place + 1}: user and assistant take turns, after at most one system message"
            )
    if len(spoken) < 2:
        raise UserError(f"{where} has no answer of the assistant: there is nothing to learn from it")
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f'{where} is no object with "role" and "content"')
    role, content = message.get("role"), message.get("content")
    if role not in (SYSTEM, USER, ASSISTANT):
        raise UserError(f"{where} has role {str(role)[:40]!r}: one of {SYSTEM}, {USER}, {ASSISTANT}")
    if isinstance(content, str):
        content = [{"type": TEXT, "text": content}]
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} has no content: a text, or a list of parts with type and text")
    parts = tuple(_part(part, role, where) for part in content)
    if not any(part.text for part in parts):
        raise UserError(f"{where} is empty: leave the conversation out, or write what was said")
    return Turn(role, parts)


def _part(part: Any, role: str, where: str) -> Part:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    allowed = (TEXT, CALL, RESULT) if role == ASSISTANT else (TEXT,)
    if not isinstance(kind, str) or kind not in allowed or not isinstance(text, str):
        raise UserError(f"{where} has a part of type {str(kind)[:40]!r} that is none of {', '.join(allowed)} with a text")
    return Part(kind, text)
