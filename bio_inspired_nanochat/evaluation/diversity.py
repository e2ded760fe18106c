"""How varied a model's texts are, beside held-out text continued from the same first tokens.

    distinct_n = different n-grams / all n-grams, over all texts       repetition_n = share of a text's n-grams that it has said before

Texts are token ids and all of one length, on which both depend. Source: Li et al. 2016 (distinct), Welleck et al. 2020 (repetition).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from bio_inspired_nanochat.engine import generate_batch
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, NotApplicable, text_batches
from bio_inspired_nanochat.gpt import GPT

ORDERS = (1, 2, 3, 4)
REPEATED = 4
PROMPT = 16  # held-out tokens that a continuation starts from, the BOS included

_METRICS = [Metric(f"distinct_{n}", "", "higher", f"share of different {n}-grams in sampled continuations") for n in ORDERS]
_METRICS.append(Metric(f"repetition_{REPEATED}", "", "lower", f"share of {REPEATED}-grams that the same continuation has said before"))
_TEXT = [Metric(f"text_{metric.name}", "", metric.better, "the same for held-out text", reference=True) for metric in _METRICS]
METRICS = (
    *_METRICS,
    *_TEXT,
    Metric("repetition_gap", "", "lower", f"distance between repetition_{REPEATED} of samples and of held-out text"),
)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all texts, in (0, 1]. Raises UserError when no text has n tokens."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    if not grams:
        raise UserError(f"no text has n={n} tokens: give longer ones")
    return len(set(grams)) / len(grams)


def repetition(texts: Sequence[Sequence[int]], n: int) -> float:
    """Mean over texts of 1 - different n-grams / n-grams of a text, in [0, 1). Raises UserError when no text has n tokens."""
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _grams(text, n))]
    if not shares:
        raise UserError(f"no text has n={n} tokens: give longer ones")
    return sum(shares) / len(shares)


def figures(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """All figures of some texts by name."""
    return {f"distinct_{n}": distinct(texts, n) for n in ORDERS} | {f"repetition_{REPEATED}": repetition(texts, REPEATED)}


def diversity(model: GPT, setting: EvaluationSetting) -> Found:
    """Continue the first tokens of held-out rows, and compare the continuations with what really follows there."""
    context = model.config.sequence_len
    prompt = min(PROMPT, context // 2)
    length = min(setting.sample_tokens, context - prompt)
    if length < REPEATED:
        raise NotApplicable(f"diversity needs continuations of {REPEATED} tokens: a context of {context} leaves {length}")
    enough = dataclasses.replace(setting, tokens=setting.samples * context)
    rows: list[list[int]] = []
    for idx, targets, _ in text_batches(model, enough, "diversity"):
        whole = (targets[:, : prompt + length - 1] >= 0).all(1)  # the last row may end before its continuation does
        rows += idx[whole].tolist()
    if not rows:
        raise NotApplicable(f"diversity needs {prompt + length} tokens of {setting.split} text in a row, which holds less: add text")
    lacks = len(rows) < setting.samples
    notices = (f"diversity: {len(rows)} continuations, not {setting.samples}: the text has no more rows",) if lacks else ()
    made: list[list[int]] = []
    for first in range(0, len(rows), setting.batch_size):
        prompts = [row[:prompt] for row in rows[first : first + setting.batch_size]]
        texts: list[list[int]] = [[] for _ in prompts]
        with torch.no_grad():
            for item in generate_batch(model, prompts, length, setting.temperature, seed=setting.seed + first):
                for text, token in zip(texts, item, strict=True):
                    text += [] if token is None else [token]
        made += texts
    own, held_out = figures(made), figures([row[prompt : prompt + length] for row in rows])
    gap = abs(own[f"repetition_{REPEATED}"] - held_out[f"repetition_{REPEATED}"])
    values = own | {f"text_{name}": value for name, value in held_out.items()} | {"repetition_gap": gap}
    return Found(values, {"continuations": len(rows), "tokens": length}, notices)


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
