"""Minimal pairs: whether the acceptable one of two sentences is the likelier one.

A folder of JSONL files, a phenomenon each; every line has `sentence_good` and `sentence_bad`, other keys are ignored (the format of
BLiMP, Warstadt et al. 2020). A sentence's log-probability is the sum over its tokens behind a BOS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.likelihood import Part, score
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, NotApplicable, check_tokenizer
from bio_inspired_nanochat.gpt import GPT

METRICS = (Metric("accuracy", "", "higher", "mean over files of the share of pairs whose good sentence is likelier; a tie counts half"),)
TIE = 1e-9


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line that is not empty. Raises UserError for what is no JSON object, and for files that cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path} line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place} is not JSON ({error}): one JSON object per line is expected") from None
                if not isinstance(record, dict):
                    raise UserError(f"{place} is no JSON object: one object per line is expected")
                yield place, record
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None


def read_pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Pairs (good, bad) by file. Raises UserError for a folder without them, lines without both sentences, and empty sentences."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"pairs_dir={folder} has no .jsonl files: one per phenomenon, with sentence_good and sentence_bad in every line")
    found: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        pairs: list[tuple[str, str]] = []
        for place, record in read_jsonl(file):
            good, bad = (record.get(key) for key in ("sentence_good", "sentence_bad"))
            if not (isinstance(good, str) and good and isinstance(bad, str) and bad):
                raise UserError(f"{place} lacks sentence_good or sentence_bad: both must be text")
            pairs.append((good, bad))
        if not pairs:
            raise UserError(f"{file} has no pairs: remove it, or add lines with sentence_good and sentence_bad")
        found[file.stem] = pairs
    return found


def minimal_pairs(model: GPT, setting: EvaluationSetting) -> Found:
    """Accuracy on the pairs of `setting.pairs_dir`; the files' own are in `details`."""
    if setting.pairs_dir is None:
        raise NotApplicable("pairs needs a folder of minimal pairs: give --pairs_dir")
    tokenizer = setting.words("pairs")
    check_tokenizer(model, tokenizer)
    by_file: dict[str, dict[str, float]] = {}
    for name, pairs in read_pairs(Path(setting.pairs_dir).expanduser()).items():
        pairs = pairs[: setting.max_per_task or None]
        parts = [_part(model, tokenizer.encode(sentence, bos=True), name) for pair in pairs for sentence in pair]
        logs = [-one.losses.sum().item() for one in score(model, parts, setting.batch_size)]
        by_file[name] = {"accuracy": accuracy(logs[0::2], logs[1::2]), "pairs": len(pairs)}
    return Found({"accuracy": sum(found["accuracy"] for found in by_file.values()) / len(by_file)}, {"files": by_file})


def accuracy(good: Sequence[float], bad: Sequence[float]) -> float:
    """Share of pairs whose first log-probability is the larger one; a tie, as between unlearned models' sentences, counts half.

    NaN where a log-probability is.
    """
    if any(map(math.isnan, (*good, *bad))):
        return math.nan
    points = [0.5 if abs(a - b) <= TIE * max(1.0, abs(a)) else float(a > b) for a, b in zip(good, bad, strict=True)]
    return sum(points) / len(points)


def _part(model: GPT, ids: list[int], name: str) -> Part:
    if len(ids) > model.config.sequence_len + 1:
        raise NotApplicable(f"pairs: a sentence of {name} has {len(ids)} tokens, the context holds {model.config.sequence_len}")
    return Part(ids, 1, len(ids))
