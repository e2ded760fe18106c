"""Synaptic layers and the state of the sequences that run through them."""

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.synaptic.attention import SynapticCausalSelfAttention
from bio_inspired_nanochat.synaptic.layers import MLP, CausalSelfAttention, Linear, rms_norm, rotary
from bio_inspired_nanochat.synaptic.presynaptic import GAINS, Presynaptic
from bio_inspired_nanochat.synaptic.state import Chunk, LayerState, SynapseState, same_layout

__all__ = [
    "GAINS",
    "MLP",
    "CausalSelfAttention",
    "Chunk",
    "LayerState",
    "Linear",
    "Presynaptic",
    "SynapseState",
    "SynapticCausalSelfAttention",
    "SynapticConfig",
    "rms_norm",
    "rotary",
    "same_layout",
]
