"""Minimal pairs: sums of log-probabilities, means over files, and files that are wrong."""

import math
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.pairs import accuracy, read_pairs
from bio_inspired_nanochat.evaluation.suite import EvaluationSetting, evaluate, evaluate_in_detail
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import Planted, guess, knows

GOOD, BAD = "a small bird sang near the river", "a small bird sang river the near"


def line(good: str, bad: str) -> str:
    return f'{{"sentence_good": "{good}", "sentence_bad": "{bad}", "UID": "x"}}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "order.jsonl").write_text(line(GOOD, BAD) * 3)
    (tmp_path / "mixed.jsonl").write_text(line(GOOD, BAD) + line(BAD, GOOD) + "\n")
    return tmp_path


def test_a_model_that_knows_the_good_sentence_takes_it(folder: Path) -> None:
    setting = EvaluationSetting(tokenizer=tokenizer(), pairs_dir=str(folder))
    found = evaluate_in_detail(Planted(knows(GOOD)), ["pairs"], setting)["pairs"]
    assert {name: one["accuracy"] for name, one in found.details["files"].items()} == {"mixed": 0.5, "order": 1.0}
    assert found.values["accuracy"] == 0.75, "files weigh alike, however long they are"
    assert evaluate(Planted(knows(BAD)), ["pairs"], setting)["pairs.accuracy"] == 0.25
    few = EvaluationSetting(tokenizer=tokenizer(), pairs_dir=str(folder), max_per_task=1)
    assert evaluate_in_detail(Planted(knows(BAD)), ["pairs"], few)["pairs"].details["files"]["mixed"] == {"accuracy": 0.0, "pairs": 1}


def test_a_model_that_guesses_is_at_a_half_when_sentences_are_equally_long(tmp_path: Path) -> None:
    short = EvaluationSetting(tokenizer=tokenizer(), pairs_dir=str(tmp_path))
    assert len(tokenizer().encode("xz")) == len(tokenizer().encode("zx"))
    (tmp_path / "a.jsonl").write_text(line("xz", "zx"))
    assert evaluate(Planted(guess), ["pairs"], short)["pairs.accuracy"] == 0.5
    assert accuracy([-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0]) == 0.5
    assert math.isnan(accuracy([-1.0, math.nan], [-2.0, -1.0])), "no accuracy, in place of a wrong answer"
    (tmp_path / "a.jsonl").write_text(line("xz", "xzxz"))
    assert evaluate(Planted(guess), ["pairs"], short)["pairs.accuracy"] == 1, "sums count, so every further token costs"
    assert evaluate(Planted(guess, sequence_len=1), ["pairs"], short)["pairs.accuracy"] is None


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "has no .jsonl files"),
        ("", "has no pairs"),
        ("nonsense\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        (line("a", "b") + '{"sentence_good": "a"}\n', "line 2 lacks"),
        (line("a", ""), "line 1 lacks"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str | bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint):
        read_pairs(tmp_path)
