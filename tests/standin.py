"""An executable that acts as `python -m MODULE` and `python -c CODE` and starts at once, for code that starts processes itself.

It hands its words, folder, variables and standard streams to a process that has imported torch. A fork of that is the command: it gets
SIGINT and SIGTERM that the executable gets, is killed where that is killed, and ends before that ends, with the same exit code. Anything
else than -m and -c is left to the real interpreter, and no other open file is handed on.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import forked

CLIENT = """
import json, os, signal, socket, sys
python, place, *words = sys.argv[1:]
while words[:1] == ["-u"]:
    words.pop(0)
if words[:1] not in (["-m"], ["-c"]):
    os.execv(python, [python, *words])
request = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
server = socket.socket(socket.AF_UNIX)
server.connect(place)
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
fork = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(fork, number))
code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    if -code in (signal.SIGINT, signal.SIGTERM):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def python(preload: tuple[str, ...] = forked.SCRIPTS, at_import: tuple[tuple[str, str], ...] = ()) -> str:
    """The path of such an executable, which works as long as this process lives. preload, at_import: as for `forked.run`.

    Elsewhere than on Linux it is the interpreter itself, which is slower.
    """
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "client.py").write_text(CLIENT)
    place, stand_in = folder / "socket", folder / "python"
    stand_in.write_text(
        f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(folder / "client.py"), sys.executable, str(place)])} "$@"\n'
    )
    stand_in.chmod(0o700)
    environment = {**os.environ, **dict(at_import), "PYTHONPATH": str(forked.ROOT), "OMP_NUM_THREADS": "1"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(64)  # whoever comes while the modules are imported waits
        command = [sys.executable, "-m", "tests.standin", str(listener.fileno()), *preload]
        server = subprocess.Popen(command, cwd=forked.ROOT, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    atexit.register(lambda: (server.stdin.close(), server.wait(timeout=60)))
    return str(stand_in)


def _serve(number: str, preload: Sequence[str]) -> None:
    """Fork for each that connects, until standard input ends."""
    for name in preload:
        importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(fileno=int(number))
    while sys.stdin.buffer not in select.select([sys.stdin.buffer, listener], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                _attend(connection)
            finally:
                os._exit(1)
        connection.close()
        _reap()
    _reap()
    gc.unfreeze()  # libraries look at the end for what was not freed


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
        forked.become(request, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(fork.to_bytes(4, "big"))
    ended = os.pidfd_open(fork)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(fork, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    connection.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
