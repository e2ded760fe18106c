"""Starts a module of the tests as two processes of one group."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def two_ranks(module: str, out: Path, timeout: float = 240.0) -> list[dict]:
    """What each of two processes, started with the variables that torchrun sets, has left in `out`/rankN.json."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in ("0", "1"):
        place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", module, str(out)]
        started.append(subprocess.Popen(command, env=ENV | place, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            said = process.communicate(timeout=timeout)[1]
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
    return [json.loads((out / f"rank{index}.json").read_text()) for index in (0, 1)]
