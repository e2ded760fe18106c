"""What a language model takes from far back in its context: a repeated span, and a needle in a haystack. No tuning is needed.

Both compare the loss of the same tokens at the same place of a row, after the same last words, with and without what the model could
remember: the difference is what it did remember. Rows are made of held-out text behind one BOS, without others, so that a model that
keeps documents apart sees one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.evaluation.likelihood import Part, PartScore, score
from bio_inspired_nanochat.evaluation.setting import LENGTHS, EvaluationSetting, Found, Metric, NotApplicable, check_tokenizer
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tokenizer import Tokenizer

CUE, SCORED = 8, 24  # tokens of a span: the first ones say which span it is, the others are measured
SPAN = CUE + SCORED
DIGITS = 4
PLACES = ("Avalon", "Bergamo", "Cordova", "Dunmore", "Elbasan", "Falmouth", "Girona", "Halifax")
BATCH_TOKENS = 16384  # of one forward, whose logits have to fit


class Pair(NamedTuple):
    """Two rows of equal length that end alike: one has told before what the part asks for, the other has not."""

    told: Part
    untold: Part


def metrics(name: str) -> tuple[Metric, ...]:
    """Metrics of one of the two, for every length of a row."""
    what = "a span that came before" if name == "copy" else "the number that a needle told"
    found: list[Metric] = []
    for length in LENGTHS:
        found += [
            Metric(
                f"gain_{length}", "nats", "higher", f"loss per token of {what} less that of the same tokens untold, rows of {length} tokens"
            ),
            Metric(f"accuracy_{length}", "", "higher", f"share of tokens of {what} that are the most likely ones"),
            Metric(f"untold_accuracy_{length}", "", "higher", "the same where it was not told", reference=True),
        ]
    return tuple(found)


def copies(model: GPT, setting: EvaluationSetting) -> Found:
    """A span of text at a row's start, and again at its end: how much better its last tokens are predicted than without the first."""
    return _measure(model, setting, "copy", lambda text, generator, length, tokenizer: copy_pair(text, generator, length, tokenizer.bos_id))


def needles(model: GPT, setting: EvaluationSetting) -> Found:
    """A sentence with a number anywhere in the text, and the same sentence begun at its end: how much better the number is predicted."""
    return _measure(model, setting, "needle", needle_pair)


def copy_pair(text: Sequence[int], generator: torch.Generator, length: int, bos_id: int) -> Pair:
    """Rows of `length` tokens: BOS, span, filler, span; without the first span another piece of text of its length stands there."""
    filler_length = length - 1 - 2 * SPAN
    filler, span, other = _pieces(text, generator, (filler_length, SPAN, SPAN))
    start = length - SCORED
    return Pair(Part([bos_id, *span, *filler, *span], start, length), Part([bos_id, *other, *filler, *span], start, length))


def needle_pair(text: Sequence[int], generator: torch.Generator, length: int, tokenizer: Tokenizer) -> Pair:
    """Rows of `length` tokens: BOS, filler with the needle at any depth, and the question. Untold, filler takes the needle's place."""
    place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
    number = "".join(str(int(digit)) for digit in torch.randint(1, 10, (DIGITS,), generator=generator))
    begun = f"\nThe secret number of {place} is:"
    answer = tokenizer.encode(number)
    needle, question = tokenizer.encode(begun) + answer + tokenizer.encode(".\n"), tokenizer.encode(begun)
    room = length - 1 - len(question) - len(answer) - len(needle)
    if room < 0:
        raise NotApplicable(f"a needle and its question do not fit into rows of {length} tokens with this tokenizer")
    filler, other = _pieces(text, generator, (room, len(needle)))
    depth = int(torch.randint(room + 1, (), generator=generator))
    rows = [[tokenizer.bos_id, *filler[:depth], *told, *filler[depth:], *question, *answer] for told in (needle, other)]
    return Pair(*(Part(row, length - len(answer), length) for row in rows))


def _pieces(text: Sequence[int], generator: torch.Generator, lengths: Sequence[int]) -> list[Sequence[int]]:
    """Pieces of the text that do not overlap, read on from its start where it ends, from a random place on in this order."""
    at = int(torch.randint(len(text), (), generator=generator))
    found: list[Sequence[int]] = []
    for length in lengths:
        places = range(at, at + length)
        found.append([text[place % len(text)] for place in places])
        at += length
    return found


def _measure(
    model: GPT, setting: EvaluationSetting, name: str, make: Callable[[Sequence[int], torch.Generator, int, Tokenizer], Pair]
) -> Found:
    tokenizer, source = setting.text(name)
    check_tokenizer(model, tokenizer)
    values: dict[str, float | None] = {metric.name: None for metric in metrics(name)}
    notices = []
    fits = [length for length in setting.lengths if length <= model.config.sequence_len]
    if len(fits) < len(setting.lengths):
        left_out = ", ".join(str(length) for length in setting.lengths if length not in fits)
        notices.append(f"{name}: rows of {left_out} tokens do not fit into the model's context of {model.config.sequence_len}")
    text = _read(tokenizer, source.texts(setting.split, max_chars=64 * max(fits, default=0)), max(fits, default=0))
    for length in fits:
        if len(text) < length:
            notices.append(f"{name}: the {setting.split} text has {len(text)} tokens, fewer than rows of {length}: add text")
            continue
        generators = [generator_for(setting.seed, f"{name}.{length}.{row}") for row in range(setting.rows)]
        pairs = [make(text, generator, length, tokenizer) for generator in generators]
        values |= _compare(model, pairs, length)
    known = {metric.name for metric in metrics(name)}
    other = {key: value for key, value in values.items() if key not in known}  # lengths of the caller's own
    return Found({key: values[key] for key in known}, {"rows": setting.rows} | other, tuple(notices))


def _read(tokenizer: Tokenizer, documents: Iterable[str], enough: int) -> list[int]:
    """Ids of documents, each followed by a line end, until there are 8 times enough: rows begin anywhere in them."""
    ids: list[int] = []
    for document in documents:
        if len(ids) >= 8 * enough:
            break
        ids += tokenizer.encode(document + "\n")
    return ids


def _compare(model: GPT, pairs: Sequence[Pair], length: int) -> dict[str, float | None]:
    batch = max(1, BATCH_TOKENS // length)
    told, untold = (score(model, [pair[side] for pair in pairs], batch) for side in (0, 1))
    gain = _mean(untold, "losses") - _mean(told, "losses")
    return {
        f"gain_{length}": gain,
        f"accuracy_{length}": _mean(told, "greedy"),
        f"untold_accuracy_{length}": _mean(untold, "greedy"),
    }


def _mean(scores: Sequence[PartScore], what: str) -> float:
    return torch.cat([getattr(one, what).double() for one in scores]).mean().item()
