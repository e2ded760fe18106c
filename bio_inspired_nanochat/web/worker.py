"""The worker: one thread that owns the model and lets the running answers take turns, a token each.

Answers never share a batch, so what one says does not depend on who else is being served: it is bit for bit what it would be
alone. The event loop never computes; it hands in jobs and receives events through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.engine import Loaded, Piece, Reply, ReplyOptions, stop_ids
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web.memory import Memory, MemoryStore

GATHER = 0.04  # seconds: pieces that come faster travel together, because waking the event loop costs the worker time
STOPPING = "the server is stopping"


class Full(Exception):
    """The queue holds as many requests as it may."""


class Stopped(Exception):
    """The worker has ended, or is about to."""


@dataclass(frozen=True)
class Event:
    """What a job tells: `token` (pieces, and vitals where there is a new look), `end` (the reply is over) or `error` (status, message)."""

    kind: str
    pieces: tuple = ()
    vitals: Any = None
    status: int = 500
    message: str = ""


@dataclass
class Job:
    """One request: its prompt as ids, its options, and where its events go."""

    ids: list[int]
    options: ReplyOptions
    memory: str | None = None
    conversation: str | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    reply: Reply | None = None
    begun: Memory | None = None  # the memory that the answer began with
    gathered: list[Piece] = field(default_factory=list)
    told: float = 0.0

    def cancel(self) -> None:
        """Free the worker before its next token. May be called from any thread, also after the end."""
        self.cancelled = True

    def gather(self, pieces: list[Piece], looks: Any) -> None:
        """Tell pieces, at once after a pause and with a look at the synapses, otherwise together with those that follow soon."""
        self.gathered += pieces
        now = time.monotonic()
        if (self.gathered and now - self.told >= GATHER) or looks is not None:
            self.flush(looks)
            self.told = now

    def flush(self, looks: Any = None) -> None:
        """Tell what was gathered."""
        if self.gathered or looks is not None:
            self.tell(Event("token", tuple(self.gathered), looks))
            self.gathered = []

    def tell(self, event: Event) -> None:
        """Hand an event to the event loop; lost when that is closed, because then nobody waits for it."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            self.cancelled = True


class Worker:
    """Loads the model in its thread, then serves jobs. `error` says why there is no model, when there is none."""

    def __init__(self, load: Callable[[], Loaded], max_active: int, max_waiting: int, max_memories: int) -> None:
        self._load, self._max_active, self._max_waiting, self._max_memories = load, max_active, max_waiting, max_memories
        self._waiting: deque[Job] = deque()
        self._active: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.loaded: Loaded | None = None
        self.memories: MemoryStore | None = None
        self.error = ""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Drop all jobs and end the thread, after its current token."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def busy(self) -> dict[str, int]:
        """How many answers are running and waiting."""
        return {"active": len(self._active), "waiting": len(self._waiting)}

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Full when as many are waiting as may (those that were cancelled do not count), and Stopped at the end."""
        with self._changed:
            if self._stopping:
                raise Stopped
            if len(self._active) + len(self._waiting) >= self._max_active + self._max_waiting:
                for left in [other for other in self._waiting if other.cancelled]:
                    self._waiting.remove(left)
                    left.tell(Event("end"))  # its request waits for that, although its client has gone
                if len(self._active) + len(self._waiting) >= self._max_active + self._max_waiting:
                    raise Full
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        try:
            loaded = self._load()
            self.memories = MemoryStore(loaded.model, self._max_memories)
            self.loaded = loaded
        except UserError as error:
            self.error = str(error)
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, /health must say that there is no model)
            traceback.print_exc()
            self.error = f"the model cannot be loaded: {type(error).__name__}"
            return
        while self._admit():
            # The job stays in the round while it is stepped, because it counts for `submit` and `busy`.
            if self._step(self._active[0]):
                self._active.rotate(-1)
            else:
                self._active.popleft()
        for job in [*self._active, *self._waiting]:
            job.tell(Event("error", status=503, message=STOPPING))

    def _admit(self) -> bool:
        """Fill the round with waiting jobs; wait while there is nothing to do. False when the server stops."""
        with self._changed:
            while not self._stopping and not self._active and not self._waiting:
                self._changed.wait()
            while self._waiting and len(self._active) < self._max_active:
                self._active.append(self._waiting.popleft())
            return not self._stopping

    def _step(self, job: Job) -> bool:
        """One token of one job. False when it is over."""
        try:
            if job.reply is None:
                if job.cancelled:
                    job.tell(Event("end"))
                    return False
                job.reply = self._begin(job)
            reply = job.reply
            if job.cancelled:
                reply.cancel()
            pieces = next(reply, None)
            if pieces is None:
                self._remember(job, reply)
                job.flush()
                job.tell(Event("end"))
                return False
            job.gather(pieces, reply.vitals)
            return True
        except UserError as error:
            job.tell(Event("error", status=400, message=str(error)))
        except Exception as error:  # noqa: BLE001 (one request must not end the service of the others)
            say(f"error: a request failed: {type(error).__name__}: {error}")
            traceback.print_exc()
            job.tell(Event("error", status=500, message="the model failed on this request; the server's log says why"))
        return False

    def _begin(self, job: Job) -> Reply:
        assert self.loaded is not None and self.memories is not None
        engram = None
        if job.memory and self.memories.available:
            engram, job.begun = self.memories.begin(job.memory, job.conversation)
        return Reply(self.loaded.model, self.loaded.tokenizer, job.ids, job.options, stop_ids(self.loaded.tokenizer), engram=engram)

    def _remember(self, job: Job, reply: Reply) -> None:
        assert self.memories is not None
        if job.memory and job.begun is not None and reply.state is not None and reply.begun:
            self.memories.keep(job.memory, reply.state.engram().select(0), job.begun)
