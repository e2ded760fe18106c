"""The stand-in for an interpreter ends, speaks and obeys as an interpreter does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import forked, standin
from tests.test_forked import CODES

SLEEPER = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
OBEDIENT = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print(1, flush=True); time.sleep(60)"


@pytest.fixture
def place(tmp_path) -> dict:
    return {"cwd": tmp_path, "env": {"WORD": "blue", "PYTHONPATH": str(forked.ROOT)}, "stdin": subprocess.DEVNULL, "text": True}


@pytest.mark.parametrize("name", CODES)
def test_it_ends_and_speaks_as_an_interpreter_does(name, place):
    words = ["-u", "-c", CODES[name], "--a", "b c"]
    want, got = (
        subprocess.run([python, *words], **place, capture_output=True, timeout=60, check=False)
        for python in (sys.executable, standin.python(preload=()))
    )
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout)
    assert got.stderr.splitlines()[-1:] == want.stderr.splitlines()[-1:]


def test_it_reads_what_it_is_given_and_runs_modules_and_files(place):
    (place["cwd"] / "own.py").write_text("import sys\nprint(sys.argv[1:], __name__, sys.stdin.read())")
    for words in (["-m", "own", "x"], ["own.py", "x"]):
        done = subprocess.run(
            [standin.python(preload=()), *words], **{**place, "stdin": None}, input="read", capture_output=True, check=True
        )
        assert done.stdout == "['x'] __main__ read\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_it_ends_the_command(number, place):
    process = subprocess.Popen([standin.python(preload=()), "-c", SLEEPER], **place, stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(number)
    began = time.monotonic()
    assert process.wait(timeout=30) == -number
    assert process.stdout.read() == "", "the command has let go of its output, so it has ended"
    assert time.monotonic() - began < 30, "not by itself"
    process.stdout.close()
    with pytest.raises(ProcessLookupError):  # as soon as somebody has asked how it ended
        for _ in range(500):
            os.kill(pid, 0)
            time.sleep(0.01)


def test_the_command_may_answer_a_signal(place):
    with subprocess.Popen([standin.python(preload=()), "-c", OBEDIENT], **place, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "1\n"
        process.terminate()
        assert process.wait(timeout=30) == 3


def test_a_fork_starts_it_in_place_of_the_interpreter(place):
    code = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'import os; print(os.getppid())'], capture_output=True).returncode)"
    done = forked.run(["-c", f"import sys; print(sys.executable)\n{code}"], preload=(), python=standin.python(preload=()))
    assert done.stdout == f"{standin.python(preload=())}\n0\n", done.stderr
