"""The mechanisms of routed experts, as records for the registry, and the fields that act between training steps."""

from __future__ import annotations

from typing import Any

# Fields of the life cycle, which `--splitmerge_every` switches.
LIFE_CYCLE = (
    *("split_health_min", "death_health_max", "merge_health_max", "merge_similarity"),
    *("mutation_strength", "expert_youth", "twin_overlap", "sm_use_neuroscore"),
)
# Fields that act on what happens to experts between training steps, and on nothing within one.
BETWEEN_STEPS = (
    *LIFE_CYCLE,
    *("bank_gain", "bank_rate", "bank_decay", "balance_rate", "router_contrastive_push", "router_contrastive_pull"),
)

EXPERT_MECHANISMS: tuple[dict[str, Any], ...] = (
    {
        "name": "router_identity",
        "doc": "experts have an identity: its cosine with a token's probe joins the router's score",
        "on": {"router_identity": True},
        "off": {"router_identity": False},
        "source": "router embeddings of the background; cosine routing (Chi et al. 2022)",
        "knobs": ("identity_dim", "identity_gain"),
    },
    {
        "name": "expert_plasticity",
        "doc": "experts facilitate and tire within a sequence, each by the kinetics that its genome decodes to",
        "on": {"expert_plasticity": True},
        "off": {"expert_plasticity": False},
        "source": "presynaptic routing of the background, by the equations of a terminal",
        "knobs": ("expert_gain", "expert_depression"),
    },
    {
        "name": "snare_codes",
        "doc": "cargo codes of tokens and t-SNARE codes of experts: their cosine joins the score",
        "on": {"snare_codes": True},
        "off": {"snare_codes": False},
        "source": "Rab and SNARE routing of the background",
        "knobs": ("snare_dim",),
    },
    {
        "name": "expert_lateral",
        "doc": "an expert is inhibited by the demand for its neighbours in identity space",
        "on": {"expert_lateral": 0.5},
        "off": {"expert_lateral": 0.0},
        "source": "septin-style lateral inhibition of the background",
        "needs": ("router_identity",),
    },
    {
        "name": "vesicle_output",
        "doc": "an expert's output is scaled by its release over that of a rested one",
        "on": {"vesicle_output": True},
        "off": {"vesicle_output": False},
        "source": "dispatch of the background: released over expected vesicles",
        "needs": ("expert_plasticity",),
    },
    {
        "name": "nmda",
        "doc": "a slow weight per sequence and expert, which counts where the token itself asks for the expert",
        "on": {"nmda": True},
        "off": {"nmda": False},
        "source": "slow modulation of the background; the coincidence of an NMDA receptor",
        "knobs": ("tau_nmda", "nmda_gain"),
    },
    {
        "name": "bank",
        "doc": "a bank account per expert: steps tax it, demand pays, and wealth attracts tokens",
        "on": {"bank_gain": 0.2},
        "off": {"bank_gain": 0.0},
        "source": "metabolism of the background, as one leaky account",
        "knobs": ("bank_rate", "bank_decay"),
    },
    {
        "name": "balance",
        "doc": "a bias per expert evens loads; it takes no part in the gates and adds no loss",
        "on": {"balance_rate": 0.001},
        "off": {"balance_rate": 0.0},
        "source": "auxiliary-loss-free balancing (Wang et al. 2024)",
    },
    {
        "name": "contrast_push",
        "doc": "identities of experts that are not chosen together move apart",
        "on": {"router_contrastive_push": 0.1},
        "off": {"router_contrastive_push": 0.0},
        "source": "contrastive router update of the background",
        "needs": ("router_identity",),
    },
    {
        "name": "contrast_pull",
        "doc": "identities of experts that are chosen together approach each other",
        "on": {"router_contrastive_pull": 0.1},
        "off": {"router_contrastive_pull": 0.0},
        "source": "contrastive router update of the background",
        "needs": ("router_identity",),
    },
)
