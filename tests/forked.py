"""Processes that start at once: forks of a process that has imported torch, which become `python -m MODULE` or `python -c CODE`.

Importing torch and its compiler's front end takes four seconds of a core, which is most of what a small script takes. A fork has its
own memory, environment, folder and exit code, so what it does ends with it. That a real interpreter comes as far as the script is
shown by the tests that start one.

Whoever of a run of the tests asks first starts the process that forks; all processes of the run share it, and it ends with the run.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CAN = hasattr(os, "pidfd_open")  # elsewhere than on Linux these are real interpreters, which is slower
RUN = "NANOCHAT_TESTS_RUN"  # number of the process that a run of the tests ends with, and the folder of its sockets
# What a training run loads, some of it only when it is first needed.
LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "pandas",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "cma",
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
    if not CAN:
        return _interpreters(words, environments, cwd, timeout)
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder, f"out{i}"), Path(folder, f"err{i}")) for i in range(len(environments))]
        asked, deadline = [], time.monotonic() + timeout
        for env, written in zip(environments, places, strict=True):
            request = {"words": list(words), "cwd": str(cwd), "env": dict(env), "python": python}
            asked.append(_ask(server(preload, at_import), request, written))
        codes = [_code(one, deadline) for one in asked]
        if None in codes:
            for one in asked:
                one.shutdown(socket.SHUT_WR)  # ends it
                _code(one, time.monotonic() + 60)
        for one in asked:
            one.close()
        if None in codes:
            raise subprocess.TimeoutExpired(
                list(words), timeout, *(b"".join(path.read_bytes() for path in of) for of in zip(*places, strict=True))
            )
        return [
            subprocess.CompletedProcess(list(words), code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
            for code, (out, err) in zip(codes, places, strict=True)
        ]


def _interpreters(words: Sequence[str], environments: Sequence[Mapping[str, str]], cwd: Path, timeout: float) -> list:
    def run(env: Mapping[str, str]) -> subprocess.CompletedProcess:
        place = {"cwd": cwd, "env": dict(env), "timeout": timeout}
        return subprocess.run([sys.executable, *words], **place, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(run, environments))


def _ask(place: Path, request: dict[str, object], written: Sequence[Path]) -> socket.socket:
    """Have a fork started with nothing to read, which writes to these two files. The connection, over which its exit code will come."""
    words = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(place))
    with open(os.devnull, "rb") as nothing, written[0].open("ab") as out, written[1].open("ab") as err:
        socket.send_fds(connection, [len(words).to_bytes(4, "big")], [stream.fileno() for stream in (nothing, out, err)])
    connection.sendall(words)
    assert len(connection.recv(4)) == 4, "the process that forks has ended"
    return connection


def _code(connection: socket.socket, deadline: float) -> int | None:
    """The exit code of a fork, or None when it has not ended at the deadline."""
    if not select.select([connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return None
    return int.from_bytes(connection.recv(4), "big", signed=True)


@functools.cache
def server(preload: tuple[str, ...] = SCRIPTS, at_import: tuple[tuple[str, str], ...] = ()) -> Path:
    """The socket of a process that forks on request, as long as this run of the tests lasts; started where it is not there yet."""
    owner, folder = run_of_the_tests().split(":", 1)
    place = Path(folder, hashlib.sha256(repr((preload, at_import)).encode()).hexdigest()[:16])
    with open(Path(folder, "lock"), "w") as lock, socket.socket(socket.AF_UNIX) as listener:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            listener.bind(str(place))
            listener.listen(64)  # whoever comes while the modules are imported waits
            environment = {**os.environ, **dict(at_import), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.forked", owner, folder, str(listener.fileno()), *preload]
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()]
            )
    return place


def run_of_the_tests() -> str:
    """The variable `RUN`, which every process that this one starts inherits."""
    if RUN not in os.environ:
        folder = tempfile.mkdtemp(prefix="warm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[RUN] = f"{os.getpid()}:{folder}"
    return os.environ[RUN]


def _serve(owner: int, folder: str, number: int, preload: Sequence[str]) -> None:
    """Fork for each that connects, until the run of the tests ends."""
    for name in preload:
        importlib.import_module(name)
    assert threading.active_count() == 1, "threads do not survive a fork"
    gc.freeze()  # a fork that collects garbage neither walks over what it was born with nor copies it
    listener, over = socket.socket(fileno=number), os.pidfd_open(owner)
    while over not in select.select([over, listener], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                listener.close()
                _attend(connection)
            finally:
                os._exit(1)
        connection.close()
        _reap()
    _reap()
    gc.unfreeze()  # libraries look at the end for what was not freed
    shutil.rmtree(folder, ignore_errors=True)


def _reap() -> None:
    """Let go of the attendants that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _attend(connection: socket.socket) -> None:
    """Fork into the command that was asked for, end it where nobody waits for it any more, and tell how it ended."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
    fork = os.fork()
    if fork == 0:
        connection.close()
        os.setsid()
        become(request, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(fork.to_bytes(4, "big"))
    ended = os.pidfd_open(fork)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(fork, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    connection.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


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
    _serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
