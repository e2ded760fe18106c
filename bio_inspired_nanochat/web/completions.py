"""POST /v1/chat/completions: from a checked body to a job, and from its events to OpenAI's format, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from bio_inspired_nanochat.engine import Loaded, Message, Piece, ReplyOptions, Sampling, context_length, fit, style_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web.config import WebConfig
from bio_inspired_nanochat.web.guards import error_body
from bio_inspired_nanochat.web.schema import ChatRequest
from bio_inspired_nanochat.web.worker import STOPPING, Event, Full, Job, Stopped, Worker

DEFAULT_TOKENS = 256
NOTHING = Piece(0, -1, "")
REASONS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop", "": None}


class Completion:
    """One request on its way: its job, and what all of its answers' records share."""

    def __init__(self, body: ChatRequest, job: Job, name: str, dropped: int) -> None:
        self.body, self.job, self.dropped = body, job, dropped
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self.texts = ["" for _ in range(job.options.n)]
        self.tokens: list[list[int]] = [[] for _ in self.texts]

    def note(self, event: Event) -> None:
        """Keep what an event adds to the answers."""
        for piece in event.pieces:
            if not piece.tool:
                self.texts[piece.answer] += piece.text
            if piece.token >= 0:
                self.tokens[piece.answer].append(piece.token)

    @property
    def finishes(self) -> list[str]:
        """Why each answer ended."""
        return list(self.job.reply.finish) if self.job.reply is not None else ["cancelled" for _ in self.texts]

    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        prompt, made = len(self.job.ids), sum(map(len, self.tokens))
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def extension(self) -> dict[str, Any]:
        """The field x_synapse at the end of an answer."""
        record: dict[str, Any] = {"finish": self.finishes, "dropped_messages": self.dropped}
        return record | ({"tokens": self.tokens} if self.body.x_synapse.return_tokens else {})


async def complete(
    body: ChatRequest,
    request: Request,
    worker: Worker,
    loaded: Loaded,
    name: str,
    config: WebConfig,
    log: Callable[[dict[str, Any]], None],
) -> Response:
    """Answer one request. Raises UserError and HTTPException for what cannot be served."""
    ids, options, dropped = await run_in_threadpool(_prepared, body, loaded, config)
    job = Job(ids, options, body.x_synapse.memory, body.x_synapse.conversation)
    try:
        worker.submit(job)
    except Full:
        said = f"{config.max_active + config.max_waiting} requests are being served or waiting: try again in a few seconds"
        raise HTTPException(429, said, {"Retry-After": "2"}) from None
    except Stopped:
        raise HTTPException(503, STOPPING) from None
    completion = Completion(body, job, name, dropped)
    watch = asyncio.create_task(_watch(request, job))
    if body.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(completion, watch, log), media_type="text/event-stream", headers=headers)
    return await _whole(completion, watch, log)


def _prepared(body: ChatRequest, loaded: Loaded, config: WebConfig) -> tuple[list[int], ReplyOptions, int]:
    """Prompt as ids, options, and how many messages were left out. Outside of the event loop, because long texts take time."""
    asked = body.max_completion_tokens or body.max_tokens
    if asked is not None and asked > config.max_tokens:
        raise UserError(f"max_tokens={asked} is above this server's limit {config.max_tokens}: ask for less, or start it with --max_tokens")
    options = ReplyOptions(
        max_tokens=asked or min(DEFAULT_TOKENS, config.max_tokens),
        sampling=Sampling(
            temperature=0.8 if body.temperature is None else body.temperature,
            top_k=50 if body.top_k is None else body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(48) if body.seed is None else body.seed,
        ),
        n=body.n or 1,
        stop=body.stops,
        samples=body.x_synapse.samples,
        vitals_every=body.x_synapse.vitals_every,
        tools=body.x_synapse.tools,
    )
    if options.samples and not loaded.model.stochastic:
        raise UserError(f"x_synapse.samples={options.samples}: this model releases no vesicle at random (stochastic_train_frac is 0)")
    messages = [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in body.messages]
    context = context_length(loaded.model)
    room = context - min(options.max_tokens, context // 4)
    ids, dropped = fit(messages, loaded.tokenizer, style_of(loaded.meta), room, body.x_synapse.overflow)
    return ids, options, dropped


async def _watch(request: Request, job: Job) -> None:
    """Free the worker when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _events(completion: Completion, watch: asyncio.Task) -> AsyncIterator[Event]:
    """The events of a job up to its end; the job is cancelled when nobody listens any more."""
    try:
        while True:
            event = await completion.job.events.get()
            completion.note(event)
            yield event
            if event.kind != "token":
                return
    finally:
        completion.job.cancel()
        watch.cancel()


async def _whole(completion: Completion, watch: asyncio.Task, log: Callable[[dict[str, Any]], None]) -> Response:
    vitals = None
    try:
        async for event in _events(completion, watch):
            vitals = event.vitals or vitals
            if event.kind == "error":
                return JSONResponse(error_body(event.status, event.message), event.status)
    finally:
        completion.job.cancel()
        watch.cancel()
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": REASONS[finish], "logprobs": None}
        for i, (text, finish) in enumerate(zip(completion.texts, completion.finishes, strict=True))
    ]
    extension = completion.extension() | ({"vitals": vitals} if vitals else {})
    log({"request": completion.body.model_dump(exclude_none=True), "answers": completion.texts})
    head = {**completion.head, "object": "chat.completion"}
    return JSONResponse(head | {"choices": choices, "usage": completion.usage(), "x_synapse": extension})


async def _stream(completion: Completion, watch: asyncio.Task, log: Callable[[dict[str, Any]], None]) -> AsyncIterator[bytes]:
    head = {**completion.head, "object": "chat.completion.chunk"}
    for answer in range(len(completion.texts)):
        yield _line(head | {"choices": [_choice(answer, {"role": "assistant", "content": ""})]})
    async for event in _events(completion, watch):
        if event.kind == "error":
            yield _line(error_body(event.status, event.message))
            break
        lines = []
        looks: dict[str, Any] = {"vitals": event.vitals} if event.vitals is not None else {}
        for piece in joined(event.pieces) or (NOTHING,) * bool(looks):
            extension, looks = looks, {}
            if piece.uncertainty is not None:
                extension["uncertainty"] = round(piece.uncertainty, 5)
            if piece.tool:
                extension["tool"] = {"kind": piece.tool, "text": piece.text}
            shown = "" if piece.tool else piece.text
            if shown or extension:
                chunk = head | {"choices": [_choice(piece.answer, {"content": shown} if shown else {})]}
                lines.append(_line(chunk | ({"x_synapse": extension} if extension else {})))
        if lines:
            yield b"".join(lines)
    else:
        endings: list[dict[str, Any]] = [
            head | {"choices": [_choice(answer, {}, REASONS[finish])]} for answer, finish in enumerate(completion.finishes)
        ]
        endings[-1]["x_synapse"] = completion.extension()
        for record in endings:
            yield _line(record)
        if completion.body.stream_options is not None and completion.body.stream_options.include_usage:
            yield _line(head | {"choices": [], "usage": completion.usage()})
        log({"request": completion.body.model_dump(exclude_none=True), "answers": completion.texts})
    yield b"data: [DONE]\n\n"


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring pieces of plain text of one answer as one, so that they make one record. Token ids are kept by `Completion.note`."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and (last.answer, last.tool, last.uncertainty) == (piece.answer, "", None) == (
            piece.answer,
            piece.tool,
            piece.uncertainty,
        ):
            found[-1] = last._replace(text=last.text + piece.text)
        else:
            found.append(piece)
    return found


def _choice(answer: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": answer, "delta": delta, "finish_reason": finish, "logprobs": None}


def _line(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
