"""`bench_train`: one optimizer step of a vanilla and a synaptic model, side by side on one device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.benchmarks.records import (
    check_record_path,
    free_unused,
    keep_record,
    place,
    quartiles,
    short,
    shown,
)
from bio_inspired_nanochat.benchmarks.timing import Competitor, Course, Spread, interleave, paired_ratio, warm_up
from bio_inspired_nanochat.common import pick_device, progress, say, table
from bio_inspired_nanochat.config import PRESETS, SynapticConfig, device_knob, dtype_knob, knob, knobs_of, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import TrainConfig, guards
from bio_inspired_nanochat.training.clock import wait_for_device
from bio_inspired_nanochat.training.config import COMPILE
from bio_inspired_nanochat.training.hardware import GIB, peak_flops
from bio_inspired_nanochat.training.pace import Rehearsal
from bio_inspired_nanochat.training.plan import Plan, make_plan

CPU_ROWS = 2
_CPU_SIZES = {"depth": 2, "max_seq_len": 128, "vocab_size": 512}
_TRAINING = knobs_of(TrainConfig)
COLUMNS = ("model", "step ms", "quartiles", "forward+backward ms", "tok/s", "MFU", "memory GiB", "parameters", "steps")


@dataclass(frozen=True)
class TrainingSizes:
    """The size of all models of a benchmark: where it is auto that of training on CUDA, and small elsewhere."""

    depth: int | None = knob(None, "number of layers, the width follows; auto is 12 on CUDA, 2 elsewhere", lo=1, hi=256)
    n_embd: int | None = knob(None, "width; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is 64, from depth 16 on 128", lo=2, hi=1024)
    max_seq_len: int | None = knob(None, "context length; auto is that of training on CUDA, 128 elsewhere", lo=2, hi=1 << 20, unit="tokens")
    vocab_size: int | None = knob(None, "token ids; auto is that of training on CUDA, 512 elsewhere", lo=266, hi=1 << 20)

    def sizes(self, device: torch.device) -> dict[str, Any]:
        """These fields as those of a TrainConfig for this device; None is what training itself would take."""
        found = {name: getattr(self, name) for name in knobs_of(TrainingSizes)}
        small = {} if device.type == "cuda" else _CPU_SIZES
        return {name: small.get(name) if value is None else value for name, value in found.items()}


@dataclass(frozen=True)
class BenchTrainConfig(TrainingSizes):
    """Two models of one size and batch."""

    device_batch_size: int | None = knob(
        None, "rows of one forward; auto is what the synaptic model fits on CUDA, 2 elsewhere", lo=1, hi=1 << 20, aliases=("batch_size",)
    )
    total_batch_size: int | None = knob(None, "tokens of one optimizer step; auto is one forward", lo=1, hi=1 << 40, unit="tokens")
    num_experts: int = knob(
        0, "also train a synaptic model with so many experts; the MLPs of the others then have as many hidden units as a token visits",
        lo=0, hi=4096, off=0,
    )  # fmt: skip
    moe_top_k: int = knob(2, "experts that a token visits beside the shared one", lo=1, hi=64)
    expert_ratio: int = knob(2, "hidden units of an expert, as a multiple of the width (the shared one has 4)", lo=1, hi=64)
    backend: str = knob("auto", "execution of the attention operators", choices=_TRAINING["backend"].choices)
    syn_preset: str = knob("default", "named set of synaptic constants that --syn_cfg.* flags then change", choices=tuple(PRESETS))
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")
    compile: str = knob("auto", "torch.compile of all; auto is 1 on CUDA, 0 elsewhere", choices=("auto", *COMPILE))
    graph: str = knob("auto", _TRAINING["graph"].doc, choices=_TRAINING["graph"].choices)
    seconds: float = knob(60.0, "time for the timed steps; compiling comes before", lo=0.0, hi=1e6, unit="seconds")
    device: str = device_knob()
    dtype: str = dtype_knob()
    seed: int = knob(0, "seed of weights and tokens", lo=0, hi=(1 << 63) - 1)
    json: str | None = knob(None, "file for the record, besides the last line of the output", none="none")

    def __post_init__(self) -> None:
        validate(self)
        if not self.syn_cfg.active:
            raise UserError(
                "the synaptic model has no terminals, no barrier and no fast weights: there is nothing to compare; use --syn_preset=default"
            )


class Trainee(Rehearsal):
    """A model in training that also knows how much memory it takes."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        super().__init__(plan, device)

    def memory(self) -> int:
        """Bytes that training this model takes, without the other model, after a first step.

        On CUDA the allocator's peak over one step; elsewhere the tensors that a step needs at once: weights, gradients,
        optimizer state and what the forward keeps for the backward.
        """
        if self.device.type == "cuda":
            self.gradients.release()  # what a replay reads and writes was allocated when it was recorded
            wait_for_device(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) - self.before
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            probes = None if self.keeper is None else self.keeper.probes()
            self.engine(self.idx, self.targets, 0, 0, probes)
        entries = self.optimizer.state_dict()["parameters"].values()
        states = sum(value.nbytes for entry in entries for value in entry["state"].values() if isinstance(value, Tensor))
        return sum(2 * parameter.nbytes for parameter in self.model.parameters()) + states + sum(saved.values())


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """Train the models in turns, print the table; returns the script's last line. Raises UserError for what cannot be."""
    check_record_path(config.json)
    device = pick_device(config.device)
    plans = make_plans(config, device)
    where = place(device, plans[0].dtype)
    for plan in plans:
        say(plan.describe()[0])
    say(plans[0].describe()[1].partition(";")[0])
    try:
        with guards.out_of_memory_as_user_error(plans[0].rows, lambda: max(1, plans[0].rows // 2), where["device"]):
            courses, memory = _measure(plans, device, config.seconds)
    finally:
        free_unused(device)
    record = where | _ratios(courses, memory)
    record["memory_of"] = (
        "allocator peak" if device.type == "cuda" else "weights, gradients, optimizer state, tensors kept for the backward"
    )
    results = [_result(plan, course, held, device) for plan, course, held in zip(plans, courses, memory, strict=True)]
    table(COLUMNS, [_cells(name, result, course) for name, result, course in zip(_names(plans), results, courses, strict=True)])
    say(f"synaptic / vanilla: step {record['step_ratio']}, memory {record['memory_ratio']}")
    if len(plans) > 2:
        say(f"experts / synaptic: step {record['experts_step_ratio']}, memory {record['experts_memory_ratio']}")
    model, plan = plans[1].model, plans[1]
    record |= {"depth": model.n_layer, "n_embd": model.n_embd, "head_dim": model.head_dim, "max_seq_len": model.sequence_len}
    record |= {"vocab_size": model.vocab_size, "device_batch_size": plan.rows, "total_batch_size": plan.tokens_per_step}
    record |= {"tick": model.syn_cfg.tick, "syn_preset": config.syn_preset, "backend": model.backend}
    record |= {
        "compiled": plan.config.compile != "0",
        "compile": plan.config.compile,
        "graph": plan.config.graph == "1",
        **dict(zip(_names(plans), results, strict=True)),
    }
    keep_record(config.json, record)
    return record


def _names(plans: Sequence[Plan]) -> tuple[str, ...]:
    return ("vanilla", "synaptic", "experts")[: len(plans)]


def make_plans(config: BenchTrainConfig, device: torch.device) -> tuple[Plan, ...]:
    """The vanilla and the synaptic plan, and the one with experts where it is asked for, of one batch."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("backend", "compile", "graph", "dtype", "seed")}
    base = TrainConfig(**config.sizes(device), **shared, num_iterations=1)
    synaptic = dataclasses.replace(base, synapses=True, syn_preset=config.syn_preset, syn_cfg=config.syn_cfg)
    rows = config.device_batch_size or (make_plan(synaptic, device, 1).rows if device.type == "cuda" else CPU_ROWS)
    length = make_plan(dataclasses.replace(base, device_batch_size=1), device, 1).model.sequence_len
    batch: dict[str, Any] = {"device_batch_size": rows, "total_batch_size": config.total_batch_size or rows * length}
    models = [base, synaptic]
    if config.num_experts:
        routed: dict[str, Any] = {name: getattr(config, name) for name in ("num_experts", "moe_top_k", "expert_ratio")}
        wide: dict[str, Any] = {"mlp_ratio": base.mlp_ratio + config.moe_top_k * config.expert_ratio}
        models = [*(dataclasses.replace(one, **wide) for one in models), dataclasses.replace(synaptic, **routed)]
    return tuple(make_plan(dataclasses.replace(one, **batch), device, 1) for one in models)


def _measure(plans: Sequence[Plan], device: torch.device, seconds: float) -> tuple[list[Course], list[int]]:
    """Courses of the steps and bytes of all models, which are on the device together."""
    if device.type == "cuda":  # the workspaces of matrix products belong to neither model
        for dtype in {torch.float32, plans[0].dtype}:
            square = torch.ones(256, 256, device=device, dtype=dtype)
            (square @ square).sum().item()
    trainees, memory = [], []
    for name, plan in zip(_names(plans), plans, strict=True):
        began = time.perf_counter()
        trainee = Trainee(plan, device)
        warm_up(Competitor(trainee.step), device)
        memory.append(trainee.memory())
        trainees.append(trainee)
        say(f"{name}: ready after {time.perf_counter() - began:.1f} s")
    competitors = {name: Competitor(trainee.step) for name, trainee in zip(_names(plans), trainees, strict=True)}
    with progress(None, "all models", "steps") as bar:
        courses = interleave(competitors, device, seconds, on_round=bar.advance)
    return list(courses.values()), memory


def _ratios(courses: Sequence[Course], memory: Sequence[int]) -> dict[str, Any]:
    """Synaptic over vanilla, and experts over synaptic."""
    vanilla, synaptic = courses[:2]
    step, work = (paired_ratio(a, b) for a, b in ((synaptic.total(), vanilla.total()), (synaptic.phase(0), vanilla.phase(0))))
    assert step is not None and work is not None
    record: dict[str, Any] = {"step_ratio": short(step.median), "step_ratio_quartiles": quartiles(step)}
    record |= {"memory_ratio": short(memory[1] / memory[0])}
    record |= {"forward_backward_ratio": short(work.median), "forward_backward_ratio_quartiles": quartiles(work)}
    if len(courses) > 2:
        routed = paired_ratio(courses[2].total(), synaptic.total())
        assert routed is not None
        record |= {"experts_step_ratio": short(routed.median), "experts_step_ratio_quartiles": quartiles(routed)}
        record |= {"experts_memory_ratio": short(memory[2] / memory[1])}
    return record


def _result(plan: Plan, course: Course, memory: int, device: torch.device) -> dict[str, Any]:
    """One model for the record: milliseconds, tokens per second, share of the peak operations, GiB."""
    step, work = course.spread(), course.spread(0)
    speed = plan.tokens_per_step / step.median
    peak = peak_flops(device, plan.dtype)
    return {
        "step_ms": short(step.median * 1e3),
        "step_ms_quartiles": quartiles(step.times(1e3)),
        "forward_backward_ms": short(work.median * 1e3),
        "tok_per_s": short(speed),
        "mfu": None if peak is None else short(plan.flops_per_token * speed / peak),
        "memory_gib": short(memory / GIB),
        "params": plan.params,
        "steps": step.count,
    }


def _cells(name: str, result: dict[str, Any], course: Course) -> tuple:
    columns = ("forward_backward_ms", "tok_per_s", "mfu", "memory_gib", "params", "steps")
    spread: Spread = course.spread().times(1e3)
    return (name, result["step_ms"], shown(spread), *map(result.get, columns))
