"""An executable that acts as `python -m MODULE` and `python -c CODE` and starts at once, for code that starts processes itself.

It hands its words, folder, variables and standard streams to the process of `tests.forked`. A fork of that is the command: it gets
SIGINT and SIGTERM that the executable gets, is killed where that is killed, and ends before that ends, with the same exit code. Anything
else than -m and -c is left to the real interpreter, and no other open file is handed on.
"""

from __future__ import annotations

import atexit
import functools
import shlex
import shutil
import sys
import tempfile
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
    if not forked.CAN:
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "client.py").write_text(CLIENT)
    words = [sys.executable, "-IS", str(folder / "client.py"), sys.executable, str(forked.server(preload, at_import))]
    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    stand_in.chmod(0o700)
    return str(stand_in)
