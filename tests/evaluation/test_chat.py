"""The chat evaluation: right is counted as right, chance as chance, and a seed always asks the same."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch

from bio_inspired_nanochat.checkpoint import save_checkpoint
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.data.conversations import CALL, TEXT
from bio_inspired_nanochat.engine import Loaded, Sampling, calculate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.chat import ChatEvalConfig, _prompt, answer_prompts, evaluate_chat, measure, option_likelihoods
from bio_inspired_nanochat.tasks.dialogues import embedded_conversations
from bio_inspired_nanochat.tasks.questions import CHOICE, GENERATIVE, TASKS
from bio_inspired_nanochat.tasks.smalltalk import PROMPTS
from scripts import chat_eval
from tests.engine.speakers import Script, speaker

# --- questions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_the_same_for_a_seed_distinct_and_answered_rightly(name):
    questions = TASKS[name].test(40, 7)
    assert [question.asked for question in questions] == [question.asked for question in TASKS[name].test(40, 7)]
    assert questions != TASKS[name].test(40, 8) and len({question.asked for question in questions}) == 40
    for question in questions:
        assert question.right(question.answer) and not question.right(question.answer + " x")
        for part in question.parts:
            assert part.kind != CALL or calculate(part.text) == question.answer
        if question.options:
            assert question.options[0] == question.answer and len(set(question.options)) == round(1 / TASKS[name].chance)


@pytest.mark.parametrize("name", TASKS)
def test_held_out_questions_are_never_drawn_for_training(name):
    task, rng = TASKS[name], random.Random(1)
    trained = {task.sample(rng, held_out=False).key for _ in range(400)}
    assert trained and not trained & {question.key for question in task.test(100, 0)}


def test_a_sum_is_held_out_together_with_its_commuted_twin():
    rng = random.Random(1)
    trained = {TASKS["arithmetic"].sample(rng, held_out=False).parts[0].text for _ in range(4000)}
    held_out = [question.parts[0].text for question in TASKS["arithmetic"].test(200, 0)]
    twins = {f"{b}{sign}{a}" for a, sign, b in (re.split(r"([+*])", text) for text in held_out if "-" not in text)}
    assert len(twins) > 50 and not twins & trained


def test_embedded_conversations_repeat_and_hold_neither_prompts_nor_held_out_questions():
    train, val = embedded_conversations()
    assert (train, val) == embedded_conversations() and train != embedded_conversations(1)[0]
    said = {turn.parts[0].text for conversation in train for turn in conversation if turn.role == "user"}
    assert not said & set(PROMPTS) and len(set(PROMPTS)) == len(PROMPTS) == 50
    for task in TASKS.values():
        assert not said & {question.asked for question in task.test(100, 0)}


def test_there_are_two_tasks_of_each_kind():
    assert len(GENERATIVE) >= 2 and len(CHOICE) >= 2 and all(task.chance for task in CHOICE)


# --- measuring ---------------------------------------------------------------------------------------------------------------------


def ids_of(loaded: Loaded, question) -> list[int]:
    """The right answer as the model writes it, without what the engine writes."""
    tokenizer, ids = loaded.tokenizer, []
    for part in question.parts:
        if part.kind == CALL:
            ids += [tokenizer.special("<|python_start|>"), *tokenizer.encode(part.text), tokenizer.special("<|python_end|>")]
            result = calculate(part.text)
            ids += [0] * (2 + len(tokenizer.encode(result)))  # forced, whatever the model would say there
        elif part.kind == TEXT:
            ids += tokenizer.encode(part.text)
    return [*ids, tokenizer.special("<|assistant_end|>")]


@pytest.mark.parametrize("name", [task.name for task in GENERATIVE])
@pytest.mark.parametrize("knows", [True, False])
def test_a_model_that_knows_scores_one_and_one_that_does_not_scores_zero(monkeypatch, name, knows):
    loaded = speaker(sequence_len=512)
    questions = TASKS[name].test(3, 0)
    for question in questions:
        says = ids_of(loaded, question) if knows else [*loaded.tokenizer.encode("bird sang"), loaded.tokenizer.special("<|assistant_end|>")]
        script = Script(loaded, says)
        monkeypatch.setattr(TASKS[name].__class__, "test", lambda self, count, seed, question=question: [question])
        script.prompt = len(_prompt(loaded, question.asked))
        found = measure(Loaded(script, loaded.tokenizer, loaded.path, 1, {"kind": "sft"}), TASKS[name], 1, 0)
        assert found["accuracy"] == float(knows)


@pytest.mark.parametrize("kind", ["default", "all_fast"])
def test_likelihood_of_an_option_is_that_of_its_tokens_and_its_end_alone(kind):
    loaded = speaker(kind)
    options = ("the king", "a", "bird sang near")
    for option, found in zip(options, option_likelihoods(loaded, "who", options), strict=True):
        start = _prompt(loaded, "who")
        row = [*start, *loaded.tokenizer.encode(option), loaded.tokenizer.special("<|assistant_end|>")]
        logs = torch.log_softmax(loaded.model(torch.tensor([row]))[0].double(), dim=-1)
        expected = sum(float(logs[place - 1, row[place]]) for place in range(len(start), len(row)))
        assert math.isclose(found, expected, abs_tol=1e-4)


@pytest.mark.parametrize("name", ["larger", "kinds"])
def test_the_place_of_the_right_option_in_the_question_gives_nothing_away(name):
    task, rng, count = TASKS[name], random.Random(2), 2000
    places = []
    for _ in range(count):
        question = task.draw(rng)
        listed = question.asked.split(":")[-1]  # the kind may be named in front of the options
        places.append(sum(listed.index(option) < listed.index(question.answer) for option in question.options[1:]))
    for place in range(round(1 / task.chance)):
        assert abs(places.count(place) / count - task.chance) < 4 * math.sqrt(task.chance * (1 - task.chance) / count)


@pytest.mark.parametrize(("last", "ended"), [("<|assistant_end|>", True), ("<|bos|>", False), ("<|user_start|>", False)])
def test_only_the_end_token_counts_as_an_end(last, ended):
    loaded = speaker(sequence_len=512)
    script = Script(loaded, [5, loaded.tokenizer.special(last)])
    script.prompt = len(_prompt(loaded, "who"))
    (answer,) = answer_prompts(Loaded(script, loaded.tokenizer, loaded.path, 1, {"kind": "sft"}), ["who"], Sampling(0.0), 6)
    assert answer.ended is ended and answer.tokens == (1 if ended else 6)


# --- the script --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> str:
    loaded = speaker(sequence_len=512)
    meta = {"kind": "sft", "model_config": to_dict(loaded.model.config)}
    return str(
        save_checkpoint(tmp_path / "run", 1, loaded.model.state_dict(), meta, files={"tokenizer.json": loaded.tokenizer.to_json().encode()})
    )


def test_the_script_prints_chance_beside_accuracy_and_is_the_same_twice(checkpoint, capsys):
    words = [f"--source={checkpoint}", "--questions=3", "--tasks=copying,larger", "--prompts=2", "--max_tokens=4", "--device=cpu"]
    records = []
    for _ in range(2):
        chat_eval.main(words)
        lines = capsys.readouterr().out.splitlines()
        records.append(json.loads(lines[-1]))
    assert any("chance" in line and "accuracy" in line for line in lines) and any(
        "answers end with the end token" in line for line in lines
    )
    for record in records:
        del record["seconds"]
    assert records[0] == records[1] and set(records[0]["tasks"]) == {"copying", "larger"} and records[0]["prompts"] == 2


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="did you mean 'spelling'"):
        ChatEvalConfig(tasks="speling")


def test_a_base_model_can_be_asked_too(checkpoint, tmp_path):
    loaded = speaker(sequence_len=512)
    files = {"tokenizer.json": loaded.tokenizer.to_json().encode()}
    base = save_checkpoint(tmp_path / "base", 1, loaded.model.state_dict(), {"model_config": to_dict(loaded.model.config)}, files=files)
    record = evaluate_chat(ChatEvalConfig(source=str(base), tasks="copying,kinds", questions=2, prompts=1, max_tokens=3, device="cpu"))
    assert record["kind"] is None and set(record["tasks"]) == {"copying", "kinds"}
