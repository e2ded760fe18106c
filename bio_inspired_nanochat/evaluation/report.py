"""The suite for a checkpoint: chosen evaluations, a table of all their metrics, one record."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from bio_inspired_nanochat.common import pick_device, table
from bio_inspired_nanochat.config import device_knob, knob
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.evaluation.base import opened, text_source
from bio_inspired_nanochat.evaluation.setting import Amounts
from bio_inspired_nanochat.evaluation.suite import EVALUATIONS, EvaluationSetting, evaluate_in_detail

ALWAYS = ("bpb", "copy", "needle", "calibration", "diversity")  # what every language model with its text can be asked
ON_REQUEST = ("experts", "core", "pairs", "lm_eval")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, by what, and where."""

    checkpoint: str | None = knob(None, "checkpoint: a step, a run or a folder of runs; auto is the newest of all runs", path="exists")
    tasks: str = knob(
        "auto",
        f"names of evaluations, separated by commas, or all; auto takes {', '.join(ALWAYS)} and what a flag or the model gives "
        f"a reason for ({', '.join(ON_REQUEST)})",
    )
    data_dir: str | None = knob(None, "folder of parquet shards; auto is what the model was trained on", path="exists")
    dataset: str | None = knob(None, "name of a Hugging Face dataset to use instead", none="none")
    device: str = device_knob()


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(Amounts, Subject):
    """Which evaluations to run on which checkpoint. The fields of the last base come first, so `--help` begins with them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen(experts=True)

    def chosen(self, experts: bool) -> list[str]:
        """The evaluations by name; `experts`: the model has some. Raises UserError for an unknown one."""
        if self.tasks == "all":
            return [name for name in EVALUATIONS if name != "memory"]  # which is for models of integer tasks
        if self.tasks == "auto":
            reasons = {"experts": experts, "core": self.bundle_given, "pairs": self.pairs_dir, "lm_eval": self.lm_eval_tasks}
            return [*ALWAYS, *(name for name in ON_REQUEST if reasons[name])]
        names = [name.strip() for name in self.tasks.split(",")]
        for name in names:
            if name not in EVALUATIONS:
                raise UserError(
                    f"--tasks={self.tasks} has an unknown evaluation {name!r}: one of {', '.join(EVALUATIONS)}{nearest(name, EVALUATIONS)}"
                )
        if len(set(names)) < len(names):
            raise UserError(f"--tasks={self.tasks} names an evaluation twice: name each once")
        return names

    @property
    def bundle_given(self) -> bool:
        """Whether there is a CORE bundle to run."""
        return any((self.eval_bundle_dir, self.eval_bundle_zip, self.eval_bundle_url))


def evaluate_suite(config: SuiteConfig) -> dict[str, Any]:
    """Evaluate one checkpoint; returns the script's last line. Raises UserError for missing checkpoints and data."""
    began = time.perf_counter()
    device = pick_device(config.device)
    loaded, record = opened(config.checkpoint, device)
    model = loaded.model
    source = text_source(config.data_dir, config.dataset, loaded.meta)
    amounts = {field.name: getattr(config, field.name) for field in dataclasses.fields(Amounts)}
    setting = EvaluationSetting(tokenizer=loaded.tokenizer, source=source, device=device, **amounts)
    names = config.chosen(experts=bool(model.experts()))
    found = evaluate_in_detail(model, names, setting)
    rows = []
    for name, one in found.items():
        metrics = {metric.name: metric for metric in EVALUATIONS[name].metrics}
        for key, value in one.values.items():
            better = "reference" if metrics[key].reference else metrics[key].better
            if value is not None:
                rows.append([f"{name}.{key}", value, metrics[key].unit or "-", better, metrics[key].meaning])
    table(("metric", "value", "unit", "better", "meaning"), rows)
    return record | {
        "metrics": {f"{name}.{key}": value for name, one in found.items() for key, value in one.values.items()},
        "details": {name: dict(one.details) for name, one in found.items()},
        "notices": [notice for one in found.values() for notice in one.notices],
        "seed": config.seed,
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 3),
    }
