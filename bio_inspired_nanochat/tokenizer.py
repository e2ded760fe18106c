"""Byte-pair tokenizer: trained by rustbpe, run by tiktoken, stored as one JSON file, never on the network.

Ids 0..255 are the single bytes, then the merges in order of training, then the special tokens. Text never becomes a
special token: a document that contains "<|bos|>" is encoded as those seven characters, and special ids are only
written by code that asks for them by name.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rustbpe
import tiktoken

from bio_inspired_nanochat.common import write_atomic
from bio_inspired_nanochat.errors import UserError, nearest

SPECIALS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MIN_VOCAB = 256 + len(SPECIALS)
MAX_VOCAB = 1 << 20

# GPT-4's split into words, with runs of one or two digits instead of three: a small vocabulary cannot afford 1110 number tokens.
PATTERN = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""

_FORMAT = "bio_inspired_nanochat.tokenizer"
_VERSION = 1
# The regular expression engine runs out of stack on a million blanks, and one endless word costs more than linear time.
_SEGMENT = 32768


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, ranks: Sequence[bytes], pattern: str = PATTERN, specials: Sequence[str] = SPECIALS) -> None:
        """`ranks` are the byte strings of the ordinary tokens in id order; specials get the ids after them."""
        self._ranks = list(ranks)
        self._pattern = pattern
        self._specials = {name: len(self._ranks) + i for i, name in enumerate(specials)}
        self._encoding = tiktoken.Encoding(
            name="bio_inspired_nanochat",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(self._ranks)},
            special_tokens=self._specials,
        )
        self._bytes = self._ranks + [name.encode() for name in specials]
        self._sha256 = hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` (read once, as a stream) for at most `vocab_size` ids, specials included.

        Text that runs out of repeated pairs supports fewer merges: then `vocab_size` of the result is smaller than asked.
        Raises UserError for a size outside [265, 1048576] and for no text at all.
        """
        if not isinstance(vocab_size, int) or not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
            raise UserError(
                f"vocab_size={vocab_size} is out of bounds [{MIN_VOCAB}, {MAX_VOCAB}]: 256 bytes and {len(SPECIALS)} special tokens come first"
            )
        seen = 0

        def segments() -> Iterator[str]:
            nonlocal seen
            for text in texts:
                for segment in _segments(_without_surrogates(text)):
                    seen += len(segment)
                    yield segment

        trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]
        trainer.train_from_iterator(segments(), vocab_size - len(SPECIALS), pattern=PATTERN)
        if not seen:
            raise UserError("no text to train a tokenizer on: every document is empty")
        merges = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        return cls([bytes(token) for token, _ in merges])

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a file written by `save`. Raises UserError when it is missing, damaged or not a tokenizer of this project."""
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"tokenizer {path} does not exist: train one with python -m scripts.tok_train") from None
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UserError(f"tokenizer {path} is not a JSON file: it is damaged or of another program; train it again") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(
                f"{path} is not a tokenizer of this project (format {_FORMAT!r} expected): train one with python -m scripts.tok_train"
            )
        if content.get("version") != _VERSION:
            raise UserError(
                f"tokenizer {path} has format version {content.get('version')!r}, this program reads {_VERSION}: train it again"
            )
        return cls._from_content(path, content)

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any]) -> Tokenizer:
        damaged = f"tokenizer {path} is damaged: {{}}; restore or train it again"
        parts: Any = (content.get(key) for key in ("pattern", "specials", "ranks"))
        pattern, specials, encoded = parts
        if not (isinstance(pattern, str) and _is_strings(specials) and _is_strings(encoded)):
            raise UserError(damaged.format("pattern, specials or ranks are missing"))
        try:
            ranks = [base64.b64decode(token, validate=True) for token in encoded]
        except binascii.Error:
            raise UserError(damaged.format("a rank is not base64")) from None
        if len(set(ranks)) != len(ranks) or {bytes([i]) for i in range(256)} - set(ranks) or b"" in ranks:
            raise UserError(damaged.format("the ranks must be distinct, not empty, and contain the 256 single bytes"))
        if len(set(specials)) != len(specials) or set(SPECIALS) - set(specials):
            raise UserError(damaged.format("the special tokens are incomplete"))
        try:
            tokenizer = cls(ranks, pattern, specials)
        except ValueError as error:
            raise UserError(damaged.format(f"its pattern does not compile ({error})")) from None
        if tokenizer.sha256 != content.get("sha256"):
            raise UserError(damaged.format("its sha256 does not match its content"))
        return tokenizer

    def _content(self) -> dict[str, Any]:
        ranks = [base64.b64encode(token).decode() for token in self._ranks]
        return {"pattern": self._pattern, "specials": list(self._specials), "ranks": ranks}

    def to_json(self) -> str:
        """The file's content, for storing inside of a checkpoint."""
        head = {"format": _FORMAT, "version": _VERSION, "sha256": self._sha256, "vocab_size": self.vocab_size}
        return json.dumps({**head, **self._content()}, indent=0) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the JSON file, whole or not at all."""
        write_atomic(Path(path), self.to_json())

    @property
    def sha256(self) -> str:
        """Digest of everything that decides how text is encoded."""
        return self._sha256

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self._specials["<|bos|>"]

    @property
    def specials(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return dict(self._specials)

    def special(self, name: str) -> int:
        """Id of a special token, for example `<|user_start|>`. Raises UserError for an unknown name."""
        if name not in self._specials:
            raise UserError(f"special token {name!r} does not exist{nearest(name, self._specials)}")
        return self._specials[name]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, after a BOS if asked. Never a special id from text; lone surrogates become U+FFFD."""
        ids = [self.bos_id] if bos else []
        for segment in _segments(text):
            ids.extend(self._encoding.encode_ordinary(segment))
        return ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False, threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on `threads` threads (default: one per core, at most 8). The result does not depend on threads."""
        threads = threads or min(8, os.cpu_count() or 1)
        parts = [_segments(text) for text in texts]
        encoded = iter(self._encoding.encode_ordinary_batch([segment for part in parts for segment in part], num_threads=threads))
        out = []
        for part in parts:
            ids = [self.bos_id] if bos else []
            for _ in part:
                ids.extend(next(encoded))
            out.append(ids)
        return out

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; a special token is its name. Raises UserError for an id outside of the vocabulary."""
        return b"".join(map(self._bytes_of, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[int]:
        """Length of each id in UTF-8 bytes of text; 0 for special tokens, which are no text."""
        return [len(token) for token in self._ranks] + [0] * len(self._specials)

    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder for one stream of ids."""
        return StreamDecoder(self)

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < len(self._bytes):
            raise UserError(f"token id {token} is outside of the vocabulary [0, {len(self._bytes) - 1}]: another tokenizer made it")
        return self._bytes[token]


class StreamDecoder:
    """Decodes one id at a time and hands out only complete characters: the pieces joined equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.decode_bytes((int(token),)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. The decoder is fresh afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _segments(text: str) -> list[str]:
    """Cut a long text before a single space between words, where the split pattern always cuts, else at the limit."""
    if len(text) <= _SEGMENT:
        return [text] if text else []
    out, start = [], 0
    while len(text) - start > _SEGMENT:
        cut = start + _SEGMENT
        for i in range(cut, start + _SEGMENT // 2, -1):
            if text[i] == " " and text[i + 1 : i + 2].isalpha() and not text[i - 1].isspace():
                cut = i
                break
        out.append(text[start:cut])
        start = cut
    out.append(text[start:])
    return out


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 encoder takes, in the way that tiktoken does when it encodes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
