"""What every request passes first: who may ask, from where, and how much. Pure ASGI, so that streaming stays streaming."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from bio_inspired_nanochat.web.config import Access, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/health")  # and the files of the page: they hold nothing that needs a key
PAGE = "/page/"
BODY_SECONDS = 30.0  # for a body to arrive
DRAINED = 8  # times the limit: so much is read and dropped, because a client that is still sending misses the refusal
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """ASGI middleware: Host allow-list, same origin, authentication, type and size of the body, security headers on every answer.

    worker: what the application behind it works with, for those who hold the guard.
    """

    worker: Any

    def __init__(self, app: Callable, config: Access) -> None:
        self._app, self._config = app, config
        own = {"localhost", "127.0.0.1", "::1", config.host.strip("[]")} | {name for name in config.allowed_hosts.split(",") if name}
        self._public = not is_loopback(config.host)
        if self._public:
            own |= {socket.gethostname(), socket.getfqdn()}
        self._hosts = {name.strip().lower() for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            return

        async def sealed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            refusal, receive = await self._body(headers, receive)
        if refusal is None:
            await self._app(scope, receive, sealed)
        else:
            await _refuse(sealed, *refusal)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, or None when the request may go on."""
        host = headers.get("host", "")
        if not self._known(host):
            return 421, f"this server does not answer to Host {host[:100]!r}: start it with --allowed_hosts, or use its own address"
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            return 403, f"requests from pages of {origin[:100]!r} are refused: only this server's own page may ask"
        if origin is None and headers.get("sec-fetch-site") in ("cross-site", "same-site") and path != "/":
            return 403, "requests from other sites' pages are refused"
        open_path = method in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(PAGE))
        if self._config.api_key is not None and not open_path:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._config.api_key.encode()):
                return 401, "a key is needed: send it as Authorization: Bearer KEY"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return 415, f"content-type {kind[:50]!r} is not served: send application/json"
        return None

    def _known(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        if not self._public:
            return False
        try:  # a page of another site can give a name any address, but it cannot make the browser send an address as Host
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _body(self, headers: dict[str, str], receive: Receive) -> tuple[tuple[int, str] | None, Receive]:
        """The whole body within its limits, and a `receive` that gives it again."""
        most = self._config.max_body_kb << 10
        too_large = (413, f"the body is larger than {self._config.max_body_kb} KiB: shorten it, or start the server with --max_body_kb")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > DRAINED * most:
            return too_large, receive
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return (400, "the connection ended before the body"), receive
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        parts.clear()
                    if not message.get("more_body", False) or size > DRAINED * most:
                        break
        except TimeoutError:
            return (408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds"), receive
        if size > most:
            return too_large, receive
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        return None, replay


def _place(origin: str) -> str | None:
    """Host and port of an origin; None for what is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps(error_body(status, reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, param: str | None = None) -> dict:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
