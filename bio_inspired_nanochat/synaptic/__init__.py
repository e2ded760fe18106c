"""Synaptic layers and the state of the sequences that run through them."""

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.synaptic.attention import SynapticCausalSelfAttention
from bio_inspired_nanochat.synaptic.execution import describe_execution
from bio_inspired_nanochat.synaptic.layers import MLP, CausalSelfAttention, Linear, rms_norm, rotary
from bio_inspired_nanochat.synaptic.presynaptic import GAINS, Presynaptic
from bio_inspired_nanochat.synaptic.state import Chunk, Extras, LayerState, SynapseState, same_layout
from bio_inspired_nanochat.synaptic.telemetry import LayerTelemetry, auxiliary_loss, summarise

__all__ = [
    "GAINS",
    "MLP",
    "CausalSelfAttention",
    "Chunk",
    "Extras",
    "LayerState",
    "LayerTelemetry",
    "Linear",
    "Presynaptic",
    "SynapseState",
    "SynapticCausalSelfAttention",
    "SynapticConfig",
    "auxiliary_loss",
    "describe_execution",
    "rms_norm",
    "rotary",
    "same_layout",
    "summarise",
]
