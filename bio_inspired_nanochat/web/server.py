"""Run the application under uvicorn until Ctrl-C, SIGTERM, or the time is over."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web.app import make_app
from bio_inspired_nanochat.web.config import DashboardConfig, WebConfig


class Server(uvicorn.Server):
    """uvicorn, whose signals only ask it to stop, so that the script can end with its record."""

    @classmethod
    def of(cls, app: Any) -> Server:
        """A quiet server of an ASGI application."""
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        return cls(uvicorn.Config(app, lifespan="on", timeout_graceful_shutdown=5, ws="none", **quiet))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While it serves, SIGINT and SIGTERM ask it to stop and are not raised again afterwards; outside of the main thread nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(config: WebConfig) -> dict[str, Any]:
    """Serve until asked to stop; the record of the run. Raises UserError when the port cannot be had or the model not be loaded."""
    config.checkpoint()
    app = make_app(config)
    with listening(config) as listener:
        url = url_of(listener)
        server = Server.of(app)
        began = time.monotonic()
        threading.Thread(target=_announce, args=(app.worker, server, url, config), daemon=True).start()
        server.run(sockets=[listener])
    if app.worker.error:
        raise UserError(app.worker.error)
    loaded = app.worker.loaded
    return {"url": url, "checkpoint": str(loaded.path) if loaded else None, "seconds": round(time.monotonic() - began, 3)}


def _announce(worker: Any, server: Server, url: str, config: WebConfig) -> None:
    """Say when the model answers; stop when there is none to load, or when the time is over."""
    say(f"listening on {url}, loading the model")
    while worker.loaded is None and not worker.error and not server.should_exit:
        time.sleep(0.05)
    if worker.loaded is not None:
        say(f"{worker.loaded.path} answers on {url} (Ctrl-C stops)")
        if not config.seconds:
            return
        end = time.monotonic() + config.seconds
        while time.monotonic() < end and not server.should_exit:
            time.sleep(0.05)
    server.should_exit = True


def url_of(listener: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listening(config: WebConfig | DashboardConfig) -> socket.socket:
    """A bound socket. Raises UserError when it cannot be had."""
    host = config.host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host={config.host} --port={config.port} cannot be listened on: {error.strerror or error}; try --port=0"
        ) from None
    listener.listen(128)
    return listener
