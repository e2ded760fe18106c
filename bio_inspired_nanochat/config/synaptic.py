"""SynapticConfig: every constant of a synapse, with bounds, unit and meaning.

A knob of a learned quantity is its value at birth; from there each head learns its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bio_inspired_nanochat.config.knobs import knob, validate
from bio_inspired_nanochat.errors import UserError, nearest


@dataclass(frozen=True)
class SynapticConfig:
    """Constants of the presynaptic terminal. Times are in tokens; rates are per token."""

    tick: int = knob(8, "tokens per tick: synaptic state is constant within a tick and advances at its end", lo=1, hi=1024, unit="tokens")
    presyn: bool = knob(True, "presynaptic terminals: calcium, release, depletion and refill bias the attention logits", off=False)
    barrier: str = knob(
        "gated",
        "septin barrier, a learned penalty on distance: none, linear (a slope per head) or gated (a forgetting gate per head and token)",
        choices=("none", "linear", "gated"),
        off="none",
    )
    barrier_strength: float = knob(1.0, "strength s_B of the barrier at birth; learned per head, never negative", lo=0.0, hi=4.0, off=0.0)
    lambda_loge: float = knob(
        0.1, "gain g_f of the log release probability at birth; learned per head, with either sign", lo=-4.0, hi=4.0, off=0.0
    )
    drive: str = knob(
        "phi",
        "calcium drive of a logit: phi (quadratic from -1 to 1, linear above, nothing below) or softplus",
        choices=("phi", "softplus"),
    )
    theta: float = knob(1.0, "drive threshold theta on the attention logit", lo=-2.0, hi=2.5, unit="logit")
    tau_c: float = knob(48.0, "calcium decay: how long a terminal stays excited after use", lo=1.0, hi=4096.0, log=True, unit="tokens")
    tau_rrp: float = knob(96.0, "vesicle refill: recovery time of the readily releasable pool", lo=1.0, hi=4096.0, log=True, unit="tokens")
    alpha_ca: float = knob(0.072, "calcium influx per token and unit of drive", lo=0.001, hi=2.0, log=True, unit="1/token")
    syt_fast_kd: float = knob(0.4, "half-activation calcium of the fast sensor Syt1", lo=0.02, hi=20.0, log=True, unit="calcium")
    syt_slow_kd: float = knob(3.0, "half-activation calcium of the slow sensor Syt7", lo=0.02, hi=20.0, log=True, unit="calcium")
    syt_mix: float = knob(0.7, "share w of the fast sensor in the release probability; 1 leaves a single sensor", lo=0.05, hi=1.0, off=1.0)
    syt_gain: float = knob(3.0, "slope a of the release probability against sensor activation", lo=0.05, hi=12.0, log=True)
    release_bias: float = knob(-1.0, "bias b0 of the release probability: its logit at rest", lo=-6.0, hi=3.0)
    release_rate: float = knob(
        0.031,
        "vesicle use u: pool fraction released per token at probability 1 and unit drive",
        lo=0.0005,
        hi=1.0,
        log=True,
        unit="1/token",
    )
    beta_max: float = knob(8.0, "smooth limit of the synaptic bias; 0 sets no limit", lo=0.0, hi=64.0, off=0.0, unit="logit")
    epsilon: float = knob(1e-4, "floor inside the logarithm of the vesicle pool", lo=1e-6, hi=0.1, log=True)

    def __post_init__(self) -> None:
        validate(self, prefix="syn_cfg.")

    @classmethod
    def preset(cls, name: str) -> SynapticConfig:
        """A named configuration: one of `PRESETS`. Raises UserError for an unknown name."""
        if name not in PRESETS:
            raise UserError(f"syn_preset={name!r} is not valid: one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return dataclasses.replace(cls(), **PRESETS[name])

    @property
    def active(self) -> bool:
        """Whether any mechanism that changes the attention logits is on."""
        return self.presyn or self.barrier != "none"


PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "core": {"barrier": "none"},
    "barrier": {"presyn": False},
    "off": {"presyn": False, "barrier": "none"},
    "pilot": {"tick": 16, "barrier": "none", "drive": "softplus", "theta": 2.0, "syt_fast_kd": 1.0, "syt_mix": 1.0, "beta_max": 0.0},
}
