"""How fast this machine trains a planned model, and how many steps of two models fit into a number of minutes."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.optim import build_optimizer
from bio_inspired_nanochat.training.clock import wait_for_device
from bio_inspired_nanochat.training.config import COMPILE
from bio_inspired_nanochat.training.experts import ExpertKeeper
from bio_inspired_nanochat.training.gradients import WARM_RUNS, Gradients
from bio_inspired_nanochat.training.hardware import GIB, crowded, keep_freed_memory, static_bytes
from bio_inspired_nanochat.training.job import Objective
from bio_inspired_nanochat.training.parallel import Engine, shard
from bio_inspired_nanochat.training.plan import Plan
from bio_inspired_nanochat.training.rounds import ROUNDS
from bio_inspired_nanochat.training.run import build_model

FEWEST_STEPS = 4
USED_SHARE = 0.85  # of the time for training; the rest is for what a measurement cannot foresee
EVAL_SHARE = 0.12  # of the time, for all evaluations
_OPTIMISTIC_FLOPS = {"cuda": 2e15, "mps": 3e13}  # more than any such device does; a CPU below
_CPU_FLOPS = 2e11  # per core
_WARM_STEPS = {"cuda": WARM_RUNS + 2}


@dataclass(frozen=True)
class Pace:
    """Measured seconds: of one optimizer step, of evaluating one token, and of the first steps (compilation included)."""

    step: float
    eval_token: float
    first: float


@dataclass(frozen=True)
class Budget:
    """steps of each model, seconds for training both (evaluations during training included), validation tokens of every evaluation."""

    steps: int
    seconds: float
    eval_tokens: int


def check_feasible(plans: Sequence[Plan], device: torch.device, seconds: float) -> None:
    """UserError for models that no machine of this kind could train in time or hold, before anything large is allocated."""
    needed = sum(FEWEST_STEPS * plan.tokens_per_step * plan.flops_per_token for plan in plans)
    speed = _OPTIMISTIC_FLOPS.get(device.type, _CPU_FLOPS * (os.cpu_count() or 1))
    depth = plans[0].model.n_layer
    if needed > speed * seconds:
        raise UserError(
            f"depth={depth} is too large: {FEWEST_STEPS} steps of both models need {needed:.1e} operations, more than {device.type} does in "
            f"{seconds / 60:.3g} minutes; use a smaller --depth or more --minutes"
        )
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if max(static_bytes(plan.params) for plan in plans) > memory:
        need = max(plan.memory_gib() for plan in plans)
        raise UserError(
            f"depth={depth} is too large: it needs about {need:.0f} GiB of {memory / GIB:.0f} GiB memory; use a smaller --depth"
        )


def measure(plan: Plan, device: torch.device, seconds: float, choose_threads: bool = False) -> Pace:
    """Train a throw-away model of `plan` on random tokens for about `seconds`, after its first steps.

    choose_threads: first set the number of CPU threads, for the whole process, to the faster one of all cores and half of them.
    """
    try:
        return _measure(plan, device, seconds, choose_threads)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Rehearsal:
    """A throw-away model in training on one batch of random tokens: what a step of `plan` takes. Collective when it has several processes."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        keep_freed_memory(device)
        self.model = shard(build_model(plan, device), plan, device)
        self.optimizer = build_optimizer(
            *(self.model.named_parameters(), self.model.param_roles(), plan.config.optim),
            n_embd=plan.model.n_embd,
            batch_tokens=plan.tokens_per_step,
        )
        if (options := COMPILE[plan.config.compile]) is not None:
            self.model.compile_regions(options=options)
        self.engine = Engine(Objective(self.model, plan.config.seed), plan, device)
        self.keeper = ExpertKeeper(self.model, self.optimizer, 0, plan.config.seed) if plan.model.num_experts else None
        self.gradients = Gradients(self.engine, self.keeper, plan)
        generator = torch.Generator().manual_seed(plan.config.seed)
        tokens = torch.randint(plan.model.vocab_size, (plan.rows, plan.model.sequence_len + 1), generator=generator).to(device)
        self.idx, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self, mark: Callable[[], object] = lambda: None) -> None:
        """One optimizer step; `mark` is called between the last backward and the optimizer."""
        self.optimizer.schedule(0, 1)
        for micro in range(self.plan.accumulation):
            self.gradients(self.idx, self.targets, micro, 1 / self.plan.accumulation)
        self.engine.finish()
        mark()
        self.optimizer.clip_grad_norm()
        self.optimizer.step()
        if self.keeper is not None:
            self.keeper.after_step(1, self.idx, self.targets)
        self.optimizer.zero_grad()


def _measure(plan: Plan, device: torch.device, seconds: float, choose_threads: bool) -> Pace:
    rehearsal = Rehearsal(plan, device)
    model, step, idx, targets = rehearsal.model, rehearsal.step, rehearsal.idx, rehearsal.targets
    first, _ = _timed(step, device, _WARM_STEPS.get(device.type, 1), math.inf)
    if choose_threads and (first < 2 * seconds or crowded(device)):
        _choose_threads(step, device)
    training, steps = _timed(step, device, 50, seconds)
    rehearsal.gradients.release()
    with evaluating(model):
        _timed(lambda: model.token_losses(idx, targets), device, 1, math.inf)
        evaluation, passes = _timed(lambda: model.token_losses(idx, targets), device, 5, seconds / 2)
    return Pace(training / steps, evaluation / passes / idx.numel(), first)


def _timed(work: Callable[[], None | Tensor], device: torch.device, most: int, seconds: float) -> tuple[float, int]:
    """Seconds and number of runs: `most` of them, or fewer when `seconds` are over, at least one."""
    wait_for_device(device)
    began = time.perf_counter()
    for count in range(1, most + 1):
        work()
        if seconds < math.inf:
            wait_for_device(device)
            if time.perf_counter() - began >= seconds:
                break
    wait_for_device(device)
    return time.perf_counter() - began, count


def _choose_threads(step: Callable[[], None], device: torch.device) -> None:
    """Take all threads or half of them, whichever takes the better of two steps. OMP_NUM_THREADS decides where it is set."""
    most = torch.get_num_threads()
    if device.type != "cpu" or most < 2 or os.environ.get("OMP_NUM_THREADS"):
        return
    best: dict[int, float] = {}
    for threads in (most, most // 2):
        torch.set_num_threads(threads)
        best[threads] = min(_timed(step, device, 1, math.inf)[0] for _ in range(2))
    torch.set_num_threads(min(best, key=best.__getitem__))


def make_budget(seconds: float, reserve: float, paces: Sequence[Pace], batch_tokens: int, most_steps: int, val_tokens: int) -> Budget:
    """How much both models can train in `seconds`, evaluations included, when `reserve` seconds are kept for what follows.

    paces: of the vanilla and the synaptic model; batch_tokens: the grain of an evaluation; most_steps, val_tokens: never more. At
    least FEWEST_STEPS and one batch of validation, even where that takes longer.
    """
    left = max(0.0, seconds - reserve)
    # Each model is evaluated once more after training, the synaptic one also with its gains at zero.
    after = paces[0].eval_token + 2 * paces[1].eval_token
    during = len(ROUNDS) * (paces[0].eval_token + paces[1].eval_token)
    batches = int(min(val_tokens, EVAL_SHARE * left / (during + after))) // batch_tokens
    eval_tokens = max(1, batches) * batch_tokens
    training = max(0.0, left - eval_tokens * after)
    steps = int((USED_SHARE * training - eval_tokens * during) / sum(pace.step for pace in paces))
    return Budget(min(max(FEWEST_STEPS, steps), most_steps), training, eval_tokens)
