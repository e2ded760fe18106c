"""The plan of a matrix: every run with nothing left open, what it will cost, and the rule by which its differences will count.

All runs of a depth read the same tokens in the same order: the batch, the context and the tokenizer are fixed once for all conditions.
Seeds change the weights and all that is random in a model, not the order of the text. The plan is one JSON file; a digest over the rule,
the conditions and the comparisons goes into every record, so that none of them can change after the runs unnoticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.common import base_dir, pick_device, say, table, write_atomic
from bio_inspired_nanochat.config import from_dict, knob, knobs_of, to_dict, validate
from bio_inspired_nanochat.data import ensure_tokenizer, resolve_data
from bio_inspired_nanochat.errors import UserError, damaged_file
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms
from bio_inspired_nanochat.study.matrix import AUTO, LIFE_CYCLES, PAIR_OF, SETS, Condition, Matrix, Options, build_matrix, subset
from bio_inspired_nanochat.study.statistics import Rule, digest
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.config import fill_defaults
from bio_inspired_nanochat.training.pace import measure
from bio_inspired_nanochat.training.plan import Plan, make_plan, suited_batch

VERSION = 1
TOLERANCE = 0.02  # of a match of parameters or FLOPs
EVALUATIONS = 16  # points of a loss curve
FEWEST_SEEDS = 3
CORE = {"presyn", "slow_sensor", "bias_limit", "barrier_gated", "barrier_linear"}  # what one operator serves on CUDA
# Fields of training that a plan gives to all runs.
SHARED = (
    *("n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "total_batch_size", "eval_tokens"),
    *("data_dir", "tokenizer", "device", "dtype", "compile", "backend"),
)
PLACES = ("data_dir", "tokenizer")  # of a run's training: files of the machine that planned it
RUN_ID = re.compile(r"d\d+-[A-Za-z0-9_.+-]+-s\d+")  # also the name of its folder, so it may not lead elsewhere
_TRAINING = knobs_of(TrainConfig)


def fewest_tokens(depth: int) -> int:
    """Tokens below which a run of that depth enters no table: 8 M to depth 6, 16 M from depth 10, linear between."""
    return int(1e6 * (8 + 2 * (min(max(depth, 6), 10) - 6)))


@dataclass(frozen=True)
class FolderConfig:
    """Report what the runs of a plan have shown: tables, plots, scorecard; which runs are missing or too small."""

    out: str | None = knob(None, "folder of the matrix; auto is study/matrix in the base folder")

    def __post_init__(self) -> None:
        validate(self)

    def folder(self) -> Path:
        """The folder; it need not exist."""
        return base_dir() / "study" / "matrix" if self.out is None else Path(self.out).expanduser()


@dataclass(frozen=True)
class PlanConfig(FolderConfig):
    """Choose conditions, depths and seeds; print the table of runs and what they cost, and write plan.json."""

    sets: tuple[str, ...] = knob(("anchors", "baselines", "add_one", "leave_one"), "groups of conditions", choices=tuple(SETS))
    conditions: tuple[str, ...] = knob((), "conditions of those sets to keep; none given: all")
    mechanisms: tuple[str, ...] = knob((), "mechanisms for add_one, leave_one and beside_default; none given: all of the registry")
    pair_of: tuple[str, ...] = knob(PAIR_OF, "mechanisms for pairs")
    depths: tuple[int, ...] = knob((6,), "depths of the models", lo=1, hi=256)
    seeds: tuple[int, ...] = knob((0, 1, 2), "seeds of weights and random releases", lo=0, hi=1 << 40)
    tokens: int | None = knob(
        None, "training tokens of a run; auto is the least that enters a table: 8 M to depth 6, 16 M from depth 10", lo=1, unit="tokens"
    )
    budget_minutes: float = knob(
        0.0, "time that there is, to say how much of the plan fits; 0 says nothing", lo=0.0, off=0.0, unit="minutes"
    )
    tok_per_s: float = knob(0.0, "speed to reckon with for every run; 0 measures it here", lo=0.0, off=0.0, unit="tokens/s")
    measure_seconds: float = knob(10.0, "time for measuring one kind of model", lo=0.0, hi=3600.0, unit="seconds")
    evaluations: tuple[str, ...] = knob(
        ("copy", "needle", "calibration", "diversity", "experts"), "evaluations of every trained model, where the package has them"
    )
    evaluation_tokens: int = knob(1 << 15, "tokens of text for each of them", lo=1, hi=1 << 40, unit="tokens")
    keep_models: bool = knob(False, "keep a checkpoint of every run", off=False)
    smoke: bool = knob(False, "a test of the machinery: everything it writes is marked, and the least tokens do not apply", off=False)
    n_embd: int | None = knob(None, "width; auto is 64 per layer", lo=8, hi=65536, aliases=("width",))
    head_dim: int | None = knob(None, "size of an attention head; auto is 64, from depth 16 on 128", lo=2, hi=1024)
    max_seq_len: int | None = knob(None, "context length; auto is that of training", lo=2, hi=1 << 20, unit="tokens")
    vocab_size: int | None = knob(None, "token ids; auto is that of training", lo=266, hi=1 << 20)
    device_batch_size: int | None = knob(
        None,
        "rows of one forward of every run; auto is what the largest model fits, as a power of two",
        lo=1,
        hi=1 << 20,
        aliases=("batch_size",),
    )
    total_batch_size: int | None = knob(
        None, "tokens of one optimizer step; auto follows the tokens of a run", lo=1, hi=1 << 40, unit="tokens"
    )
    eval_tokens: int | None = knob(None, "validation tokens; auto is that of training", lo=1, unit="tokens")
    data_dir: str | None = knob(None, "folder of parquet shards; none is the embedded demo corpus", path="exists", none="none")
    tokenizer: str | None = knob(None, "tokenizer file; auto trains one for the data once", path="file")
    device: str = knob("auto", "where to run", choices=_TRAINING["device"].choices)
    dtype: str = knob("auto", "activations", choices=_TRAINING["dtype"].choices)
    compile: str = knob("auto", "torch.compile; auto is 1 on CUDA, 0 elsewhere", choices=_TRAINING["compile"].choices)
    backend: str = knob("auto", "execution of the attention operators", choices=_TRAINING["backend"].choices)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sets", "depths", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={','.join(map(str, values))} must name at least one, and each once")

    def matrix(self) -> Matrix:
        """The conditions and comparisons that the flags choose."""
        matrix = build_matrix(self.sets, Options(self.mechanisms, self.pair_of))
        return subset(matrix, self.conditions) if self.conditions else matrix


@dataclass(frozen=True)
class Cell:
    """A condition at a depth: its training plan for the first seed, and how it was matched, in words."""

    condition: Condition
    depth: int
    plan: Plan
    match: str = ""


def make_matrix_plan(config: PlanConfig) -> dict[str, Any]:
    """Plan, print the table, write plan.json; returns the script's last line. Raises UserError for what cannot be matched, and for another
    plan in a folder that has runs already."""
    matrix, device = config.matrix(), pick_device(config.device)
    source = resolve_data(config.data_dir)
    size = config.vocab_size or fill_defaults(TrainConfig(depth=config.depths[0], data_dir=config.data_dir), device).vocab_size
    assert size is not None
    tokenizer = ensure_tokenizer(source, size, config.tokenizer)
    cells: list[Cell] = []
    for depth in config.depths:
        cells += _Depth(config, matrix, depth, device, (tokenizer.vocab_size, tokenizer.bos_id)).cells()
    rates = _rates(config, cells, device)
    runs = _runs(config, cells, rates)
    record: dict[str, Any] = {
        "version": VERSION,
        "smoke": config.smoke,
        "rule": asdict(Rule()),
        "conditions": {name: {"about": one.about, "changes": one.changes, "match": one.match} for name, one in matrix.conditions.items()},
        "aliases": matrix.aliases,
        "comparisons": [asdict(one) for one in matrix.comparisons],
        "matches": {f"{cell.condition.name} at depth {cell.depth}": cell.match for cell in cells if cell.match},
        "evaluations": list(config.evaluations),
        "evaluation_tokens": config.evaluation_tokens,
        "data": {"fingerprint": source.fingerprint, "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]},
        "runs": runs,
    }
    record["digest"] = plan_digest(record)
    path = _write(config.folder(), record)
    return _describe(config, cells, runs, rates, path)


class _Depth:
    """All conditions at one depth, at one batch and number of steps."""

    def __init__(self, config: PlanConfig, matrix: Matrix, depth: int, device: torch.device, words: tuple[int, int]) -> None:
        self.config, self.matrix, self.depth, self.device, self.words = config, matrix, depth, device, words
        self.tokens = config.tokens or fewest_tokens(depth)
        plans = {name: self.plan(one.changes) for name, one in matrix.conditions.items()}
        first = next(iter(plans.values()))
        total = config.total_batch_size or (suited_batch(self.tokens) if device.type == "cuda" else first.tokens_per_step)
        most = min(*(plan.rows for plan in plans.values()), max(1, total // first.length))
        rows = config.device_batch_size or 1 << (most.bit_length() - 1)
        self.batch = {"device_batch_size": rows, "total_batch_size": max(1, round(total / (rows * first.length))) * rows * first.length}
        self.steps = max(1, -(-self.tokens // self.batch["total_batch_size"]))

    def plan(self, changes: Mapping[str, Any], **more: Any) -> Plan:
        values = {name: getattr(self.config, name) for name in SHARED} | {"depth": self.depth, **changes, **more}
        if values.get("splitmerge_every") == AUTO:
            values["splitmerge_every"] = max(1, getattr(self, "steps", 1) // LIFE_CYCLES)
        steps = values.setdefault("num_iterations", 1 if not hasattr(self, "steps") else self.steps)
        values |= {"eval_every": max(1, steps // EVALUATIONS), "log_every": max(1, steps // 100), "vitals_every": max(1, steps // 8)}
        values |= {"sample_every": 0, "save_every": 0 if self.config.keep_models else -1, "keep_checkpoints": 1}
        return make_plan(from_dict(TrainConfig, values), self.device, 1, *self.words)

    def cells(self) -> list[Cell]:
        found = {name: Cell(one, self.depth, self.plan(one.changes, **self.batch)) for name, one in self.matrix.conditions.items()}
        for name, cell in found.items():
            kind, _, of = cell.condition.match.partition(":")
            if kind:
                target = found[of].plan
                plan = self._same_flops(cell, target) if kind == "flops" else self._same_params(cell, target)
                found[name] = Cell(cell.condition, self.depth, plan, matched(kind, plan, target, of))
        return list(found.values())

    def _same_flops(self, cell: Cell, target: Plan) -> Plan:
        steps = round(self.steps * target.flops_per_token / cell.plan.flops_per_token)
        return self.plan(cell.condition.changes, **self.batch, num_iterations=max(1, steps))

    def _same_params(self, cell: Cell, target: Plan) -> Plan:
        """The plain model if it is near enough, else the width whose parameters come nearest: heads of even sizes up to a third larger."""
        if abs(cell.plan.params / target.params - 1) <= TOLERANCE:
            return cell.plan
        width, heads = cell.plan.model.n_embd, cell.plan.model.n_head
        sizes = [(heads + more, size) for more in range(3) for size in range(2, 2 * cell.plan.model.head_dim, 2)]
        sizes = [(count, size) for count, size in sizes if width < count * size <= 4 * width // 3]
        plans = [self.plan(cell.condition.changes, **self.batch, n_embd=count * size, head_dim=size) for count, size in sizes]
        return min([cell.plan, *plans], key=lambda plan: abs(plan.params - target.params))


def matched(kind: str, plan: Plan, target: Plan, of: str) -> str:
    """How near a match came, in words. Raises UserError when it is farther than TOLERANCE."""
    ours, theirs = (_spent(kind, one) for one in (plan, target))
    if abs(ours / theirs - 1) > TOLERANCE:
        raise UserError(
            f"vanilla cannot be matched to the {kind} of {of}: {ours:.4g} against {theirs:.4g}, more than {TOLERANCE:.0%} apart: "
            "use more tokens, a larger depth or leave the anchors out"
        )
    unit = "parameters" if kind == "params" else "FLOPs in all"
    return f"{ours:.5g} {unit} against {theirs:.5g} of {of} ({ours / theirs - 1:+.2%}): width {plan.model.n_embd}, {plan.steps} steps"


def _spent(kind: str, plan: Plan) -> float:
    return float(plan.params if kind == "params" else plan.flops_per_token * plan.tokens_per_step * plan.steps)


def _kind(cell: Cell) -> str:
    """Models of one kind are reckoned to have one speed."""
    model = cell.plan.model
    experts = " with experts" if model.num_experts else ""
    if not model.synapses:
        return "vanilla" + experts
    on = {name for name in active_mechanisms(model.syn_cfg) if experts or not MECHANISMS[name].experts}
    return ("core" if on <= CORE else "other synapses") + experts


def _rates(config: PlanConfig, cells: list[Cell], device: torch.device) -> dict[str, float]:
    """Tokens per second by depth and kind of model; of a kind the model with the most mechanisms is measured."""
    chosen: dict[str, Cell] = {}
    for cell in cells:
        key, mine = f"{cell.depth} {_kind(cell)}", len(active_mechanisms(cell.plan.model.syn_cfg))
        if key not in chosen or mine > len(active_mechanisms(chosen[key].plan.model.syn_cfg)):
            chosen[key] = cell
    rates = {}
    for key, cell in chosen.items():
        rates[key] = config.tok_per_s or cell.plan.tokens_per_step / measure(cell.plan, device, config.measure_seconds).step
        if not config.tok_per_s:
            say(f"speed of depth {key} ({cell.condition.name}): {rates[key]:,.0f} tokens/s")
    return rates


def _runs(config: PlanConfig, cells: list[Cell], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A record per run. Conditions that come to the same training (a match that needs no change) share their runs."""
    runs: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for seed in config.seeds:
            train = to_dict(dataclasses.replace(cell.plan.config, seed=seed))
            key = digest(train)
            if key in runs:
                runs[key]["conditions"].append(cell.condition.name)
                continue
            tokens = cell.plan.steps * cell.plan.tokens_per_step
            runs[key] = {
                "id": f"d{cell.depth}-{re.sub(r'[^A-Za-z0-9_.+-]', '-', cell.condition.name)}-s{seed}",
                "conditions": [cell.condition.name],
                "depth": cell.depth,
                "seed": seed,
                "tokens": tokens,
                "params": cell.plan.params,
                "flops_per_token": cell.plan.flops_per_token,
                "seconds": round(tokens / rates[f"{cell.depth} {_kind(cell)}"], 1),
                "key": key,
                "train": train | located(train),
            }
    return list(runs.values())


def located(train: Mapping[str, Any]) -> dict[str, Any]:
    """The `PLACES` of a training as absolute paths: its runs find them from whatever folder they are started."""
    return {name: train[name] and os.path.abspath(train[name]) for name in PLACES}


def plan_digest(plan: Mapping[str, Any]) -> str:
    """What must not change once runs have begun: the rule, the conditions and the comparisons. More seeds may join."""
    return digest(*(plan[name] for name in ("version", "rule", "conditions", "comparisons", "smoke")))


def _write(folder: Path, record: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    record = json.loads(json.dumps(record))
    if path.exists() and any(folder.glob("runs/*/record.json")):
        before = read_plan(folder)
        if before["digest"] != record["digest"] or before["data"] != record["data"]:
            raise UserError(f"out={str(folder)!r} has runs of another plan: give another --out, or move that folder away")
    try:
        write_atomic(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out={str(folder)!r} cannot be written ({error.strerror}): give a writable folder") from None
    return path


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan in a folder. Raises UserError when there is none, it is damaged, or its rule, conditions or comparisons were changed."""
    path = folder / "plan.json"
    try:
        text = path.read_bytes()
    except OSError:
        raise UserError(f"out={str(folder)!r} has no plan.json: make one with `python -m scripts.eval_matrix plan --out=...`") from None
    with damaged_file(path, "make the plan anew in another folder"):
        plan = json.loads(text)
        check_plan(plan, path)
    return plan


def check_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for a plan, read from path, of another version or rule, or that is not as it was made; a KeyError, TypeError or
    ValueError, for `damaged_file`, where something is missing or of another form."""
    if plan["version"] != VERSION:
        raise UserError(f"{path} is of version {plan['version']!r}, this is version {VERSION}: make the plan anew in another folder")
    for name in ("data", "matches", "evaluations", "evaluation_tokens"):
        plan[name]
    for run in plan["runs"]:
        if not RUN_ID.fullmatch(run["id"]):
            raise ValueError(f"a run is called {run['id']!r}")
        for name in ("key", "conditions", "depth", "seed", "tokens", "seconds", "flops_per_token", "train"):
            run[name]
    if len({run["id"] for run in plan["runs"]}) < len(plan["runs"]):
        raise ValueError("two runs have one name")
    found = plan_digest(plan)
    if found != plan["digest"]:
        raise UserError(
            f"{path} was changed after it was made (digest {found}, written {plan['digest']}): rule and comparisons are fixed before the runs"
        )
    if plan["rule"] != asdict(Rule()):
        raise UserError(
            f"{path} has another rule than this version of the package, which could not judge by it: use the version that made it"
        )
    for name, own in plan["aliases"].items():
        if own not in plan["conditions"] or (name in plan["conditions"] and own != name):
            raise UserError(f"{path} was changed after it was made ({name} stands for {own}): conditions are fixed before the runs")


def _describe(config: PlanConfig, cells: list[Cell], runs: list[dict[str, Any]], rates: Mapping[str, float], path: Path) -> dict[str, Any]:
    rows = []
    for cell in cells:
        tokens = cell.plan.steps * cell.plan.tokens_per_step
        hours = len(config.seeds) * tokens / rates[f"{cell.depth} {_kind(cell)}"] / 3600
        sizes = (f"{cell.plan.params:,}", f"{cell.plan.flops_per_token:.4g}", f"{tokens:,}", f"{hours:.2f}")
        rows.append((cell.condition.name, cell.depth, *sizes, cell.match or cell.condition.about))
    table(("condition", "depth", "parameters", "FLOPs/token", "tokens", f"hours x {len(config.seeds)} seeds", "what it is"), rows)
    seconds = sum(run["seconds"] for run in runs)
    short = sorted({run["depth"] for run in runs if run["tokens"] < fewest_tokens(run["depth"])})
    if short and not config.smoke:
        say(f"notice: depth {', '.join(map(str, short))}: fewer tokens than the least for a table: the report lists these runs apart")
    if len(config.seeds) < FEWEST_SEEDS:
        say(f"notice: {len(config.seeds)} seeds are fewer than {FEWEST_SEEDS}: nothing of this plan can enter a table")
    if config.budget_minutes:
        done, fitting = 0.0, 0
        for run in runs:
            done += run["seconds"]
            fitting += done <= 60 * config.budget_minutes
        say(f"{fitting} of {len(runs)} runs fit into {config.budget_minutes:g} minutes on one device")
    return {
        "runs": len(runs),
        "conditions": len({cell.condition.name for cell in cells}),
        "tokens": sum(run["tokens"] for run in runs),
        "hours": round(seconds / 3600, 3),
        "tok_per_s": {key: round(rate, 1) for key, rate in rates.items()},
        "measured": not config.tok_per_s,
        "smoke": config.smoke,
        "plan": str(path),
    }
