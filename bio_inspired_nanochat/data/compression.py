"""How well a tokenizer compresses, and whether it gives every text back exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bio_inspired_nanochat.data.source import DataSource
from bio_inspired_nanochat.tokenizer import Tokenizer

_BATCH = 256
_UNICODE = (
    "Zażółć gęślą jaźń. Съешь ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと ちりぬるを。 키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع וזה משפט בעברית  हिन्दी में एक वाक्य  ประโยคภาษาไทย",
    "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ aᵢ ≤ ∞ 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 e\u0301 \u200d\u00a0\ufeff\u2028 \x00\x1b\t\r\n",
    "0 12 345 6789 1234567890 3.14159e-10 0x7f 1,000,000 2024-01-31T12:00:00Z",
)


@dataclass(frozen=True)
class Compression:
    """Sums over some texts. exact: every text came back as it was."""

    bytes: int
    tokens: int
    exact: bool

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; raw bytes have 1."""
        return self.bytes / max(1, self.tokens)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Compression:
    """Encode and decode `texts`, a batch at a time."""
    size, tokens, exact, stream = 0, 0, True, iter(texts)
    while batch := list(islice(stream, _BATCH)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            size += len(text.encode())
            tokens += len(ids)
            exact = exact and tokenizer.decode(ids) == text
    return Compression(size, tokens, exact)


def samples(source: DataSource, max_chars: int) -> Iterator[tuple[str, list[str]]]:
    """Named texts: both splits of the corpus, program code (this package's own), and many scripts and symbols."""
    for split in ("train", "val"):
        yield split, list(source.texts(split, max_chars))
    yield "code", [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    yield "unicode", list(_UNICODE)
