"""The knobs of routed experts: what a token's route depends on, the account of every expert, and their life cycle."""

from __future__ import annotations

from dataclasses import dataclass

from bio_inspired_nanochat.config.knobs import knob


@dataclass(frozen=True)
class ExpertConfig:
    """Constants of a synaptic mixture of experts; a part of `SynapticConfig` that acts with `num_experts` above 0."""

    # --- the route of a token
    router_identity: bool = knob(
        True, "the cosine of a token's probe with the identity vector of an expert joins its score", off=False, analogue="receptor identity"
    )
    identity_dim: int = knob(32, "length of identity vectors", lo=1, hi=1024)
    identity_gain: float = knob(1.0, "weight of the identity cosine at birth; learned, with either sign", lo=-8.0, hi=8.0, at_birth=True)
    expert_plasticity: bool = knob(
        True, "experts facilitate and tire within a sequence, by the kinetics of a terminal", off=False, analogue="short-term plasticity"
    )
    expert_gain: float = knob(
        0.5, "gain of an expert's log release probability at birth; learned per expert, with either sign", lo=-4.0, hi=4.0, at_birth=True
    )
    expert_depression: float = knob(
        0.0, "gain of an expert's log vesicle pool at birth; learned per expert, with either sign", lo=-4.0, hi=4.0, at_birth=True
    )
    snare_codes: bool = knob(
        False, "the cosine of a token's cargo code with the t-SNARE code of an expert joins its score", off=False, analogue="SNARE, Rab"
    )
    snare_dim: int = knob(16, "length of SNARE codes", lo=1, hi=1024)
    expert_lateral: float = knob(
        0.0,
        "lateral inhibition of an expert by neighbours in identity space; learned, with either sign",
        lo=-8.0,
        hi=8.0,
        off=0.0,
        analogue="septin",
        at_birth=True,
    )
    vesicle_output: bool = knob(
        False, "an expert's output is scaled by the vesicles it releases over those of a rested one", off=False, analogue="quantal release"
    )
    nmda: bool = knob(
        False,
        "slow weight of an expert: its trace over a sequence adds to its score where the token itself asks for it",
        off=False,
        analogue="NMDA receptor",
    )
    tau_nmda: float = knob(
        512.0, "averaging time of the slow weight", lo=4.0, hi=65536.0, log=True, unit="tokens", analogue="NMDA receptor"
    )
    nmda_gain: float = knob(0.5, "weight of the NMDA term at birth; learned, with either sign", lo=-8.0, hi=8.0, at_birth=True)
    # --- the account of an expert
    bank_gain: float = knob(
        0.2, "kappa: what a full account adds to an expert's score, twice over an empty one", lo=0.0, hi=8.0, off=0.0, analogue="ATP"
    )
    bank_rate: float = knob(
        0.005,
        "income of an expert per step at fair demand, and the tax that every step takes",
        lo=0.0,
        hi=0.5,
        off=0.0,
        unit="1/step",
        training_only=True,
        analogue="ATP",
    )
    bank_decay: float = knob(
        0.01, "pull of the account towards one half", lo=1e-4, hi=0.5, log=True, unit="1/step", training_only=True, analogue="ATP"
    )
    balance_rate: float = knob(
        0.001,
        "step of the load-balancing bias, which takes no part in the gates",
        lo=0.0,
        hi=0.1,
        off=0.0,
        unit="1/step",
        training_only=True,
        analogue="homeostatic scaling",
    )
    router_contrastive_push: float = knob(
        0.1,
        "how fast identities of experts that are not chosen together move apart",
        lo=0.0,
        hi=10.0,
        off=0.0,
        training_only=True,
        analogue="lateral inhibition",
    )
    router_contrastive_pull: float = knob(
        0.1,
        "how fast identities of experts that are chosen together approach",
        lo=0.0,
        hi=10.0,
        off=0.0,
        training_only=True,
        analogue="co-activation",
    )
    # --- the life cycle
    split_health_min: float = knob(
        0.8, "health from which an expert splits; twice the fair demand reaches 1", lo=0.5, hi=1.0, training_only=True, analogue="mitosis"
    )
    death_health_max: float = knob(
        0.15,
        "health below which an expert dies; fair demand has one half",
        lo=0.0,
        hi=0.5,
        off=0.0,
        training_only=True,
        analogue="apoptosis",
    )
    merge_health_max: float = knob(
        0.45, "health below which an expert may merge", lo=0.0, hi=1.0, off=0.0, training_only=True, analogue="absorption"
    )
    merge_similarity: float = knob(
        0.6, "cosine of two identities from which their experts may merge", lo=-1.0, hi=1.0, training_only=True, analogue="absorption"
    )
    mutation_strength: float = knob(
        0.1, "size of the random change of a child's identity and genome", lo=0.0, hi=2.0, off=0.0, training_only=True, analogue="mutation"
    )
    expert_youth: int = knob(
        200,
        "steps before an expert can die, merge or split, and over which twins come apart",
        lo=1,
        hi=1 << 20,
        unit="steps",
        training_only=True,
        analogue="maturation",
    )
    twin_overlap: float = knob(
        0.01, "share of tokens that both twins would take below which they become two", lo=0.0, hi=1.0, training_only=True
    )
    sm_use_neuroscore: bool = knob(
        False, "contribution to the loss joins the health that the life cycle decides by", off=False, training_only=True
    )
