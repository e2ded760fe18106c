"""The dashboard: follows the log folder of a run, and lets the newest checkpoint read a sentence under other kinetics.

It shows what the run wrote and what its model does; it never writes.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

from bio_inspired_nanochat.common import pick_device, say
from bio_inspired_nanochat.engine import Loaded, load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.inspector import inspect, sliders
from bio_inspired_nanochat.neuroviz.phylo import PAGE as VIZ_FOLDER
from bio_inspired_nanochat.neuroviz.phylo import read_family
from bio_inspired_nanochat.neuroviz.summary import RunFolder
from bio_inspired_nanochat.web.app import PAGE_FOLDER, add_errors
from bio_inspired_nanochat.web.config import DashboardConfig
from bio_inspired_nanochat.web.guards import Guard
from bio_inspired_nanochat.web.server import Server, listening, url_of

LONGEST_TEXT = 4000  # characters


class InspectRequest(BaseModel):
    """What the state inspector is asked. factors: of kinetic constants, by name."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1, max_length=LONGEST_TEXT)
    layer: int = Field(0, ge=0)
    factors: dict[str, float] = Field(default_factory=dict, max_length=32)


class Watcher:
    """The run's folder and the model of its newest checkpoint, for one request at a time."""

    def __init__(self, config: DashboardConfig) -> None:
        self._config, self._run = config, RunFolder(config.log)
        self._lock, self._model_lock = threading.Lock(), threading.Lock()
        self._loaded: Loaded | None = None

    def summary(self) -> dict[str, Any]:
        """See `RunFolder.summary`."""
        with self._lock:
            return self._run.summary()

    def model(self) -> Loaded:
        """The newest checkpoint's model. Raises UserError when there is none yet."""
        with self._lock:
            path = Path(self._config.checkpoint) if self._config.checkpoint else self._run.checkpoint()
        if path is None:
            raise UserError("the run has saved no checkpoint yet, so there is no model to look into: wait, or start with --checkpoint=PATH")
        with self._model_lock:
            if self._loaded is None or (self._loaded.path != path and self._config.checkpoint is None):
                self._loaded = load(path, pick_device(self._config.device))
            return self._loaded

    def inspect(self, body: InspectRequest) -> dict[str, Any]:
        """See `neuroviz.inspector.inspect`."""
        loaded = self.model()
        with self._model_lock:
            return {"step": loaded.step, **inspect(loaded, body.text, body.layer, body.factors)}


def make_dashboard(config: DashboardConfig) -> Guard:
    """The dashboard as an ASGI application."""
    watcher = Watcher(config)

    app = FastAPI(title="bio-inspired nanochat dashboard", docs_url=None, redoc_url=None)
    add_errors(app)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE_FOLDER / "dashboard.html", headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok", "key_needed": config.api_key is not None}

    @app.get("/api/run")
    def run() -> Response:
        """Curves, leaderboard, map and samples of the run."""
        return _json(watcher.summary())

    @app.get("/api/family")
    def family() -> Response:
        """The family tree of the experts."""
        return _json(read_family(config.log))

    @app.get("/api/model")
    def model() -> dict:
        """What the state inspector can look into."""
        loaded = watcher.model()
        return {"step": loaded.step, "layers": len(loaded.model.blocks), "sliders": sliders(loaded.model)}

    @app.post("/api/inspect")
    def look(body: InspectRequest) -> Response:
        """What the terminals of a layer do with a text, and would do with other constants."""
        return _json(watcher.inspect(body))

    app.mount("/page/viz", StaticFiles(directory=VIZ_FOLDER), name="viz")
    app.mount("/page", StaticFiles(directory=PAGE_FOLDER), name="page")
    return Guard(app, config)


def serve_dashboard(config: DashboardConfig) -> dict[str, Any]:
    """Serve until Ctrl-C, SIGTERM, or the time is over; the script's last line. Raises UserError when the port cannot be had."""
    with listening(config) as listener:
        url, began = url_of(listener), time.monotonic()
        server = Server.of(make_dashboard(config))
        say(f"{config.log} on {url} (Ctrl-C stops)")
        if config.seconds:
            timer = threading.Timer(config.seconds, lambda: setattr(server, "should_exit", True))
            timer.daemon = True
            timer.start()
        server.run(sockets=[listener])
    return {"url": url, "log": config.log, "seconds": round(time.monotonic() - began, 3)}


def _json(record: dict[str, Any]) -> Response:
    """Without the checks of a response model, which take longer than everything else."""
    return Response(json.dumps(record, separators=(",", ":")), media_type="application/json", headers={"Cache-Control": "no-store"})
