"""Synaptic layers and the state of the sequences that run through them."""

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.synaptic.accounts import Accounts
from bio_inspired_nanochat.synaptic.attention import SynapticCausalSelfAttention
from bio_inspired_nanochat.synaptic.block import GATE_CHANNELS, LEAST_SHARE, Block, Embedding, stream_scales
from bio_inspired_nanochat.synaptic.consolidation import Consolidation, consolidate, rollback, sleep
from bio_inspired_nanochat.synaptic.engram import Engram
from bio_inspired_nanochat.synaptic.execution import describe_execution
from bio_inspired_nanochat.synaptic.expert_synapse import ExpertSynapse
from bio_inspired_nanochat.synaptic.glue import rms_norm
from bio_inspired_nanochat.synaptic.layers import CausalSelfAttention, rotary
from bio_inspired_nanochat.synaptic.linear import Linear
from bio_inspired_nanochat.synaptic.mlp import MLP, SynapticMLP
from bio_inspired_nanochat.synaptic.moe import Probe, Routing, SynapticMoE
from bio_inspired_nanochat.synaptic.postsynaptic import Density, SynapticLinear
from bio_inspired_nanochat.synaptic.presynaptic import GAINS, Presynaptic
from bio_inspired_nanochat.synaptic.roles import active_size, flops_per_token, param_roles
from bio_inspired_nanochat.synaptic.state import Chunk, Extras, LayerState, Place, SynapseState
from bio_inspired_nanochat.synaptic.telemetry import LayerTelemetry, auxiliary_loss, summarise, vitals

__all__ = [
    "GAINS",
    "GATE_CHANNELS",
    "LEAST_SHARE",
    "MLP",
    "Accounts",
    "Block",
    "CausalSelfAttention",
    "Chunk",
    "Consolidation",
    "Density",
    "Embedding",
    "Engram",
    "ExpertSynapse",
    "Extras",
    "LayerState",
    "LayerTelemetry",
    "Linear",
    "Place",
    "Presynaptic",
    "Probe",
    "Routing",
    "SynapseState",
    "SynapticCausalSelfAttention",
    "SynapticConfig",
    "SynapticLinear",
    "SynapticMLP",
    "SynapticMoE",
    "active_size",
    "auxiliary_loss",
    "consolidate",
    "describe_execution",
    "flops_per_token",
    "param_roles",
    "rms_norm",
    "rollback",
    "rotary",
    "sleep",
    "stream_scales",
    "summarise",
    "vitals",
]
