"""Copies and needles: a model that repeats takes everything from far back, one that guesses takes nothing."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.common import generator_for
from bio_inspired_nanochat.evaluation.longrange import DIGITS, SCORED, SPAN, copy_pair, needle_pair
from bio_inspired_nanochat.evaluation.suite import EvaluationSetting, evaluate, evaluate_in_detail
from tests.contract import make_model
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import SURE, Planted, guess, repeat, text

SETTING = EvaluationSetting(tokenizer=tokenizer(), source=text(), rows=3, lengths=(256,))


@pytest.mark.parametrize("name", ["copy", "needle"])
def test_a_model_that_repeats_scores_one_and_one_that_guesses_nothing(name: str) -> None:
    repeats = evaluate(Planted(repeat), [name], SETTING)
    guesses = evaluate(Planted(guess), [name], SETTING)
    uniform = torch.tensor(float(tokenizer().vocab_size)).log().item()
    assert repeats[f"{name}.accuracy_256"] == 1 and repeats[f"{name}.untold_accuracy_256"] == 0
    assert repeats[f"{name}.gain_256"] == pytest.approx(uniform, rel=1e-3), "from a uniform guess to certainty"
    assert guesses[f"{name}.gain_256"] == pytest.approx(0, abs=1e-6) and guesses[f"{name}.accuracy_256"] == 0


def test_a_memory_that_is_too_short_gains_nothing() -> None:
    """What is measured is the distance: a model that sees only the last 64 tokens of a row does not find the span."""

    def near(ids: list[int]) -> list[int | None]:
        return [None] * (len(ids) - min(len(ids), 64)) + repeat(ids[-64:])

    assert evaluate(Planted(near), ["copy"], SETTING)["copy.gain_256"] == pytest.approx(0, abs=1e-6)


def test_the_two_rows_of_a_pair_differ_only_in_what_was_told() -> None:
    words = list(range(200, 500))
    told, untold = copy_pair(words, generator_for(0, "a"), 256, bos_id=1)
    assert len(told.ids) == len(untold.ids) == 256 and told.start == untold.start == 256 - SCORED
    assert told.ids[1 + SPAN :] == untold.ids[1 + SPAN :] and told.ids[1 : 1 + SPAN] == told.ids[-SPAN:]
    assert not set(untold.ids[1 : 1 + SPAN]) & set(told.ids[-SPAN:]) and told.ids[0] == untold.ids[0] == 1
    depths, letters = set(), [97 + place % 26 for place in range(300)]
    for draw in range(8):
        told, untold = needle_pair(letters, generator_for(0, f"needle.{draw}"), 256, tokenizer())
        start, sentence = told.start, tokenizer().decode(told.ids[told.start :])
        assert len(told.ids) == len(untold.ids) == 256 and told.ids[start:] == untold.ids[start:]
        assert len(sentence) == DIGITS and sentence.isdigit() and told.ids[0] == tokenizer().bos_id
        asked = tokenizer().decode(told.ids)
        assert asked.count(f" is:{sentence}") == 2 and tokenizer().decode(untold.ids).count(f" is:{sentence}") == 1
        depths.add(asked.index(sentence))
    assert len(depths) > 4, "needles lie at any depth"


def test_lengths_that_do_not_fit_are_none_with_a_notice() -> None:
    found = evaluate_in_detail(Planted(repeat, sequence_len=300), ["copy"], dataclasses.replace(SETTING, lengths=(256, 512)))["copy"]
    assert found.values["accuracy_256"] == 1 and found.values["accuracy_512"] is None and found.values["gain_8192"] is None
    assert "512" in found.notices[0] and "context of 300" in found.notices[0]


def test_numbers_are_those_of_the_seed_and_not_of_the_batch() -> None:
    model = make_model("default", vocab_size=tokenizer().vocab_size, bos_token_id=tokenizer().bos_id, sequence_len=256)
    once, again = (evaluate(model, ["copy", "needle"], SETTING) for _ in range(2))
    assert once == again
    assert evaluate(model, ["copy"], dataclasses.replace(SETTING, seed=1))["copy.gain_256"] != once["copy.gain_256"]
    assert SURE > 10 and not model.training
