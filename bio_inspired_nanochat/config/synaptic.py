"""SynapticConfig: every constant of a synapse, with bounds, unit and meaning.

A knob of a learned quantity is its value at birth; from there each head learns its own.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bio_inspired_nanochat.config.experts import ExpertConfig
from bio_inspired_nanochat.config.knobs import from_dict, knob, validate
from bio_inspired_nanochat.errors import UserError, nearest

FAST_LAYERS = ("q", "k", "v", "o", "mlp_in", "mlp_out")  # the projections of a block that may carry fast weights


@dataclass(frozen=True)
class SynapticConfig(ExpertConfig):
    """Constants of the presynaptic terminal and the postsynaptic density. Times are in tokens; rates are per token."""

    tick: int = knob(16, "tokens per tick: synaptic state is constant within a tick and advances at its end", lo=1, hi=1024, unit="tokens")
    presyn: bool = knob(True, "presynaptic terminals: calcium, release, depletion and refill bias the attention logits", off=False)
    barrier: str = knob(
        "gated",
        "septin barrier, a learned penalty on distance: none, linear (a slope per head) or gated (a forgetting gate per head and token)",
        choices=("none", "linear", "gated"),
        off="none",
        analogue="septin",
    )
    barrier_strength: float = knob(
        1.0,
        "strength s_B of the barrier at birth; learned per head, never negative",
        lo=0.0,
        hi=4.0,
        off=0.0,
        analogue="septin",
        at_birth=True,
    )
    lambda_loge: float = knob(
        0.1, "gain g_f of the log release probability at birth; learned per head, with either sign", lo=-4.0, hi=4.0, off=0.0, at_birth=True
    )
    drive: str = knob(
        "phi",
        "calcium drive of a logit: phi (quadratic from -1 to 1, linear above, nothing below) or softplus",
        choices=("phi", "softplus"),
    )
    theta: float = knob(
        1.0, "drive threshold theta on the attention logit", lo=-2.0, hi=2.5, unit="logit", analogue="calcium channel threshold"
    )
    tau_c: float = knob(
        48.0,
        "calcium decay: how long a terminal stays excited after use",
        lo=1.0,
        hi=4096.0,
        log=True,
        unit="tokens",
        analogue="calcium decay",
    )
    tau_rrp: float = knob(
        96.0,
        "vesicle refill: recovery time of the readily releasable pool",
        lo=1.0,
        hi=4096.0,
        log=True,
        unit="tokens",
        analogue="vesicle refill, RIM",
    )
    alpha_ca: float = knob(
        0.072, "calcium influx per token and unit of drive", lo=0.001, hi=2.0, log=True, unit="1/token", analogue="calcium influx, RIM"
    )
    syt_fast_kd: float = knob(
        0.4, "half-activation calcium of the fast sensor Syt1", lo=0.02, hi=20.0, log=True, unit="calcium", analogue="Syt1"
    )
    syt_slow_kd: float = knob(
        3.0, "half-activation calcium of the slow sensor Syt7", lo=0.02, hi=20.0, log=True, unit="calcium", analogue="Syt7"
    )
    syt_mix: float = knob(
        0.7,
        "share w of the fast sensor in the release probability; 1 leaves a single sensor",
        lo=0.05,
        hi=1.0,
        off=1.0,
        analogue="Syt1, Syt7",
    )
    syt_gain: float = knob(3.0, "slope a of the release probability against sensor activation", lo=0.05, hi=12.0, log=True, analogue="Syt1")
    release_bias: float = knob(
        -1.0, "bias b0 of the release probability: its logit at rest", lo=-6.0, hi=3.0, analogue="spontaneous release, SV2"
    )
    release_rate: float = knob(
        0.031,
        "vesicle use u: pool fraction released per token at probability 1 and unit drive",
        lo=0.0005,
        hi=1.0,
        log=True,
        unit="1/token",
        analogue="release probability",
    )
    beta_max: float = knob(8.0, "smooth limit of the synaptic bias; 0 sets no limit", lo=0.0, hi=64.0, off=0.0, unit="logit")
    epsilon: float = knob(1e-4, "floor inside the logarithm of a pool", lo=1e-6, hi=0.1, log=True)
    tied_gains: bool = knob(
        False, "one gain lambda for release, pool, priming and amplitude: lambda log(eps + q n) of the background", off=False
    )

    buffer: bool = knob(False, "calcium buffer: binds free calcium and gives it back", off=False, analogue="parvalbumin, calmodulin")
    tau_buf: float = knob(4.0, "unbinding time of the calcium buffer", lo=0.25, hi=1024.0, log=True, unit="tokens")
    buf_kd: float = knob(1.0, "half-saturation calcium of the buffer", lo=0.02, hi=20.0, log=True, unit="calcium")
    doc2_gain: float = knob(
        0.0, "weight of the Doc2 sensor, which also opens the asynchronous release channel", lo=0.0, hi=4.0, off=0.0, analogue="Doc2"
    )
    doc2_threshold: float = knob(0.5, "calcium at which Doc2 is half active", lo=0.02, hi=20.0, log=True, unit="calcium")
    async_rate: float = knob(
        0.02, "asynchronous release: pool fraction per token at full Doc2 activation", lo=0.0005, hi=1.0, log=True, unit="1/token"
    )
    complexin_bias: float = knob(
        0.0, "complexin clamp: lowers the logit of the release probability", lo=0.0, hi=6.0, off=0.0, unit="logit", analogue="complexin"
    )
    clamp: bool = knob(False, "dynamic complexin clamp: calcium lifts it, time restores it", off=False, analogue="complexin")
    tau_clamp: float = knob(24.0, "time in which the complexin clamp returns", lo=1.0, hi=4096.0, log=True, unit="tokens")
    clamp_release: float = knob(
        0.2, "rate at which calcium lifts the complexin clamp", lo=0.001, hi=10.0, log=True, unit="1/(token calcium)"
    )
    priming: bool = knob(False, "SNARE priming: release sites must be primed before they release", off=False, analogue="Munc13, Munc18")
    tau_prime: float = knob(5.0, "SNARE priming time of a free release site", lo=0.25, hi=1024.0, log=True, unit="tokens")
    tau_nsf: float = knob(10.0, "time in which NSF frees a used SNARE complex", lo=0.25, hi=1024.0, log=True, unit="tokens", analogue="NSF")
    prime_use: float = knob(4.0, "primed share used up per released pool", lo=0.05, hi=64.0, log=True)
    priming_gain: float = knob(2.0, "slope of the release logit against the primed share", lo=0.05, hi=12.0, log=True, unit="logit")
    reserve: bool = knob(False, "finite reserve pool: docking draws from it, recycling fills it", off=False, analogue="synapsin, actin")
    reserve_size: float = knob(3.0, "vesicles of a full reserve, in units of the releasable pool", lo=0.1, hi=100.0, log=True, unit="pools")
    mobilisation: float = knob(
        1.0, "how much calcium speeds docking by freeing vesicles of the reserve", lo=0.01, hi=16.0, log=True, analogue="synapsin, actin"
    )
    tau_syn: float = knob(
        64.0, "time in which an emptied vesicle is filled anew", lo=1.0, hi=4096.0, log=True, unit="tokens", analogue="V-ATPase, VGLUT"
    )
    endo_delay: float = knob(
        0.0, "endocytosis: delay between release and recycling", lo=0.0, hi=512.0, off=0.0, unit="tokens", analogue="clathrin, dynamin"
    )
    rec_rate: float = knob(0.5, "share of recovered vesicles that return to the reserve without refilling", lo=0.01, hi=0.99)
    rab: bool = knob(False, "two endosomal stages between endocytosis and refilling", off=False, analogue="Rab5, Rab7")
    tau_rab5: float = knob(16.0, "time in the early endosome", lo=0.25, hi=4096.0, log=True, unit="tokens", analogue="Rab5")
    tau_rab7: float = knob(48.0, "time in the late endosome", lo=0.25, hi=4096.0, log=True, unit="tokens", analogue="Rab7")
    energy: bool = knob(
        False, "energy budget: release, pumping and priming cost it, docking and priming need it", off=False, analogue="ATP"
    )
    tau_energy: float = knob(
        200.0, "recovery time of the energy budget", lo=1.0, hi=4096.0, log=True, unit="tokens", analogue="mitochondria, VDAC"
    )
    energy_cost_rel: float = knob(0.015, "energy spent per released vesicle", lo=0.0, hi=10.0, unit="1/vesicle")
    energy_cost_pump: float = knob(0.015, "energy spent per refilled vesicle", lo=0.0, hi=10.0, unit="1/vesicle", analogue="V-ATPase")
    energy_cost_prime: float = knob(0.005, "energy spent to prime one release site of six", lo=0.0, hi=10.0, unit="1/site", analogue="NSF")
    quantal: bool = knob(False, "quantal amplitude: low energy makes a vesicle weaker", off=False, analogue="VGLUT, SV2")
    quantal_slope: float = knob(4.0, "slope of the quantal amplitude against energy", lo=0.1, hi=32.0, log=True)
    lateral_strength: float = knob(
        0.0,
        "lateral inhibition by the release of older neighbouring keys; learned per head, with either sign",
        lo=-8.0,
        hi=8.0,
        off=0.0,
        analogue="septin",
        at_birth=True,
    )
    lateral_window: int = knob(8, "how many older keys inhibit a key", lo=1, hi=64, unit="keys", analogue="septin")
    stochastic_train_frac: float = knob(
        0.0, "fraction of (tick, head, key) release events drawn at random in training", lo=0.0, hi=1.0, off=0.0, training_only=True
    )
    stochastic_mode: str = knob(
        "normal_reparam",
        "how release is drawn: a normal approximation, or vesicle by vesicle with a relaxed or a straight-through gradient",
        choices=("normal_reparam", "gumbel_sigmoid_ste", "straight_through"),
        training_only=True,
    )
    stochastic_tau: float = knob(
        1.0, "temperature of the relaxed gradient of gumbel_sigmoid_ste", lo=0.05, hi=20.0, log=True, training_only=True
    )
    stochastic_count_cap: int = knob(8, "vesicles per token and event in stochastic release", lo=1, hi=64, training_only=True)
    genome: str = knob(
        "direct",
        "how kinetics are learned: directly per head, from a small vector per head with a shared decoder, or from 16 proteins",
        choices=("direct", "xi", "proteins"),
    )
    xi_dim: int = knob(4, "length of the genome vector of genome=xi", lo=1, hi=64)
    aux_energy: float = knob(
        0.0, "weight of the loss on terminals whose energy is below one half", lo=0.0, hi=100.0, off=0.0, training_only=True
    )
    aux_pool: float = knob(0.0, "weight of the loss on pools below a quarter of full", lo=0.0, hi=100.0, off=0.0, training_only=True)

    hebb: str = knob(
        "off",
        "fast weights, a memory that a sequence writes while it is read: off, hebb (adds) or delta (corrects what it recalls)",
        choices=("off", "hebb", "delta"),
        off="off",
        analogue="long-term potentiation",
    )
    fast_layers: tuple[str, ...] = knob(("mlp_in",), "projections of a block that carry fast weights", choices=FAST_LAYERS)
    rank_eligibility: int = knob(16, "modes r of the fast weights: r x r values per sequence and projection", lo=1, hi=1024, unit="modes")
    rho_elig: float = knob(
        0.998,
        "share of the fast weights that a token leaves, at birth; hebb spreads its modes from 16 to 4096 tokens instead",
        lo=0.8,
        hi=0.9999,
        analogue="eligibility trace",
    )
    hebb_rate: float = knob(
        2.0, "write strength eta_0 with all gates open; the product of the gates is limited to 1", lo=0.01, hi=16.0, log=True
    )
    camkii_gain: float = knob(1.5, "how much CaMKII opens the write gate", lo=0.0, hi=16.0, off=0.0, unit="logit", analogue="CaMKII")
    tau_camkii: float = knob(
        64.0, "relaxation time of CaMKII", lo=4.0, hi=4096.0, log=True, unit="tokens", analogue="CaMKII dephosphorylation"
    )
    camkii_latch: bool = knob(
        False, "CaMKII excites itself and PP1 holds it down: a bistable switch in place of a leaky integrator", off=False, analogue="CaMKII"
    )
    camkii_half: float = knob(
        0.5, "calcium that activates CaMKII half, in the latch", lo=0.05, hi=4.0, log=True, unit="calcium", analogue="calmodulin"
    )
    latch_gain: float = knob(
        6.0,
        "self-excitation of CaMKII in the latch; below 2 it holds nothing without calcium, what 32 tokens of calcium 1 have set it holds from about 4.4 on",
        lo=0.0,
        hi=32.0,
        analogue="CaMKII",
    )
    pp1_gain: float = knob(1.0, "how much PP1 closes the write gate", lo=0.0, hi=16.0, off=0.0, unit="logit", analogue="PP1")
    tau_pp1: float = knob(32.0, "relaxation time of PP1", lo=4.0, hi=4096.0, log=True, unit="tokens", analogue="PP1")
    pp1_half: float = knob(
        0.2, "calcium that activates PP1 half: lower than CaMKII's", lo=0.02, hi=2.0, log=True, unit="calcium", analogue="calcineurin"
    )
    bdnf_gamma: float = knob(
        0.0, "how much past activity (BDNF) raises the write strength: a factor 1 + gamma D", lo=0.0, hi=16.0, off=0.0, analogue="BDNF"
    )
    tau_bdnf: float = knob(512.0, "averaging time of BDNF", lo=4.0, hi=65536.0, log=True, unit="tokens", analogue="BDNF")
    camkii_read: float = knob(
        0.0,
        "kappa: how much CaMKII opens the read gate; learned, with either sign",
        lo=-16.0,
        hi=16.0,
        off=0.0,
        unit="logit",
        analogue="CaMKII",
    )
    psd95_slots: float = knob(
        0.0,
        "receptor slots of a mode: the most that it can answer, times 1 + CaMKII; 0 sets no limit",
        lo=0.0,
        hi=64.0,
        off=0.0,
        analogue="PSD-95",
    )
    fast_init: bool = knob(False, "the fast weights of a new sequence are learned, not zero", off=False)
    extra: tuple[str, ...] = knob((), "mechanisms of your own that are on, from the files of NANOCHAT_MECHANISMS", off=())

    SECTIONS: ClassVar = {
        "tick": "terminals",
        "buffer": "parts",
        "stochastic_train_frac": "randomness",
        "genome": "genome",
        "aux_energy": "losses",
        "hebb": "memory",
        "extra": "extensions",
        "router_identity": "routing",
        "bank_gain": "accounts",
        "split_health_min": "lifecycle",
    }  # of --help and of the tables, by their first knobs

    def __post_init__(self) -> None:
        validate(self, prefix="syn_cfg.")
        if self.hebb != "off" and not self.fast_layers:
            raise UserError(f"syn_cfg.fast_layers is empty while hebb={self.hebb}: name at least one of {', '.join(FAST_LAYERS)}")
        if len(set(self.fast_layers)) < len(self.fast_layers):
            raise UserError(f"syn_cfg.fast_layers={','.join(self.fast_layers)} names a projection twice: name each once")

    @classmethod
    def preset(cls, name: str) -> SynapticConfig:
        """A named configuration: one of `PRESETS`, or a preset file (`NAME.json`, see `read_preset`). UserError for anything else."""
        if name.endswith(".json"):
            return read_preset(Path(name).expanduser())
        if name not in PRESETS:
            raise UserError(f"syn_preset={name!r} is not valid: one of {', '.join(PRESETS)}, or a .json file{nearest(name, PRESETS)}")
        return dataclasses.replace(cls(), **PRESETS[name])

    @property
    def active(self) -> bool:
        """Whether anything of a synapse is on."""
        return self.in_attention or self.hebb != "off"

    @property
    def in_attention(self) -> bool:
        """Whether any mechanism that changes the attention logits is on."""
        return self.presyn or self.barrier != "none"


def read_preset(path: Path) -> SynapticConfig:
    """The configuration of a preset file: a JSON object with `syn_cfg`, the fields that differ from the default preset.

    Other entries of the object say where it comes from and are not read. Raises UserError for a file that is missing or no such object,
    unknown fields and values out of bounds.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"syn_preset={str(path)!r} cannot be read ({error.strerror}): give a preset file or one of {', '.join(PRESETS)}"
        ) from None
    except ValueError:
        raise UserError(f"syn_preset={str(path)!r} is not JSON: give a file that `tune_bio_params best` wrote") from None
    if not isinstance(found, dict) or not isinstance(found.get("syn_cfg"), dict):
        raise UserError(f"syn_preset={str(path)!r} has no object syn_cfg: give a file that `tune_bio_params best` wrote")
    return from_dict(SynapticConfig, found["syn_cfg"], prefix="syn_cfg.")


PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "core": {"barrier": "none"},
    "barrier": {"presyn": False},
    "off": {
        "presyn": False,
        "barrier": "none",
        "router_identity": False,
        "expert_plasticity": False,
        "bank_gain": 0.0,
        "balance_rate": 0.0,
        "router_contrastive_push": 0.0,
        "router_contrastive_pull": 0.0,
    },
    "pilot": {"tick": 16, "barrier": "none", "drive": "softplus", "theta": 2.0, "syt_fast_kd": 1.0, "syt_mix": 1.0, "beta_max": 0.0},
    "memory": {"hebb": "delta"},
    "full": {
        "buffer": True,
        "doc2_gain": 0.1,
        "complexin_bias": 0.5,
        "clamp": True,
        "priming": True,
        "reserve": True,
        "endo_delay": 24.0,
        "rab": True,
        "energy": True,
        "quantal": True,
        "lateral_strength": 0.1,
        "stochastic_train_frac": 0.12,
    },
    "seed": {
        "barrier": "linear",
        "tau_c": 4.0,
        "tau_rrp": 40.0,
        "alpha_ca": 0.25,
        "syt_fast_kd": 0.4,
        "syt_gain": 3.0,
        "release_bias": 2.0,  # with the clamp of 2 and a primed terminal: probability one half at rest
        "complexin_bias": 2.0,
        "release_rate": 0.1,
        "lambda_loge": 0.1,
        "tied_gains": True,
        "buffer": True,
        "priming": True,
        "energy": True,
        "quantal": True,
    },
}
