"""Console output: plain lines in a pipe, rich on a terminal, rank 0 only, and never a traceback for a closed pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from bio_inspired_nanochat.common import console, progress, say, table
from bio_inspired_nanochat.errors import UserError, exit_on_user_error

# Torch takes seconds to import, is needed by the neighbours of the console only, and is left out of these small programs.
PRELUDE = """
import sys, types
torch, dist = types.ModuleType("torch"), types.ModuleType("torch.distributed")
torch.distributed, torch.Tensor, torch.no_grad = dist, object, lambda: lambda function: function
sys.modules.update({"torch": torch, "torch.distributed": dist})
"""

SCRIPT = (
    PRELUDE
    + """
from bio_inspired_nanochat.common import print_json_line, progress, say, table
say("start [bold]x[/bold]")
with progress(3, "train", "steps") as bar:
    for i in range(3):
        bar.advance(1, note=f"loss [{i}]")
        say(f"line [red]{i}[/red]")
table(["name", "loss"], [["a", 1.23456], ["b", None]])
print_json_line({"steps": 3})
"""
)


def environment(**extra: str) -> dict[str, str]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return keep | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "25"} | extra


def in_terminal(**extra: str) -> str:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=follower, stdout=follower, stderr=follower, env=environment(**extra)
    ) as child:
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 1 << 16)
            except OSError:  # the terminal is gone once the child has ended
                break
            if not piece:
                break
            seen += piece
        assert child.wait(timeout=60) == 0
    os.close(leader)
    return seen.decode()


def test_a_pipe_gets_plain_lines_and_ends_with_the_record() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL, timeout=60
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    assert lines[:4] == ["start [bold]x[/bold]", "line [red]0[/red]", "line [red]1[/red]", "line [red]2[/red]"]
    assert lines[4].startswith("train 3/3 steps (100%), ") and lines[4].endswith(", loss [2]")
    assert lines[5:8] == ["name   loss", "a     1.235", "b         -"]
    assert json.loads(lines[-1]) == {"steps": 3} and len(lines) == 9


def test_a_terminal_gets_a_bar_with_the_time_left_and_ends_with_the_record() -> None:
    screen = in_terminal()
    assert "\x1b[" in screen and "3/3" in screen and "0:00:00" in screen and "loss [2]" in screen and "line [red]1[/red]" in screen
    assert json.loads(screen.splitlines()[-1]) == {"steps": 3}


def test_no_color_leaves_no_colours_on_a_terminal() -> None:
    screen = in_terminal(NO_COLOR="1")
    assert "\x1b[3" not in screen and json.loads(screen.splitlines()[-1]) == {"steps": 3}


def test_a_dumb_terminal_is_written_to_like_a_pipe() -> None:
    assert "\x1b" not in in_terminal(TERM="dumb")


def test_a_closed_pipe_ends_the_program_without_a_word() -> None:
    code = PRELUDE + "from bio_inspired_nanochat.common import say\nfor i in range(100000): say('x' * 100)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), stdin=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 141


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    say("hello")
    table(["a"], [[1]])
    with progress(2, "train", "steps", every=0) as bar:
        bar.advance(2, note="x")
    assert capsys.readouterr().out == "" and bar.done == 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_plain_progress_speaks_every_ten_seconds_and_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "train", "steps") as bar:
        for _ in range(50):
            clock[0] += 0.5
            bar.advance(note="loss 2.5")
    assert capsys.readouterr().out.splitlines() == [
        "train 20/100 steps (20%), 2 steps/s, 40s left, loss 2.5",
        "train 40/100 steps (40%), 2 steps/s, 30s left, loss 2.5",
        "train 50/100 steps (50%), 2 steps/s, 25s left, loss 2.5",
    ]


def test_a_resumed_loop_counts_only_its_own_steps_in_the_rate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "train", "steps", start=60) as bar:
        clock[0] += 10.0
        bar.advance(10)
    assert capsys.readouterr().out == "train 70/100 steps (70%), 1 steps/s, 30s left\n"


def test_an_unknown_total_gives_a_count_and_a_rate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "read", "files") as bar:
        clock[0] += 2.0
        bar.advance(8)
    assert capsys.readouterr().out == "read 8 files, 4 files/s\n"


def test_large_counts_can_be_read(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "tokenizer", "characters") as bar:
        clock[0] += 1.1
        bar.advance(16_962_075)
    assert capsys.readouterr().out == "tokenizer 16,962,075 characters, 15,420,068 characters/s\n"


def test_an_error_inside_the_loop_comes_out_as_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress(3, "train", "steps") as bar:
        bar.advance()
        raise KeyError("x")
    assert capsys.readouterr().out.startswith("train 1/3")
    assert console._live == []


def test_text_that_the_stream_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("τ \udcff ok")
    assert raw.getvalue() == b"\\u03c4 \\udcff ok\n"


def test_a_name_from_elsewhere_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Clearing the screen, setting the title, going back in the line, the one-byte form of an escape."""
    name = "a\x1b[2Jb\x1b]0;c\x07d\re\x9b3mf"
    shown = "a\\x1b[2Jb\\x1b]0;c\\x07d\\x0de\\x9b3mf"
    say(f"notice: {name} has\n\tno text")
    with progress(None, "prepare", "documents") as bar:
        bar.advance(1, note=name)
    table(["file"], [[name.replace("\r", "")]])
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError(f"{name} is damaged")
    said = capsys.readouterr()
    assert f"notice: {shown} has\n\tno text\n" in said.out and f", {shown}\n" in said.out and "is damaged" in said.err
    assert not any(sign in said.out + said.err for sign in "\x1b\x07\r\x9b")


def test_a_missing_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody reads this")
    table(["a"], [[1]])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (260, "4m20s"), (3900, "1h05m"), (90000, "25h00m")])
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("columns", "rows", "text"),
    [
        (["a", "bb"], [], "a  bb\n"),
        (["name", "n"], [["x\ny", 10], ["z", 5]], "name   n\nx y   10\nz      5\n"),
        (["on", "v"], [[True, 1e-7]], "on        v\nTrue  1e-07\n"),
    ],
)
def test_plain_tables_are_aligned(columns: list[str], rows: list[list[Any]], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table(columns, rows)
    assert capsys.readouterr().out == text
