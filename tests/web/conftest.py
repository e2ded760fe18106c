"""A server in this process, with a tiny model, on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx2
import pytest
import uvicorn

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.engine import Loaded
from bio_inspired_nanochat.web import WebConfig, make_app
from bio_inspired_nanochat.web.worker import Worker
from tests.engine.speakers import speaker

FAST = SynapticConfig(hebb="delta", tick=4, theta=-1.0, alpha_ca=0.5, stochastic_train_frac=0.5)


def tiny() -> Loaded:
    """A model with terminals, fast weights and random release; its answers never end by themselves."""
    loaded = speaker("default", sequence_len=512, syn_cfg=FAST)
    loaded.model.head.weight.data[-9:] = 0
    loaded.model.head.weight.data[-9:, 0] = 0
    return loaded


@dataclass
class Server:
    """url: where it listens; client: a client that may use it."""

    url: str
    client: httpx2.Client
    worker: Worker
    running: uvicorn.Server

    def requests(self, within: float = 2.0) -> int:
        """Requests whose handlers still run; waits for them to end."""
        end = time.monotonic() + within
        while self.running.server_state.tasks and time.monotonic() < end:
            time.sleep(0.01)
        return len(self.running.server_state.tasks)

    def ask(self, text: str = "the king said", **fields) -> httpx2.Response:
        """One request that answers with a few greedy tokens unless `fields` say otherwise."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 1.0, "seed": 1} | fields
        return self.client.post("/v1/chat/completions", json=body)

    def idle(self, within: float = 5.0) -> bool:
        """Whether the worker has nothing to do, now or soon."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            if self.worker.busy() == {"active": 0, "waiting": 0}:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(loader: Callable[[], Loaded] = tiny, wait: bool = True, **flags) -> Iterator[Server]:
    """A running server; it is stopped at the end."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = make_app(replace(WebConfig(device="cpu", port=0), **flags), loader)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    headers = {"Authorization": f"Bearer {flags['api_key']}"} if "api_key" in flags else {}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as client:
        end = time.monotonic() + 20
        while wait and time.monotonic() < end and app.worker.loaded is None and not app.worker.error:
            time.sleep(0.01)
        while time.monotonic() < end and not server.started:
            time.sleep(0.01)
        try:
            yield Server(url, client, app.worker, server)
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
