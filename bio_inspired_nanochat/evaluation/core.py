"""CORE: the mean over the tasks of a bundle of accuracy above guessing, from examples in the context. No tuning is needed.

    centred = (accuracy - baseline) / (1 - baseline)

multiple_choice: one context, several continuations, the right one must have the lowest mean loss per token. schema: several contexts,
one continuation, which the right context must make likeliest. language_modeling: every token of the continuation must be the most
likely one. Tied options share the point, so that an unlearned model scores what guessing does. Source: DCLM (Li et al. 2024); prompts,
draws of examples and the order of questions follow nanochat, so that scores can be compared. T tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from bio_inspired_nanochat.common import progress
from bio_inspired_nanochat.evaluation.bundle import CoreTask, find_bundle, read_bundle
from bio_inspired_nanochat.evaluation.likelihood import Part, PartScore, fitted, score
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, NotApplicable, check_tokenizer
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tokenizer import Tokenizer

ORDER_SEED, SHOTS_SEED = 1337, 1234  # nanochat's, so that its questions and examples are drawn
TIE = 1e-9
TOGETHER = 32  # questions whose rows are sorted by length before they are batched
METRICS = (
    Metric("core", "", "higher", "mean over tasks of the accuracy above guessing, as a share of what is left"),
    Metric("accuracy", "", "higher", "mean accuracy over tasks"),
)


def core(model: GPT, setting: EvaluationSetting) -> Found:
    """The metrics above on the bundle of the setting; every task's own are in `details`."""
    root = find_bundle(setting.eval_bundle_dir, setting.eval_bundle_zip, setting.eval_bundle_url)
    if root is None:
        raise NotApplicable("core needs a bundle: give --eval_bundle_dir, --eval_bundle_zip or --eval_bundle_url")
    tokenizer = setting.words("core")
    check_tokenizer(model, tokenizer)
    tasks = read_bundle(root)
    found: dict[str, dict[str, Any]] = {}
    cut = 0
    with progress(len(tasks), "core", "tasks") as bar:
        for task in tasks:
            found[task.label], shortened = measure_task(model, tokenizer, task, setting.max_per_task, setting.batch_size)
            cut += shortened
            bar.advance(1, note=f"{task.label} {found[task.label]['accuracy']:.3f}")
    means = {key: sum(one[key] for one in found.values()) / len(found) for key in ("centred", "accuracy")}
    notices = (f"core: {cut} prompts are longer than the context and lost their beginning",) if cut else ()
    return Found({"core": means["centred"], "accuracy": means["accuracy"]}, {"tasks": found}, notices)


def measure_task(model: GPT, tokenizer: Tokenizer, task: CoreTask, max_items: int = 0, batch_size: int = 8) -> tuple[dict[str, Any], int]:
    """Accuracy, centred accuracy, baseline and number of questions of a task; and how many rows did not fit into the context."""
    items = list(task.items)
    random.Random(ORDER_SEED).shuffle(items)
    items = items[: max_items or None]
    if len(items) <= task.shots:  # examples come from the same questions
        raise NotApplicable(f"core: {task.label} needs more than its {task.shots} examples, max_per_task={max_items} leaves {len(items)}")
    points, cut = 0.0, 0
    context = model.config.sequence_len
    for first in range(0, len(items), TOGETHER):
        places = range(first, min(first + TOGETHER, len(items)))
        questions = [prompt_parts(tokenizer, task, items, place) for place in places]
        cut += sum(len(part.ids) > context + 1 for parts in questions for part in parts)
        scores = iter(score(model, [fitted(part.ids, part.start, context) for parts in questions for part in parts], batch_size))
        for place, parts in zip(places, questions, strict=True):
            points += judged([next(scores) for _ in parts], items[place].get("gold") if task.kind != "language_modeling" else None)
    accuracy = points / len(items)
    centred = (accuracy - task.baseline) / (1 - task.baseline)
    return {"accuracy": accuracy, "centred": centred, "baseline": task.baseline, "questions": len(items)}, cut


def judged(scores: Sequence[PartScore], gold: int | None) -> float:
    """The point for one question: 1, 0, or a share of it among tied options; NaN where a loss is. gold None: all tokens must be the most
    likely ones.
    """
    if any(bool(one.losses.isnan().any()) for one in scores):
        return math.nan
    if gold is None:
        return float(all(bool(one.greedy.all()) for one in scores))
    losses = [one.losses.mean().item() for one in scores]
    best = [place for place, loss in enumerate(losses) if loss <= min(losses) + TIE]
    return (gold in best) / len(best)


def prompt_parts(tokenizer: Tokenizer, task: CoreTask, items: Sequence[dict[str, Any]], place: int) -> list[Part]:
    """The rows of question `place`, one per option, each BOS first, with the tokens by which it is judged."""
    drawn = random.Random(SHOTS_SEED + place).sample([other for other in range(len(items)) if other != place], task.shots)
    head = "".join(text + "\n\n" for text in (_solved(task, items[other]) for other in drawn))
    item = items[place]
    if task.kind == "multiple_choice":
        rows = [tokenizer.encode(head + item["query"] + task.delimiter + choice, bos=True) for choice in item["choices"]]
        start = _common(rows)
        return [Part(row, min(start, len(row) - 1), len(row)) for row in rows]
    if task.kind == "schema":
        ends = task.delimiter + item["continuation"]
        rows = [tokenizer.encode(head + context + ends, bos=True) for context in item["context_options"]]
        length = max(1, _common([row[::-1] for row in rows]))
        return [Part(row, max(1, len(row) - length), len(row)) for row in rows]
    asked = head + item["context"].strip() + task.delimiter
    row = tokenizer.encode(asked + item["continuation"], bos=True)
    start = _common([tokenizer.encode(asked.strip(), bos=True), row])
    return [Part(row, min(start, len(row) - 1), len(row))]


def _solved(task: CoreTask, item: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    if task.kind == "schema":
        return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens the rows have in common at their beginning."""
    length = 0
    while length < min(map(len, rows)) and len({row[length] for row in rows}) == 1:
        length += 1
    return length
