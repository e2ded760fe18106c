"""What a fork does in place of a new interpreter cannot be told apart from what that would do."""

import os
import subprocess
import sys
import time

import pytest

from tests import forked

CODES = {
    "the end": "print('said')",
    "a number": "import sys; print('said'); sys.exit(3)",
    "a text": "raise SystemExit('one line')",
    "nothing": "raise SystemExit",
    "an error": "def f(): raise ValueError('why')\nf()",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "no input": "import sys; print(repr(sys.stdin.read()))",
    "words": "import sys; print(sys.argv, __name__)",
    "surroundings": "import os; print(os.getcwd(), os.environ['WORD'], 'HOME' in os.environ)",
    "what is left to do": "import atexit; atexit.register(print, 'late')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('later'))).start()",
    "an error with something left": "import atexit; atexit.register(print, 'late'); 1 / 0",
}


@pytest.fixture
def place(tmp_path) -> dict:
    return {"cwd": tmp_path, "env": {"WORD": "blue", "PYTHONPATH": str(forked.ROOT)}, "timeout": 60}


@pytest.mark.parametrize("name", CODES)
def test_it_ends_and_speaks_as_an_interpreter_does(name, place):
    words = ["-c", CODES[name], "--a", "b c"]
    want = subprocess.run([sys.executable, *words], **place, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    got = forked.run(words, **place, preload=())
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout)
    assert got.stderr.splitlines()[-1:] == want.stderr.splitlines()[-1:]


def test_a_module_is_run_anew_from_the_folder(place):
    (place["cwd"] / "own.py").write_text("import sys\nprint(sys.argv[1:], __name__, 'own' in sys.modules)")
    want = subprocess.run([sys.executable, "-m", "own", "x"], **place, capture_output=True, text=True, check=True)
    for _ in range(2):
        got = forked.run(["-m", "own", "x"], **place, preload=())
        assert (got.returncode, got.stdout, got.stderr) == (0, want.stdout, "")


def test_one_that_takes_too_long_is_killed_and_the_next_one_runs(place):
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(["-c", "import time; time.sleep(60)"], **(place | {"timeout": 0.5}), preload=())
    assert forked.run(["-c", "print(1)"], **place, preload=()).stdout == "1\n"


def test_several_run_at_the_same_time_and_answer_in_their_order(place):
    meet = "import os, pathlib, time\nme, other = os.environ['WORD'].split()\npathlib.Path(me).touch()\n"
    meet += "while not pathlib.Path(other).exists(): time.sleep(0.01)\nprint(me); raise SystemExit(me == 'b')"
    environments = [place["env"] | {"WORD": word} for word in ("a b", "b a")]
    ended = forked.run_together(["-c", meet], environments, cwd=place["cwd"], timeout=60, preload=())
    assert [(one.returncode, one.stdout) for one in ended] == [(0, "a\n"), (1, "b\n")]


def test_of_several_one_that_takes_too_long_ends_all(place):
    code = "import os, time; time.sleep(0 if os.environ['WORD'] == 'a' else 60)"
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run_together(["-c", code], [{"WORD": "a"}, {"WORD": "b"}], cwd=place["cwd"], timeout=0.5, preload=())
    assert forked.run(["-c", "print(1)"], **place, preload=()).stdout == "1\n"


def test_nothing_of_a_fork_reaches_the_next_one(place):
    forked.run(["-c", "import os, sys; os.environ['WORD'] = sys.path[0] = 'red'; sys.modules['json'] = None"], **place, preload=())
    assert forked.run(["-c", "import os, json; print(os.environ['WORD'])"], **place, preload=()).stdout == "blue\n"
    assert os.environ.get("WORD") is None


SERVED = "from tests import forked; print(forked.server(()), forked.run(['-c', 'print(1)'], preload=()).stdout)"


def test_the_processes_of_a_run_share_the_one_that_forks_and_it_ends_with_the_run(place):
    """Also when the process that started it has ended before."""
    run = [sys.executable, "-c", SERVED]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        (folder := place["cwd"] / "sockets").mkdir()
        place["env"][forked.RUN] = f"{owner.pid}:{folder}"
        said = [subprocess.run(run, **place, stdout=subprocess.PIPE, text=True, check=True).stdout.split() for _ in range(2)]
        assert said[0] == said[1] and said[0][1] == "1"
        assert len(list(folder.iterdir())) == 2, "one socket and the lock"
        owner.communicate(b"\n")
    for _ in range(500):
        if not folder.exists():
            return
        time.sleep(0.01)
    raise AssertionError("it is still there")
