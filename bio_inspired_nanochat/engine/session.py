"""ChatSession: a conversation with one model, whose synapses live as long as it does.

The state (keys, values, terminals, fast weights) stays between turns, so a turn reads only what is new. With memory on, the fast
weights outlive the conversation as an engram: the next one begins with them. Writing them into the model itself is for its
owner alone (`consolidate`, `rollback`) and is never done unasked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bio_inspired_nanochat.common import write_atomic
from bio_inspired_nanochat.engine.conversation import Message, Style, fit, stop_ids, style_of, turn_end, user_turn
from bio_inspired_nanochat.engine.generation import Finish, Loaded, context_length
from bio_inspired_nanochat.engine.reply import Piece, Reply, ReplyOptions
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic import Consolidation, Engram, SynapseState, consolidate, rollback

_FORMAT = "bio_inspired_nanochat.conversation"


class Turn:
    """One answer of a session: iterate over its pieces. When the iteration ends, also early, the answer joins the conversation.

    dropped: messages that were left out so that the conversation fits into the context.
    """

    def __init__(self, session: ChatSession, reply: Reply, dropped: int) -> None:
        self._session, self._reply, self.dropped = session, reply, dropped
        self.text, self.tokens = "", 0

    @property
    def finish(self) -> Finish:
        """Why it ended; empty while it runs."""
        return self._reply.finish[0]

    def cancel(self) -> None:
        """End the answer before its next token."""
        self._reply.cancel()

    def __iter__(self) -> Iterator[Piece]:
        whole = False
        try:
            for pieces in self._reply:
                for piece in pieces:
                    self.text += "" if piece.tool else piece.text
                    self.tokens += piece.token >= 0
                    yield piece
            whole = True
        finally:
            self._session._answered(self, self._reply if whole else None)


class ChatSession:
    """messages: the conversation so far; memory: whether the fast weights of a conversation are kept for the next one."""

    def __init__(self, loaded: Loaded, style: Style | None = None, system: str = "", memory: bool = True) -> None:
        """A new conversation. style: how it is written as tokens, by default what the checkpoint was trained for."""
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self.style: Style = style_of(loaded.meta) if style is None else style
        self.system, self.memory = system, memory
        self._engram: Engram | None = None  # what the next conversation begins with
        self._start: Engram | None = None  # what this one began with
        self._consolidated: list[Consolidation] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation. With memory on it starts with the fast weights of the one before."""
        self._keep()
        self.messages: list[Message] = [Message("system", self.system)] if self.system else []
        self._start = self._engram if self.memory else None
        self._state: SynapseState | None = None
        self._tail: list[int] = []  # tokens at the end of the conversation that the state has not read

    def forget(self) -> None:
        """Drop the memory; a conversation that has begun goes on without it from its next rebuilt state."""
        self._engram = self._start = None
        self._state = None

    def ask(self, text: str, options: ReplyOptions | None = None) -> Turn:
        """Put a question. Raises UserError, and leaves the conversation as it was, when the question does not fit into the context.

        A conversation that outgrows the context loses its oldest turns (`conversation.fit`); what is left is then read anew.
        """
        options = options or ReplyOptions()
        if options.n != 1:
            raise UserError(f"n={options.n}: a conversation has one answer per question")
        messages = [*self.messages, Message("user", text)]
        context = context_length(self._model)
        room = context - min(options.max_tokens, context // 4)
        state, dropped = self._state, 0
        ids = [*self._tail, *user_turn(text, self._tokenizer, self.style)]
        if state is None or options.samples or int(state.pos[0]) + len(ids) > room:
            ids, dropped = fit(messages, self._tokenizer, self.style, room, "drop_oldest")
            state = None if options.samples else self._model.init_state(1, context, engram=self._start)
        stops = stop_ids(self._tokenizer)
        start = self._start if state is None else None
        reply = Reply(self._model, self._tokenizer, ids, options, stops, state=state, engram=start)
        self.messages = messages
        if dropped:
            first = 1 if messages[0].role == "system" else 0
            self.messages = [*messages[:first], *messages[first + dropped :]]
        return Turn(self, reply, dropped)

    def _answered(self, turn: Turn, reply: Reply | None) -> None:
        self.messages.append(Message("assistant", turn.text))
        self._state, self._tail = None, []
        if reply is not None and reply.state is not None and not reply._options.samples and reply.begun:
            self._state = reply.state
            self._tail = [*reply.unread, *turn_end(self._tokenizer, self.style)]

    # --- memory --------------------------------------------------------------------------------------------------------------

    @property
    def remembers(self) -> bool:
        """Whether the model has fast weights, without which there is no memory to keep."""
        return any(block.fast_layers() for block in self._model.blocks)  # pyrefly: ignore[not-callable]

    def engram(self) -> Engram | None:
        """The memory as it is now: of this conversation, or what it began with. None when there is none."""
        if self.remembers and self._state is not None:
            return self._state.engram().select(0)
        return self._start or self._engram

    def _keep(self) -> None:
        if self.memory and getattr(self, "_state", None) is not None and self.remembers:
            self._engram = self.engram()

    def save(self, path: str | Path) -> None:
        """Write the conversation (`*.json`) or the memory (any other name) to a file. Raises UserError when there is none, and
        where it cannot be written.
        """
        if str(path).endswith(".json"):
            record = {"format": _FORMAT, "messages": [{"role": m.role, "content": m.content} for m in self.messages]}
            # A byte of the terminal that is no UTF-8 is a lone surrogate: its Python escape is that of JSON too.
            content = (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace")
            try:
                write_atomic(Path(path), content)
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}): name a file in a writable folder") from None
            return
        engram = self.engram()
        if engram is None:
            why = (
                "nothing has been said yet"
                if self.remembers
                else "this model has no fast weights; a name that ends in .json saves the text"
            )
            raise UserError(f"there is no memory to save: {why}")
        engram.save(path)

    def load(self, path: str | Path) -> None:
        """Begin a new conversation from a file that `save` wrote: its text, or its memory. Raises UserError for any other file."""
        if str(path).endswith(".json"):
            messages = _read_conversation(Path(path))
            self.reset()
            self.messages = messages
            return
        engram = Engram.load(path, next(self._model.parameters()).device)
        self._model.init_state(1, 1, engram=engram)  # says so when it is another model's
        self._state = None
        self._engram, self.memory = engram, True
        self.reset()

    # --- for the owner of the model ----------------------------------------------------------------------------------------------

    def consolidate(self, strength: float = 1.0) -> float:
        """Write the fast weights of this conversation into the model, and return the size of the change relative to its weights.

        Raises UserError before the first answer and for a model without fast weights.
        """
        if self._state is None:
            raise UserError("there is nothing to consolidate yet: ask something first")
        self._consolidated.append(consolidate(self._model, self._state, strength))
        return self._consolidated[-1].norm()

    def rollback(self) -> None:
        """Take the last consolidation back, bit for bit. Raises UserError when there is none."""
        if not self._consolidated:
            raise UserError("nothing was consolidated in this session")
        rollback(self._model, self._consolidated[-1])
        self._consolidated.pop()


def _read_conversation(path: Path) -> list[Message]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a conversation: {error}") from None
    turns = record.get("messages") if isinstance(record, dict) and record.get("format") == _FORMAT else None
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    ):
        raise UserError(f"{path} is not a saved conversation: make one with /save {path.name}")
    return [Message(turn["role"], turn["content"]) for turn in turns]
