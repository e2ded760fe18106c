"""GPTConfig: the shape of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bio_inspired_nanochat.config.knobs import knob, validate
from bio_inspired_nanochat.config.synaptic import SynapticConfig
from bio_inspired_nanochat.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """One model, vanilla (`synapses=False`) or synaptic. `GPTConfig.from_depth` derives the sizes from the one dial."""

    sequence_len: int = knob(1024, "context length in training", lo=1, hi=1 << 20, unit="tokens")
    vocab_size: int = knob(4096, "number of token ids, special tokens included", lo=2, hi=1 << 20)
    n_layer: int = knob(4, "transformer blocks", lo=1, hi=256)
    n_head: int = knob(4, "query heads", lo=1, hi=1024)
    n_kv_head: int = knob(4, "key and value heads; fewer than n_head share keys (GQA)", lo=1, hi=1024)
    n_embd: int = knob(256, "width of the residual stream", lo=8, hi=65536)
    window_pattern: str = knob(
        "L", "attention window per layer, repeated: L sees everything, S a quarter of sequence_len; the last layer is always L"
    )
    value_embeds: bool = knob(True, "gated value embeddings on alternate layers", off=False)
    doc_mask: bool = knob(False, "a BOS token starts a document: attention and synapses do not look across it", off=False)
    bos_token_id: int = knob(0, "id of the token that starts a document, used with doc_mask", lo=0, hi=1 << 20)
    backend: str = knob(
        "auto",
        "execution of the attention operators: auto picks by device: on CUDA fused, a whole layer in one operator, where it can",
        choices=("auto", "reference", "sdpa", "triton", "fused", "rust"),
    )
    init: str = knob(
        "standard",
        "initial q, k, v and mlp input matrices: standard draws uniform values, rule30 and rule116 read a cellular automaton",
        choices=("standard", "rule30", "rule116"),
        off="standard",
    )
    mlp_ratio: int = knob(4, "hidden units of an MLP, as a multiple of n_embd", lo=1, hi=64)
    num_experts: int = knob(0, "experts of every MLP at birth, beside the shared one; 0 has none", lo=0, hi=4096, off=0)
    moe_top_k: int = knob(2, "experts that a token visits beside the shared one", lo=1, hi=64)
    expert_slots: int = knob(0, "places for experts, living and dead; 0 is num_experts", lo=0, hi=8192)
    expert_ratio: int = knob(2, "hidden units of an expert, as a multiple of n_embd (the shared one has mlp_ratio)", lo=1, hi=64)
    dropout: float = knob(
        0.0,
        "share of what attention and MLP add to the residual stream that is zeroed in training",
        lo=0.0,
        hi=0.9,
        off=0.0,
        source="dropout (Srivastava et al. 2014), as a baseline without biology",
        training_only=True,
    )
    synapses: bool = knob(False, "replace every attention layer by a synaptic one", off=False)
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: choose a width of n_head times the head size")
        if (self.n_embd // self.n_head) % 2:
            raise UserError(f"head size {self.n_embd // self.n_head} is odd: rotary embeddings need an even one")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if not self.window_pattern or set(self.window_pattern.upper()) - {"S", "L"}:
            raise UserError(
                f"window_pattern={self.window_pattern!r} is not valid: letters S (quarter context) and L (full), for example SSSL"
            )
        if self.doc_mask and self.bos_token_id >= self.vocab_size:
            raise UserError(f"bos_token_id={self.bos_token_id} is outside the vocabulary of {self.vocab_size}")

        if self.num_experts:
            slots = self.expert_slots or self.num_experts
            if slots < self.num_experts:
                raise UserError(f"expert_slots={slots} is less than num_experts={self.num_experts}: give at least as many, or 0")
            if self.moe_top_k >= self.num_experts:
                raise UserError(f"moe_top_k={self.moe_top_k} is not below num_experts={self.num_experts}: choose fewer or add experts")

    @property
    def slots(self) -> int:
        """Places for experts in every layer, living and dead."""
        return self.expert_slots or self.num_experts

    @property
    def tick(self) -> int | None:
        """Tokens per tick of the synapses; None without any."""
        return self.syn_cfg.tick if self.synapses else None

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.n_embd // self.n_head

    def window(self, layer: int) -> int | None:
        """Attention window W of a layer (query t sees keys with t - j < W), or None for the full context."""
        letter = self.window_pattern.upper()[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return None
        return max(1, self.sequence_len // 4)


def sizes_from_depth(depth: int, head_dim: int | None = None, n_embd: int | None = None) -> dict[str, int]:
    """The one dial: width = 64 * depth rounded up to the head size (64 below depth 16, then 128).

    Returns n_layer, n_embd, n_head and n_kv_head for GPTConfig. `n_embd` overrides the width and is rounded up as well.
    """
    if head_dim is None:
        head_dim = 64 if depth < 16 else 128
    width = n_embd if n_embd is not None else 64 * depth
    n_head = max(1, math.ceil(width / head_dim))
    return {"n_layer": depth, "n_embd": n_head * head_dim, "n_head": n_head, "n_kv_head": n_head}
