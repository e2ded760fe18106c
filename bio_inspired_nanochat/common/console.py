"""Lines, progress and tables on stdout: rich on a terminal, plain text in a pipe, nothing on ranks other than 0.

The last line of a script's stdout is its JSON record, so a progress bar is always closed by its context manager before that.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from bio_inspired_nanochat.common.rank import this_rank
from bio_inspired_nanochat.errors import harmless

_BROKEN_PIPE_EXIT = 141  # 128 + SIGPIPE, what a shell reports for a program whose reader went away
_live: list[Any] = []  # the rich displays that are on the screen now; plain lines have to go above them


def write(text: str) -> None:
    """Write text to stdout and flush. When the reader has gone (`| head`), leave quietly instead of with a traceback.

    Characters that the stream cannot encode are written as escapes.
    """
    stream = sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _leave()


def _leave() -> None:
    """Exit without the interpreter's own complaint about the pipe when it flushes stdout at the end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(_BROKEN_PIPE_EXIT)


def on_terminal() -> bool:
    """Whether stdout is a terminal that can redraw a line."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """One log line on stdout, flushed; rank 0 only. Above a live progress bar it scrolls. Control characters are shown, not obeyed."""
    if not this_rank().first:
        return
    text = harmless(text)
    if _live and on_terminal():
        _live[-1].console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        write(text + "\n")


class Progress:
    """A running count. Plain form: a line every `every` seconds and one at the end."""

    def __init__(self, total: int | None, label: str, unit: str, every: float, start: int) -> None:
        self.total, self.label, self.unit, self.every = total, label, unit, every
        self.start, self.done, self.note = start, start, ""
        self.started = self.reported = time.monotonic()
        self.reported_done = -1

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more; `note` is shown beside the count and stays until the next one."""
        self.done += n
        self.note = harmless(note) or self.note
        self._changed()

    def _changed(self) -> None:
        if time.monotonic() - self.reported >= self.every:
            self._report()

    def _report(self) -> None:
        if self.done == self.reported_done:
            return
        self.reported, self.reported_done = time.monotonic(), self.done
        say(self.line())

    def line(self) -> str:
        """The count as one line: `train 120/1,000 steps (12%), 3.4 steps/s, 4m20s left, loss 2.31`."""
        parts = []
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        parts.append(f"{self.label} {self.done:,}{f'/{self.total:,}' if self.total else ''} {self.unit}{share}")
        elapsed = time.monotonic() - self.started
        if self.done > self.start and elapsed > 0:
            rate = (self.done - self.start) / elapsed
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.3g} {self.unit}/s")
            if self.total and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts + ([self.note] if self.note else []))


class _Silent(Progress):
    def _changed(self) -> None:
        pass


class _Bar(Progress):
    """The rich form. The task's fields carry the note, without markup, because a note may hold brackets."""

    def attach(self, display: Any) -> None:
        self._display = display
        self._task = display.add_task(self.label, total=self.total, completed=self.start, note="", unit=self.unit)

    def _changed(self) -> None:
        self._display.update(self._task, completed=self.done, note=self.note)


@contextmanager
def progress(total: int | None, label: str, unit: str = "steps", *, every: float = 10.0, start: int = 0) -> Iterator[Progress]:
    """Show how far a loop is: `with progress(1000, "train", "steps") as bar: ... bar.advance(1, note="loss 2.31")`.

    A bar with the time left on a terminal; in a pipe a line every `every` seconds and one at the end. total: None or 0 when unknown; start: what was done before, for a resumed loop (it does not count in the rate).
    """
    if not this_rank().first:
        yield _Silent(total, label, unit, every, start)
    elif not on_terminal() or _live:  # a second bar inside the first would fight for the same line
        plain = Progress(total or None, label, unit, every, start)
        try:
            yield plain
        finally:
            plain._report()
    else:
        with _display() as display:
            bar = _Bar(total or None, label, unit, every, start)
            bar.attach(display)
            _live.append(display)
            try:
                yield bar
            finally:
                _live.remove(display)
                bar._changed()


def _display() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42s`, `4m20s`, `1h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; rank 0 only. Numbers are aligned to the right; a float has four significant digits, None is a dash."""
    if not this_rank().first:
        return
    assert all(len(row) == len(columns) for row in rows), "every row has a cell per column"
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
    if not on_terminal():
        write(plain_table(columns, cells, right))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table()
    for name, numeric in zip(columns, right):
        grid.add_column(Text(name), justify="right" if numeric else "left")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    (_live[-1].console if _live else Console()).print(grid)


def plain_table(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Aligned columns two blanks apart, no trailing blanks; `right[i]` aligns column i to the right."""
    widths = [max(len(text) for text in column) for column in zip(columns, *cells)]
    lines = []
    for row in [columns, *cells]:
        padded = [text.rjust(width) if numeric else text.ljust(width) for text, width, numeric in zip(row, widths, right)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return harmless(" ".join(str(value).split()))
