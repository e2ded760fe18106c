"""OptimConfig: learning rates by role, schedules and decay."""

from __future__ import annotations

from dataclasses import dataclass

from bio_inspired_nanochat.config.knobs import knob, validate


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer. Learning rates are those of a model of width 768 at batches of 2^19 tokens; `groups` scales them."""

    matrix_lr: float = knob(0.02, "Muon learning rate of the matrices", lo=0.0, hi=1.0, off=0.0, log=True)
    fast_lr: float = knob(0.004, "Muon learning rate of the matrices into and out of fast weights", lo=0.0, hi=1.0, off=0.0, log=True)
    embed_lr: float = knob(0.3, "learning rate of the token embedding", lo=0.0, hi=10.0, off=0.0, log=True)
    value_embed_lr: float = knob(0.15, "learning rate of the value embeddings", lo=0.0, hi=10.0, off=0.0, log=True)
    head_lr: float = knob(0.008, "learning rate of the output head", lo=0.0, hi=1.0, off=0.0, log=True)
    scalar_lr: float = knob(0.1, "learning rate of scalars and gains of the residual stream", lo=0.0, hi=10.0, off=0.0, log=True)
    gate_lr: float = knob(0.005, "learning rate of gates", lo=0.0, hi=1.0, off=0.0, log=True)
    router_lr: float = knob(0.003, "learning rate of the routers of experts", lo=0.0, hi=1.0, off=0.0, log=True)
    kinetics_lr: float = knob(0.01, "learning rate of the synapses' kinetics and gains", lo=0.0, hi=1.0, off=0.0, log=True)
    weight_decay: float = knob(0.1, "decay of the matrices, times their learning rate per step", lo=0.0, hi=10.0, off=0.0)
    cautious: bool = knob(True, "decay an entry only where the step shrinks it too", off=False)
    momentum: float = knob(0.95, "Muon momentum after its warm-up", lo=0.0, hi=0.999)
    momentum_start: float = knob(0.85, "Muon momentum at step 0", lo=0.0, hi=0.999)
    momentum_warmup: int = knob(300, "steps to full momentum; at most a third of the run", lo=0, hi=100000, off=0, unit="steps")
    grad_clip: float = knob(0.0, "global gradient norm above which gradients are scaled down; 0 never", lo=0.0, hi=1e6, off=0.0)
    warmup_steps: int = knob(40, "steps of learning rate warm-up; at most a tenth of the run", lo=0, hi=1000000, off=0, unit="steps")
    decay_frac: float = knob(0.65, "share of the run in which the learning rate falls linearly", lo=0.0, hi=1.0, off=0.0)
    final_lr_frac: float = knob(0.05, "learning rate at the end of the run, as a fraction", lo=0.0, hi=1.0)

    def __post_init__(self) -> None:
        validate(self, prefix="optim.")
