"""The ASGI application: page, health, models, chat completions, memories."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from bio_inspired_nanochat.common import pick_device, say
from bio_inspired_nanochat.engine import Loaded, context_length, load, style_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import active_mechanisms
from bio_inspired_nanochat.web.completions import complete
from bio_inspired_nanochat.web.config import WebConfig
from bio_inspired_nanochat.web.guards import Guard, error_body
from bio_inspired_nanochat.web.memory import MemoryStore
from bio_inspired_nanochat.web.schema import ChatRequest, Name
from bio_inspired_nanochat.web.worker import Worker

PAGE_FOLDER = Path(__file__).parent / "page"
LOADING = "the model is still loading: try again in a few seconds"


def make_app(config: WebConfig, loader: Callable[[], Loaded] | None = None) -> Guard:
    """The server as an ASGI application. loader: in place of the checkpoint that `config` names. `.worker` is its worker.

    Raises UserError for a log of conversations that cannot be written.
    """
    worker = Worker(
        loader or (lambda: load(config.checkpoint(), pick_device(config.device))),
        config.max_active,
        config.max_waiting,
        config.max_memories,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    # No interactive documentation: its pages load scripts from elsewhere. /openapi.json has the schema.
    app = FastAPI(title="bio-inspired nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_errors(app)
    _add_page(app)
    _add_api(app, worker, config)
    _add_memories(app, worker)
    guard = Guard(app, config)
    guard.worker = worker
    return guard


def ready(worker: Worker) -> tuple[Loaded, MemoryStore]:
    """The model and its memories, or a 503 that says why there are none."""
    if worker.loaded is None or worker.memories is None:
        headers = None if worker.error else {"Retry-After": "2"}
        raise HTTPException(503, worker.error or LOADING, headers)
    return worker.loaded, worker.memories


def add_errors(app: FastAPI) -> None:
    """Answer errors in the form of OpenAI's API."""

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    @app.exception_handler(UserError)
    async def wrong(_: Request, error: UserError) -> Response:
        return JSONResponse(error_body(400, str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        said = f"{place}: {first['msg']}{more}" if place else f"{first['msg']}{more}"
        return JSONResponse(error_body(400, said, place or None), 400)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE_FOLDER / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE_FOLDER), name="page")


def _add_api(app: FastAPI, worker: Worker, config: WebConfig) -> None:
    log = _conversation_log(config.log_conversations)

    @app.get("/health")
    async def health() -> Response:
        """200 when questions are answered, 503 while the model is loading or when it cannot be loaded."""
        status = "error" if worker.error else "ok" if worker.loaded is not None else "loading"
        record = {"status": status, "key_needed": config.api_key is not None, **worker.busy()}
        return JSONResponse(record | ({"error": worker.error} if worker.error else {}), 200 if status == "ok" else 503)

    @app.get("/v1/models")
    async def models() -> dict:
        """The one model, with what its synapses can do."""
        loaded, memories = ready(worker)
        model = loaded.model.config
        about = {
            "step": loaded.step,
            "style": style_of(loaded.meta),
            "context": context_length(loaded.model),
            "max_tokens": config.max_tokens,
            "layers": model.n_layer,
            "heads": model.n_head,
            "mechanisms": sorted(active_mechanisms(model.syn_cfg)) if model.synapses else [],
            "memory": memories.available,
            "stochastic": loaded.model.stochastic,
        }
        entry = {"id": model_name(loaded), "object": "model", "created": 0, "owned_by": "you", "x_synapse": about}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer, whole or as server-sent events that end in [DONE]."""
        loaded, _ = ready(worker)
        return await complete(body, request, worker, loaded, model_name(loaded), config, log)


def _add_memories(app: FastAPI, worker: Worker) -> None:
    @app.get("/v1/x_synapse/memories/{name}")
    def describe(name: Name) -> dict:
        """How much a memory holds."""
        return ready(worker)[1].describe(name)

    @app.delete("/v1/x_synapse/memories/{name}")
    async def forget(name: Name) -> dict:
        """Drop a memory."""
        ready(worker)[1].forget(name)
        return {"memory": name, "forgotten": True}

    @app.get("/v1/x_synapse/memories/{name}/file")
    def download(name: Name) -> Response:
        """The memory as a file."""
        content = ready(worker)[1].download(name)
        return Response(
            content, media_type="application/octet-stream", headers={"Content-Disposition": "attachment; filename=memory.safetensors"}
        )

    @app.put("/v1/x_synapse/memories/{name}/file")
    async def upload(name: Name, request: Request) -> dict:
        """Replace a memory by a file that was downloaded before."""
        memories = ready(worker)[1]
        await run_in_threadpool(memories.upload, name, await request.body())
        return await run_in_threadpool(memories.describe, name)


def model_name(loaded: Loaded) -> str:
    """Name of the model in the API: its run and step."""
    return f"{loaded.path.parent.name or 'model'}-{loaded.step}"


def _conversation_log(path: str | None) -> Callable[[dict[str, Any]], None]:
    """What keeps a record of a request: nothing, unless a file was asked for. Raises UserError for one that cannot be written."""
    if path is None:
        return lambda record: None

    def append(record: dict[str, Any]) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False) + "\n")
        except OSError as error:  # the answer is made, and goes out whether or not there is room for its record
            say(f"notice: a conversation was not written to {path} ({error.strerror})")

    try:
        open(path, "a").close()
    except OSError as error:
        raise UserError(f"--log_conversations={path} cannot be written ({error.strerror}): name a file in a writable folder") from None

    return append
