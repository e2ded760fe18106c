"""What the chat server and the dashboard serve, where, and within which limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Protocol

from bio_inspired_nanochat.config import REQUIRED, device_knob, knob, validate
from bio_inspired_nanochat.engine import source_path
from bio_inspired_nanochat.errors import UserError


@dataclass(frozen=True)
class WebConfig:
    """The flags of `scripts.chat_web`."""

    source: str = knob("base", "base: the newest that base_train wrote; sft: the newest fine-tuned one; or the path of a checkpoint")
    host: str = knob("127.0.0.1", "address to listen on; one that other machines reach needs --api_key")
    port: int = knob(8000, "port to listen on; 0 takes a free one", lo=0, hi=65535)
    api_key: str | None = knob(None, "whoever asks must send it as Authorization: Bearer KEY; - asks for none", none="-")
    allowed_hosts: str = knob("", "further names of this server in the Host header, separated by commas")
    device: str = device_knob()
    max_active: int = knob(8, "answers that take turns, token by token", lo=1, hi=1024)
    max_waiting: int = knob(64, "requests that wait for a turn; one more is answered by 429", lo=0, hi=65536)
    max_tokens: int = knob(1024, "longest answer that a request may ask for", lo=1, hi=1 << 20, unit="tokens")
    max_body_kb: int = knob(1024, "largest body of a request", lo=1, hi=1 << 20, unit="KiB")
    max_memories: int = knob(256, "memories that are kept; the one unused for longest makes room", lo=1, hi=1 << 20)
    log_conversations: str | None = knob(None, "file that every answered request is appended to; - writes none", none="-")
    seconds: float = knob(0.0, "stop after this time; 0 serves until Ctrl-C", lo=0.0, hi=1e9, unit="seconds")

    def __post_init__(self) -> None:
        validate(self)
        check_access(self.host, self.api_key)

    def checkpoint(self) -> str | None:
        """The path of `source` for `engine.load`; None is the newest base model. Raises UserError when there is none."""
        return source_path(self.source)


@dataclass(frozen=True)
class DashboardConfig:
    """The flags of `scripts.dashboard`."""

    log: str = knob(REQUIRED, "log folder of a run, running or finished", path="dir")
    checkpoint: str | None = knob(None, "checkpoint for the state inspector; auto is the newest that the log names", path="exists")
    host: str = knob("127.0.0.1", "address to listen on; one that other machines reach needs --api_key")
    port: int = knob(8001, "port to listen on; 0 takes a free one", lo=0, hi=65535)
    api_key: str | None = knob(None, "whoever asks must send it as Authorization: Bearer KEY; - asks for none", none="-")
    allowed_hosts: str = knob("", "further names of this server in the Host header, separated by commas")
    device: str = device_knob("cpu", "where the state inspector runs the model")
    max_body_kb: int = knob(64, "largest body of a request", lo=1, hi=1 << 20, unit="KiB")
    seconds: float = knob(0.0, "stop after this time; 0 serves until Ctrl-C", lo=0.0, hi=1e9, unit="seconds")

    def __post_init__(self) -> None:
        validate(self)
        check_access(self.host, self.api_key)


class Access(Protocol):
    """What the guard of a server needs to know of its configuration; both configs here have it."""

    @property
    def host(self) -> str:
        """The address that the server listens on."""
        ...

    @property
    def api_key(self) -> str | None:
        """The key that requests must bring, or None."""
        ...

    @property
    def allowed_hosts(self) -> str:
        """Names that the Host header may have, with commas between."""
        ...

    @property
    def max_body_kb(self) -> int:
        """The largest body of a request in KiB."""
        ...


def check_access(host: str, api_key: str | None) -> None:
    """UserError for an address that others reach without a key, for an empty key and for one that cannot travel in a header."""
    if not is_loopback(host) and not api_key:
        raise UserError(f"--host={host} can be reached from other machines: add --api_key=SECRET, or use --host=127.0.0.1")
    if api_key == "":
        raise UserError("--api_key is empty, which would let everyone in who sends none: give a secret, or leave the flag out")
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or " " in api_key):
        raise UserError("--api_key must be printable ASCII without blanks, because it travels in a header")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
