"""Bio-Inspired Nanochat: a minimal GPT whose attention layers are synapses.

The public Python interface is `bio_inspired_nanochat.gpt` (GPT, GPTConfig) and
`bio_inspired_nanochat.synaptic` (SynapticConfig and the synaptic modules).
"""

__version__ = "0.1.0"
