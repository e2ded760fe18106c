"""The evaluations of one trained model, by name, behind one function.

    evaluate(model, ["bpb", "calibration"], EvaluationSetting(tokenizer=..., source=...))  ->  {"bpb.bpb": 1.21, "calibration.ece": 0.02, ...}

Everything is a function of the model, the setting and its seed, and the same for vanilla and synaptic models. A metric that does not
apply to a model is None, with a notice that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bio_inspired_nanochat.common import say
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.evaluation import core, diversity, experts, harness, longrange, pairs, uncertainty
from bio_inspired_nanochat.evaluation.bpb import bits_per_byte, evaluating
from bio_inspired_nanochat.evaluation.memory import measure
from bio_inspired_nanochat.evaluation.setting import Evaluation, EvaluationSetting, Found, Metric, NotApplicable, check_tokenizer
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tasks.memory import TASKS

__all__ = ["EVALUATIONS", "Evaluation", "EvaluationSetting", "Found", "Metric", "evaluate", "evaluate_in_detail"]


def _bpb(model: GPT, setting: EvaluationSetting) -> Found:
    tokenizer, source = setting.text("bpb")
    check_tokenizer(model, tokenizer)
    length = model.config.sequence_len
    rows = -(-setting.tokens // length)
    size = min(rows, setting.batch_size)
    loader = source.loader(setting.split, tokenizer, size, length, loop=False)
    try:
        found = bits_per_byte(model, loader, -(-rows // size), tokenizer.token_bytes(), max_rows=rows)
    finally:
        loader.close()
    return Found({"bpb": found.bpb, "nats": found.nats_per_token}, {"tokens": found.tokens, "bytes": found.bytes})


MEMORY_TASKS = tuple(TASKS)


def _memory(model: GPT, setting: EvaluationSetting) -> Found:
    if not setting.memory:
        raise NotApplicable("memory needs the tasks that a model was trained on: give EvaluationSetting(memory=(Recall(),))")
    values: dict[str, float | None] = {f"{task}_{what}": None for task in MEMORY_TASKS for what in ("accuracy", "loss")}
    details = {}
    for task in setting.memory:
        found = measure(model, task, setting.memory_rows, setting.seed, setting.batch_size)
        numbers = {f"{task.name}_accuracy": found.accuracy, f"{task.name}_loss": found.loss}
        details[task.name] = {"chance": task.chance, "by_distance": found.by_distance, "by_group": found.by_group, "answers": found.answers}
        known = task.name in MEMORY_TASKS
        values |= numbers if known else {}
        details[task.name] |= {} if known else numbers
    missing = [task for task in MEMORY_TASKS if task not in {task.name for task in setting.memory}]
    return Found(values, {"tasks": details}, (f"memory: {', '.join(missing)} are not among the model's tasks",) if missing else ())


def _memory_metrics() -> tuple[Metric, ...]:
    found = []
    for task in MEMORY_TASKS:
        found.append(Metric(f"{task}_accuracy", "", "higher", f"share of right answers in the memory task {task}"))
        found.append(Metric(f"{task}_loss", "nats", "lower", f"loss of the answers in the memory task {task}"))
    return tuple(found)


BPB = (
    Metric("bpb", "bits", "lower", "bits per byte of held-out text"),
    Metric("nats", "nats", "lower", "loss per token of held-out text"),
)
EVALUATIONS: dict[str, Evaluation] = {
    found.name: found
    for found in (
        Evaluation("bpb", BPB, "tokenizer and text", _bpb),
        Evaluation("copy", longrange.metrics("copy"), "tokenizer, text and a context of at least a length", longrange.copies),
        Evaluation("needle", longrange.metrics("needle"), "tokenizer, text and a context of at least a length", longrange.needles),
        Evaluation("memory", _memory_metrics(), "memory tasks that the model was trained on", _memory),
        Evaluation("calibration", uncertainty.METRICS, "tokenizer and text; mc_* a model that releases at random", uncertainty.calibrate),
        Evaluation("diversity", diversity.METRICS, "tokenizer and text", diversity.diversity),
        Evaluation("core", core.METRICS, "tokenizer and a CORE bundle: a folder, a zip file or an address", core.core),
        Evaluation("pairs", pairs.METRICS, "tokenizer and a folder of minimal pairs", pairs.minimal_pairs),
        Evaluation("experts", experts.METRICS, "a model with experts, tokenizer and text", experts.health),
        Evaluation("lm_eval", harness.METRICS, "tokenizer, names of tasks and the package lm-eval", harness.run_harness),
    )
}


def evaluate(model: GPT, names: Sequence[str], setting: EvaluationSetting) -> dict[str, float | None]:
    """All metrics of the named evaluations as {"calibration.ece": 0.02}; None where one does not apply, which a notice explains.

    The model's weights and mode stay as they are; it moves to `setting.device` if that is given. Raises UserError for an unknown name
    and for inputs that are wrong (files, a tokenizer of another model).
    """
    return {
        f"{name}.{key}": value for name, found in evaluate_in_detail(model, names, setting).items() for key, value in found.values.items()
    }


def evaluate_in_detail(model: GPT, names: Sequence[str], setting: EvaluationSetting) -> dict[str, Found]:
    """Like `evaluate`, with what each evaluation found beyond its metrics, in the order of `names`.

    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in EVALUATIONS:
            raise UserError(f"evaluation {name!r} does not exist: one of {', '.join(EVALUATIONS)}{nearest(name, EVALUATIONS)}")
    if setting.device is not None:
        model = model.to(setting.device)
    return {name: _run(EVALUATIONS[name], model, setting) for name in names}


def _run(evaluation: Evaluation, model: GPT, setting: EvaluationSetting) -> Found:
    try:
        with evaluating(model):
            found = evaluation.run(model, setting)
    except NotApplicable as error:
        found = Found({}, {}, (str(error),))
    values = {metric.name: _finite(found.values.get(metric.name)) for metric in evaluation.metrics}
    assert set(found.values) <= set(values), f"{evaluation.name} names its metrics"
    wild = [name for name, value in found.values.items() if value is not None and not math.isfinite(value)]
    notices = (*found.notices, f"{evaluation.name}: {', '.join(wild)} are not finite, which makes them None") if wild else found.notices
    for notice in notices:
        say(f"notice: {notice}")
    return Found(values, found.details, notices)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
