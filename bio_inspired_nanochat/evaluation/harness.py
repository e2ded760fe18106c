"""lm-eval (EleutherAI's harness, the extra `lm-eval`) for a model of this project.

`Likelihoods` answers the three kinds of requests on plain texts and does not know the package; `harness_model` makes the harness's model
of it. The harness is imported only here and only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.engine import context_length, generate_batch
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.evaluation.likelihood import Part, fitted, score
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, NotApplicable, check_tokenizer
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.tokenizer import Tokenizer

INSTALL = "python -m pip install -c constraints.txt lm-eval==0.4.13 (the extra lm-eval of this project)"
NEW_TOKENS = 256  # of an answer whose task sets no limit
METRICS = (Metric("accuracy", "", "higher", "mean of `acc` over the tasks of lm-eval that have it"),)


class Likelihoods:
    """The three kinds of requests of the harness, on texts. Every row begins with BOS."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        check_tokenizer(model, tokenizer)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation after its context, and whether greedy decoding would write it.

        A context too long for the model loses its beginning. Blanks at a context's end count to the continuation, where tokens of
        words begin. Raises UserError for an empty continuation.
        """
        parts = []
        for context, continuation in pairs:
            if not continuation:
                raise UserError("a continuation is empty: a task of lm-eval must ask for some text")
            kept = context.rstrip()
            head = self.tokenizer.encode(kept, bos=True)
            row = self.tokenizer.encode(context + continuation, bos=True)
            start = len(head) if row[: len(head)] == head else _common(head, row)
            parts.append(fitted(row, min(start, len(row) - 1), self.model.config.sequence_len))
        found = score(self.model, parts, self.batch_size)
        return [(-one.losses.sum().item(), bool(one.greedy.all())) for one in found]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability in nats of each whole text. One too long is read in windows that fill the context; every token counts once."""
        context = self.model.config.sequence_len
        owner, parts = [], []
        for place, text in enumerate(texts):
            ids = self.tokenizer.encode(text, bos=True)
            for start in range(1, len(ids), context):
                stop = min(start + context, len(ids))
                first = max(0, stop - context - 1)
                owner.append(place)
                parts.append(Part(ids[first:stop], start - first, stop - first))
        sums = [0.0] * len(texts)
        for place, one in zip(owner, score(self.model, parts, self.batch_size), strict=True):
            sums[place] -= one.losses.sum().item()
        return sums

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each context up to a stop text, which is left out. Greedy unless `do_sample` asks for `temperature`."""
        return [self._continue(context, options) for context, options in requests]

    def _continue(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        room = context_length(self.model)
        budget = min(int(options.get("max_gen_toks") or NEW_TOKENS), max(1, room // 2))
        ids = self.tokenizer.encode(context, bos=True)
        excess = len(ids) + budget - room
        if excess > 0:
            ids = [ids[0], *ids[1 + excess :]]
        made: list[int] = []
        with evaluating(self.model):
            for (token,) in generate_batch(self.model, [ids], budget, temperature, stop_ids=[self.tokenizer.bos_id]):
                made += [] if token is None else [token]
                text = self.tokenizer.decode(made)
                places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
                if places:
                    return text[: min(places)]
        return self.tokenizer.decode(made)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal, at least the BOS."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return max(1, length)


def harness_model(model: GPT, tokenizer: Tokenizer, batch_size: int = 8) -> Any:
    """An `lm_eval.api.model.LM` that answers with this model. Raises UserError when lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): {INSTALL}") from None
    answers = Likelihoods(model, tokenizer, batch_size)

    class HarnessModel(LM):
        """Unpacks the harness's requests."""

        tokenizer_name = f"bio_inspired_nanochat-{tokenizer.sha256[:16]}"

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return answers.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return answers.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return answers.generate_until([request.args for request in requests])

    return HarnessModel()


def run_harness(model: GPT, setting: EvaluationSetting) -> Found:
    """Run `setting.lm_eval_tasks`, among those of `setting.lm_eval_dir` too; all of the harness's numbers are in `details`.

    Raises UserError for a task that does not exist or whose data cannot be had, and when lm-eval is not installed.
    """
    if not setting.lm_eval_tasks:
        raise NotApplicable("lm_eval needs names of tasks: give --lm_eval_tasks")
    wrapped = harness_model(model, setting.words("lm_eval"), setting.batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = None
    if setting.lm_eval_dir is not None:  # the harness reads its thousands of task files only when one of them is asked for
        folder = str(Path(setting.lm_eval_dir).expanduser())
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(setting.lm_eval_tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folder)
    manager = manager or TaskManager()
    for name in setting.lm_eval_tasks:
        if name not in manager.all_tasks:
            raise UserError(f"lm_eval_tasks={name} is no task of lm-eval: see its list of tasks, or give --lm_eval_dir")
    seeds = {f"{name}_random_seed": setting.seed % (1 << 32) for name in ("numpy", "torch", "fewshot")}
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(setting.lm_eval_tasks),
            task_manager=manager,
            limit=setting.max_per_task or None,
            random_seed=setting.seed,
            log_samples=False,
            bootstrap_iters=0,
            **seeds,
        )
    except OSError as error:
        raise UserError(
            f"lm-eval cannot run {', '.join(setting.lm_eval_tasks)} ({type(error).__name__}: {error}): check its data"
        ) from None
    numbers = {
        name: {key: value for key, value in one.items() if isinstance(value, (int, float))} for name, one in found["results"].items()
    }
    scores = [one["acc,none"] for one in numbers.values() if "acc,none" in one]
    values = {"accuracy": sum(scores) / len(scores) if scores else None}
    return Found(values, {"tasks": numbers}, () if scores else ("lm_eval: none of the tasks reports acc",))
