"""What the chat server costs: time to the first token and tokens per second through the API against the engine alone, and fairness.

The same questions with the same seeds, in turns: once from the engine in this process, once through a server in this process, asked
by a client in another one. Both make the same tokens. The clients of a crowd ask the same, so that all of them have as far to go.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from bio_inspired_nanochat.benchmarks.records import quartiles, short
from bio_inspired_nanochat.benchmarks.timing import Spread, paired_ratio
from bio_inspired_nanochat.common import pick_device, progress, say, table
from bio_inspired_nanochat.config import device_knob, knob, validate
from bio_inspired_nanochat.engine import (
    Loaded,
    Message,
    Reply,
    ReplyOptions,
    Sampling,
    context_length,
    fit,
    load,
    source_path,
    stop_ids,
    style_of,
)
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web.app import make_app
from bio_inspired_nanochat.web.config import WebConfig
from bio_inspired_nanochat.web.server import listening

QUESTION = "Tell me something about the sea, the moon and the king."
TOPS = {"temperature": 1.0, "top_k": 50}
FEWEST = 3  # rounds


@dataclass(frozen=True)
class BenchApiConfig:
    """Which model, how long answers, how many clients."""

    source: str = knob("base", "base: the newest that base_train wrote; sft: the newest fine-tuned one; or the path of a checkpoint")
    tokens: int = knob(128, "length of an answer, less where the model ends it itself", lo=2, hi=1 << 16, unit="tokens")
    clients: int = knob(8, "clients at the same time, for fairness", lo=2, hi=256)
    seconds: float = knob(60.0, "time to measure for, at least three rounds", lo=0.0, hi=3600.0, unit="seconds")
    device: str = device_knob()

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Timed:
    """One answer: seconds to its first text, to its end, processor seconds of this process, and its tokens."""

    first: float
    whole: float
    work: float
    tokens: int

    @property
    def each(self) -> float:
        """Seconds per token, from the question to the end."""
        return self.whole / max(1, self.tokens)


def bench_api(config: BenchApiConfig) -> dict[str, Any]:
    """Measure one checkpoint; returns the script's last line. Raises UserError for a missing checkpoint and too long answers."""
    loaded = load(source_path(config.source), pick_device(config.device))
    room = context_length(loaded.model) * 3 // 4  # what the server leaves for the answer at least
    ids, _ = fit([Message("user", QUESTION)], loaded.tokenizer, style_of(loaded.meta), room)
    if len(ids) + config.tokens > context_length(loaded.model):
        raise UserError(
            f"--tokens={config.tokens} behind a question of {len(ids)} do not fit into {context_length(loaded.model)}: use fewer"
        )
    alone, served, crowds = _measure(config, loaded, ids)
    record = _record(config, loaded, alone, served, crowds)
    _show(record)
    return record


def _measure(config: BenchApiConfig, loaded: Loaded, ids: Sequence[int]) -> tuple[list[Timed], list[Timed], list[list[dict[str, float]]]]:
    """Rounds of: the engine, the API, and, on every fourth, all clients at once."""
    alone: list[Timed] = []
    served: list[Timed] = []
    crowds: list[list[dict[str, float]]] = []
    with _serving(config, loaded) as client, progress(None, "bench_api", "rounds") as bar:
        began, number = time.perf_counter(), 0
        _engine(config, loaded, ids, 0)
        client.ask([_body(config, 0)])
        while number < FEWEST or time.perf_counter() - began < config.seconds:
            # whoever comes second in a round finds the machine as the first one left it, so they change places
            for side in (0, 1) if number % 2 else (1, 0):
                if side == 0:
                    alone.append(_engine(config, loaded, ids, number))
                else:
                    worked = time.process_time()
                    (found,) = client.ask([_body(config, number)])
                    served.append(Timed(found["first"], found["whole"], time.process_time() - worked, int(found["tokens"])))
            assert alone[-1].tokens == served[-1].tokens, "the API makes the tokens of the engine"
            if number % 4 == 0:
                crowds.append(client.ask([_body(config, number)] * config.clients))
            number += 1
            bar.advance(1)
    return alone, served, crowds


def _body(config: BenchApiConfig, seed: int) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": config.tokens, "seed": seed, "stream": True, **TOPS}
    return body | {"stream_options": {"include_usage": True}, "x_synapse": {"tools": False}}


def _engine(config: BenchApiConfig, loaded: Loaded, ids: Sequence[int], seed: int) -> Timed:
    options = ReplyOptions(config.tokens, Sampling(seed=seed, **TOPS), tools=False)
    began, worked, first = time.perf_counter(), time.process_time(), None
    reply = Reply(loaded.model, loaded.tokenizer, ids, options, stop_ids(loaded.tokenizer))
    for pieces in reply:
        if first is None and any(piece.text for piece in pieces):
            first = time.perf_counter() - began
    whole = time.perf_counter() - began
    return Timed(whole if first is None else first, whole, time.process_time() - worked, reply.made[0])


# --- server and clients ------------------------------------------------------------------------------------------------------------


class _Clients:
    """The process that asks."""

    def __init__(self, host: str, port: int) -> None:
        script = str(Path(__file__).with_name("benchclient.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """Send requests at the same time; what each client saw."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(list(bodies)) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or "[]")
        assert len(answer) == len(bodies) and all(answer), "every client was answered"
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(10)


@contextlib.contextmanager
def _serving(config: BenchApiConfig, loaded: Loaded) -> Iterator[_Clients]:
    """A server of the loaded model on a free port of this machine, and clients for it."""
    settings = WebConfig(port=0, max_active=config.clients, max_tokens=config.tokens, device=config.device)
    app = make_app(settings, lambda: loaded)
    with listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while thread.is_alive() and not (server.started and app.worker.loaded):
            time.sleep(0.02)
        clients = _Clients(host, port)
        try:
            yield clients
        finally:
            clients.close()
            server.should_exit = True
            thread.join(10)


# --- the record --------------------------------------------------------------------------------------------------------------------


def jain(rates: Sequence[float]) -> float:
    """Fairness index of Jain, Chiu and Hawe (1984): 1 when all get as much, 1/n when one gets everything."""
    return sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))


def _record(
    config: BenchApiConfig,
    loaded: Loaded,
    alone: Sequence[Timed],
    served: Sequence[Timed],
    crowds: Sequence[Sequence[dict[str, float]]],
) -> dict[str, Any]:
    each = paired_ratio([timed.each for timed in served], [timed.each for timed in alone])
    first = paired_ratio([timed.first for timed in served], [timed.first for timed in alone])
    work = paired_ratio([timed.work for timed in served], [timed.work for timed in alone])
    assert each is not None and first is not None and work is not None
    rates = [[found["tokens"] / found["whole"] for found in crowd] for crowd in crowds]
    # together: tokens of all clients in the time from the first question to the last end
    totals = [sum(found["tokens"] for found in crowd) / max(found["whole"] for found in crowd) for crowd in crowds]
    engine = Spread.of(1 / timed.each for timed in alone)
    return {
        "checkpoint": str(loaded.path),
        "rounds": len(alone),
        "tokens": alone[0].tokens,
        "engine_tok_per_s": short(engine.median),
        "api_tok_per_s": short(Spread.of(1 / timed.each for timed in served).median),
        "overhead": short(each.median - 1),
        "overhead_quartiles": [short(value - 1) for value in (each.low, each.high)],
        "work_overhead": short(work.median - 1),
        "work_overhead_quartiles": [short(value - 1) for value in (work.low, work.high)],
        "engine_first_ms": short(1e3 * Spread.of(timed.first for timed in alone).median),
        "api_first_ms": short(1e3 * Spread.of(timed.first for timed in served).median),
        "first_extra_ms": short(1e3 * Spread.of(a.first - b.first for a, b in zip(served, alone, strict=True)).median),
        "first_ratio_quartiles": quartiles(first),
        "clients": config.clients,
        "fairness": short(min(map(jain, rates))),
        "slowest_to_fastest": short(min(min(group) / max(group) for group in rates)),
        "crowd_tok_per_s": short(Spread.of(totals).median),
        "crowd_to_engine": short(Spread.of(totals).median / engine.median),
        "crowd_first_ms": short(1e3 * Spread.of(found["first"] for crowd in crowds for found in crowd).median),
        "device": str(next(loaded.model.parameters()).device),
    }


def _show(record: dict[str, Any]) -> None:
    low, high = record["overhead_quartiles"]
    rows = [
        ["engine alone", record["engine_tok_per_s"], record["engine_first_ms"]],
        ["API, one client", record["api_tok_per_s"], record["api_first_ms"]],
        [f"API, {record['clients']} clients together", record["crowd_tok_per_s"], record["crowd_first_ms"]],
    ]
    table(["", "tokens per second", "first token, ms"], rows)
    say(f"overhead per token at one client {100 * record['overhead']:.1f} % (quartiles {100 * low:.1f} to {100 * high:.1f} %)")
    low, high = record["work_overhead_quartiles"]
    say(
        f"in processor time of the server, which neighbours do not change: {100 * record['work_overhead']:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
    )
    say(f"fairness of {record['clients']} clients {record['fairness']}, slowest to fastest {record['slowest_to_fastest']}")
