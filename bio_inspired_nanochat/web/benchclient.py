"""The clients of `bench_api`, in a process of their own, from the standard library alone: `python benchclient.py HOST PORT`.

Every line of stdin is a JSON list of request bodies, sent at the same time over one connection each; the answer is one line, a list of
{"first": seconds to the first text, "whole": seconds to the end, "last": the same on the clock of all clients, "tokens": how many}.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any

PATIENCE = 600.0  # seconds


def ask(host: str, port: int, body: dict[str, Any], together: threading.Barrier) -> dict[str, float]:
    """Send one request and read its stream to the end."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    connection.connect()
    data = json.dumps(body).encode()
    together.wait()
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, tokens = None, 0
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read()[:300]!r}")
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        record = json.loads(line[6:])
        if first is None and any(choice["delta"].get("content") for choice in record["choices"]):
            first = time.perf_counter() - began
        if record.get("usage"):
            tokens = record["usage"]["completion_tokens"]
    whole = time.perf_counter() - began
    connection.close()
    return {"first": whole if first is None else first, "whole": whole, "last": began + whole, "tokens": tokens}


def main(host: str, port: int) -> None:
    """Serve lines until stdin ends."""
    for line in sys.stdin:
        bodies = json.loads(line)
        together, found = threading.Barrier(len(bodies)), [{} for _ in bodies]

        def work(place: int, bodies: list = bodies, found: list = found, together: threading.Barrier = together) -> None:
            found[place] = ask(host, port, bodies[place], together)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
