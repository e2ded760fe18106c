"""Processes that start at once: forks of a process that has imported torch, which become `python -m MODULE` or `python -c CODE`.

Importing torch and its compiler's front end takes four seconds of a core, which is most of what a small script takes. A fork has its
own memory, environment, folder and exit code, so what it does ends with it. That a real interpreter comes as far as the script is
shown by the tests that start one.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a training run loads, some of it only when it is first needed.
LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "pandas",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
SCRIPTS = (*LIBRARIES, "tyro.constructors", "rich.progress", "scripts.base_train", "scripts.tune_bio_params")


def run(
    words: Sequence[str],
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    preload: tuple[str, ...] = SCRIPTS,
    at_import: tuple[tuple[str, str], ...] = (),
    python: str | None = None,
) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *words], capture_output=True, text=True)` with an empty standard input.

    preload: modules that the process has already imported; at_import: variables that these read while they were; python: the
    interpreter that it starts itself, in place of the real one (`tests.standin`).
    A process that a signal ended has the exit code -signal. Raises subprocess.TimeoutExpired after `timeout` seconds, when it has been
    killed.
    """
    return run_together(words, [os.environ if env is None else env], cwd, timeout, preload, at_import, python)[0]


def run_together(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = ROOT,
    timeout: float = 300,
    preload: tuple[str, ...] = SCRIPTS,
    at_import: tuple[tuple[str, str], ...] = (),
    python: str | None = None,
) -> list[subprocess.CompletedProcess]:
    """As `run`, but a process at the same time in each of these environments."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder, f"out{i}"), Path(folder, f"err{i}")) for i in range(len(environments))]
        requests = [
            {"words": list(words), "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err), "python": python}
            for env, (out, err) in zip(environments, places, strict=True)
        ]
        server = _server(preload, at_import)
        pids = json.loads(_ask(server, requests))
        if not select.select([server.stdout], [], [], timeout)[0]:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)  # one that has ended is there, too, until the server has waited for all
            server.stdout.readline()
            raise subprocess.TimeoutExpired(
                list(words), timeout, *(b"".join(path.read_bytes() for path in of) for of in zip(*places, strict=True))
            )
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(list(words), code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
            for code, (out, err) in zip(codes, places, strict=True)
        ]


@functools.cache
def _server(preload: tuple[str, ...], at_import: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    """A process that forks on request, as long as this one lives."""
    environment = {**os.environ, **dict(at_import), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.forked", *preload]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    atexit.register(lambda: (server.stdin.close(), server.wait(timeout=60)))
    return server


def _ask(server: subprocess.Popen, requests: list[dict[str, object]]) -> bytes:
    """The first line of the answer. Nothing is read ahead, so that `select` sees whether there is a second one."""
    server.stdin.write(json.dumps(requests).encode() + b"\n")
    line = server.stdout.readline()
    assert line, f"the process that forks has ended (exit code {server.wait()})"
    return line


def _serve(preload: Sequence[str]) -> None:
    """Fork for each request of a line of standard input; answer with the forks' numbers at once and with their exit codes at the end."""
    for name in preload:
        importlib.import_module(name)
    assert threading.active_count() == 1, "threads do not survive a fork"
    gc.freeze()  # a fork that collects garbage neither walks over what it was born with nor copies it
    for line in sys.stdin:
        pids = []
        for request in json.loads(line):
            pid = os.fork()
            if pid == 0:
                streams = ((os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("out", "err")))
                become(request, [os.open(path, flags, 0o600) for path, flags in streams])
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        for pid in pids:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # keeps its number until the last one has ended
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
    gc.unfreeze()  # libraries look at the end for what was not freed


def become(request: dict, streams: Sequence[int]) -> None:
    """In the fork: be that command on these three open files, and end as an interpreter does."""
    code = 1
    try:
        for number, opened in enumerate(streams):
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process lives)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        before = [place for place in sys.path if place not in ("", str(ROOT))]
        sys.executable = request.get("python") or sys.executable
        sys.path[:] = [request["cwd"], *request["env"].get("PYTHONPATH", "").split(os.pathsep), *before]
        code = _execute(*request["words"])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _execute(kind: str, what: str, *rest: str) -> int:
    """Run it to its end, with its threads and with what it left for the end; the exit code."""
    code = 0
    try:
        if kind == "-m":
            sys.modules.pop(what, None)  # the script itself is run anew; what it imports is not
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c", kind
            sys.argv = [kind, *rest]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 (what the test wrote)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 (an interpreter, too, prints whatever it was)
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    _serve(sys.argv[1:])
