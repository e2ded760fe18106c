"""Long texts to pieces, cut where a reader would cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_BREAKS = ("\n\n", "\n", ". ", " ")


def split_text(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters of the text that `chunks` make up, however it is cut into chunks.

    A piece ends at the last blank line of its second half; failing that at a line, a sentence, a word, or the limit. Line breaks
    at the ends of a piece are dropped, and so are pieces of blanks alone.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > limit:
            end = _cut(buffer, start, limit)
            yield from _trimmed(buffer[start:end])
            start = end
        buffer = buffer[start:]
    yield from _trimmed(buffer)


def _cut(text: str, start: int, limit: int) -> int:
    for mark in _BREAKS:
        found = text.rfind(mark, start + limit // 2, start + limit)
        if found > start:
            return found + len(mark)
    return start + limit


def _trimmed(piece: str) -> Iterator[str]:
    piece = piece.strip("\r\n")
    if piece and not piece.isspace():
        yield piece
