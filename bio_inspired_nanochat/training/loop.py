"""The training loop: accumulate, step, and between steps log, save, evaluate and sample, in this order.

Nothing in a step waits for the device. Losses stay on it until the next log line, checkpoint or evaluation; on a CPU, where
reading is free, they are read after every step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import Stopped, bits_per_byte, evaluating
from bio_inspired_nanochat.structural import LineageLog
from bio_inspired_nanochat.training import faults, guards
from bio_inspired_nanochat.training.callbacks import Callback, EvalRecord, FaultRecord, Run, StepRecord
from bio_inspired_nanochat.training.clock import Clock, wait_for_device
from bio_inspired_nanochat.training.config import COMPILE
from bio_inspired_nanochat.training.experts import ExpertKeeper
from bio_inspired_nanochat.training.gradients import Gradients
from bio_inspired_nanochat.training.hardware import fitting_rows, peak_flops, peak_memory_gib, total_memory
from bio_inspired_nanochat.training.job import Job, Objective
from bio_inspired_nanochat.training.looks import Looks
from bio_inspired_nanochat.training.parallel import Engine, held, sleep_on, whole_model
from bio_inspired_nanochat.training.ranks import broadcast, on_rank0
from bio_inspired_nanochat.training.vitals import look

MAX_UNREAD = 100  # steps whose losses may stay on the device when nothing is logged


class Trainer:
    """Runs one Job to its end. `run` is called once."""

    def __init__(self, job: Job, callbacks: Sequence[Callback] = (), signals: guards.StopSignals | None = None) -> None:
        self.job, self.callbacks, self.signals = job, list(callbacks), signals or guards.StopSignals()
        self.config, self.plan, self.progress = job.plan.config, job.plan, job.progress
        self.start_step = job.progress.step
        self.clock = Clock(self.plan.steps - self.start_step)
        self.looks = Looks(self.config.vitals_every, job.rank.first)
        self.checkpoint = job.resumed_from
        self.saved_step = self.start_step if job.resumed_from else -1
        self.first_loss: float | None = None
        self._unread: list[tuple[Tensor, list[str]]] = []  # loss and gradient norm of a step, and its documents
        # Faults are found before the weights are changed where that costs no wait, or where the run goes on after them.
        self._careful = self.config.on_nonfinite != "stop" or job.device.type == "cpu"
        self._last_batch: Tensor | None = None
        self._grad_norm = 0.0
        self._waited = job.loader.wait_seconds
        self._before = job.progress.seconds
        self._began = time.perf_counter()
        self._peak = peak_flops(job.device, self.plan.dtype)
        self.engine = self._engine()
        self.keeper = self._experts()
        self.gradients = Gradients(self.engine, self.keeper, self.plan)

    def _engine(self) -> Engine:
        if (options := COMPILE[self.config.compile]) is not None:
            self.job.model.compile_regions(options=options)
        return Engine(Objective(self.job.model, self.config.seed), self.plan, self.job.device)

    def _experts(self) -> ExpertKeeper | None:
        if not self.job.model.experts():
            return None
        kept = self.job.rank.first and self.job.origin is None
        log = LineageLog(self.job.log_dir) if kept and self.job.log_dir is not None else None
        if log is not None and self.start_step:
            log.resume(self.start_step)
        elif log is not None:
            log.found([self.plan.model.num_experts] * self.plan.model.n_layer)
        every, seed = self.config.splitmerge_every, self.config.seed
        return ExpertKeeper(self.job.model, self.job.optimizer, every, seed, log, self.job.ballots)

    def run(self) -> dict[str, Any]:
        """Train to the end, or to the first reason to stop. Returns the script's last line; see `result`."""
        self._began = time.perf_counter()
        finished = self.start_step >= self.plan.steps
        owed = tuple(self.progress.owed) if not finished else ("eval", "sample")
        run = Run(self.config, self.job.model, self.start_step, self.plan.steps, self.job.log_dir, self.job.tokenizer, owed)
        try:
            self._tell("on_start", run)
            with self.signals, guards.frozen_garbage() as garbage, self._memory_guard():
                try:
                    stopped = self._train(garbage)
                except guards.Interrupted:
                    stopped = self.signals.received
            result = self.result(stopped or self.signals.received)
            self._tell("on_end", result)
            return result
        finally:
            for callback in self.callbacks:
                callback.close()

    def _train(self, garbage: guards.FrozenGarbage) -> str:
        """All steps and what comes after the last; returns why it ended early, or an empty string."""
        if self.config.on_nonfinite == "rollback" and self.progress.step == 0:
            self.saved_step = -1  # imported weights alone are no place to return to
            self._save()
        stopped = self._steps(garbage)
        if self.config.save_every >= 0 and self.progress.step > self.start_step:
            self._save()
        if stopped in ("", "max_minutes") and self._evaluate():
            self._sample()
        return stopped

    # --- steps -----------------------------------------------------------------------------------------------------------------

    def _steps(self, garbage: guards.FrozenGarbage) -> str:
        """Step until the end; returns why it ended early, or an empty string."""
        self.job.model.train()
        self._settle()
        while self.progress.step < self.plan.steps:
            stopped, elapsed = self._reason_to_stop()
            if stopped:
                return stopped
            self.clock.start()
            multiplier = self.job.optimizer.schedule(self._schedule_step(elapsed), self.plan.steps)
            fault = self._update()
            if fault is not None and self._recover(fault):
                continue
            step, last = self.progress.step, self.progress.step == self.plan.steps
            if self.config.consolidate_every > 0 and self._due(self.config.consolidate_every) and fault is None:
                self._consolidate()
            for callback in self.callbacks:
                callback.after_update(step, self.job.model, self.job.optimizer)
            log = self.config.log_every > 0 and (self._due(self.config.log_every) or last or step == self.start_step + 1)
            save = self.config.save_every > 0 and self._due(self.config.save_every)
            watch = self.looks.take(step, last)
            dues = {"eval": self.config.eval_every, "sample": self.config.sample_every}
            self.progress.owed = [name for name, every in dues.items() if every > 0 and self._due(every) and not last]
            if self.clock.steps == self.clock.warm:
                self._read_losses()
                garbage.freeze()
            elif log or save or self.progress.owed or watch or last or self._careful or len(self._unread) >= MAX_UNREAD:
                self._read_losses()
            if log and self.progress.recent:
                self._log(multiplier)
            if watch:
                self._look()
            if save:
                self._save()
            self._settle()
        return ""

    def _settle(self) -> None:
        """Evaluate and sample where that is owed at this step; what a signal prevents stays owed, for the run that resumes."""
        for name, pay in (("eval", self._evaluate), ("sample", self._sample)):
            if name in self.progress.owed and not pay():
                return
            self.progress.owed = [other for other in self.progress.owed if other != name]

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _update(self) -> faults.Fault | None:
        """One optimizer step. The gradient is the mean over micro-batches and ranks; the loss stays on the device.

        Returns the fault for which the weights were left alone.
        """
        total: Tensor | None = None
        documents: list[str] = []
        for micro, (idx, targets, share) in enumerate(self.job.batches()):
            idx, targets = self._to_device(idx, targets)
            documents += getattr(self.job.loader, "documents", [])
            loss = self._backward(idx, targets, micro, share)
            total = loss if total is None else total + loss
            self._last_batch = idx
        assert total is not None
        self.engine.finish()
        norm = self.job.optimizer.clip_grad_norm()
        self.progress.step += 1
        self.progress.tokens += self.plan.tokens_per_step
        self.clock.steps += 1
        self._unread.append((torch.stack([total.float(), norm.float()]), documents))
        fault = self._read_losses() if self._careful else None
        if fault is None:
            self.job.optimizer.step()
            if self.keeper is not None:
                self.keeper.after_step(self.progress.step, idx, targets, self.gradients.release)
        elif self.keeper is not None:
            self.keeper.discard()
        self.job.optimizer.zero_grad()
        return fault

    def _backward(self, idx: Tensor, targets: Tensor, micro: int, share: float) -> Tensor:
        """Forward and backward of one micro-batch; its share of the loss (see `Job.batches`). Both may be what the compiler fails at."""
        first_row = (micro * self.job.rank.world + self.job.rank.index) * idx.shape[0]
        try:
            return self.gradients(idx, targets, micro, share, self.progress.step, first_row)
        except RuntimeError as error:
            if self.config.compile != "0" and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = next(iter(str(error).splitlines()), "")[:200]
                raise UserError(f"torch.compile failed ({type(error).__name__}: {reason}): use --compile=0") from error
            raise

    def _to_device(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.job.device.type == "cuda":
            idx, targets = idx.pin_memory(), targets.pin_memory()
        return idx.to(self.job.device, non_blocking=True), targets.to(self.job.device, non_blocking=True)

    def _reason_to_stop(self) -> tuple[str, float]:
        """(why to stop before the next step, agreed seconds in the loop); the same on every rank."""
        if self.config.stop_after and self.start_step < self.plan.steps and self.progress.step >= self.config.stop_after:
            return "stop_after", self._elapsed()
        seconds, received = self._elapsed(), self.signals.received
        up = bool(self.config.max_minutes) and seconds >= 60 * self.config.max_minutes
        code, seconds = guards.agree([guards.INTERRUPTED if received else guards.TIME_IS_UP if up else guards.GO_ON, seconds])
        reasons = {guards.GO_ON: "", guards.TIME_IS_UP: "max_minutes", guards.INTERRUPTED: received or "signal"}
        return reasons[int(code)], seconds

    def _interrupted(self) -> bool:
        """Whether a signal has reached any rank. Collective."""
        return guards.agree([float(bool(self.signals.received))]) != [0.0]

    def _elapsed(self) -> float:
        """Seconds in the loop, those of the processes before this one included."""
        return self._before + time.perf_counter() - self._began

    def _schedule_step(self, seconds: float) -> int:
        """The step that the learning rate is at: further on than the real one where time runs out sooner than steps."""
        if not self.config.max_minutes:
            return self.progress.step
        by_time = int(self.plan.steps * seconds / (60 * self.config.max_minutes))
        return max(self.progress.step, min(self.plan.steps - 1, by_time))

    def _consolidate(self) -> None:
        """Let what the step's last sequences leave in the fast weights join the slow ones. Collective."""
        assert self._last_batch is not None
        self.gradients.release()
        with evaluating(self.job.model):
            change = sleep_on(self.job.model, self._last_batch, self.config.consolidate_strength)
        self._tell("on_consolidate", self.progress.step, change)

    # --- between steps -----------------------------------------------------------------------------------------------------------

    def _read_losses(self) -> faults.Fault | None:
        """Stop the clock and take the losses of the last steps from the device; the first fault among them, on all ranks alike.

        Raises UserError for a fault that ends the run.
        """
        if not self._unread:
            return None
        own = torch.stack([row for row, _ in self._unread])
        rows = own.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(rows)
            rows /= dist.get_world_size()
        values, documents = rows.tolist(), [names for _, names in self._unread]
        self._unread = []
        wait_for_device(self.job.device)
        self.clock.stop()
        for i, (loss, norm) in enumerate(values):
            what = faults.judge(loss, norm, self.progress.recent, self.config.loss_spike)
            if what is not None:
                fault = faults.find(self.progress.step - len(values) + i + 1, what, float(own[i, 0]), documents[i])
                if self.config.on_nonfinite == "stop":
                    raise faults.diverged(fault, self._last_saved())
                return fault
            self.progress.add_losses([loss])
            if self.first_loss is None:
                self.first_loss = loss
            self._grad_norm = norm
        return None

    def _recover(self, fault: faults.Fault) -> bool:
        """Count a fault and leave it behind, or raise UserError when there were too many. Whether steps were undone. Collective."""
        policy, progress, most = self.config.on_nonfinite, self.progress, self.config.max_faults
        progress.faults += 1
        if progress.faults > most:
            raise faults.diverged(fault, self._last_saved(), f"it is fault {progress.faults} of this run, --max_faults={most}")
        undone = policy == "rollback"
        if undone:
            assert self.job.reload is not None and self.checkpoint is not None
            progress.rollbacks += 1
            self.job.reload(self.job, self.checkpoint)
            self.saved_step = progress.step
            self._tell("on_rollback", progress.step)
            if self.keeper is not None:
                self.keeper.rollback(progress.step)
        else:
            progress.skipped += 1
        self._tell("on_fault", FaultRecord(progress.step, fault.step, fault.what, policy, progress.faults, fault.batches))
        return undone

    def _log(self, multiplier: float) -> None:
        """Tell the callbacks where training stands, with rates since the last record."""
        clock, steps = self.clock, max(1, self.clock.lap_steps)
        rate = steps * self.plan.tokens_per_step / max(clock.lap_seconds, 1e-9)
        waited = self.job.loader.wait_seconds
        recent = self.progress.recent[-steps:]
        record = StepRecord(
            step=self.progress.step,
            loss=sum(recent) / len(recent),
            lr=multiplier,
            grad_norm=self._grad_norm,
            tok_per_s=rate,
            mfu=None if self._peak is None else rate * self.plan.flops_per_token / (self._peak * self.plan.world),
            mem_gib=peak_memory_gib(self.job.device),
            wait=min(1.0, (waited - self._waited) / max(clock.lap_seconds, 1e-9)),
            epoch=self.job.loader.epoch,
            tokens=self.progress.tokens,
            seconds_left=self._seconds_left(),
        )
        self._waited = waited
        clock.new_lap()
        self._tell("on_step", record)

    def _seconds_left(self) -> float | None:
        pace = self.clock.seconds_per_step()
        if pace is None:
            return None
        left = pace * (self.plan.steps - self.progress.step)
        return min(left, max(0.0, 60 * self.config.max_minutes - self._elapsed())) if self.config.max_minutes else left

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one. Collective. Never saves weights that are not finite."""
        if self.saved_step == self.progress.step:
            return
        self.signals.relax()
        self._read_losses()
        if not guards.all_finite(held(self.job.model)):
            raise faults.diverged(faults.Fault(self.progress.step, "the weights are not finite", {}), self._last_saved())
        self.progress.seconds = self._elapsed()
        self.checkpoint = self.job.save(self.job)
        self.saved_step = self.progress.step
        self._tell("on_save", self.progress.step, self.checkpoint)

    def _evaluate(self) -> bool:
        """Bits per byte on the validation data; False when a signal ended it. Collective."""
        rows = self.plan.eval_rows()
        if rows == 0:
            return True
        self.gradients.release()
        loader, sizes = self.job.val_loader(), self.job.tokenizer.token_bytes()
        try:
            bpb = bits_per_byte(self.job.model, loader, -(-rows // self.plan.rows), sizes, max_rows=rows, stop=self._interrupted)
        except Stopped:
            return False
        finally:
            if hasattr(loader, "close"):
                loader.close()
        self.progress.val_bpb, self.progress.val_loss = bpb.bpb, bpb.nats_per_token
        self._tell("on_eval", EvalRecord(self.progress.step, bpb.bpb, bpb.nats_per_token, bpb.tokens))
        return True

    def _look(self) -> None:
        """Let the callbacks see what synapses and experts do on the step's last batch, on rank 0. Collective where the model is divided."""
        if not self.callbacks or self._last_batch is None:
            return
        wait_for_device(self.job.device)  # for the steps before, whose time is not the look's
        left_out = self.looks.left_out
        with self.looks.timed():
            model = whole_model(self.job.model)
            if self.job.rank.first:
                seen = look(model, self._last_batch, self.progress.step, self.job.ballots.cast, left_out)
                if seen is not None:
                    self._tell("on_look", seen)

    def _sample(self) -> bool:
        """Let the model continue a few prompts, on rank 0; False when a signal ended it. Collective."""
        if self.config.sample_every <= 0 or not self.callbacks:
            return True
        self.gradients.release()
        model = whole_model(self.job.model)

        def show() -> bool:
            texts = self.job.sample(model, lambda: bool(self.signals.received))
            if texts is not None:
                self._tell("on_sample", self.progress.step, texts)
            return texts is not None

        return broadcast(on_rank0(show))

    # --- the end -----------------------------------------------------------------------------------------------------------------

    def result(self, stopped: str) -> dict[str, Any]:
        """The record that ends the script. final_loss: mean of the last steps (at most 20); first_loss: of this process's first step."""
        seconds, steps = self.clock.timed_seconds, self.clock.timed_steps
        return {
            "final_loss": self.progress.final_loss(),
            "val_bpb": self.progress.val_bpb,
            "val_loss": self.progress.val_loss,
            "first_loss": self.first_loss,
            "tok_per_s": round(steps * self.plan.tokens_per_step / seconds, 1) if seconds else None,
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "params": self.plan.params,
            "checkpoint": self._last_saved(),
            "resumed_from": self.start_step if self.job.resumed_from else None,
            "stopped": stopped or None,
            "seconds": round(time.perf_counter() - self._began, 3),
            "peak_memory_gib": round(peak_memory_gib(self.job.device), 3),
            "device": str(self.job.device),
            "run_name": self.config.run_name,
            "log_dir": None if self.job.log_dir is None else str(self.job.log_dir),
            "skipped_steps": self.progress.skipped,
            "rollbacks": self.progress.rollbacks,
            "looks_left_out": self.looks.left_out_in_all,
            "data": getattr(self.job.loader, "counts", {}),
            "lineage_events": 0 if self.keeper is None else self.keeper.events,
        } | ({} if self.keeper is None else {"experts": self.keeper.living()})

    def _last_saved(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint)

    def _memory_guard(self) -> contextlib.AbstractContextManager[None]:
        def instead() -> str:
            return "--graph=0, which holds less at once" if self.gradients.holds else ""  # the optimizer's need comes on top of a recording

        return guards.out_of_memory_as_user_error(self.plan.rows, self._fitting_rows, str(self.job.device), instead)

    def _fitting_rows(self) -> int:
        """Rows that should fit, after an allocation has failed: at most half as many."""
        half = max(1, self.plan.rows // 2)
        memory = total_memory(self.job.device)
        return half if memory is None else fitting_rows(self.plan.model, self.plan.dtype, self.plan.params, memory, most=half)

    def _tell(self, event: str, *args: Any) -> None:
        if self.job.rank.first:
            for callback in self.callbacks:
                getattr(callback, event)(*args)
