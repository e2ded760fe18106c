"""The adapter for lm-eval: its three kinds of requests, and a task of the harness itself where it is installed."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.harness import Likelihoods
from bio_inspired_nanochat.evaluation.suite import EvaluationSetting, evaluate, evaluate_in_detail
from tests.contract import make_model
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import Planted, guess, knows

GOOD = "a small bird sang near the river and nobody knew why"
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval (the extra lm-eval)")


def model(**changes):
    return make_model("default", vocab_size=tokenizer().vocab_size, bos_token_id=tokenizer().bos_id, **changes)


def test_a_continuation_is_scored_behind_bos_and_its_context() -> None:
    answers = Likelihoods(model(), tokenizer())
    ids = tokenizer().encode("the king said to", bos=True)
    logs = answers.model.logits(torch.tensor([ids])).log_softmax(-1)[0]
    own = [logs[place - 1, ids[place]].item() for place in range(1, len(ids))]
    last = len(tokenizer().encode(" said to"))
    (spaced, _), (joined, _), (whole, _) = answers.loglikelihood(
        [("the king ", "said to"), ("the king", " said to"), ("", "the king said to")]
    )
    assert spaced == joined == pytest.approx(sum(own[-last:]), abs=1e-4), "a blank counts to the word, wherever a task writes it"
    assert whole == pytest.approx(sum(own), abs=1e-4)
    assert len({scored for scored, _ in answers.loglikelihood([("1 ", "2"), ("1", " 2")])}) == 1, (
        "also where the blank is a token of its own"
    )
    assert answers.rolling(["the king said to"]) == [pytest.approx(whole, abs=1e-4)]
    with pytest.raises(UserError, match="empty"):
        answers.loglikelihood([("the king", "")])


def test_greedy_is_said_of_what_the_model_would_write() -> None:
    answers = Likelihoods(Planted(knows(GOOD)), tokenizer())
    assert [greedy for _, greedy in answers.loglikelihood([("a small", " bird sang"), ("a small", " river")])] == [True, False]


def test_a_text_longer_than_the_context_counts_every_token_once() -> None:
    tokens = len(tokenizer().encode(GOOD))
    assert tokens > 10
    for context in (1, 3, 7, tokens, 50):
        (found,) = Likelihoods(Planted(guess, sequence_len=context), tokenizer()).rolling([GOOD])
        assert found == pytest.approx(-tokens * math.log(tokenizer().vocab_size), rel=1e-5)
    full, narrow = (Likelihoods(model(sequence_len=length), tokenizer()).rolling([GOOD])[0] for length in (64, 8))
    assert full != narrow and abs(full - narrow) < abs(full)
    assert Likelihoods(model(), tokenizer()).rolling([""]) == [0.0]


def test_generation_ends_before_a_stop_text_and_at_its_limit() -> None:
    answers = Likelihoods(model(sequence_len=32), tokenizer())
    (free,) = answers.generate_until([("the king", {"max_gen_toks": 6, "until": []})])
    stop = free[2:4]
    (stopped,) = answers.generate_until([("the king", {"max_gen_toks": 6, "until": [stop]})])
    assert stopped == free[: free.index(stop)] and free == answers.generate_until([("the king", {"max_gen_toks": 6})])[0]
    (long,) = answers.generate_until([("the king said " * 30, {"max_gen_toks": 6})])
    assert isinstance(long, str)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="lm-eval is not installed.*pip install"):
        evaluate(Planted(guess), ["lm_eval"], EvaluationSetting(tokenizer=tokenizer(), lm_eval_tasks=("any",)))


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{target}"
{more}
"""


@needs_harness
@pytest.mark.timeout(120)
def test_a_task_of_the_harness_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    rows = [("a small", "bird", "river"), ("near the", "river", "bird"), ("and nobody", "why", "knew")]
    data.write_text("".join(json.dumps({"context": c, "options": [a, b], "gold": 0, "text": GOOD}) + "\n" for c, a, b in rows))
    kinds = {
        "own_choice": ("multiple_choice", "{{gold}}", 'doc_to_choice: "{{options}}"\nmetric_list: [{metric: acc}]'),
        "own_rolling": ("loglikelihood_rolling", "{{text}}", "metric_list: [{metric: bits_per_byte}]"),
        "own_answer": (
            "generate_until",
            "{{options[0]}}",
            'generation_kwargs: {until: [" "], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]',
        ),
    }
    for name, (kind, target, more) in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, target=target, more=more))
    known = Planted(knows(GOOD))
    setting = EvaluationSetting(tokenizer=tokenizer(), lm_eval_tasks=("own_choice", "own_rolling"), lm_eval_dir=str(tmp_path))
    found = evaluate_in_detail(known, ["lm_eval"], setting)["lm_eval"]
    assert found.values["accuracy"] == pytest.approx(2 / 3), "the third right answer is the one that the model does not say"
    guessed = evaluate_in_detail(Planted(guess), ["lm_eval"], setting)["lm_eval"].details["tasks"]["own_rolling"]["bits_per_byte,none"]
    wanted = len(tokenizer().encode(GOOD)) * math.log2(tokenizer().vocab_size) / len(GOOD.encode())
    assert guessed == pytest.approx(wanted, rel=1e-4)
    spoken = EvaluationSetting(tokenizer=tokenizer(), lm_eval_tasks=("own_answer",), lm_eval_dir=str(tmp_path))
    answered = evaluate_in_detail(model(), ["lm_eval"], spoken)["lm_eval"]
    assert "exact_match,none" in answered.details["tasks"]["own_answer"] and answered.values["accuracy"] is None
    tasks = sys.modules["lm_eval.tasks"]
    own = tasks.TaskManager  # reading all of the harness's own task files takes a quarter of a minute
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path=None, **_: own(include_path=include_path, include_defaults=False))
    with pytest.raises(UserError, match="no task of lm-eval"):
        evaluate(known, ["lm_eval"], dataclasses.replace(setting, lm_eval_tasks=("unheard_of",)))
