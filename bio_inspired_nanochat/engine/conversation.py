"""Conversations as token ids.

Two styles. `chat`: every turn between the special tokens of its role, for models that were tuned on conversations. `text`: the
contents alone, a line each, which a base model continues. A system message joins the first message of the user.

When a conversation does not fit into the context there are two policies: `error`, and `drop_oldest`, which leaves out whole
turns, the oldest first (never the system message, never the last question), and says how many.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bio_inspired_nanochat.data.conversations import ASSISTANT, CALL, RESULT, SYSTEM, TEXT, Conversation, Part
from bio_inspired_nanochat.data.rows import Transcript
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

Style = Literal["chat", "text"]
Overflow = Literal["error", "drop_oldest"]
ROLES = ("system", "user", "assistant")
TUNED = "sft"  # meta["kind"] of a checkpoint that was tuned on conversations


@dataclass(frozen=True)
class Message:
    """One turn. role: system, user or assistant."""

    role: str
    content: str


def style_of(meta: Mapping[str, Any]) -> Style:
    """How a model with this checkpoint metadata reads conversations."""
    return "chat" if meta.get("kind") == TUNED else "text"


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: its own end, and the beginning of anything that is not its."""
    return frozenset(tokenizer.special(f"<|{name}|>") for name in ("bos", "assistant_end", "user_start", "user_end", "assistant_start"))


def user_turn(content: str, tokenizer: Tokenizer, style: Style) -> list[int]:
    """Ids of a question, up to where the answer begins."""
    if style == "text":
        return tokenizer.encode(content)
    return [*_turn("user", content, tokenizer), tokenizer.special("<|assistant_start|>")]


def turn_end(tokenizer: Tokenizer, style: Style) -> list[int]:
    """Ids between an answer and the next question."""
    return tokenizer.encode("\n") if style == "text" else [tokenizer.special("<|assistant_end|>")]


def render(messages: Sequence[Message], tokenizer: Tokenizer, style: Style) -> list[int]:
    """Ids of a conversation from BOS to where the assistant answers.

    Raises UserError when there is no message, a role is unknown, a system message is not the first or the user does not speak last.
    """
    turns = _merged(messages)
    if style == "text":
        return tokenizer.encode("\n".join(message.content for message in turns), bos=True)
    ids = [tokenizer.bos_id]
    for message in turns:
        ids += _turn(message.role, message.content, tokenizer)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def transcript(conversation: Conversation, tokenizer: Tokenizer) -> Transcript:
    """A whole conversation in the style `chat`, to learn from: its ids, and which of them the model is to say itself.

    Those are the texts of the assistant, its calls of the calculator, and the end of each of its messages; not what the calculator
    answers, which the engine writes.
    """
    first = 1 if conversation[0].role == SYSTEM else 0
    before = "".join(f"{part.text}\n\n" for turn in conversation[:first] for part in turn.parts)
    ids, learned = [tokenizer.bos_id], [False]
    for turn in conversation[first:]:
        own = turn.role == ASSISTANT
        pieces: list[tuple[list[int], bool]] = [([tokenizer.special(f"<|{turn.role}_start|>")], False)]
        if not own:
            pieces.append((tokenizer.encode(before + "".join(part.text for part in turn.parts)), False))
            before = ""
        else:
            pieces += [(_part_ids(part, tokenizer), part.kind != RESULT) for part in turn.parts]
        pieces.append(([tokenizer.special(f"<|{turn.role}_end|>")], own))
        for piece, learn in pieces:
            ids += piece
            learned += [learn] * len(piece)
    return Transcript(ids, learned)


def _part_ids(part: Part, tokenizer: Tokenizer) -> list[int]:
    """A part of an answer; calls and results between the special tokens that `Reply` reads and writes."""
    if part.kind == TEXT:
        return tokenizer.encode(part.text)
    name = "python" if part.kind == CALL else "output"
    return [tokenizer.special(f"<|{name}_start|>"), *tokenizer.encode(part.text), tokenizer.special(f"<|{name}_end|>")]


def fit(messages: Sequence[Message], tokenizer: Tokenizer, style: Style, room: int, overflow: Overflow = "error") -> tuple[list[int], int]:
    """The conversation in at most `room` tokens, and how many messages were left out for that.

    Raises UserError when it does not fit, under `drop_oldest` only when the last question alone does not.
    """
    ids = render(messages, tokenizer, style)
    first = begin = 1 if messages[0].role == "system" else 0
    later = [place for place, message in enumerate(messages) if message.role == "user" and place > first]

    def rest(place: int) -> list[int]:
        return render([*messages[:first], *messages[place:]], tokenizer, style)

    if len(ids) > room and later and overflow == "drop_oldest":
        # By halving: one turn at a time would read a long conversation as often as it has turns.
        fitting = bisect.bisect_left(later, True, hi=len(later) - 1, key=lambda place: len(rest(place)) <= room)
        begin = later[fitting]
        ids = rest(begin)
    if len(ids) > room:
        raise UserError(
            f"the conversation has {len(ids)} tokens, {room} fit into this context beside the answer: shorten it by {len(ids) - room} or more"
        )
    return ids, begin - first


def _turn(role: str, content: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special(f"<|{role}_start|>"), *tokenizer.encode(content), tokenizer.special(f"<|{role}_end|>")]


def _merged(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system message in front of the first content."""
    if not messages:
        raise UserError("the conversation is empty: give at least one message of the user")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise UserError(f"messages[{place}].role={message.role!r} is unknown: one of {', '.join(ROLES)}")
        if message.role == "system" and place:
            raise UserError(f"messages[{place}] is a system message: only the first message can be one")
    if messages[-1].role != "user":
        raise UserError(f"the last message is of role {messages[-1].role!r}: end the conversation with a message of the user")
    if messages[0].role != "system":
        return list(messages)
    first = messages[1]
    return [Message(first.role, f"{messages[0].content}\n\n{first.content}"), *messages[2:]]
