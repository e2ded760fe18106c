"""Errors that a user can cause and fix.

Everything a user types or feeds in (flags, files, shapes) fails with `UserError`: a ValueError whose message is one line
that names the value, its bound and the fix. Scripts print it without a traceback and exit with code 2 (`exit_on_user_error`).
Invariants of the code itself stay `assert`.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A wrong input. The message is one line: the value, the bound, the fix."""


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """Control characters as escapes: the name of a file or the answer of a server must not command the terminal that shows it."""
    return text.translate(_CONTROLS)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A suffix like ` (did you mean 'depth'?)` for a mistyped `name`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


@contextlib.contextmanager
def damaged_file(what: object, fix: str) -> Iterator[None]:
    """Turn what Python raises when data of a file has another form than its reader expects into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:160]}): {fix}") from None


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2; everything else propagates."""
    try:
        yield
    except UserError as error:
        print("error: " + harmless(" ".join(str(error).split())), file=sys.stderr)
        raise SystemExit(2) from None
