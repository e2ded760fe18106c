"""The suite: every evaluation by name, metrics that are complete, None with a notice where one does not apply."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bio_inspired_nanochat.checkpoint import save_checkpoint
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.data.corpus import write_corpus
from bio_inspired_nanochat.data.source import open_corpus
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation import diversity, experts
from bio_inspired_nanochat.evaluation.diversity import distinct, repetition
from bio_inspired_nanochat.evaluation.likelihood import Part, fitted, score
from bio_inspired_nanochat.evaluation.memory import measure
from bio_inspired_nanochat.evaluation.report import SuiteConfig
from bio_inspired_nanochat.evaluation.suite import EVALUATIONS, EvaluationSetting, evaluate, evaluate_in_detail
from bio_inspired_nanochat.structural.neuroscore import gini
from bio_inspired_nanochat.tasks.memory import Recall
from scripts import eval_suite
from tests.contract import make_model
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import Planted, guess, text
from tests.training.tiny import corpus

SMALL = {"tokens": 64, "rows": 1, "samples": 2, "sample_tokens": 8, "draws": 2}


def talker(kind: str = "default", **changes):
    return make_model(kind, vocab_size=tokenizer().vocab_size, bos_token_id=tokenizer().bos_id, **changes)


def test_where_the_text_ends_nothing_is_measured_on_padding(tmp_path) -> None:
    """Five rows of text, in batches that it fills and in batches that it does not."""
    words = ("the king said to his old friend that a small bird sang near the river " * 40).split()
    held_out = [" ".join(words[start : start + 47]) for start in range(0, 282, 47)]
    write_corpus(tmp_path / "corpus", [("the king", False), *((one, True) for one in held_out)], shard_chars=1000)
    setting = EvaluationSetting(tokenizer=tokenizer(), source=open_corpus(tmp_path / "corpus"), samples=16, sample_tokens=16)
    model = talker("default", num_experts=4)
    found = {size: evaluate_in_detail(model, ["diversity", "experts"], replace(setting, batch_size=size)) for size in (1, 4, 16)}
    count = found[1]["diversity"].details["continuations"]
    assert 2 <= count < 16 and all("not 16" in "".join(one["diversity"].notices) for one in found.values())
    for name in ("diversity", "experts"):
        texts = [{key: value for key, value in one[name].values.items() if name == "experts" or "text" in key} for one in found.values()]
        assert texts[1] == pytest.approx(texts[0]) and texts[2] == pytest.approx(texts[0])


@pytest.mark.parametrize("kind", ["vanilla", "default", "experts"])
def test_all_metrics_are_named_and_what_does_not_apply_is_none(kind: str, capsys: pytest.CaptureFixture) -> None:
    model = talker("default", num_experts=4) if kind == "experts" else talker(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    setting = EvaluationSetting(tokenizer=tokenizer(), source=text(), **SMALL)
    found = evaluate(model, list(EVALUATIONS), setting)
    assert list(found) == [f"{name}.{metric.name}" for name, one in EVALUATIONS.items() for metric in one.metrics]
    assert all(value is None or math.isfinite(value) for value in found.values())
    have = {name.split(".")[0] for name, value in found.items() if value is not None}
    assert have == {"bpb", "calibration", "diversity"} | ({"experts"} if kind == "experts" else set())
    said = capsys.readouterr().out
    assert all(f"notice: {name}" in said for name in ("copy", "needle", "memory", "core", "pairs", "lm_eval"))
    assert found == evaluate(model, list(EVALUATIONS), setting), "twice the same numbers"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and not model.training


def test_without_text_and_tokenizer_nothing_is_made_up() -> None:
    assert set(evaluate(talker(), list(EVALUATIONS), EvaluationSetting(**SMALL)).values()) == {None}


def test_unknown_names_and_foreign_tokenizers_are_one_line() -> None:
    with pytest.raises(UserError, match="did you mean 'needle'"):
        evaluate(talker(), ["bpb", "needel"], EvaluationSetting())
    with pytest.raises(UserError, match="more than the model's vocab_size=50"):
        evaluate(make_model("vanilla"), ["calibration"], EvaluationSetting(tokenizer=tokenizer(), source=text()))
    with pytest.raises(UserError, match="draws"):
        EvaluationSetting(draws=1)


def test_a_number_that_is_not_finite_is_none_with_a_notice() -> None:
    model = talker()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    found = evaluate_in_detail(model, ["calibration"], EvaluationSetting(tokenizer=tokenizer(), source=text(), **SMALL))["calibration"]
    assert found.values["ece"] is None and "not finite" in found.notices[-1]


def test_memory_tasks_are_measured_on_models_of_their_own() -> None:
    task = Recall(distance=8)
    model = make_model("default", vocab_size=task.vocab_size, sequence_len=task.length)
    found = evaluate(model, ["memory"], EvaluationSetting(memory=(task,), memory_rows=16, seed=3))
    own = measure(model, task, 16, 3, 8)
    assert (found["memory.recall_accuracy"], found["memory.recall_loss"]) == (own.accuracy, own.loss)
    assert found["memory.binding_accuracy"] is None


# --- likelihoods -------------------------------------------------------------------------------------------------------------------


def test_padding_and_batches_change_no_likelihood() -> None:
    model = talker(sequence_len=32)
    rows = [list(range(1, 4)), list(range(5, 25)), list(range(30, 41))]
    parts = [Part(row, 2, len(row) - place) for place, row in enumerate(rows)]
    together, alone = score(model, parts, 3), score(model, parts, 1)
    for part, a, b in zip(parts, together, alone, strict=True):
        logs = model.logits(torch.tensor([part.ids])).log_softmax(-1)[0]
        wanted = [-logs[place - 1, part.ids[place]].item() for place in range(part.start, part.stop)]
        torch.testing.assert_close(a.losses, torch.tensor(wanted, dtype=torch.double), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.losses, b.losses, atol=1e-5, rtol=1e-5)
    for bad in (Part([1, 2], 0, 2), Part([1, 2], 1, 3), Part([1, 2], 1, 1), Part([0] * 34, 1, 34)):
        with pytest.raises(UserError, match="out of bounds|does not fit"):
            score(model, [bad])


def test_a_row_that_is_too_long_keeps_its_first_token_and_its_end() -> None:
    assert fitted([9, 1, 2, 3, 4, 5], 4, context=3) == Part([9, 3, 4, 5], 2, 4)
    assert fitted([9, 1, 2], 1, context=3) == Part([9, 1, 2], 1, 3)
    assert fitted([9, 1, 2, 3, 4, 5], 1, context=3) == Part([9, 3, 4, 5], 1, 4), "a part too long by itself keeps its end"


# --- diversity and experts ---------------------------------------------------------------------------------------------------------


def test_repetition_and_different_grams_are_counted() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2, 3, 4]], 1) == 4 / 8
    assert distinct([[1, 2, 1, 2], [1, 2, 3, 4]], 2) == 4 / 6  # 12 21 23 34
    assert repetition([[5] * 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], 4) == pytest.approx((6 / 7 + 0) / 2)
    assert repetition([[1, 2, 1, 2, 1, 2, 1]], 4) == pytest.approx(1 - 2 / 4)
    with pytest.raises(UserError, match="n=4"):
        distinct([[1, 2]], 4)


def test_a_model_that_repeats_itself_is_told_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = EvaluationSetting(tokenizer=tokenizer(), source=text(), samples=3, sample_tokens=40, batch_size=2)
    honest = evaluate(talker("vanilla"), ["diversity"], setting)
    loop = [7, 8, 9, 10]
    monkeypatch.setattr(
        diversity, "generate_batch", lambda _, prompts, length, *a, **k: ([loop[i % 4]] * len(prompts) for i in range(length))
    )
    found = evaluate(talker("vanilla"), ["diversity"], setting)
    assert found["diversity.repetition_4"] == pytest.approx(1 - 4 / 37) and found["diversity.distinct_4"] == pytest.approx(4 / (3 * 37))
    gap = found["diversity.repetition_4"] - found["diversity.text_repetition_4"]
    assert found["diversity.repetition_gap"] == pytest.approx(gap) and gap > 0.5 > honest["diversity.repetition_gap"]
    assert all(found[name] == honest[name] for name in found if ".text_" in name), "held-out text is the same for every model"


def test_experts_that_starve_are_dead_and_equal_ones_are_even() -> None:
    model = talker("default", num_experts=4)
    (layer, *_), idx = model.experts(), torch.randint(0, 200, (2, 32))
    (route, *_) = model.run(idx, routing=True).routing
    alive = layer.accounts.alive
    load = torch.zeros_like(route.load)
    load[alive] = torch.tensor([4.0, 0, 0, 0])
    inputs = torch.zeros_like(route.inputs)
    inputs[alive] = torch.nn.functional.one_hot(torch.arange(4), inputs.shape[1]).float()
    common = torch.nn.functional.one_hot(torch.tensor(0), inputs.shape[1]).float()
    one = experts.layer_health(layer, [route._replace(load=load, inputs=inputs, common=common)])
    assert (one["gini"], one["dead"], one["specialization"]) == (pytest.approx(0.75), 0.75, pytest.approx(0))
    load[alive] = 1.0
    even = experts.layer_health(layer, [route._replace(load=load, inputs=inputs, common=common)] * 2)
    assert (even["gini"], even["dead"], even["specialization"]) == (pytest.approx(0, abs=1e-9), 0, pytest.approx(0.75))
    setting = EvaluationSetting(tokenizer=tokenizer(), source=text(), **SMALL)
    found = evaluate_in_detail(model, ["experts"], setting)["experts"]
    assert found.values["gini"] == pytest.approx(sum(gini(torch.tensor(one["load"])) for one in found.details["layers"]) / 2)


# --- the script --------------------------------------------------------------------------------------------------------------------


def record(capsys: pytest.CaptureFixture, *flags: str) -> dict:
    eval_suite.main(["--device=cpu", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def checkpoint(tmp_path) -> str:
    model = talker()
    meta = {"model_config": to_dict(model.config), "train_config": {"data_dir": str(corpus())}, "kind": "base"}
    return str(save_checkpoint(tmp_path / "run", 1, model.state_dict(), meta, files={"tokenizer.json": tokenizer().to_json().encode()}))


def test_the_script_runs_what_is_asked_and_complains_in_one_line(checkpoint: str, tmp_path, capsys: pytest.CaptureFixture) -> None:
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    found = record(capsys, f"--checkpoint={checkpoint}", *small)
    assert found["metrics"]["bpb.bpb"] > 0 and found["metrics"]["copy.gain_256"] is None and found["notices"]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.jsonl").write_text('{"sentence_good": "the king", "sentence_bad": "king the"}\n')
    found = record(capsys, f"--checkpoint={checkpoint}", "--tasks=pairs", f"--pairs_dir={tmp_path / 'pairs'}")
    assert list(found["metrics"]) == ["pairs.accuracy"] and found["details"]["pairs"]["files"]["a"]["pairs"] == 1
    for flags, complaint in (
        (["--tasks=bbp"], "did you mean 'bpb'"),
        (["--tasks=bpb,bpb"], "twice"),
        (["--pairs_dir=nowhere"], "--pairs_dir='nowhere' does not exist"),
    ):
        with pytest.raises(SystemExit):
            eval_suite.main([f"--checkpoint={checkpoint}", *flags])
        err = capsys.readouterr().err
        assert complaint in err and err.count("\n") == 1


def test_auto_takes_what_there_is_a_reason_for() -> None:
    assert SuiteConfig().chosen(experts=False) == ["bpb", "copy", "needle", "calibration", "diversity"]
    assert SuiteConfig(eval_bundle_url="x").chosen(experts=True)[-2:] == ["experts", "core"]
    assert "memory" not in SuiteConfig(tasks="all").chosen(experts=True) and SuiteConfig(tasks="core, bpb").chosen(False) == ["core", "bpb"]
    assert Planted(guess).experts() == []
